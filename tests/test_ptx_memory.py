"""Memory on the machine: what one CTA may know of another's, races and counts, by few lines."""

import pytest
import torch
from ptx_machine import build
from ptx_machine.launch import Run, Wrong
from ptx_programs import launch, program, store_lane

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


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


def handover(release: str, acquire: str, seed: int, cluster: int = 1) -> tuple[Run, int]:
    data = torch.zeros(8, dtype=torch.int32)
    flag = torch.zeros(1, dtype=torch.int32)
    run = launch(
        HANDOVER.format(release=release, acquire=acquire), data, flag, ctas=2, threads=1,
        seed=seed, resident=2, cluster=cluster,
    )  # fmt: skip
    assert not run.failure
    return run, int(data[1])


RELEASE = "red.release.gpu.global.add.u32 [%d1], 1;"
ACQUIRE = "ld.acquire.gpu.global.b32 %r1, [%d1];"
RELAXED_RELEASE = "red.relaxed.gpu.global.add.u32 [%d1], 1;"
RELAXED_ACQUIRE = "ld.relaxed.gpu.global.b32 %r1, [%d1];"
FENCE = "fence.acq_rel.gpu;"


CLUSTER_RELEASE, CLUSTER_ACQUIRE, RELAXED_CLUSTER_RELEASE, CLUSTER_FENCE = (
    text.replace("gpu", "cluster") for text in (RELEASE, ACQUIRE, RELAXED_RELEASE, FENCE)
)


@pytest.mark.parametrize(
    ("release", "acquire", "cluster"),
    [
        (RELEASE, ACQUIRE, 1),
        (FENCE + RELAXED_RELEASE, RELAXED_ACQUIRE + FENCE, 1),
        ("fence.release.gpu;" + RELAXED_RELEASE, RELAXED_ACQUIRE + "fence.acquire.gpu;", 1),
        (CLUSTER_RELEASE, CLUSTER_ACQUIRE, 2),
        (FENCE + RELAXED_RELEASE, RELAXED_ACQUIRE + FENCE, 2),
        (CLUSTER_FENCE + RELAXED_RELEASE, RELAXED_ACQUIRE + CLUSTER_FENCE, 2),
        (FENCE + RELAXED_CLUSTER_RELEASE, RELAXED_ACQUIRE + CLUSTER_FENCE, 2),
    ],
)
def test_release_and_acquire_hand_over(release: str, acquire: str, cluster: int) -> None:
    for seed in range(8):
        run, value = handover(release, acquire, seed, cluster)
        assert (run.reports, value) == ([], 42)


@pytest.mark.parametrize(
    ("release", "acquire"),
    [
        (RELAXED_RELEASE, ACQUIRE),
        (RELEASE, RELAXED_ACQUIRE),
        (RELEASE.replace("gpu", "cta"), ACQUIRE),
        (FENCE + RELAXED_RELEASE.replace("gpu", "cta"), RELAXED_ACQUIRE + FENCE),
        (RELEASE, ACQUIRE.replace("gpu", "cta")),
        (CLUSTER_RELEASE, ACQUIRE),
        (RELEASE, CLUSTER_ACQUIRE),
        *(
            (fence + RELAXED_RELEASE, RELAXED_ACQUIRE + FENCE)
            for fence in ("fence.acq_rel.cta;", "fence.acquire.gpu;", CLUSTER_FENCE)
        ),
        *(
            (FENCE + RELAXED_RELEASE, RELAXED_ACQUIRE + fence)
            for fence in ("fence.acq_rel.cta;", "fence.release.gpu;", CLUSTER_FENCE)
        ),
    ],
)
def test_a_weaker_handover_is_a_race(release: str, acquire: str) -> None:
    kernel = program(HANDOVER.format(release=release, acquire=acquire), 2, 1)
    wrote, read = (
        next(s.line for s in kernel.statements if s.opcode == opcode)
        for opcode in ("st.global.b32", "ld.global.b32")
    )
    race = f"race in global memory: read at line {read} and write at line {wrote}"
    for seed in range(4):
        assert race in handover(release, acquire, seed)[0].reports


ADD, LOAD, STORE = (
    "atom.relaxed.{}.global.add.u32 %r1, [%d0], 1;",
    "ld.relaxed.{}.global.u32 %r1, [%d0];",
    "st.relaxed.{}.global.u32 [%d0], 1;",
)


@pytest.mark.parametrize(("one", "other"), [(ADD, ADD), (STORE, LOAD), (STORE, STORE)])
@pytest.mark.parametrize(
    ("scopes", "cluster", "meet"),
    [
        (("gpu", "gpu"), 1, True),
        (("cta", "gpu"), 1, False),
        (("gpu", "cta"), 1, False),
        (("cta", "cta"), 2, False),
        (("gpu", "cluster"), 1, False),
        (("gpu", "cluster"), 2, True),
    ],
)
def test_strong_accesses_may_meet_within_the_scope_of_both(
    one: str, other: str, scopes: tuple[str, str], cluster: int, meet: bool
) -> None:
    word = torch.zeros(1, dtype=torch.int32)
    body = f"""
    ld.param.u64 %d0, [p0];
    mov.u32 %r0, %ctaid.x;
    setp.eq.u32 %p0, %r0, 0;
    @%p0 {one.format(scopes[0])}
    @!%p0 {other.format(scopes[1])}
    """
    for seed in range(4):
        run = launch(body, word, ctas=2, threads=1, seed=seed, resident=2, cluster=cluster)
        assert not run.failure
        assert bool(run.reports) is not meet


@pytest.mark.parametrize("before", ["st.global.b32 [%d0], 1;", ADD.format("cta")])
def test_a_later_access_of_wider_scope_does_not_hide_an_earlier_one(before: str) -> None:
    word = torch.zeros(1, dtype=torch.int32)
    body = f"""
    ld.param.u64 %d0, [p0];
    mov.u32 %r0, %ctaid.x;
    setp.eq.u32 %p0, %r0, 0;
    @%p0 {before}
    {ADD.format("gpu")}
    """
    for seed in range(8):
        run = launch(body, word, ctas=2, threads=1, seed=seed, resident=2)
        assert any("race in global memory" in report for report in run.reports)


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


def test_a_run_is_judged() -> None:
    with pytest.raises(Wrong, match="race in shared memory"):
        launch(SHARED.format(barrier=""), threads=64).check()
