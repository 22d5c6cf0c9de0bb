"""Matrix products in Triton, of every way it has to move data, multiply and synchronise.

The kernels are plain; what is on trial is how the machine runs what the compiler makes of them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx_machine.launch import Grid
from ptx_machine.products import Launch
from ptx_machine.triton_compile import compile_kernel


@triton.jit
def _tile(pid, grid_m, grid_n):
    return pid % grid_m, pid // grid_m


@triton.jit
def by_pointers(
    a, b, c, M, N, K, a_m, a_k, b_k, b_n, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """c = a·b, one tile a program, strides free."""
    pid_m, pid_n = _tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN))
    rm, rn, rk = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        in_k = k + rk < K
        left = tl.load(
            a + rm[:, None] * a_m + (k + rk)[None, :] * a_k,
            mask=(rm < M)[:, None] & in_k[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            b + (k + rk)[:, None] * b_k + rn[None, :] * b_n,
            mask=in_k[:, None] & (rn < N)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(left, right, acc)
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(c + rm[:, None] * N + rn[None, :], acc.to(c.dtype.element_ty), mask=inside)


@triton.jit
def by_descriptors(
    a, b, c, M, N, K, MAJOR_A: tl.constexpr, MAJOR_B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same through TMA; K ("k") or the other direction of an operand is contiguous."""
    pid_m, pid_n = _tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN))
    m, n = pid_m * BM, pid_n * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        left = a.load([m, k]) if MAJOR_A == "k" else a.load([k, m]).T
        right = b.load([n, k]).T if MAJOR_B == "k" else b.load([k, n])
        acc = tl.dot(left, right, acc)
    c.store([m, n], acc.to(c.dtype))


