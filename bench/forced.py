"""Makes the Triton backend use a given tile and a given number of CTAs."""

import contextlib
from collections.abc import Iterator
from typing import Any

from lora_kernels.ops.lora_linear import triton
from lora_kernels.ops.lora_linear.config import TileConfig, candidates, fits
from lora_kernels.ops.lora_linear.problem import Problem

# Of the smallest launch with a queue: every CTA takes several items.
FEW_CTAS = 2


@contextlib.contextmanager
def forced(config: TileConfig | None = None, ctas: int | None = None) -> Iterator[None]:
    """Use `config` and `ctas` for every launch inside; None leaves the backend its choice."""
    replaced: dict[str, Any] = {}
    if config is not None:
        replaced["pick"] = lambda *_, **__: config
    if ctas is not None:
        replaced["_ctas"] = lambda items, *_: min(items, ctas)
    kept = {name: getattr(triton, name) for name in replaced}
    for name, function in replaced.items():
        setattr(triton, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(triton, name, function)


def tiles(problem: Problem) -> list[TileConfig]:
    """Return every tile that `problem` may get on its device, largest first."""
    return [config for config in candidates(problem) if fits(config, problem)]
