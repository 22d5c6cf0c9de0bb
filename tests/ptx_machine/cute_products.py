"""A matrix product in CuTe that is known to be right on hardware: what Triton's do not use.

Persistent, warp-specialised, in clusters: TMA loads for several CTAs at once, a ring of mbarriers
whose slots the CTAs free at one another, setmaxnreg, stmatrix and TMA stores. The kernel is
written here; how CTAs and warps synchronise is the library's own pipeline.
"""

import os
import tempfile
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")  # no driver is asked
import cutlass
from cutlass import cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cute.runtime import make_fake_compact_tensor

from ptx_machine.launch import Grid, Memory, pack, tensor_map
from ptx_machine.parse import Kernel, parse
from ptx_machine.products import Launch

PANEL = 32  # columns of a TMA store
DTYPES = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}


class Product:
    """c[M,N] = a[M,K]·b[N,K]ᵀ; a CTA computes tiles of `block`, a cluster `cluster` of them."""

    def __init__(self, flavour: "CuteFlavour") -> None:
        self.flavour = flavour
        self.dtype = DTYPES[flavour.dtype]
        self.block, self.cluster = flavour.block, flavour.cluster
        self.major = (flavour.major_a, flavour.major_b)
        self.consumers = flavour.block[0] // 64  # warpgroups, 64 rows each
        self.panel = (flavour.block[0], PANEL)

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
        bm, bn, bk = self.block
        cm, cn = self.cluster
        kinds = warpgroup.SmemLayoutAtomKind
        modes = [OperandMajorMode.K if m == "k" else OperandMajorMode.MN for m in self.major]
        op = warpgroup.MmaF16BF16Op(
            self.dtype, cutlass.Float32, (64, bn, 16), warpgroup.OperandSource.SMEM, *modes
        )
        mma = cute.make_tiled_mma(cute.make_mma_atom(op), (self.consumers, 1, 1))
        rings, loads = [], []
        # CTAs side by side share operands: A those of a row, B those of a column.
        operands = ((a, bm, self.major[0], cn), (b, bn, self.major[1], cm))
        for operand, rows, major, shared in operands:
            kind = kinds.K_SW128 if major == "k" else kinds.MN_SW128
            atom = warpgroup.make_smem_layout_atom(kind, self.dtype)
            order = (0, 1, 2) if major == "k" else (1, 0, 2)
            ring = cute.tile_to_shape(atom, (rows, bk, self.flavour.stages), order)
            how = (
                cpasync.CopyBulkTensorTileG2SMulticastOp()
                if shared > 1
                else cpasync.CopyBulkTensorTileG2SOp()
            )
            slot = cute.slice_(ring, (None, None, 0))
            rings.append(ring)
            loads.append(
                cpasync.make_tiled_tma_atom(how, operand, slot, (rows, bk), num_multicast=shared)
            )
        atom = warpgroup.make_smem_layout_atom(kinds.K_SW64, self.dtype)
        panels = cute.tile_to_shape(atom, (*self.panel, 2), (0, 1, 2))
        store = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), c, cute.slice_(panels, (None, None, 0)), self.panel
        )
        maps = [part for load in (*loads, store) for part in (load.atom, load.tma_tensor)]
        self.kernel(*maps, mma, *rings, panels).launch(
            grid=(self.flavour.clusters * cm * cn, 1, 1),
            block=(128 * (1 + self.consumers), 1, 1),
            cluster=(cm * cn, 1, 1),
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self, load_a: cute.CopyAtom, a: cute.Tensor, load_b: cute.CopyAtom, b: cute.Tensor,
        store_c: cute.CopyAtom, c: cute.Tensor, mma: cute.TiledMma,
        ring_a: cute.ComposedLayout, ring_b: cute.ComposedLayout, panels: cute.ComposedLayout,
    ):  # fmt: skip
        bm, bn, bk = self.block
        cm, cn = self.cluster
        stages, clusters = self.flavour.stages, self.flavour.clusters
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        warpgroup_index = cute.arch.make_warp_uniform(thread // 128)
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        ctas = cute.make_layout((cm, cn, 1))
        place = ctas.get_flat_coord(rank)

        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[cutlass.Int64, 2 * stages]
            a: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(ring_a)], 1024]
            b: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(ring_b)], 1024]
            c: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(panels)], 1024]

        storage = cutlass.memory.SmemAllocator().allocate(Storage)
        shared_a = storage.a.get_tensor(ring_a.outer, swizzle=ring_a.inner)
        shared_b = storage.b.get_tensor(ring_b.outer, swizzle=ring_b.inner)
        shared_c = storage.c.get_tensor(panels.outer, swizzle=panels.inner)
        # A slot is free when the warps of all CTAs that it is loaded for have said so.
        freed_by = (cm + cn - 1) * self.consumers * 4
        ring = pipeline.PipelineTmaAsync.create(
            barrier_storage=storage.barriers.data_ptr(),
            num_stages=stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, freed_by),
            tx_count=(bm + bn) * bk * 2,
            cta_layout_vmnk=cute.make_layout((1, cm, cn, 1)),
            defer_sync=True,
        )
        pipeline.pipeline_init_arrive(cluster_shape_mn=self.cluster, is_relaxed=True)

        tiles_a = cute.local_tile(a, (bm, bk), (None, None))
        tiles_b = cute.local_tile(b, (bn, bk), (None, None))
        tiles_c = cute.local_tile(c, self.panel, (None, None))
        to_a, from_a = cpasync.tma_partition(
            load_a, place[1], cute.make_layout(cn),
            cute.group_modes(shared_a, 0, 2), cute.group_modes(tiles_a, 0, 2),
        )  # fmt: skip
        to_b, from_b = cpasync.tma_partition(
            load_b, place[0], cute.make_layout(cm),
            cute.group_modes(shared_b, 0, 2), cute.group_modes(tiles_b, 0, 2),
        )  # fmt: skip
        from_c, to_c = cpasync.tma_partition(
            store_c, 0, cute.make_layout(1),
            cute.group_modes(shared_c, 0, 2), cute.group_modes(tiles_c, 0, 2),
        )  # fmt: skip
        steps = cute.size(tiles_a, mode=[3])
        grid_m = cute.ceil_div(cute.size(tiles_a, mode=[2]), cm)
        grid_n = cute.ceil_div(cute.size(tiles_b, mode=[2]), cn)
        first = cta // (cm * cn)
        pipeline.pipeline_init_wait(cluster_shape_mn=self.cluster)

        if warpgroup_index == 0:
            cute.arch.setmaxregister_decrease(40)
            if warp_index == 0:
                for_a = cute.make_layout_image_mask(ctas, place, mode=1) if cn > 1 else None
                for_b = cute.make_layout_image_mask(ctas, place, mode=0) if cm > 1 else None
                state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, stages)
                for tile in cutlass.range(first, grid_m * grid_n, clusters, unroll=1):
                    m = tile % grid_m * cm + place[0]
                    n = tile // grid_m * cn + place[1]
                    for step in cutlass.range(steps, unroll=1):
                        ring.producer_acquire(state)
                        full = ring.producer_get_barrier(state)
                        cute.copy(
                            load_a, from_a[None, m, step], to_a[None, state.index],
                            tma_bar_ptr=full, mcast_mask=for_a,
                        )  # fmt: skip
                        cute.copy(
                            load_b, from_b[None, n, step], to_b[None, state.index],
                            tma_bar_ptr=full, mcast_mask=for_b,
                        )  # fmt: skip
                        state.advance()
                if cutlass.const_expr(cm * cn > 1):  # others arrive here: stay until they have
                    ring.producer_tail(state)
        else:
            cute.arch.setmaxregister_increase(232)
            consumer = thread - 128
            mine = mma.get_slice(consumer // 128 * 128)
            left = mma.make_fragment_A(mine.partition_A(shared_a))
            right = mma.make_fragment_B(mine.partition_B(shared_b))
            acc = cute.make_rmem_tensor(mma.partition_shape_C((bm, bn)), cutlass.Float32)
            matrices = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
            copy = cute.make_tiled_copy_S(matrices, cute.make_tiled_copy_C_atom(matrices, mma))
            to_panel = copy.get_slice(consumer).partition_D(shared_c)
            sums = copy.retile(acc)
            rounded = cute.make_rmem_tensor(to_panel.shape[:3], self.dtype)
            each = cute.size(rounded)
            together = pipeline.NamedBarrier(barrier_id=1, num_threads=128 * self.consumers)
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, stages)
            behind = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, stages)
            for tile in cutlass.range(first, grid_m * grid_n, clusters, unroll=1):
                m = tile % grid_m * cm + place[0]
                n = tile // grid_m * cn + place[1]
                mma.set(warpgroup.Field.ACCUMULATE, False)
                for step in cutlass.range(steps, unroll=1):
                    ring.consumer_wait(state)
                    warpgroup.fence()
                    for k in cutlass.range_constexpr(bk // 16):
                        at = (None, None, k, state.index)
                        cute.gemm(mma, acc, left[at], right[at], acc)
                        mma.set(warpgroup.Field.ACCUMULATE, True)
                    warpgroup.commit_group()
                    state.advance()
                    if step > 0:
                        warpgroup.wait_group(1)
                        ring.consumer_release(behind)
                        behind.advance()
                warpgroup.wait_group(0)
                ring.consumer_release(behind)
                behind.advance()
                for panel in cutlass.range_constexpr(bn // PANEL):
                    for i in cutlass.range_constexpr(each):
                        rounded[i] = sums[panel * each + i].to(self.dtype)
                    cute.copy(copy, rounded, to_panel[None, None, None, panel % 2])
                    cute.arch.fence_proxy("async.shared", space="cta")
                    together.arrive_and_wait()
                    if warp_index == 4:
                        column = n * (bn // PANEL) + panel
                        cute.copy(store_c, from_c[None, panel % 2], to_c[None, m, column])
                        cute.arch.cp_async_bulk_commit_group()
                        cute.arch.cp_async_bulk_wait_group(1, read=True)
                    together.arrive_and_wait()
            if warp_index == 4:
                cute.arch.cp_async_bulk_wait_group(0, read=True)


@dataclass(frozen=True)
class CuteFlavour:
    """One way to compile the product, and the sizes to run it at."""

    dtype: torch.dtype = torch.bfloat16
    major_a: str = "k"
    major_b: str = "k"
    block: tuple[int, int, int] = (128, 128, 64)
    cluster: tuple[int, int] = (2, 1)
    stages: int = 3
    clusters: int = 2
    sizes: tuple[int, int, int] = (456, 264, 328)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        block = "x".join(map(str, self.block))
        cluster = "x".join(map(str, self.cluster))
        return f"cute-{kind}-{self.major_a}{self.major_b}-{block}-{self.stages}-cluster{cluster}"

    # Faults that no place may hide: here nothing is waited for twice.
    exact: ClassVar[frozenset[str]] = frozenset(
        {
            "nobody is told of an mbarrier's init",
            "a box for several CTAs goes to one",
            "the peer's mbarrier is taken for the own",
            "an arrival is removed",
            "an arrival is relaxed",
            "a barrier of the cluster is removed",
            "a product waits for a group less",
            "wgmma.fence is removed",
            "TMA stores' shared memory is reused early",
        }
    )

    @property
    def harmless(self) -> set[str]:
        """Faults that change nothing here."""
        found = set()
        if self.major_b == "k" or self.block[1] <= 64:
            found.add("the leading offset is 16 bytes off")
        if self.cluster == (1, 1):  # the CTA's own barrier tells its threads
            found.add("nobody is told of an mbarrier's init")
        return found

    def launch(self) -> Launch:
        """Compile, and return what is to be run."""
        m, n, k = self.sizes
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(*s, generator=generator).to(self.dtype) for s in ((m, k), (n, k)))
        a, b = (
            t if major == "k" else t.t().contiguous().t()
            for t, major in ((a, self.major_a), (b, self.major_b))
        )
        c = torch.full((m, n), float("nan"), dtype=self.dtype)
        values = {"a": a, "b": b, "c": c}
        bm, bn, bk = self.block
        ring_bytes = self.stages * (bm + bn) * bk * 2
        grid = Grid(
            self.clusters * self.cluster[0] * self.cluster[1],
            cluster=self.cluster[0] * self.cluster[1],
            shared_bytes=1024 + ring_bytes + 2 * bm * PANEL * 2,
        )
        return Launch(CompiledCute(self, _compile(self, a, b, c)), values, grid, (a, b.t()), c, [])


@dataclass
class CompiledCute:
    """The compiled product: its program, and the tensor maps that its launch would make."""

    flavour: CuteFlavour
    kernel: Kernel

    def pack(self, arguments: dict[str, Any], memory: Memory) -> bytes:
        """Return the three tensor maps; the last parameter is an object without content."""
        bm, bn, bk = self.flavour.block
        cm, cn = self.flavour.cluster
        loads = (("a", bm, self.flavour.major_a, cn), ("b", bn, self.flavour.major_b, cm))
        maps = [
            _map(
                arguments[name],
                (rows // shared, 64) if major == "k" else (bk // shared, 64),
                memory,
            )
            for name, rows, major, shared in loads
        ]
        c = arguments["c"]
        address = memory.add(c, writable=True)
        row_bytes = c.stride(0) * c.element_size()
        maps.append(
            tensor_map(address, c.shape[::-1], [row_bytes], (PANEL, bm), c.element_size(), 64)
        )
        return pack(self.kernel, [*maps, *[0] * (len(self.kernel.parameters) - 3)])


def _map(operand: torch.Tensor, box: tuple[int, int], memory: Memory) -> bytes:
    """Return the map for loads of `box`, rows and columns with the contiguous direction last."""
    address = memory.add(operand, writable=False)
    matrix = operand if operand.stride(1) == 1 else operand.t()
    row_bytes = matrix.stride(0) * matrix.element_size()
    return tensor_map(
        address, matrix.shape[::-1], [row_bytes], box[::-1], matrix.element_size(), 128
    )


def _compile(flavour: CuteFlavour, *tensors: torch.Tensor) -> Kernel:
    """Return the program for tensors like these, with their sizes built in."""
    shapes = [
        make_fake_compact_tensor(
            DTYPES[flavour.dtype], tuple(t.shape), assumed_align=16,
            stride_order=(1, 0) if t.stride(1) == 1 else (0, 1),
        )
        for t in tensors
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        options = f"--gpu-arch sm_90a --keep-ptx --dump-dir {folder}"
        return parse(cute.compile(Product(flavour), *shapes, options=options).__ptx__)


bf16, fp16 = torch.bfloat16, torch.float16
CUTE_FLAVOURS = (
    CuteFlavour(),
    CuteFlavour(fp16, "m", "n", (64, 128, 64), (1, 2), 4, 3, (200, 520, 200)),
    CuteFlavour(bf16, "k", "k", (64, 64, 64), (2, 2), 2, 1, (264, 136, 200)),
    CuteFlavour(bf16, "m", "k", (128, 64, 64), (1, 1), 3, 3, (264, 136, 264)),
    CuteFlavour(fp16, "k", "n", (128, 256, 64), (2, 1), 2, 1, (264, 520, 200)),
    CuteFlavour(bf16, "m", "n", (128, 128, 64), (2, 2), 2, 1, (264, 264, 136)),
    CuteFlavour(bf16, "m", "n", (64, 64, 64), (2, 1), 4, 2, (200, 136, 520)),
)