@triton.jit
def persistent(a, b, c, ticket, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The same by programs that take tiles from a counter until there are none."""
    grid_m, grid_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tile = tl.atomic_add(ticket, 1)
    while tile < grid_m * grid_n:
        pid_m, pid_n = _tile(tile, grid_m, grid_n)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(a.load([pid_m * BM, k]), b.load([pid_n * BN, k]).T, acc)
        c.store([pid_m * BM, pid_n * BN], acc.to(c.dtype))
        tile = tl.atomic_add(ticket, 1)


@triton.jit
def split_k(a, b, c, partial, flag, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Two programs a tile, each for half of K: the first hands its sum to the second by a flag."""
    grid_m, grid_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    half = tl.program_id(0) // (grid_m * grid_n)
    tile = tl.program_id(0) % (grid_m * grid_n)
    pid_m, pid_n = _tile(tile, grid_m, grid_n)
    rm, rn, rk = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(half * (K // 2), (half + 1) * (K // 2), BK):
        left = tl.load(a + rm[:, None] * K + (k + rk)[None, :], mask=(rm < M)[:, None], other=0.0)
        right = tl.load(b + rn[None, :] * K + (k + rk)[:, None], mask=(rn < N)[None, :], other=0.0)
        acc = tl.dot(left, right, acc)
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    at = rm[:, None] * N + rn[None, :]
    if half == 0:
        tl.store(partial + at, acc, mask=inside)
        tl.debug_barrier()
        tl.atomic_add(flag + tile, 1, sem="release")
    else:
        while tl.atomic_add(flag + tile, 0, sem="acquire") == 0:
            pass
        tl.debug_barrier()
        acc += tl.load(partial + at, mask=inside, other=0.0)
        tl.store(c + at, acc.to(c.dtype.element_ty), mask=inside)
        tl.store(flag + tile, 0)


@dataclass(frozen=True)
class Flavour:
    """One way to compile a product, and the sizes to run it at."""

    function: str
    arch: int
    dtype: torch.dtype = torch.bfloat16
    major_a: str = "k"
    major_b: str = "k"
    block: tuple[int, int, int] = (64, 64, 32)
    warps: int = 4
    stages: int = 3
    sizes: tuple[int, int, int] = (130, 96, 200)
    cluster: int = 1

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        block = "x".join(map(str, self.block))
        layout = f"{self.major_a}{self.major_b}"
        cluster = f"-cluster{self.cluster}" if self.cluster > 1 else ""
        return f"{self.function}-sm{self.arch}-{kind}-{layout}-{block}-{self.stages}{cluster}"

    exact: ClassVar[frozenset[str]] = frozenset()  # more faults that no place may hide

    @property
    def harmless(self) -> set[str]:
        """Faults that change nothing here."""
        found = set()
        if self.function == "persistent":  # a ticket hands over nothing
            found |= {"a release is relaxed", "a store comes after its release"}
        # A K-major operand has no leading offset, nor has one of a single swizzled panel; the CTAs
        # of a cluster share the columns.
        if self.major_b == "k" or self.block[1] // self.cluster <= 64:
            found.add("the leading offset is 16 bytes off")
        return found

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return a[M,K] and b[K,N], laid out as the flavour says."""
        m, n, k = self.sizes
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(m, k, generator=generator).to(self.dtype)
        b = torch.randn(k, n, generator=generator).to(self.dtype)
        a = a if self.major_a == "k" else a.t().contiguous().t()
        b = b.t().contiguous().t() if self.major_b == "k" else b
        return a, b

    def launch(self) -> Launch:
        """Compile, and return what is to be run."""
        a, b = self.operands()
        (m, n, k), (bm, bn, bk) = self.sizes, self.block
        c = torch.full((m, n), float("nan"), dtype=self.dtype)
        tiles = triton.cdiv(m, bm) * triton.cdiv(n, bn)
        blocks = {"BM": bm, "BN": bn, "BK": bk}
        options = {"num_warps": self.warps, "num_stages": self.stages, "num_ctas": self.cluster}
        options |= {"enable_fp_fusion": True}
        names = ["a", "b", "c"]
        ctas, scratch = tiles, []
        if self.function == "by_pointers":
            values = [a, b, c, m, n, k, *a.stride(), *b.stride()]
            names += ["M", "N", "K", "a_m", "a_k", "b_k", "b_n"]
        elif self.function == "split_k":
            scratch = [torch.full((m, n), float("nan")), torch.zeros(tiles, dtype=torch.int32)]
            values = [a, b, c, *scratch, m, n, k]
            names += ["partial", "flag", "M", "N", "K"]
            ctas = 2 * tiles
        else:
            descriptors = [
                _descriptor(a if self.major_a == "k" else a.t(), bm, bk, self.major_a),
                _descriptor(b.t() if self.major_b == "k" else b, bn, bk, self.major_b),
                TensorDescriptor(c, [m, n], [n, 1], [bm, bn]),
            ]
            if self.function == "persistent":
                scratch = [torch.zeros(1, dtype=torch.int32)]
                ctas = max(tiles // 3, 2)
            else:
                blocks |= {"MAJOR_A": self.major_a, "MAJOR_B": self.major_b}
            values = [*descriptors, *scratch, m, n, k]
            names += [*["ticket"][: len(scratch)], "M", "N", "K"]
        compiled = compile_kernel(
            FUNCTIONS[self.function], self.arch, tuple(values), {**blocks, **options}
        )
        values = dict(zip(names, values, strict=True))
        grid = Grid(ctas * self.cluster, 32 * self.warps, self.cluster, compiled.shared_bytes)
        return Launch(compiled, values, grid, (a, b), c, scratch)


FUNCTIONS = {
    "by_pointers": by_pointers,
    "by_descriptors": by_descriptors,
    "persistent": persistent,
    "split_k": split_k,
}


def _descriptor(matrix: Tensor, rows: int, depth: int, major: str) -> TensorDescriptor:
    box = [rows, depth] if major == "k" else [depth, rows]
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), box)


bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
FLAVOURS = (
    # mma.sync: every layout through ldmatrix, few and many stages, tf32
    Flavour("by_pointers", 80),
    Flavour("by_pointers", 80, fp16, "m", "n", stages=4),
    Flavour("by_pointers", 80, bf16, "k", "n", (128, 64, 32), 8, 2, (300, 130, 136)),
    Flavour("by_pointers", 80, fp32, "k", "n", (64, 64, 16)),
    Flavour("split_k", 80, fp16, block=(64, 32, 32), sizes=(100, 72, 256)),
    # wgmma: from pointers and through TMA, K-major and MN-major, wide tiles
    Flavour("by_pointers", 90, bf16, "k", "n", (64, 64, 64)),
    Flavour("by_pointers", 90, fp16, "m", "k", (64, 128, 64)),
    Flavour("by_descriptors", 90, bf16, block=(64, 64, 64), sizes=(136, 96, 328)),
    Flavour("by_descriptors", 90, fp16, "m", "n", (64, 128, 64), 4, 4, (136, 200, 456)),
    Flavour("by_descriptors", 90, bf16, "m", "k", (128, 64, 64), 8, 2, (264, 72, 200)),
    Flavour("by_descriptors", 90, bf16, "k", "n", (128, 256, 64), 8, 3, (136, 264, 328)),
    Flavour("by_descriptors", 90, bf16, block=(64, 32, 32), stages=5, sizes=(64, 40, 264)),
    Flavour("by_descriptors", 90, bf16, block=(128, 128, 64), sizes=(264, 200, 328), cluster=2),
    Flavour("by_pointers", 90, fp16, "k", "n", (128, 128, 64), sizes=(264, 200, 200), cluster=2),
    Flavour("persistent", 90, bf16, block=(64, 64, 64), sizes=(264, 200, 456)),
    Flavour("persistent", 90, fp16, block=(128, 128, 64), warps=8, sizes=(264, 264, 328)),
    Flavour("split_k", 90, bf16, block=(64, 64, 64), sizes=(100, 72, 256)),
)
