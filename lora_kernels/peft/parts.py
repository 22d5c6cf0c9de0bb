"""The contract of a kind: what a frozen layer and an adapter hand over, and checks they share."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.distributed import dropout
from lora_kernels.peft.tensor_parallel import Split


class Frozen(NamedTuple):
    """What a kind of frozen layer hands over: W[N,K] as it is, or how to make it, and bias[N]."""

    weight: Tensor
    bias: Tensor | None
    # What the layer computes in outside autocast.
    dtype: torch.dtype
    # For a quantised W: makes it in a given dtype.
    dense: Callable[[torch.dtype], Tensor] | None = None
    # Whether y has x's dtype rather than the one computed in; x may then be of a narrower one.
    y_like_x: bool = False
    # How processes share W out; it and the bias are then this process's shards.
    split: Split | None = None


class Factors(NamedTuple):
    """A[R,K] and B[N,R] of a call, and what it adds to every row of y: bias[N] or None."""

    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None


class Adapter(NamedTuple):
    """What a kind of adapter hands over for `s·drop(x)·Aᵀ·Bᵀ`: A[R,K], B[N,R], s and p."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float
    # Makes A and B from the parameters, differentiably, where they are not those two themselves.
    derive: Callable[[], Factors] | None = None
    # Makes y of x, W, the factors and the bias where that is more than one `lora_linear`. It takes
    # a dense W and, under dropout, adapters in the dtype computed in.
    compute: Callable[[Tensor, Tensor, Factors, Tensor | None], Tensor] | None = None
    # Whether `derive` waits for other processes, so that all must call it, whatever their x.
    collective: bool = False
    # How processes share A or B out, as W; these are then this process's shards.
    split: Split | None = None
    # Adapters that are added to y one by one: each drops elements of its own.
    others: tuple["Adapter", ...] = ()

    def factors(self) -> Factors:
        """Return what this call multiplies by."""
        return self.derive() if self.derive else Factors(self.lora_a, self.lora_b, None)

    def added_to(self, y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """Return `y + s·drop(x)·Aᵀ·Bᵀ (+ bias)` out of PyTorch's own operators, as PEFT does."""
        lora_a, lora_b, bias = self.factors()
        x = x.to(lora_a.dtype)
        dropped = dropout(layer, x, self.dropout_p) if self.dropout_p else x
        y = y + F.linear(F.linear(dropped, lora_a), lora_b) * self.scaling
        return y if bias is None else y + bias


class Found(NamedTuple):
    """What a call has to compute, and in which dtype its frozen product is computed."""

    frozen: Frozen
    adapter: Adapter
    dtype: torch.dtype


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


def parameter(module: Any, name: str) -> Any:
    """Return a parameter of a module, or None where it has none by that name."""
    parameters = module._parameters
    # FSDP and DataParallel keep the tensor in a plain attribute while the module runs.
    return parameters[name] if name in parameters else getattr(module, name)


def computed_in(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """Return the dtype that autocast turns `dtype` into for a linear layer."""
    if autocast is None or dtype == torch.float64 or not dtype.is_floating_point:
        return dtype
    return autocast


def kind(thing: object) -> str:
    """Return the full name of a thing's type."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def without_ours(state: dict[str, Any]) -> dict[str, Any]:
    """Return the `__dict__` of a layer less what a fused one keeps there."""
    return {name: value for name, value in state.items() if not name.startswith("_lora_kernels_")}
