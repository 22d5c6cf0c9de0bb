"""Which backend runs a call: the first that supports it, or exactly the one asked for by name."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

AUTO = "auto"


class BackendUnavailable(RuntimeError):  # noqa: N818 (reads as what happened)
    """No backend, or not the one asked for, can run a call; the message lists every reason."""


class Backend(NamedTuple):
    """One implementation of an operator, declared as plain functions.

    `why_not(problem)` is pure and needs no GPU: it returns the reason the backend cannot run
    `problem`, or None. Dispatch, error messages, test skips and `lora_kernels.info` all read it.
    `forward(call)` and `backward(call)` do the work on one typed object, the operands of a call in
    that direction; an operator's `operands.py` documents them and what is returned.
    `not_auto` is the reason "auto" passes over it whatever the problem, or None.
    """

    name: str
    why_not: Callable[[Any], str | None]
    forward: Callable[[Any], Any]
    backward: Callable[[Any], Any]
    not_auto: str | None = None


def select(backends: Sequence[Backend], problem: Any, requested: str = AUTO) -> Backend:
    """Return the backend that runs `problem`.

    `requested="auto"` takes the first of `backends` whose `why_not` and `not_auto` are None. A
    backend asked for by name never falls back.

    Raises:
        BackendUnavailable: listing the reason of every backend that was considered.
    """
    reasons = []
    for backend in backends:
        if requested in (AUTO, backend.name):
            reason = backend.not_auto if requested == AUTO else None
            reason = reason or backend.why_not(problem)
            if reason is None:
                return backend
            reasons.append(f"{backend.name}: {reason}")
    if not reasons:
        names = ", ".join(backend.name for backend in backends)
        raise BackendUnavailable(f"there is no backend {requested!r}, only {names}")
    raise BackendUnavailable(f"no backend for {problem}: " + "; ".join(reasons))
