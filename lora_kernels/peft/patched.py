"""What a module's call may run beside its class's own forward: hooks, and patches of any kind."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.peft.parts import kind


def not_plain(
    part: str, module: nn.Module, types: Collection[type[nn.Module]] = (nn.Linear,)
) -> str | None:
    """Return why a module cannot be computed without calling it, or None."""
    if type(module) not in types:
        return f"{part} is a {kind(module)}, not a plain nn.{[*types][-1].__name__}"
    return replaced(part, module)


def altered(part: str, module: nn.Module) -> str | None:
    """Return why calling a module may run more than its class's own forward, or None."""
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return f"{part} has hooks, which only its own call would run"
    if "forward" in state:
        return f"the forward of {part} was replaced on the instance"
    return None


def replaced(part: str, module: nn.Module) -> str | None:
    """Return why calling a module may run more than the forward its class was defined with."""
    reason = altered(part, module)
    if reason:
        return reason
    return patched(type(module))


_forwards: dict[Any, Any] = {}
_called: Any = nn.Module._wrapped_call_impl  # is `__call__`, whatever was patched before us


def patched(own: Any) -> str | None:
    """Return that a class is called, or goes forward, in another way than it was defined to."""
    if own not in _forwards:
        owner = next(c for c in own.__mro__ if "forward" in vars(c))
        source = getattr(owner.forward, "__globals__", {})  # which no `functools.wraps` changes
        _forwards[own] = owner.forward if source.get("__name__") == owner.__module__ else None
    if own.forward is not _forwards[own]:
        return f"{own.__name__}.forward was patched"
    if issubclass(own, nn.Module) and own.__call__ is not _called:
        return f"{own.__name__}.__call__ was patched"
    return None


def _as_defined(function: Any, module: str) -> Any:
    """Return a function if the module of that name defines it, else None."""
    return function if function.__globals__["__name__"] == module else None


_linear = torch._C._nn.linear
_dropout = _as_defined(F.dropout, "torch.nn.functional")
_call_impl = _as_defined(nn.Module._call_impl, "torch.nn.modules.module")


def patched_functions() -> str | None:
    """Return which function that every plain module calls was patched, or None."""
    if F.linear is not _linear:
        return "torch.nn.functional.linear was patched"
    if F.dropout is not _dropout:
        return "torch.nn.functional.dropout was patched"
    return None if nn.Module._call_impl is _call_impl else "nn.Module._call_impl was patched"


for _class in (nn.Linear, nn.Dropout, nn.Identity):
    patched(_class)  # before a compiler traces it
