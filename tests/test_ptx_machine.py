"""The machine's own rules, on programs of a few lines: opcodes, memory, time, races, dead ends."""

import math
import struct

import pytest
import torch
from ptx_machine import build
from ptx_machine.launch import Grid, Memory, Run, Wrong, pack, run, tensor_map
from ptx_machine.parse import Kernel, PtxSyntaxError, parse

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 window[];
.visible .entry kernel({parameters}) .maxntid {threads}, 1, 1
{{
.reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .f32 %f<64>; .reg .b64 %d<64>;
.reg .f64 %g<8>;
{body}
ret;
}}
"""


def program(body: str, parameters: int = 1, threads: int = 32) -> Kernel:
    """Return a kernel of `body` whose 64-bit parameters are p0, p1, ..."""
    names = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    return parse(HEAD.format(body=body, parameters=names, threads=threads))


def launch(
    body: str, *tensors: torch.Tensor, ctas: int = 1, threads: int = 32, shared: int = 4096,
    **options: int,
) -> Run:  # fmt: skip
    memory = Memory()
    addresses = [memory.add(tensor, writable=True) for tensor in tensors]
    kernel = program(body, len(tensors), threads)
    grid = Grid(ctas, shared_bytes=shared, **options)
    return run(kernel, pack(kernel, addresses), memory, grid)


def store_lane(value: str, kind: str, size: int) -> str:
    """Return code that stores `value` at p0[lane]."""
    return f"""
    ld.param.u64 %d0, [p0];
    mov.u32 %r0, %laneid;
    mul.wide.u32 %d1, %r0, {size};
    add.s64 %d2, %d0, %d1;
    st.global.{kind} [%d2], {value};
    """


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


# --- Memory ---------------------------------------------------------------------------------------


def test_nothing_outside_of_a_tensor_is_touched() -> None:
    out = torch.zeros(33, dtype=torch.int32)[:31]
    assert "outside of every tensor" in launch(store_lane("1", "b32", 4), out).failure


HANDOVER = """
    ld.param.u64 %d0, [p0];
    ld.param.u64 %d1, [p1];
    mov.u32 %r0, %ctaid.x;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra reader;
    st.global.b32 [%d0], 42;
    {release}
    bra end;
reader:
    {acquire}
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra reader;
    ld.global.b32 %r2, [%d0];
    st.global.b32 [%d0+4], %r2;
end:
"""


def handover(release: str, acquire: str, seed: int) -> tuple[Run, int]:
    data = torch.zeros(8, dtype=torch.int32)
    flag = torch.zeros(1, dtype=torch.int32)
    run = launch(
        HANDOVER.format(release=release, acquire=acquire), data, flag, ctas=2, threads=1,
        seed=seed, resident=2,
    )  # fmt: skip
    assert not run.failure
    return run, int(data[1])


RELEASE = "red.release.gpu.global.add.u32 [%d1], 1;"
ACQUIRE = "ld.acquire.gpu.global.b32 %r1, [%d1];"
RELAXED_RELEASE = "red.relaxed.gpu.global.add.u32 [%d1], 1;"
RELAXED_ACQUIRE = "ld.relaxed.gpu.global.b32 %r1, [%d1];"
FENCE = "fence.acq_rel.gpu;"


@pytest.mark.parametrize(
    ("release", "acquire"), [(RELEASE, ACQUIRE), (FENCE + RELAXED_RELEASE, RELAXED_ACQUIRE + FENCE)]
)
def test_release_and_acquire_hand_over(release: str, acquire: str) -> None:
    for seed in range(8):
        run, value = handover(release, acquire, seed)
        assert (run.reports, value) == ([], 42)


@pytest.mark.parametrize(
    ("release", "acquire"),
    [
        (RELAXED_RELEASE, ACQUIRE),
        (RELEASE, RELAXED_ACQUIRE),
        (RELEASE.replace("gpu", "cta"), ACQUIRE),
        ("fence.acq_rel.cta;" + RELAXED_RELEASE, RELAXED_ACQUIRE + FENCE),
    ],
)
def test_a_weaker_handover_is_a_race(release: str, acquire: str) -> None:
    for seed in range(4):
        run, _ = handover(release, acquire, seed)
        assert any("race in global memory" in r and "line" in r for r in run.reports)


def test_a_weak_store_is_held_back_until_a_release() -> None:
    values = {handover(RELAXED_RELEASE, ACQUIRE, seed)[1] for seed in range(8)}
    assert 0 in values  # the reader has found the flag without the data


SHARED = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, window;
    shl.b32 %r2, %r0, 2;
    add.s32 %r3, %r1, %r2;
    st.shared.b32 [%r3], %r0;
    {barrier}
    xor.b32 %r4, %r2, 128;
    add.s32 %r5, %r1, %r4;
    ld.shared.b32 %r6, [%r5];
"""


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_missing_barrier_is_a_race(barrier: str) -> None:
    run = launch(SHARED.format(barrier=barrier), threads=64)
    assert not run.failure
    assert bool(run.reports) is (barrier == "")


