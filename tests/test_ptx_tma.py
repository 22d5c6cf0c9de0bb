"""TMA on the machine, by programs of a few lines: boxes that are loaded, stored and added to."""

import math

import pytest
import torch
from ptx_machine import build
from ptx_machine.launch import Grid, Memory, Run, Wrong, pack, run, tensor_map
from ptx_programs import program

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


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
