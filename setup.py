"""The optional extension grpo_kernels._C; all else is in pyproject.toml. Building needs no torch.

GRPO_KERNELS_BUILD = auto (build what there are compilers for; a failure is a warning), cpu (the C++ kernels, or an
error), cuda (those and the CUDA kernels, or an error), none (pure Python). GRPO_KERNELS_ARCHITECTURES, as in "sm_90a":
CUDA code for those only, which takes less time.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
NVCC = os.environ.get("NVCC") or "nvcc"  # it finds its own headers and libraries; it may be a wrapper script
# For each GPU generation its own code, as far as this nvcc knows it, and PTX for those to come.
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
PTX = "compute_80"
CUDA_FLAGS = [
    *(
        "-std=c++17",
        "-O3",
        "-lineinfo",
        "--expt-relaxed-constexpr",
        "-ftz=true",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
    ),
    *("-Xfatbin=-compress-all", "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror"),  # a spill is an error
]
CUDA_MEND = "nvcc on the PATH, or named in NVCC (CUDA 12.0 or later), with a g++ that it takes"
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
        """With the CUDA kernels where they are asked for or can be had, else without."""
        if MODE == "cuda" or (MODE == "auto" and shutil.which(NVCC)):
            try:
                return self._build(ext, with_cuda=True)
            except (subprocess.CalledProcessError, OSError) as error:
                said = getattr(error, "stderr", None) or error
                text = f"the CUDA kernels were not built: {said}\nThey need {CUDA_MEND}."
                if MODE == "cuda":
                    raise CompileError(text) from error
                print(f"warning: {text} The rest is built without them.", file=sys.stderr)
        return self._build(ext, with_cuda=False)

    def _build(self, ext: Extension, with_cuda: bool) -> None:
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

        architectures = _architectures() if with_cuda else []
        of_cuda = [f'-DGRPO_CUDA="{_nvcc_version()}, {" ".join(architectures)}"'] if with_cuda else []
        with ThreadPoolExecutor() as pool:
            made = [
                pool.submit(compiled, CSRC / "bindings.cpp", f'-DGRPO_BUILD_FLAGS="{" ".join(FLAGS)}"', *of_cuda),
                *(
                    pool.submit(compiled, CSRC / "cpu" / "rows.cpp", f"-DGRPO_ISA={name}", *set_flags, folder=name)
                    for name, set_flags in INSTRUCTION_SETS.items()
                ),
            ]
            if with_cuda:
                made += [
                    pool.submit(self._cuda_object, source, architectures)
                    for source in sorted((CSRC / "cuda").glob("*.cu"))
                ]
        objects = [name for one in made for name in one.result()]  # raises what one of them raised
        target = self.get_ext_fullpath(ext.name)
        if with_cuda:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            _run(NVCC, "-shared", "-cudart=static", "-Xcompiler=-pthread", *objects, "-o", target)
            return
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")

    def _cuda_object(self, source: Path, architectures: list[str]) -> list[str]:
        codes = [f"-gencode=arch={re.sub('^sm', 'compute', name)},code={name}" for name in architectures]
        made = Path(self.build_temp, "cuda", f"{source.stem}.o")
        made.parent.mkdir(parents=True, exist_ok=True)
        _run(NVCC, "--threads=0", *CUDA_FLAGS, *codes, "-c", str(source), "-o", str(made))
        return [str(made)]


def _nvcc_version() -> str:
    version = re.search(r"V([\d.]+)", _run(NVCC, "--version"))
    return f"nvcc {version[1] if version else 'of an unknown version'}"


def _architectures() -> list[str]:
    named = (os.environ.get("GRPO_KERNELS_ARCHITECTURES") or "").split()
    if named:
        return named
    known = _run(NVCC, "--list-gpu-code").split()
    return [*(name for name in ARCHITECTURES if name.rstrip("a") in known), PTX]  # sm_90a is not listed


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def extensions() -> list[Extension]:
    if MODE not in ("auto", "cpu", "cuda", "none"):
        raise ValueError(f"GRPO_KERNELS_BUILD must be auto, cpu, cuda or none, got {MODE!r}")
    if MODE == "none":
        return []
    sources = sorted(str(path) for path in CSRC.rglob("*.cpp"))
    headers = sorted(str(path) for pattern in ("*.h", "*.cuh", "*.cu") for path in CSRC.rglob(pattern))
    return [Extension("grpo_kernels._C", sources, depends=headers, language="c++", optional=MODE == "auto")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
