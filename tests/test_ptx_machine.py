"""The machine's own rules, on programs of a few lines: opcodes and divergence."""

import math
import struct

import pytest
import torch
from ptx_machine import build
from ptx_machine.launch import Grid, Memory, pack, run
from ptx_machine.parse import PtxSyntaxError
from ptx_programs import launch, program, store_lane

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

# --- Opcodes --------------------------------------------------------------------------------------

NUMBERS = [0, 1, 7, -1, -7, 2**31 - 1, -(2**31), 0x12345678]


def binary(opcode: str, a: int, b: int) -> int:
    out = torch.zeros(32, dtype=torch.int32)
    launch(f"{opcode} %r5, {a}, {b};" + store_lane("%r5", "b32", 4), out).check()
    assert (out == out[0]).all()
    return int(out[0])


def wrapped(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("add.s32", lambda a, b: a + b),
        ("sub.s32", lambda a, b: a - b),
        ("mul.lo.s32", lambda a, b: a * b),
        ("mul.hi.s32", lambda a, b: a * b >> 32),
        ("mul.hi.u32", lambda a, b: (a % 2**32) * (b % 2**32) >> 32),
        ("min.s32", min),
        ("max.u32", lambda a, b: max(a % 2**32, b % 2**32)),
        ("and.b32", lambda a, b: a & b),
        ("xor.b32", lambda a, b: a ^ b),
        ("shl.b32", lambda a, b: a << (b % 2**32) if b % 2**32 < 32 else 0),
        ("shr.s32", lambda a, b: a >> min(b % 2**32, 31)),
        ("shr.u32", lambda a, b: (a % 2**32) >> min(b % 2**32, 32)),
        ("div.s32", lambda a, b: math.trunc(a / b) if b else -1),
        ("rem.u32", lambda a, b: (a % 2**32) % (b % 2**32) if b else a),
    ],
)
def test_integers(opcode: str, expected: object) -> None:
    for a in NUMBERS:
        for b in NUMBERS:
            assert binary(opcode, a, b) == wrapped(expected(a, b)), (a, b)  # type: ignore[operator]


