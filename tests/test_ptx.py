"""What Triton and nvcc make of the kernels, run and checked without a GPU by the interpreter of PTX in tests/ptx.

Longer runs, with more interleavings: `make ptx`.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ptx import arithmetic, machine, parser
from ptx.memory import Fault, Memory

# -- the interpreter itself, on kernels of a few lines -----------------------------------------------------------------

HEADER = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel(.param .u64 a, .param .u64 b)
{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<20>;
    .reg .b64 %rd<20>;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    ld.param.u64 %rd0, [a];
    ld.param.u64 %rd1, [b];
"""


def run(
    body: str, a: torch.Tensor, b: torch.Tensor | None = None, blocks: int = 1, threads: int = 32, seed: int = 0
) -> None:
    memory = Memory()
    b = torch.zeros(1, dtype=torch.int32) if b is None else b
    memory.add(a, "a")
    memory.add(b, "b")
    params = np.array([a.data_ptr(), b.data_ptr()], np.uint64).tobytes()
    program = machine.Program(parser.kernel(HEADER + body + "\n    ret;\n}", "kernel"))
    machine.launch(program, (blocks, 1, 1), threads, params, 512, memory, seed)


STORE = "mul.wide.u32 %rd2, %r0, 4; add.s64 %rd2, %rd0, %rd2; st.global.b32 [%rd2], %r2;"


def test_lanes_part_and_meet_again() -> None:
    body = f"""
        mov.b32 %r2, 7;
        setp.lt.u32 %p1, %r0, 5;
        @%p1 bra SMALL;
        mov.b32 %r2, 9;
        bra.uni MEET;
    SMALL:
        mov.b32 %r2, 1;
        setp.eq.u32 %p2, %r0, 3;
        @%p2 ret;
    MEET:
        shfl.sync.bfly.b32 %r2, %r2, 16, 31, -1;
        {STORE}
    """
    out = torch.full((32,), -1, dtype=torch.int32)
    with pytest.raises(Fault, match="divergence"):
        run(body, out)  # lane 19 asks lane 3, which is gone
    run(body.replace("@%p2 ret;", ""), out)
    assert out.tolist() == [9] * 16 + [1] * 5 + [9] * 11


def test_an_unknown_instruction_is_named_with_its_line() -> None:
    with pytest.raises(parser.Unsupported, match=r"unknown instruction at line 16 of the PTX: wgmma\.fence"):
        run("wgmma.fence.sync.aligned;", torch.zeros(1))
    with pytest.raises(parser.Unsupported, match=r"unknown modifiers.*add\.cc\.u32"):
        run("add.cc.u32 %r2, %r0, %r1;", torch.zeros(1))


def test_divergent_barriers_are_a_deadlock() -> None:
    with pytest.raises(Fault, match="deadlock"):
        run("setp.lt.u32 %p1, %r0, 5; @%p1 bar.sync 0; bar.sync 1;", torch.zeros(1))


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("ld.global.v2.b32 {%r2, %r3}, [%rd0+4];", "misaligned"),
        ("ld.global.b32 %r2, [%rd0+128];", "out of bounds"),
        ("ld.global.b32 %r2, [%rd0+-4];", "out of bounds"),
        ("ld.shared.b32 %r2, [dynamic];", "uninitialised"),
        ("st.shared.b32 [dynamic+512], %r2;", "out of bounds"),
        ("st.global.b32 [%rd0], %r0;", "race"),  # different values
        ("ld.global.b32 %r2, [%rd0]; setp.eq.u32 %p1, %r0, 9; @%p1 st.global.b32 [%rd0], %r0;", "race"),
    ],
)
def test_wrong_accesses(body: str, kind: str) -> None:
    with pytest.raises(Fault, match=kind) as caught:
        run(body, torch.zeros(32, dtype=torch.int32))
    assert caught.value.kind == kind


EXCHANGE = """
    mul.wide.u32 %rd2, %r0, 4;
    cvt.u32.u64 %r5, %rd2;
    add.u32 %r6, %r5, dynamic;
    st.shared.b32 [%r6], %r0;
    bar.sync 0;
    sub.u32 %r7, 63, %r0;
    shl.b32 %r7, %r7, 2;
    add.u32 %r7, %r7, dynamic;
    ld.shared.b32 %r2, [%r7];
    BEHIND
    st.shared.b32 [%r6], %r2;
    add.s64 %rd2, %rd0, %rd2;
    st.global.b32 [%rd2], %r2;
"""


def test_barriers_order_shared_memory() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    run(EXCHANGE.replace("BEHIND", "bar.sync 0;"), out, threads=64)
    assert out.tolist() == list(range(63, -1, -1))
    for seed in range(3):
        with pytest.raises(Fault, match="race"):
            run(EXCHANGE.replace("BEHIND", ""), out, threads=64, seed=seed)
        with pytest.raises(Fault, match=r"race|uninitialised"):
            run(EXCHANGE.replace("bar.sync 0;", "", 1).replace("BEHIND", "bar.sync 0;"), out, threads=64, seed=seed)