@pytest.mark.parametrize(("stride", "wavefronts"), [(4, 1), (8, 2), (128, 32)])
def test_bank_conflicts_are_counted(stride: int, wavefronts: int) -> None:
    body = f"mov.u32 %r0, %tid.x; mad.lo.s32 %r1, %r0, {stride}, 1024; st.shared.b32 [%r1], %r0;"
    run = launch(body, adversarial=False).check()
    (count,) = (c for c in run.counts if c[4])
    assert count[4:] == (wavefronts, 1)


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32)])
def test_sectors_are_counted(stride: int, sectors: int) -> None:
    out = torch.zeros(1024, dtype=torch.int32)
    base = out.data_ptr() % 32 // 4
    run = launch(store_lane("1", "b32", stride), out[(8 - base) % 8 :], adversarial=False).check()
    (count,) = (c for c in run.counts if c[2])
    assert count[2:4] == (sectors, 128)


# --- Clusters and barriers ------------------------------------------------------------------------


def test_a_ctas_own_shared_addresses_carry_its_rank() -> None:
    out = torch.zeros(2, dtype=torch.int32)
    body = """
    ld.param.u64 %d0, [p0];
    mov.u32 %r0, %cluster_ctarank;
    mul.wide.u32 %d1, %r0, 4;
    add.s64 %d2, %d0, %d1;
    mov.u32 %r1, window;
    st.global.b32 [%d2], %r1;
    """
    launch(body, out, ctas=2, threads=1, cluster=2).check()
    assert out.tolist() == [1024, 1024 + (1 << 24)]


CLUSTER = """
    mov.u32 %r0, %cluster_ctarank;
    mov.u32 %r1, window;
    xor.b32 %r2, %r0, 1;
    mapa.shared::cluster.u32 %r3, %r1, %r2;
    st.shared::cluster.u32 [%r3], %r0;
    barrier.cluster.arrive{order}.aligned;
    barrier.cluster.wait.acquire.aligned;
    ld.shared.u32 %r4, [window];
    ld.param.u64 %d0, [p0];
    mul.wide.u32 %d1, %r0, 4;
    add.s64 %d2, %d0, %d1;
    st.global.b32 [%d2], %r4;
"""


@pytest.mark.parametrize("order", [".release", ".relaxed"])
def test_a_cluster_reaches_into_each_others_shared_memory(order: str) -> None:
    out = torch.zeros(2, dtype=torch.int32)
    run = launch(CLUSTER.format(order=order), out, ctas=2, threads=1, cluster=2)
    assert out.tolist() == [1, 0]
    assert bool(run.reports) is (order == ".relaxed")


INIT = """
    mov.u32 %r1, window;
    mov.u32 %r0, %cluster_ctarank;
    mbarrier.init.shared.b64 [%r1], 1;
    {fence}
    barrier.cluster.arrive{order}.aligned;
    barrier.cluster.wait.aligned;
    xor.b32 %r2, %r0, 1;
    mapa.shared::cluster.u32 %r3, %r1, %r2;
    mbarrier.arrive.shared::cluster.b64 _, [%r3];
    {wait}
"""
INIT_FENCE = "fence.mbarrier_init.release.cluster;"
OWN_PHASE = """again:
    mbarrier.try_wait.parity.shared.b64 %p0, [%r1], 0;
    @!%p0 bra again;"""


def cluster_of_two(body: str, seed: int = 0) -> Run:
    return launch(body, ctas=2, threads=1, cluster=2, seed=seed)


@pytest.mark.parametrize(
    ("fence", "order", "told"),
    [(INIT_FENCE, ".relaxed", True), ("", ".release", True), ("", ".relaxed", False)],
)
def test_the_cluster_is_told_of_an_mbarriers_init(fence: str, order: str, told: bool) -> None:
    for seed in range(4):
        run = cluster_of_two(INIT.format(fence=fence, order=order, wait=OWN_PHASE), seed)
        assert bool(run.failure or run.reports) is not told, run.reports