def bits(value: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


# Of 256 and 1, and of 1 and 3, as bf16.
PAIRED = "mov.b32 %r1, 0x43803F80; mov.b32 %r2, 0x3F804040; {}; mov.b32 {{%{}}}, %r3;"
# Of products 261/256 and 259/256, half way between two bf16.
FUSED = "mov.b16 %h3, {}; fma.rn.bf16 %h0, %h1, %h2, %h3;"


@pytest.mark.parametrize(
    ("code", "kind", "expected"),
    [
        (f"fma.rn.f32 %f0, {bits(1.5)}, {bits(-2.0)}, {bits(0.25)};", "f32", -2.75),
        (f"cvt.rn.bf16.f32 %h0, {bits(1.00390625)};", "bf16", 1.0),  # a tie goes to even
        (f"cvt.rn.bf16.f32 %h0, {bits(1.01171875)};", "bf16", 1.015625),
        (f"cvt.rn.f16.f32 %h0, {bits(65520.0)};", "f16", math.inf),
        (f"cvt.rn.f16.f32 %h0, {bits(2.0**-25)};", "f16", 0.0),
        (f"cvt.rna.tf32.f32 %f0, {bits(1 + 2**-11)};", "f32", 1 + 2**-10),
        (f"min.f32 %f0, {bits(math.nan)}, {bits(3.0)};", "f32", 3.0),
        ("mov.f32 %f0, %f63;", "f32", math.nan),  # nobody has written it
        # Where the sum is a tie it goes to even, where a bit far below says otherwise it does not.
        ("mov.b16 %h1, 0x4380; mov.b16 %h2, 0x3F80; add.bf16 %h0, %h1, %h2;", "bf16", 256.0),
        ("mov.b16 %h1, 0x6800; mov.b16 %h2, 0x4200; add.f16 %h0, %h1, %h2;", "f16", 2052.0),
        (PAIRED.format("add.bf16x2 %r3, %r1, %r2", "h0, %h1"), "bf16", 4.0),
        (PAIRED.format("add.bf16x2 %r3, %r1, %r2", "h1, %h0"), "bf16", 256.0),
        (PAIRED.format("add.f16x2 %r3, %r1, %r1", "h1, %h0"), "f16", 7.5),
        (PAIRED.format("fma.rn.bf16x2 %r3, %r2, %r2, %r1", "h0, %h1"), "bf16", 10.0),
        (PAIRED.format("fma.rn.bf16x2 %r3, %r2, %r2, %r1", "h1, %h0"), "bf16", 256.0),
        ("mov.b16 %h1, 0x4110; mov.b16 %h2, 0x3DE8;" + FUSED.format("0"), "bf16", 1.015625),
        ("mov.b16 %h1, 0x4110; mov.b16 %h2, 0x3DE8;" + FUSED.format("0x0080"), "bf16", 1.0234375),
        ("mov.b16 %h1, 0x40E0; mov.b16 %h2, 0x3E14;" + FUSED.format("0x8080"), "bf16", 1.0078125),
    ],
)
def test_floats(code: str, kind: str, expected: float) -> None:
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[kind]
    out = torch.zeros(32, dtype=dtype)
    register, width = ("%f0", "b32") if kind == "f32" else ("%h0", "b16")
    launch(code + store_lane(register, width, out.element_size()), out).check()
    assert torch.equal(out.float().nan_to_num(-9), torch.full((32,), expected).nan_to_num(-9))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("bfe.u32 %r5, 0x12345678, 8, 12;", 0x456),
        ("bfe.s32 %r5, 0x00000F00, 8, 4;", -1),
        ("bfi.b32 %r5, 0xAB, 0x11111111, 8, 8;", 0x1111AB11),
        ("prmt.b32 %r5, 0x33221100, 0x77665544, 0x7531;", 0x77553311),
        ("lop3.b32 %r5, 0xFF00FF00, 0x0F0F0F0F, 0x33333333, 0x96;", 0xC33CC33C),
        ("shf.l.wrap.b32 %r5, 0x80000000, 1, 1;", 3),
        ("popc.b32 %r5, 0xF0F0;", 8),
        ("clz.b32 %r5, 0x00010000;", 15),
        ("setp.lt.and.u32 %p0, 1, 2, %p1; selp.b32 %r5, 1, 0, %p0;", None),
        ("mov.b32 %r5, {1, 2};", 0x20001),
        ("cvt.s32.s8 %r5, 200;", -56),
        ("shfl.sync.bfly.b32 %r5, 7, 1, 31, -1;", 7),
        ("elect.sync %r5|%p1, -1;", 0),
        (
            "mov.b64 %d3, window; cvta.shared.u64 %d4, %d3; cvta.to.shared::cluster.u64 %d5, %d4;"
            "cvt.u32.u64 %r5, %d5;",
            1024,
        ),
    ],
)
def test_bits_and_lanes(code: str, expected: int | None) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    launch(code + store_lane("%r5", "b32", 4), out).check()
    if expected is not None:
        assert int(out[3]) == wrapped(expected)


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("frobnicate.b32 %r0, %r1;", "unknown opcode frobnicate.b32"),
        ("add.sat.s32 %r0, %r1, %r2;", "unknown opcode add.sat.s32"),
        ("ld.global.mystery.b32 %r0, [%d0];", "unknown modifier .mystery"),
        ("add.s32 %r0, %d1, %r2;", "register of another size"),
        ("ld.global.v2.b32 %r0, [%d0];", "another length"),
    ],
)
def test_what_is_not_known_is_named(statement: str, named: str) -> None:
    with pytest.raises(RuntimeError, match=named.replace(".", r"\.")):
        launch(statement, torch.zeros(1))


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(PtxSyntaxError, match=r"line 10.*whatever"):
        program("mov.u32 %r0, whatever;")


