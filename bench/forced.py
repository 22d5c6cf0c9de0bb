"""Makes the Triton backend use a given tile and few CTAs, as only large problems else would."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from lora_kernels.ops.lora_linear import triton
from lora_kernels.ops.lora_linear.config import TileConfig, candidates, fits
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
)


@contextlib.contextmanager
def forced(config: TileConfig | None = None, ctas: int | None = None) -> Iterator[None]:
    """Use `config` and `ctas` for every launch inside; None leaves the backend its choice."""
    replaced: dict[str, Any] = {}
    if config is not None:
        replaced["pick"] = _always(config)
    if ctas is not None:
        replaced["_ctas"] = _at_most(ctas)
    kept = {name: getattr(triton, name) for name in replaced}
    for name, function in replaced.items():
        setattr(triton, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(triton, name, function)


# One function for one choice: the backend may keep plans by the functions that made them.
@functools.cache
def _always(config: TileConfig) -> Callable[..., TileConfig]:
    return lambda *_, **__: config


@functools.cache
def _at_most(ctas: int) -> Callable[..., int]:
    return lambda items, *_: min(items, ctas)


def tiles(problem: Problem) -> list[TileConfig]:
    """Return every tile that `problem` may get on its device, largest first."""
    return [config for config in candidates(problem) if fits(config, problem)]