def test_the_fence_of_an_mbarriers_init_tells_of_nothing_else() -> None:
    body = CLUSTER.replace("barrier.cluster.arrive", INIT_FENCE + "barrier.cluster.arrive", 1)
    out = torch.zeros(2, dtype=torch.int32)
    run = launch(body.format(order=".relaxed"), out, ctas=2, threads=1, cluster=2)
    assert any("race in shared memory" in report for report in run.reports)


def test_a_cta_may_leave_only_when_others_have_done_with_it() -> None:
    for seed in range(8):
        run = cluster_of_two(INIT.format(fence="", order=".release", wait=""), seed)
        assert run.failure or any("a CTA left that did not wait" in r for r in run.reports)


def test_an_arrival_returns_what_can_be_waited_for() -> None:
    body = """
    mbarrier.init.shared::cta.b64 [window], 1;
    mbarrier.arrive.shared::cta.b64 %d1, [window];
again:
    mbarrier.try_wait.shared::cta.b64 %p0, [window], {state};
    @!%p0 bra again;
    """
    launch(body.format(state="%d1"), threads=1).check()
    assert "no state of an mbarrier" in launch(body.format(state="0"), threads=1).failure


REGISTERS = """
    mov.u32 %r0, %tid.x;
    setp.ge.u32 %p0, %r0, 128;
    @%p0 bra others;
    {given}
    bra end;
others:
    setmaxnreg.inc.sync.aligned.u32 232;
end:
"""


@pytest.mark.parametrize("threads", [256, 384])
def test_registers_are_handed_around_within_the_cta(threads: int) -> None:
    given = "setmaxnreg.dec.sync.aligned.u32 40;"
    launch(REGISTERS.format(given=given), threads=threads).check()
    # What a CTA of 256 threads starts with is enough as it is.
    failure = launch(REGISTERS.format(given=""), threads=threads).failure
    assert ("waits for registers" in failure) is (threads == 384)


STUCK = """
    mbarrier.init.shared::cta.b64 [window], 2;
    mbarrier.arrive.shared::cta.b64 _, [window];
again:
    mbarrier.try_wait.parity.shared::cta.b64 %p0, [window], 0;
    @%p0 bra done;
    bra again;
done:
"""


def test_a_dead_end_says_where_everybody_is() -> None:
    failure = launch(STUCK, threads=1).failure
    assert "nothing moves any more" in failure
    assert (
        "CTA 0 warp 0: line 14 (mbarrier.try_wait" in failure or "CTA 0 warp 0: line 1" in failure
    )
    assert "parity 0 of the mbarrier at 1024, which wants 1 arrivals and 0 bytes" in failure


PRODUCT = """
    mov.b32 %r1, 0;
    mov.b32 %r2, 0;
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
    mov.f32 %f0, 0f00000000;
    mov.f32 %f1, 0f00000000;
    mov.f32 %f2, 0f00000000;
    mov.f32 %f3, 0f00000000;
    mov.b64 %d0, 64;
    mov.pred %p0, 1;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}},
        {{%r1, %r2, %r3, %r4}}, %d0, %p0, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    {early}
    wgmma.wait_group.sync.aligned 0;
"""


@pytest.mark.parametrize(
    ("early", "touches"),
    [
        ("", False),
        ("mov.b32 %r9, %r2;", False),  # A may be read,
        ("mov.b32 %r2, 1;", True),  # not written,
        ("mov.f32 %f9, %f3;", True),  # an accumulator neither
    ],
)
def test_the_registers_of_a_product_are_its_own(early: str, touches: bool) -> None:
    run = launch(PRODUCT.format(early=early), threads=128)
    assert not run.failure
    assert any("register of a product" in report for report in run.reports) is touches


# --- TMA ------------------------------------------------------------------------------------------

BOX = """
    ld.param.u64 %d0, [p0];
    ld.param.u64 %d3, [p1];
    mov.u32 %r9, window;
    add.s32 %r8, %r9, 2048;
    mbarrier.init.shared::cta.b64 [%r8], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 1024;
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
        [%r9], [%d0, {{4, 12}}], [%r8];
again:
    {wait}
    ld.shared.b32 %r1, [window];
    ld.shared.b32 %r2, [window+132];
    st.shared.b32 [window], 7;
    {fence}
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d3, {{0, 0}}], [%r9];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
"""
WAIT = """mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r8], 0;
    @!%p0 bra again;"""
