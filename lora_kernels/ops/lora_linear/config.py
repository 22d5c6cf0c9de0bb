"""Tile sizes of the one-launch kernels, chosen from the problem alone; nothing is timed to choose.

No configuration has been tuned on a GPU yet; `pick` is an analytic rule, and it works on a device
that nobody has seen.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from lora_kernels.ops.lora_linear.problem import Problem

# Shared memory that one CTA may use, in KiB, by compute capability.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99}
LEAST_SHARED_KIB = 99  # of every capability since 8.0, so of an unknown one
BUSY = 128  # tiles that give every multiprocessor of a large GPU something to do
RANK_TILES = (16, 32, 64, 128)


@dataclass(frozen=True)
class TileConfig:
    """Compile-time sizes of one kernel.

    A main or dx tile is `bm` x `bn` and its contraction advances by `bk`. A P or Q item is `bm` x
    `br`. A da or db item is `bk` x `br` and its contraction advances by `bm`, so that the same
    blocks of x and dy serve all items. `group` row blocks share the L2 cache (`schedule.tile`).
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    br: int = 64
    group: int = 8

    @property
    def bs(self) -> int:
        """The advance of a tile's contraction over the rank: the fewer, the fewer are wasted."""
        return min(self.br, 32)

    @property
    def ctas(self) -> int:
        """CTAs worth launching per multiprocessor: its registers hold 8 warps of these kernels."""
        return max(8 // self.warps, 1)

    def shared_bytes(self, itemsize: int, adapter_itemsize: int) -> int:
        """Return the shared memory that the pipelined loops take: `stages` blocks of two operands.

        The largest of the main or dx tile, the P or Q item and the da or db item.
        """
        wide = self.bm * self.bk * itemsize
        main = wide + self.bn * self.bk * itemsize
        narrow = wide + max(self.bm, self.bk) * self.br * adapter_itemsize
        return self.stages * max(main, narrow)


# Largest first: the fewer bytes a tile loads per product, the better, if there are tiles enough.
_16_BIT = (
    TileConfig(128, 256, 64, warps=8, stages=4),
    TileConfig(128, 128, 64, warps=8, stages=3),
    TileConfig(128, 128, 32, warps=8, stages=3),
    TileConfig(64, 128, 64, warps=4, stages=3),
    TileConfig(64, 64, 64, warps=4, stages=3),
    TileConfig(16, 64, 64, warps=4, stages=4),
)
# Without tensor cores, unless TF32 is on; longer blocks do not fit the registers.
_32_BIT = (
    TileConfig(128, 64, 16, warps=8, stages=3),
    TileConfig(64, 64, 16, warps=4, stages=3),
    TileConfig(16, 64, 32, warps=4, stages=3),
)


def in_eights(r: int, pitch: int) -> bool:
    """Return whether rows of R and of `pitch` elements start at 16 bytes, if the first one does.

    Triton itself specialises on multiples of 16 alone, and R = 8 would move 2 bytes at a time.
    """
    return r % 8 == 0 and pitch % 8 == 0


def candidates(problem: Problem) -> Iterator[TileConfig]:
    """Yield the configurations to consider for `problem`, largest tiles first."""
    br = next((t for t in RANK_TILES if problem.r <= t), RANK_TILES[-1])
    if problem.adapter_dtype.itemsize == 4:
        br = min(br, 32)  # fp32, on the FMA units or split in two, takes twice the registers
    blackwell = problem.arch is not None and 100 <= problem.arch < 120
    if blackwell and (problem.dropout or problem.dtype.itemsize == 4):
        # Wider, one register of a loop is spilled: making the mask, or in TF32 by Triton 3.6.
        br = min(br, 32 if problem.dtype.itemsize == 2 else 16)
    for config in _16_BIT if problem.dtype.itemsize == 2 else _32_BIT:
        # With tcgen05 the accumulators of 256 columns leave too few registers: the loops spill.
        if not (blackwell and config.bn == 256):
            yield dataclasses.replace(config, br=br)


def fits(config: TileConfig, problem: Problem) -> bool:
    """Return whether the device has the shared memory that `config` takes."""
    limit = SHARED_KIB.get(problem.arch or 0, LEAST_SHARED_KIB) * 1024
    taken = config.shared_bytes(problem.dtype.itemsize, problem.adapter_dtype.itemsize)
    return taken + 1024 <= limit  # 1 KiB for the barriers


@functools.lru_cache(maxsize=4096)
def pick(problem: Problem, *, backward: bool = False) -> TileConfig:
    """Return the configuration for one direction of `problem`.

    The largest tiles that fit, are no taller than M demands, and number at least `BUSY`; if no
    size gives that many, the smallest.
    """
    columns = problem.k if backward else problem.n
    config = None
    for config in candidates(problem):
        few = -(-problem.m // config.bm) * -(-columns // config.bn) < BUSY
        if fits(config, problem) and not few and config.bm < 2 * max(problem.m, 8):
            return config
    assert config is not None
    return config
