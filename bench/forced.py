"""Makes the Triton backend use a given tile and few CTAs, as only large problems else would."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from lora_kernels.ops.lora_linear import triton
from lora_kernels.ops.lora_linear.config import TileConfig, candidates, fits, pick
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.testing import Case, bf16, fp16, fp32

FEW_CTAS = 2  # so that every CTA takes several items of a small case
# For every tile: aligned, so that tensor cores, TMA and vectors are used, in each class of ranks;
# and ragged against all tiles. The first matter most: a time limit cuts off the others.
CASES = (
    Case(300, 512, 512, 16, bf16, bias=True),
    Case(300, 512, 512, 64, bf16, dropout_p=0.3),
    Case(300, 512, 512, 8, bf16),
    Case(300, 512, 512, 16, bf16, fp32, dropout_p=0.3),
    Case(300, 264, 136, 24, fp16, bias=True, dropout_p=0.3),
    Case(300, 131, 89, 5, bf16, bias=True),
    Case(300, 512, 512, 64, fp32),
    Case(300, 512, 512, 8, fp32),
    Case(300, 512, 512, 200, bf16, bias=True),
    Case(300, 131, 89, 24, fp32, bias=True, dropout_p=0.3),
    Case(300, 512, 512, 64, bf16),
    Case(300, 264, 136, 24, fp16),
)


class Tile(NamedTuple):
    """A tile of one direction, and how its products take fp32 operands."""

    config: TileConfig
    backward: bool = False
    tf32: bool = False

    def __str__(self) -> str:
        words = ["backward" if self.backward else "forward", *["tf32"] * self.tf32]
        return f"{' '.join(words)} {self.config}"

    def judge(self, case: Case) -> Case:
        """Return `case` with no more gradients than this tile has a part in."""
        return case if self.backward else case._replace(needs=(False, False, False))


@contextlib.contextmanager
def forced(tile: Tile | None = None, ctas: int | None = None) -> Iterator[None]:
    """Use `tile` and `ctas` for every launch inside; None leaves the backend its choice.

    The other direction keeps its choice. What else multiplies fp32 inside does it as `tile` does.
    """
    replaced: dict[str, Any] = {}
    if tile is not None:
        replaced["pick"] = _always(tile.config, tile.backward)
    if ctas is not None:
        replaced["_ctas"] = _at_most(ctas)
    kept = {name: getattr(triton, name) for name in replaced}
    products = torch.backends.cuda.matmul
    precision = products.fp32_precision
    for name, function in replaced.items():
        setattr(triton, name, function)
    if tile is not None:
        products.fp32_precision = "tf32" if tile.tf32 else "ieee"
    try:
        yield
    finally:
        products.fp32_precision = precision
        for name, function in kept.items():
            setattr(triton, name, function)


# One function for one choice: the backend may keep plans by the functions that made them.
@functools.cache
def _always(config: TileConfig, in_backward: bool) -> Callable[..., TileConfig]:
    def choose(problem: Problem, *, backward: bool = False, tf32: bool = False) -> TileConfig:
        chosen = backward == in_backward
        return config if chosen else pick(problem, backward=backward, tf32=tf32)

    return choose


@functools.cache
def _at_most(ctas: int) -> Callable[..., int]:
    return lambda items, *_: min(items, ctas)


def tiles(problem: Problem, *, backward: bool = False, tf32: bool = False) -> list[Tile]:
    """Return the tiles that `problem` may get on its device in a direction, largest first."""
    how = {"backward": backward, "tf32": tf32}
    return [Tile(c, **how) for c in candidates(problem, **how) if fits(c, problem, **how)]


def every_tile(problem: Problem) -> list[Tile]:
    """Return the tiles that `problem` may get on its device at all."""
    precisions = (False, True) if problem.dtype == fp32 else (False,)
    return [
        tile
        for tf32 in precisions
        for backward in (False, True)
        for tile in tiles(problem, backward=backward, tf32=tf32)
    ]