PROXY = "fence.proxy.async.shared::cta;"


def box(wait: str = WAIT, fence: str = PROXY) -> tuple[Run, torch.Tensor]:
    return on_maps(BOX.format(wait=wait, fence=fence), threads=1)


def on_maps(body: str, threads: int) -> tuple[Run, torch.Tensor]:
    """Run `body` with the maps of a source and of a target, which is returned."""
    source = torch.arange(16 * 48, dtype=torch.int32).view(16, 48)
    target = torch.full((8, 32), -1, dtype=torch.int32)
    packed = (
        tensor_map(source.data_ptr(), (48, 16), (192,), (32, 8), 4, 128),
        tensor_map(target.data_ptr(), (32, 8), (128,), (32, 8), 4, 128),
    )
    return launch_maps(body, packed, source, target, threads=threads), target


def launch_maps(
    body: str, packed: tuple[bytes, ...], *tensors: torch.Tensor, threads: int, **options: int
) -> Run:
    """Run `body` on the addresses of the maps, then of the tensors."""
    maps = torch.zeros(64 + 128 * len(packed), dtype=torch.uint8)
    first = -maps.data_ptr() % 64
    maps[first : first + 128 * len(packed)] = torch.frombuffer(
        bytearray(b"".join(packed)), dtype=torch.uint8
    )
    memory, at = Memory(), maps.data_ptr() + first
    addresses = [at + 128 * i for i in range(len(packed))]
    addresses += [memory.add(tensor, writable=True) for tensor in tensors]
    kernel = program(body, len(addresses), threads)
    return run(
        kernel, pack(kernel, addresses), memory, Grid(**{"ctas": 1, "shared_bytes": 4096} | options)
    )


def test_a_box_arrives_swizzled_clipped_and_filled_with_zeros() -> None:
    run, target = box()
    run.check()
    source = torch.arange(16 * 48, dtype=torch.int32).view(16, 48)
    expected = torch.zeros(8, 32, dtype=torch.int32)
    expected[:4] = source[12:16, 4:36]  # rows 16 to 19 are outside
    expected[0, 0] = 7  # what the program put there
    assert torch.equal(target, expected)


@pytest.mark.parametrize(
    ("change", "report"),
    [({"wait": ""}, "race in shared memory"), ({"fence": ""}, "no proxy fence in shared memory")],
)
def test_tma_needs_its_wait_and_its_fence(change: dict[str, str], report: str) -> None:
    assert any(report in r for r in box(**change)[0].reports)


BY_A_WARP = """
    ld.param.u64 %d3, [p1];
    mov.u32 %r0, %laneid;
    mov.u32 %r2, window;
    mad.lo.s32 %r1, %r0, 32, %r2;
    st.shared.v4.b32 [%r1], {{%r0, %r0, %r0, %r0}};
    st.shared.v4.b32 [%r1+16], {{%r0, %r0, %r0, %r0}};
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d3, {{{column}, 0}}], [window];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
"""


@pytest.mark.parametrize(("column", "races"), [("0", False), ("%r0", True)])
def test_lanes_that_store_the_same_box_store_one(column: str, races: bool) -> None:
    run, _ = on_maps(BY_A_WARP.format(column=column), threads=32)
    assert not run.failure
    assert any("TMA store's write" in report for report in run.reports) is races


# Each CTA adds a box of 16-bit elements, the lanes' bytes, to the tensor at p0; p1 is the tensor.
ADDS = """
    ld.param.u64 %d3, [p0];
    ld.param.u64 %d4, [p1];
    mov.u32 %r0, %laneid;
    mov.u32 %r2, window;
    mad.lo.s32 %r1, %r0, 32, %r2;
    {before}
    st.shared.v4.b32 [%r1], {{{pair}, {pair}, {pair}, {pair}}};
    st.shared.v4.b32 [%r1+16], {{{pair}, {pair}, {pair}, {pair}}};
    {fence}
    bar.warp.sync -1;
    setp.eq.u32 %p0, %r0, 0;
    {elect}
    {add}
    cp.async.bulk.commit_group;
    {wait}
    {after}
done:
"""
ADD = """cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group
        [%d3, {4, 6}], [window];"""
ALL_READ = "cp.async.bulk.wait_group.read 0;"
ALL_WRITTEN = "cp.async.bulk.wait_group 0;"
KINDS = {  # each with two ones in a word, and where they are half of an ulp
    torch.float16: (0x3C003C00, 2048.0),
    torch.bfloat16: (0x3F803F80, 256.0),
}