# Each block writes its number, then takes a ticket; the last one reads what all wrote.
TICKET = """
    setp.ne.u32 %p1, %r0, 0;
    @%p1 ret;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd2, %rd0, %rd2;
    st.global.b32 [%rd2], %r1;
    RELEASE
    atom.SEMANTICS.global.add.u32 %r2, [%rd1], 1;
    ACQUIRE
    setp.ne.u32 %p2, %r2, 3;
    @%p2 ret;
    ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd0];
    st.global.b32 [%rd0+16], %r6;
"""


@pytest.mark.parametrize(
    ("release", "semantics", "acquire", "sound"),
    [
        ("", "acq_rel.gpu", "", True),
        ("fence.acq_rel.gpu;", "relaxed.gpu", "fence.acq_rel.gpu;", True),
        ("membar.gl;", "relaxed.gpu", "membar.gl;", True),
        ("membar.gl;", "acquire.gpu", "", True),
        ("", "release.gpu", "membar.gl;", True),
        ("", "relaxed.gpu", "membar.gl;", False),
        ("membar.gl;", "relaxed.gpu", "", False),
        ("", "acquire.gpu", "", False),
        ("", "release.gpu", "", False),
        ("membar.cta;", "relaxed.gpu", "membar.gl;", False),
        ("", "acq_rel.cta", "", False),
    ],
)
def test_tickets_order_blocks(release: str, semantics: str, acquire: str, sound: bool) -> None:
    body = TICKET.replace("RELEASE", release).replace("SEMANTICS", semantics).replace("ACQUIRE", acquire)
    for seed in range(5):
        out = torch.zeros(8, dtype=torch.int32)
        launch = partial(run, body, out, torch.zeros(1, dtype=torch.int32), blocks=4, seed=seed)
        if sound:
            launch()
            assert out.tolist() == [0, 1, 2, 3, 3, 0, 0, 0]
        else:
            with pytest.raises(Fault, match="race"):
                launch()


def computed(opcode: str, *values: np.ndarray) -> np.ndarray:
    instruction = parser.Instruction(opcode, (), None, None, 0, opcode, "")
    operation = arithmetic.decoded(instruction)
    with np.errstate(all="ignore"):
        return operation.compute(*(x.astype(arithmetic.DTYPES[t]) for x, t in zip(values, operation.sources)))  # noqa: B905


def test_fused_multiply_add_rounds_once() -> None:
    a, b, c = np.random.default_rng(0).standard_normal((3, 500)) * np.array([[1.0], [1e8], [1e8]])
    c[:250] = -(a * b)[:250]  # only the rounding of the product is left
    exact = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(computed("fma.rn.f64", a, b, c), exact)
    down = computed("fma.rm.ftz.f32", *(np.array([x], np.float32) for x in (1 / 3, 1.0, 2.0**20)))
    assert down[0] <= float(np.float32(1 / 3)) + 2.0**20


def test_integers_and_conversions() -> None:
    minus = np.array([-7, 7, -8], np.int64)
    assert computed("div.s32", minus, np.array([2, -2, 3])).tolist() == [-3, -3, -2]
    assert computed("rem.s64", minus, np.array([2, -2, 3])).tolist() == [-1, 1, -2]
    assert computed("mul.hi.u64", *[np.array([2**63 + 1], np.uint64)] * 2).tolist() == [2**62 + 1]
    assert computed("shr.s32", np.array([-8]), np.array([40])).tolist() == [-1]
    assert computed("shl.b32", np.array([1]), np.array([32])).tolist() == [0]
    assert computed("prmt.b32", *map(np.array, ([0x33221100], [0x77665544], [0x7531]))).tolist() == [0x77553311]
    assert computed("cvt.rni.s32.f32", np.array([2.5, -3.5, np.nan, 1e20])).tolist() == [2, -4, 0, 2**31 - 1]
    numbers = torch.randn(1000) * 1e3
    expected = numbers.bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(computed("cvt.rn.bf16.f32", numbers.numpy()), expected)
    nan = np.array([np.nan, 1.0])
    assert computed("max.f32", nan, nan[::-1]).tolist() == [1, 1]
    assert np.isnan(computed("max.NaN.f32", nan, nan[::-1])).all()
    assert computed("setp.geu.f32", nan, np.ones(2)).tolist() == [True, True]


