"""Which backend runs a call: the first that supports it and is proven, or exactly the one named."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

AUTO = "auto"


class BackendUnavailable(RuntimeError):  # noqa: N818 (reads as what happened)
    """No backend, or not the one asked for, can run a call; the message lists every reason."""


class Backend(NamedTuple):
    """One implementation of an operator, declared as plain functions.

    `why_not(problem)` is pure and needs no GPU: it returns the reason the backend cannot run
    `problem`, or None. Dispatch, error messages, test skips and `lora_kernels.info` all read it.
    `forward(call)` and `backward(call, onto=None)` do the work on one typed object, the operands of
    a call in that direction; an operator's `operands.py` documents them and what is returned.
    `why_not_auto(problem, backward)` is the reason "auto" passes over it for that direction, or
    None; a backend without one needs no proof.
    """

    name: str
    why_not: Callable[[Any], str | None]
    forward: Callable[[Any], Any]
    backward: Callable[..., Any]
    why_not_auto: Callable[[Any, bool], str | None] | None = None

    def unproven(self, problem: Any, backward: bool = False) -> str | None:
        """Return why "auto" passes over this backend although it could run `problem`, or None."""
        return None if self.why_not_auto is None else self.why_not_auto(problem, backward)


_Key = tuple[Any, str, bool]
_chosen: dict[_Key, tuple[Sequence[Backend], Backend]] = {}
_MOST_CHOICES = 4096


def select(
    backends: Sequence[Backend], problem: Any, requested: str = AUTO, *, backward: bool = False
) -> Backend:
    """Return the backend that runs one direction of `problem`, from memory if it was asked before.

    `requested="auto"` takes the first of `backends` that has no objection to `problem` and that
    nothing speaks against on this machine. A backend asked for by name never falls back; where
    something speaks against it, it warns once.

    Raises:
        BackendUnavailable: listing the reason of every backend that was considered.
    """
    key = problem, requested, backward
    known = _chosen.get(key)
    if known is not None and known[0] is backends:
        return known[1]
    backend = _select(backends, problem, requested, backward)
    if len(_chosen) >= _MOST_CHOICES:
        _chosen.clear()
    _chosen[key] = backends, backend
    return backend


def forget() -> None:
    """Ask every backend anew from now on: something that choices depend on has changed."""
    _chosen.clear()


def _select(backends: Sequence[Backend], problem: Any, requested: str, backward: bool) -> Backend:
    reasons = []
    for backend in backends:
        if requested not in (AUTO, backend.name):
            continue
        reason = backend.why_not(problem)
        if reason is None:
            reason = backend.unproven(problem, backward)
            if reason is None:
                return backend
            if requested != AUTO:
                _warn_once(f"the {backend.name} backend is unproven here: {reason}")
                return backend
        reasons.append(f"{backend.name}: {reason}")
    if not reasons:
        names = ", ".join(backend.name for backend in backends)
        raise BackendUnavailable(f"there is no backend {requested!r}, only {names}")
    raise BackendUnavailable(f"no backend for {problem}: " + "; ".join(reasons))


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"lora_kernels: {message}", stacklevel=4)
