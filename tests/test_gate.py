"""kernels/machine_code.py and gate.py on machine code written by hand: each thing that must not be is found."""

from __future__ import annotations

import dataclasses

from grpo_kernels.kernels import gate, machine_code
from grpo_kernels.kernels.machine_code import Code, HotPath, Resources

LOOP = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x1000] ;
        /*0030*/                   FADD R12, R5, R0 ;
        /*0040*/                   LDG.E.128 R16, desc[UR4][R2.64+0x2000] ;
        /*0050*/                   MUFU.EX2 R12, R12 ;
        /*0060*/              @P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2) ;
"""

TILE = """
        /*0000*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*0010*/              @P1 BRA `(.L_x_1) ;
        /*0020*/              @P2 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/                   BRA.U UP0, `(.L_x_2) ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   FADD R4, R4, R0 ;
        /*0080*/                   FADD R4, R4, R0 ;
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_3:
        /*00a0*/                   EXIT ;
.L_x_1:
        /*00b0*/                   STG.E.128 desc[UR4][R2.64], RZ ;
        /*00c0*/                   EXIT ;
"""

AMD = """
.LBB0_1:
\tglobal_load_dwordx4 v[2:5], v[0:1], off
\tglobal_load_dwordx4 v[6:9], v[0:1], off offset:16
\ts_waitcnt vmcnt(1)
\tv_exp_f32_e32 v10, v3
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


def test_a_loop_is_found_and_counted() -> None:
    hot = machine_code.hot_path(Code.parsed(LOOP), is_loop=True)
    assert hot == HotPath(True, 6, 1, 3, 0, 2, 0, 0)
    assert hot.per_logit(hot.instructions, 2) == 6 / 24
    after = """
.L_x_3:
        /*0090*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*00a0*/                   MUFU.EX2 R4, R4 ;
        /*00b0*/                   MUFU.LG2 R4, R4 ;
        /*00c0*/              @P0 BRA `(.L_x_3) ;
"""
    assert machine_code.hot_path(Code.parsed(LOOP + after), is_loop=True) == hot, "not the pairs' loop"


def test_of_a_tile_the_shortest_way_that_reads_and_writes() -> None:
    hot = machine_code.hot_path(Code.parsed(TILE), is_loop=False)
    assert (hot.instructions, hot.wide_loads, hot.narrow_loads, hot.wide_stores) == (8, 1, 1, 1)


def test_amd_assembly() -> None:
    hot = machine_code.hot_path(Code.parsed(AMD, amd=True), is_loop=True)
    assert (hot.instructions, hot.special, hot.wide_loads, hot.in_flight) == (5, 1, 2, 2)


def report(**changes: object) -> gate.Report:
    """A forward in bfloat16 that passes, with changes."""
    hot = HotPath(True, 230, 33, 4, 0, 4, 0, 0)
    code = Code.parsed(LOOP)
    good = gate.Report.of("triton", "_logps_fwd_kernel", "bfloat16", ["V odd"], 90, 256, Resources(64, 0, 32), code)
    fine = dataclasses.replace(good, hot=hot, instructions_per_logit=7.2, special_per_logit=1.03)
    of_hot = {name: value for name, value in changes.items() if hasattr(hot, name)}
    rest = {name: value for name, value in changes.items() if name not in of_hot}
    return dataclasses.replace(fine, hot=dataclasses.replace(hot, **of_hot), **rest)  # type: ignore[arg-type]


def test_what_must_not_be_is_a_problem() -> None:
    assert gate.problems([report()]) == []
    for changes, problem in (
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"wide_loads": 3}, "reads logits by 3 loads of 16 bytes"),
        ({"narrow_loads": 1}, "1 narrower"),
        ({"in_flight": 2}, "2 loads in flight"),
        ({"blocks_per_multiprocessor": 3}, "fits 3 blocks"),
        ({"blocks_per_multiprocessor": 0}, "shared memory"),
        ({"instructions_per_logit": 7.6}, "7.6 instructions a logit, at most 7.5"),
        ({"barriers": 1}, "1 barriers"),
    ):
        assert problem in gate.problems([report(**changes)])[0]
    backward = report(kernel="_logps_bwd_kernel", is_loop=False, narrow_loads=5, blocks_per_multiprocessor=3)
    assert gate.problems([backward]) == []
    assert gate.problems([dataclasses.replace(backward, instructions_per_logit=14.1)])
    assert gate.problems([report(serves=[gate.STRIDED], wide_loads=0, narrow_loads=8, in_flight=0)]) == []


def test_blocks_of_a_multiprocessor() -> None:
    h200 = machine_code.DEVICES[90]
    blocks = machine_code.blocks_per_multiprocessor
    assert [blocks(Resources(registers, 0, 0), 256, h200) for registers in (64, 65, 80, 81, 32)] == [4, 3, 3, 2, 8]
    assert blocks(Resources(32, 0, 100_000), 256, h200) == 2


def test_the_model_is_bounded_by_its_three_resources() -> None:
    """Few instructions and many blocks: the memory. One block: its latency. Many instructions: the issue slots."""
    h200 = machine_code.DEVICES[90]
    light, heavy = HotPath(True, 100, 8, 4, 0, 4, 0, 0), HotPath(True, 4000, 8, 4, 0, 4, 0, 0)

    def fraction(step: HotPath, blocks: int, waits: int = 0) -> float:
        return machine_code.predicted_fraction(machine_code.Work(16, step, 256, False, 0, waits), blocks, h200)

    assert fraction(light, 8) > 0.97
    step_bytes, rate = 16 * 4 * 256, h200.bandwidth / h200.multiprocessors / h200.clock
    alone = step_bytes / rate / (step_bytes / rate + machine_code.LATENCY + 100 * 8 / 4)
    assert abs(fraction(light, 1) - alone) < 0.01
    assert abs(fraction(heavy, 8) - step_bytes / rate / (4000 * 8 / 4)) < 0.01
    assert fraction(light, 2, waits=5000) < fraction(light, 2) < fraction(light, 4)