# -- the kernels -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def in_process() -> Iterator[Callable[..., Any]]:
    """Calls a function in one process beside this one, in which Triton compiles instead of interpreting."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(int).result()  # it is started now, with this environment
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(params=["triton", "cuda"])
def compiler(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        from ptx import cuda_kernels

        if cuda_kernels.missing():
            pytest.skip(cuda_kernels.missing())
    return request.param


# ptx.cases imports Triton's compiler: only its process may do that.
def _tokens(compiler: str, options: dict[str, Any], plant: tuple | None = None) -> None:
    from ptx import cases, faults

    cases.run_tokens(compiler, cases.Tokens(**options), plant and getattr(faults, plant[0])(*plant[1:]))


def _fused(compiler: str, options: dict[str, Any], plant: tuple | None = None) -> None:
    from ptx import cases, faults

    cases.run_fused(compiler, cases.Fused(**options), plant and getattr(faults, plant[0])(*plant[1:]))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16, "vocab": 2501, "splits": 3},
        {"dtype": torch.bfloat16, "vocab": 2504, "inplace": True},
        {"dtype": torch.bfloat16, "vocab": 127, "inplace": True},  # fewer vectors than threads
        {"dtype": torch.float32, "vocab": 1285, "stride": 1301, "inplace": True},
        {"dtype": torch.float64, "vocab": 133, "splits": 2},
        {"dtype": torch.bfloat16, "vocab": 777, "splits": 2, "far": "rows", "inplace": True},
        {"dtype": torch.float16, "vocab": 9, "far": "columns", "inplace": True},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_token_logps_and_gradient(compiler: str, options: dict[str, Any], in_process: Callable) -> None:
    in_process(_tokens, compiler, options)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16, "vocab": 777, "splits": 3, "packed": True},
        {"dtype": torch.float32, "vocab": 296, "splits": 2, "every_option": True},
    ],
    ids=["float64", "packed", "every option"],
)
def test_fused_loss_and_gradient(compiler: str, options: dict[str, Any], in_process: Callable) -> None:
    in_process(_fused, compiler, options)


PACKED = {"dtype": torch.bfloat16, "vocab": 777, "splits": 3, "packed": True}
FUSED = "group_robust_fwd"
RELAXED = ("replaced", FUSED, r"\.acq_rel\.(add\.u32)")
FAULTS_OF_FUSED = {
    "triton": {
        "barrier before the ticket": ("without_barriers_before", FUSED, r"atom\S*\.acq_rel"),
        "barrier before sums of groups": ("without", FUSED, "bar.sync", "sums are read"),
        "barrier of a reduction": ("without", FUSED, "bar.sync", "standard.py"),
        "relaxed ticket": (*RELAXED, r".relaxed.\1"),
        "ticket without release": (*RELAXED, r".acquire.\1"),
        "ticket without acquire": (*RELAXED, r".release.\1"),
        "ticket of a block": ("replaced", FUSED, r"\.gpu(\.acq_rel\.add\.u32)", r".cta\1"),
    },
    "cuda": {
        "barrier behind the ticket": ("without", FUSED, "bar.sync", "after the ticket is taken"),
        "barrier before sums of groups": ("without", FUSED, "bar.sync", "sums are read"),
        "barrier of a reduction": ("without", FUSED, "bar.sync", "results are read by all threads"),
        "fence before the ticket": ("without", FUSED, "membar", "come before the ticket"),
        "fence behind the ticket": ("without", FUSED, "membar", "are read after it"),
    },
}


@pytest.mark.parametrize(
    ("compiler", "fault"),
    [(one, name) for one, faults in FAULTS_OF_FUSED.items() for name in faults],
    indirect=["compiler"],
)
def test_planted_faults_of_order_are_found(compiler: str, fault: str, in_process: Callable) -> None:
    with pytest.raises(Fault, match=r"race|uninitialised"):
        in_process(_fused, compiler, PACKED, FAULTS_OF_FUSED[compiler][fault])


WIDE = r"(ld\.global\S*\.v4\.\w+\s+\{[^}]*\}, \[ ?%\w+)[^\]]*\]"


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (("one_tile_more", "logps_fwd"), "out of bounds"),
        (("replaced", "logps_fwd", WIDE, r"\1+4]"), "misaligned"),
        (("replaced", "logps_bwd", WIDE, r"\1+4]"), "misaligned"),
        (("replaced", "logps_bwd", WIDE, r"\1+16384]"), "out of bounds"),
        (("without", "logps_fwd", "st.shared", ""), "uninitialised"),
    ],
    ids=["one tile more", "unaligned load forward", "unaligned load backward", "far load", "no store"],
)
def test_planted_faults_of_memory_are_found(compiler: str, plant: tuple, kind: str, in_process: Callable) -> None:
    with pytest.raises(Fault, match=kind) as caught:
        in_process(_tokens, compiler, {"dtype": torch.bfloat16, "vocab": 2560}, plant)
    assert re.search(r"at line \d+ of the PTX, \w+\.\w+:\d+: ", str(caught.value)), "where in the source"
