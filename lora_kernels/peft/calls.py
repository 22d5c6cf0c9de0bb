"""What became of every call of a fused layer, counted where it happens."""

from typing import Any

import torch

FUSED = "fused"
# There is no adapter to compute: what the caller asked for is the frozen layer.
DISABLED, MERGED, NO_ADAPTER = "adapters are disabled", "adapters are merged", "no active adapter"
_NOTHING_TO_FUSE = (FUSED, DISABLED, MERGED, NO_ADAPTER)

_COUNTS = "_lora_kernels_calls"  # in a layer's __dict__
_STRICT = "_lora_kernels_strict"
_is_compiling = torch.compiler.is_compiling


class NotFused(RuntimeError):  # noqa: N818 (reads as what happened)
    """A layer would run PEFT's code where `fuse(strict=True)` forbids it; the message says why."""


def note(layer: Any, outcome: str) -> None:
    """Count a call of a layer, unless a compiler is tracing it.

    Raises:
        NotFused: the layer is strict and the outcome is a fallback.
    """
    state = layer.__dict__
    if not _is_compiling():
        counts = state.get(_COUNTS)
        if counts is not None:  # the layer was not unfused meanwhile
            counts[outcome] = counts.get(outcome, 0) + 1
    if outcome not in _NOTHING_TO_FUSE and state.get(_STRICT):
        raise NotFused(f"a layer fused with strict=True cannot run fused: {outcome}")


def watch(layer: Any, strict: bool) -> dict[str, int]:
    """Return the counts of a layer by outcome, which go on from now."""
    state = layer.__dict__
    state[_STRICT] = strict
    counts: dict[str, int] = state.setdefault(_COUNTS, {})
    return counts
