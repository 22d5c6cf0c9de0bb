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

    def shared_bytes(self, problem: Problem, *, backward: bool = False, tf32: bool = False) -> int:
        """Return the shared memory that the loops take, of which the largest counts.

        Each holds some blocks of both operands; an item also the one it masks or splits in two.
        """
        wide, narrow = problem.dtype.itemsize, problem.adapter_dtype.itemsize

        def blocks(rows: int) -> int:
            # wgmma and tcgen05 read a block where it is, mma from registers: one fewer is held.
            held = _asynchronous(problem) and rows >= 64 and (wide == 2 or tf32)
            return self.stages if held else self.stages - 1

        step = max(self.bk * wide, self.bs * narrow)  # of the main loop and of the rank loop
        loops = [blocks(self.bm) * (self.bm + self.bn) * step]
        left = self.bm * self.bk * wide
        for rows, depth in ((self.bm, self.bk), (self.bk, self.bm))[: 1 + backward]:
            right = depth * self.br
            made = 2 * right * wide if narrow > wide else left * problem.dropout
            loops.append(blocks(rows) * (left + right * narrow) + made)
        return max(loops)


# Largest first: the fewer bytes a tile loads per product, the better, if there are tiles enough.
_SMALL = (
    TileConfig(64, 128, 64, warps=4, stages=3),
    TileConfig(64, 64, 64, warps=4, stages=3),
    TileConfig(16, 32, 256, warps=4, stages=4),  # few rows: bytes in flight are what counts
)
_WGMMA = (
    TileConfig(128, 256, 64, warps=8, stages=4, group=16),
    TileConfig(128, 128, 64, warps=4, stages=3),
    *_SMALL,
)
_TCGEN05 = (
    TileConfig(128, 256, 64, warps=8, stages=4, group=16),
    TileConfig(128, 128, 64, warps=8, stages=3),
    TileConfig(128, 128, 32, warps=8, stages=4),
    *_SMALL,
)
_MMA = (
    TileConfig(128, 256, 64, warps=8, stages=3, group=16),
    TileConfig(128, 128, 32, warps=4, stages=4),
    TileConfig(128, 128, 64, warps=8, stages=3),
    TileConfig(128, 128, 32, warps=8, stages=4),
    *_SMALL,
)
# Without tensor cores longer blocks do not fit the registers.
_FMA = (
    TileConfig(128, 64, 16, warps=8, stages=3),
    TileConfig(64, 64, 16, warps=4, stages=3),
    TileConfig(16, 64, 32, warps=4, stages=3),
)
_TF32 = (TileConfig(128, 128, 32, warps=8, stages=3), *_FMA[1:])


def in_eights(r: int, pitch: int) -> bool:
    """Return whether rows of R and of `pitch` elements start at 16 bytes, if the first one does.

    Triton itself specialises on multiples of 16 alone, and R = 8 would move 2 bytes at a time.
    """
    return r % 8 == 0 and pitch % 8 == 0


def candidates(
    problem: Problem, *, backward: bool = False, tf32: bool = False
) -> Iterator[TileConfig]:
    """Yield the configurations to consider for one direction of `problem`, largest tiles first."""
    sizes: tuple[TileConfig, ...]
    if problem.dtype.itemsize == 4:
        # da masks a block of x in registers: beside 128 columns, 584 bytes of stack.
        sizes = _TF32 if tf32 and not (backward and problem.dropout) else _FMA
    elif _tcgen05(problem):
        sizes = _TCGEN05
    else:
        sizes = _WGMMA if _asynchronous(problem) else _MMA
    br = next((t for t in RANK_TILES if problem.r <= t), RANK_TILES[-1])
    if problem.adapter_dtype.itemsize == 4:
        br = min(br, 32)  # fp32, on the FMA units or split in two, takes twice the registers
    if problem.dropout and (_tcgen05(problem) or problem.dtype.itemsize == 4):
        br = min(br, 64 // problem.dtype.itemsize)  # wider, making the mask spills
    for config in sizes:
        if not _spills(config, problem, br, backward):
            # Blocks of 256 leave little room for the narrow operand's.
            most = RANK_TILES[-1] if config.bk <= 64 else 64 // problem.adapter_dtype.itemsize
            yield dataclasses.replace(config, br=min(br, most))


def _spills(config: TileConfig, problem: Problem, br: int, backward: bool) -> bool:
    """Return whether the loops of `config` are known to spill registers beside the tensor cores.

    Read off the code of Triton 3.6 and 3.9, whichever is worse (README.md, "Tile sizes").
    """
    masked, split = problem.dropout, problem.adapter_dtype.itemsize == 4
    if problem.arch == 90 or problem.dtype.itemsize == 4 or config.bm < 128:
        return False
    if config.bn == 256:
        beside_tma = (problem.arch or 0) >= 120 and br > 16
        return backward or beside_tma or (masked and not _tcgen05(problem))
    if config.warps == 8:
        return masked and split and config.bk == 64
    if backward:
        return masked or split or br > 32
    return masked and (split or br > 16)


def fits(
    config: TileConfig, problem: Problem, *, backward: bool = False, tf32: bool = False
) -> bool:
    """Return whether the device has the shared memory that `config` takes."""
    limit = SHARED_KIB.get(problem.arch or 0, LEAST_SHARED_KIB) * 1024
    taken = config.shared_bytes(problem, backward=backward, tf32=tf32)
    return taken + 1024 <= limit  # 1 KiB for the barriers


@functools.lru_cache(maxsize=4096)
def pick(problem: Problem, *, backward: bool = False, tf32: bool = False) -> TileConfig:
    """Return the configuration for one direction of `problem`, fp32 multiplied as TF32 or not.

    The largest tiles that fit, are no taller than M demands, and number at least `BUSY`; if no
    size gives that many, the smallest.
    """
    columns = problem.k if backward else problem.n
    config = None
    for config in candidates(problem, backward=backward, tf32=tf32):
        few = -(-problem.m // config.bm) * -(-columns // config.bn) < BUSY
        fit = fits(config, problem, backward=backward, tf32=tf32)
        if fit and not few and config.bm < 2 * max(problem.m, 8):
            return config
    assert config is not None
    return config


def _asynchronous(problem: Problem) -> bool:
    """Return whether products run beside the instructions that follow: wgmma and tcgen05."""
    return problem.arch is not None and 90 <= problem.arch < 120


def _tcgen05(problem: Problem) -> bool:
    return _asynchronous(problem) and problem.arch != 90
