"""What a backend must leave alone, whatever it computes: torch's global state, and old memory."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch import Backend


def guarded(backend: Backend) -> Backend:
    """Return `backend` with every call watched.

    A call raises AssertionError if it leaves a setting or random state of torch other than it found
    them, which are then put back for those who come after it; or if a result, other than a dx that
    was added to, is no new, contiguous tensor: the caller may write to it, and `torch.compile` was
    told that it is.
    """

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(operands: Any, onto: Tensor | None = None) -> Any:
            before = _state()
            try:
                results = run(operands) if onto is None else run(operands, onto)
            finally:
                changed = _put_back(before)
            assert not changed, f"it changes {' and '.join(changed)}"
            _assert_new(operands, results, onto)
            return results

        return call

    return backend._replace(forward=watched(backend.forward), backward=watched(backend.backward))


def _assert_new(operands: Any, results: Any, onto: Tensor | None) -> None:
    known = [t for t in (*operands, onto) if isinstance(t, Tensor)]
    held = [t.untyped_storage().data_ptr() for t in known]
    for result in results:
        if isinstance(result, Tensor) and result is not onto and result.numel():
            address = result.untyped_storage().data_ptr()
            assert address not in held, "a result shares memory with an operand or another result"
            assert result.is_contiguous(), "a result is not contiguous"
            held.append(address)


# What can be read, and how it is put back.
_STATE: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (torch.get_default_device, torch.set_default_device),
    "the random state": (torch.get_rng_state, torch.set_rng_state),
    "Python's random state": (random.getstate, random.setstate),
    "the grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the deterministic mode": (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda was: torch.use_deterministic_algorithms(was[0], warn_only=was[1]),
    ),
    "the precision of fp32 products": (
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda was: setattr(torch.backends.cuda.matmul, "fp32_precision", was),
    ),
    "CUDA's random state": (
        lambda: torch.cuda.get_rng_state() if _may_ask_cuda() else None,
        lambda was: torch.cuda.set_rng_state(was) if was is not None else None,
    ),
}


def _may_ask_cuda() -> bool:
    return torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing()


def _state() -> dict[str, Any]:
    return {name: read() for name, (read, _) in _STATE.items()}


def _put_back(before: Mapping[str, Any]) -> list[str]:
    """Restore what has changed; return its names."""
    now = _state()
    changed = [name for name, was in before.items() if not _same(was, now[name])]
    for name in changed:
        _STATE[name][1](before[name])
    return changed


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)