# --- Divergence -----------------------------------------------------------------------------------

LOOP = """
    mov.u32 %r0, %laneid;
    mov.u32 %r1, 0;
    mov.u32 %r2, %r0;
again:
    setp.eq.u32 %p0, %r2, 0;
    @%p0 bra done;
    add.s32 %r1, %r1, %r2;
    sub.s32 %r2, %r2, 1;
    bra again;
done:
    bar.warp.sync -1;
"""


def test_lanes_part_and_meet_again() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    run = launch(LOOP + store_lane("%r1", "b32", 4), out).check()
    assert out.tolist() == [n * (n + 1) // 2 for n in range(32)]
    assert run.by_opcode()["bar.warp.sync"] == 1


@pytest.mark.parametrize("meet", ["bar.warp.sync -1;", ""])
def test_lanes_keep_together_only_where_they_must(meet: str) -> None:
    """Each lane reads another's word and writes its own: without a meeting some come too late."""
    body = f"""
    mov.u32 %r1, %laneid; shl.b32 %r2, %r1, 2; add.s32 %r2, %r2, 1024; xor.b32 %r3, %r2, 4;
    st.shared.b32 [%r2], 7;
    bar.warp.sync -1;
    ld.shared.b32 %r5, [%r3];
    {meet}
    st.shared.b32 [%r2], 9;
    """
    seen = set()
    for seed in range(200):
        out = torch.zeros(32, dtype=torch.int32)
        launch(body + store_lane("%r5", "b32", 4), out, seed=seed).check()
        seen.update(out.tolist())
    assert seen == ({7} if meet else {7, 9})


def test_a_program_with_statements_doubled_still_branches_where_it_did() -> None:
    body = """
    mov.u32 %r5, 0;
    again:
    add.s32 %r5, %r5, 1;
    setp.lt.s32 %p1, %r5, 7;
    @%p1 bra again;
    """
    kernel = program(body + store_lane("%r5", "b32", 4))
    adds = {i for i, s in enumerate(kernel.statements) if s.opcode == "add.s32"}
    out = torch.zeros(32, dtype=torch.int32)
    memory = Memory()
    parameters = pack(kernel, [memory.add(out, writable=True)])
    run(kernel.doubled(adds), parameters, memory, Grid(1, shared_bytes=64)).check()
    assert (out == 8).all()  # in twos


@pytest.mark.parametrize(
    ("behind", "order", "target"),
    [
        ({1: 2}, [0, 2, 1, 3, 4], 1),
        ({0: 2, 1: 2}, [2, 0, 1, 3, 4], 0),
        ({2: 4}, [0, 1, 3, 4, 2], 1),
        ({2: 0, 3: 0}, [0, 2, 3, 1, 4], 3),
    ],
)
def test_a_branch_goes_on_to_where_a_statement_was_that_now_comes_behind_another(
    behind: dict[int, int], order: list[int], target: int
) -> None:
    kernel = program("abs.s32 %r5, 1; again: not.b32 %r6, 2; neg.s32 %r5, %r5; bra again;")
    moved = kernel.moved(behind)
    opcodes = [statement.opcode for statement in kernel.statements]
    assert [statement.opcode for statement in moved.statements] == [opcodes[i] for i in order]
    (branch,) = (statement for statement in moved.statements if statement.opcode == "bra")
    assert branch.operands[0][0][0][:2] == ("l", target)


def test_lanes_that_never_meet_are_reported() -> None:
    body = """
    mov.u32 %r0, %laneid;
    setp.lt.u32 %p0, %r0, 4;
    @%p0 bra few;
    bar.sync 0;
    bra end;
few:
    bar.sync 1;
end:
"""
    assert "never come together" in launch(body).failure
