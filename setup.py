"""The optional extension grpo_kernels._C; all else is in pyproject.toml. Building needs no torch.

GRPO_KERNELS_BUILD = auto (build what there are compilers for; a failure is a warning), cpu (the C++ kernels, or an
error), cuda (those and the CUDA kernels, or an error), none (pure Python).
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError

MODE = os.environ.get("GRPO_KERNELS_BUILD") or "auto"
CSRC = Path("csrc")
# No contraction: each instruction set fuses multiplications with additions where the source says so, nowhere else.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
if "-g" not in os.environ.get("CFLAGS", ""):
    FLAGS.append("-g0")  # Python's own flags ask for debug information, which is most of 7 MB
# The row kernels are compiled once for each instruction set and chosen at run time.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    # g++ 12 warns of its own AVX-512 headers.
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mprefer-vector-width=512", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ]
MEND = "a C++17 compiler (Debian: apt install g++; or set CXX) and Python's headers (python3-dev)"


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            self._compile_and_link(ext)
        except (CCompilerError, OSError) as error:  # OSError: the compiler cannot be started
            raise CompileError(
                f"grpo_kernels._C was not built: {error}\nIt needs {MEND}. Without it grpo_kernels works on other "
                "backends; GRPO_KERNELS_BUILD=none does not try. `python -m grpo_kernels doctor` shows what there is."
            ) from error

    def _compile_and_link(self, ext: Extension) -> None:
        import pybind11

        include_dirs = [*self.include_dirs, pybind11.get_include()]
        flags = [*FLAGS, "-pthread"]

        def compiled(source: Path, *more: str, folder: str = "") -> list[str]:
            return self.compiler.compile(
                [str(source)],
                output_dir=str(Path(self.build_temp, folder)),
                include_dirs=include_dirs,
                extra_postargs=[*flags, *more],
            )

        objects = compiled(CSRC / "bindings.cpp", f'-DGRPO_BUILD_FLAGS="{" ".join(FLAGS)}"')
        for name, set_flags in INSTRUCTION_SETS.items():
            objects += compiled(CSRC / "cpu" / "rows.cpp", f"-DGRPO_ISA={name}", *set_flags, folder=name)
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")


def extensions() -> list[Extension]:
    if MODE not in ("auto", "cpu", "cuda", "none"):
        raise ValueError(f"GRPO_KERNELS_BUILD must be auto, cpu, cuda or none, got {MODE!r}")
    if MODE == "none":
        return []
    if MODE == "cuda" and not (CSRC / "cuda").is_dir():
        raise ValueError("GRPO_KERNELS_BUILD=cuda: this version has no CUDA kernels (csrc/cuda); use auto or cpu")
    sources = sorted(str(path) for path in CSRC.rglob("*.cpp"))
    headers = sorted(str(path) for path in CSRC.rglob("*.h"))
    return [Extension("grpo_kernels._C", sources, depends=headers, language="c++", optional=MODE == "auto")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
