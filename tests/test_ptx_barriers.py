"""Clusters, barriers, registers and dead ends on the machine, by programs of a few lines."""

import pytest
import torch
from ptx_machine import build
from ptx_machine.launch import Run
from ptx_programs import launch

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


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


@pytest.mark.parametrize(
    ("fence", "order", "told"),
    [
        ("", ".release", True),
        ("", ".relaxed", False),
        ("fence.acq_rel.cta;", ".relaxed", False),
        ("fence.acquire.cluster;", ".relaxed", False),
        ("fence.release.cluster;", ".relaxed", True),
    ],
)
def test_a_cluster_reaches_into_each_others_shared_memory(
    fence: str, order: str, told: bool
) -> None:
    out = torch.zeros(2, dtype=torch.int32)
    body = CLUSTER.replace("barrier.cluster.arrive", fence + "barrier.cluster.arrive", 1)
    run = launch(body.format(order=order), out, ctas=2, threads=1, cluster=2)
    assert out.tolist() == [1, 0]
    assert bool(run.reports) is not told


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


def test_who_meets_at_a_barrier_agrees_on_how_many_meet() -> None:
    body = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, 128;
    setp.lt.u32 %p0, %r0, 64;
    @%p0 mov.u32 %r1, 64;
    bar.sync 1, %r1;
    """
    failures = [launch(body, threads=128, seed=seed).failure for seed in range(8)]
    assert all(failures)
    assert any("another number of threads" in failure for failure in failures)


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