def added(
    dtype: torch.dtype = torch.bfloat16, there: float = 3.0, *, typed: bool = True, ctas: int = 1,
    seed: int = 0, **change: str,
) -> tuple[Run, torch.Tensor]:  # fmt: skip
    """Add a box of 8 x 64 ones at (6, 4) to a tensor that ends within it."""
    tensor = torch.full((9, 40), there, dtype=dtype)
    element = dtype if typed else None
    packed = tensor_map(tensor.data_ptr(), (40, 9), (80,), (64, 8), 2, 128, element)
    code = {
        "pair": hex(KINDS[dtype][0]), "before": "", "fence": PROXY, "elect": "@!%p0 bra done;",
        "add": ADD, "wait": ALL_WRITTEN, "after": "",
    }  # fmt: skip
    body = ADDS.format(**code | change)
    return launch_maps(body, (packed,), tensor, threads=32, ctas=ctas, seed=seed), tensor


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_box_is_added_once_rounded_and_clipped(dtype: torch.dtype) -> None:
    _, large = KINDS[dtype]
    for there, sum_ in ((3.0, 4.0), (large, large), (large + 2, large + 4), (math.inf, math.inf)):
        run, tensor = added(dtype, there)
        run.check()
        expected = torch.full((9, 40), there)
        expected[6:, 4:] = sum_  # to nearest, ties to even
        assert torch.equal(tensor.float(), expected), there


def test_boxes_of_several_ctas_are_all_added() -> None:
    for seed in range(8):
        run, tensor = added(ctas=5, seed=seed)
        run.check()
        assert (tensor[6:, 4:] == 8.0).all()


def test_every_lane_adds_its_box() -> None:
    run, tensor = added(elect="")
    run.check()
    assert (tensor[6:, 4:] == 3.0 + 32).all()


STORE = ADD.replace("cp.reduce", "cp").replace(".add.tile", "")
OWN_STORE = "st.global.b32 [%d4+656], 0;"  # within the box
OWN_LOAD = "ld.global.b32 %r5, [%d4+656];"


@pytest.mark.parametrize(
    ("change", "report"),
    [
        ({"fence": ""}, "no proxy fence in shared memory"),
        ({"after": OWN_LOAD, "wait": ALL_READ}, "race in global memory"),
        ({"after": OWN_LOAD, "wait": ""}, "race in global memory"),
        ({"after": OWN_LOAD}, None),
        ({"after": "st.shared.b32 [window], 0;", "wait": ""}, "race in shared memory"),
        ({"after": "st.shared.b32 [window], 0;", "wait": ALL_READ}, None),
        ({"before": OWN_STORE}, "no proxy fence in global memory"),
        ({"before": f"{OWN_STORE} fence.proxy.async.global;"}, None),
        ({"add": STORE + ADD}, "race in global memory"),
        ({"add": ADD + STORE}, "race in global memory"),
        # A generic atomic is no more ordered with it than a store is.
        ({"after": "red.relaxed.gpu.global.add.u32 [%d4+656], 1;", "wait": ""}, "race in global"),
    ],
)
def test_an_addition_reads_and_writes(change: dict[str, str], report: str | None) -> None:
    run, _ = added(**change)
    assert not run.failure
    if report is None:
        run.check()
    else:
        assert any(report in r for r in run.reports), run.reports


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (".add", ".min", "it has none of .add"),
        (".tile", ".im2col_no_offs", "unknown modifier .im2col_no_offs"),
        (".add", ".add.noftz", "unknown modifier .noftz"),
        (".bulk_group", "", "it has none of .bulk_group"),
        (".global", ".shared::cluster", "it has none of .global"),
        ("[window]", "[window+8]", "misaligned source"),
    ],
)
def test_an_addition_that_is_not_known_is_named(old: str, new: str, named: str) -> None:
    with pytest.raises((RuntimeError, Wrong), match=named.replace(".", r"\.")):
        added(add=ADD.replace(old, new))[0].check()


def test_an_addition_to_elements_of_no_known_type_is_an_error() -> None:
    with pytest.raises(Wrong, match="elements of a type that is not modelled"):
        added(typed=False)[0].check()


def test_a_run_is_judged() -> None:
    with pytest.raises(Wrong, match="race in shared memory"):
        launch(SHARED.format(barrier=""), threads=64).check()
