"""The contract of a kind: what a frozen layer and an adapter hand over, and checks they share."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_DROPOUT = (nn.Identity, nn.Dropout)


class Frozen(NamedTuple):
    """What a kind of frozen layer hands over: W[N,K] as it is, or how to make it, and bias[N]."""

    weight: Tensor
    bias: Tensor | None
    # What the layer computes in outside autocast.
    dtype: torch.dtype
    # For a quantised W: makes it in a given dtype. Such a layer takes x of a narrower dtype, too.
    dense: Callable[[torch.dtype], Tensor] | None = None
    # Whether y has x's dtype rather than the one computed in.
    y_like_x: bool = False


class Adapter(NamedTuple):
    """What an adapter hands over for `s·drop(x)·Aᵀ·Bᵀ`: A[R,K], B[N,R], s and p."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float


def adapter_of(layer: Any, name: str) -> Adapter | str:
    """Return what one adapter of a PEFT layer hands over, or why it cannot.

    It runs at every call, so it reads `_modules` and `_parameters`: `nn.Module.__getattr__` costs
    about a microsecond each time, a dictionary a twentieth of that.
    """
    children = layer._modules
    if name not in children["lora_A"]._modules:
        return f"there is no adapter {name!r} in this layer"
    if name in layer.lora_variant:
        return f"variant {type(layer.lora_variant[name]).__name__}"
    lora_a, lora_b, dropout = (
        children[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout")
    )
    reason = (
        not_plain("lora_A", lora_a)
        or not_plain("lora_B", lora_b)
        or not_plain("lora_dropout", dropout, _DROPOUT)
    )
    if reason:
        return reason
    scaling = layer.scaling[name]
    if not isinstance(scaling, (int, float)):
        return f"scaling is a {kind(scaling)}, not a number"
    if parameter(lora_a, "bias") is not None or parameter(lora_b, "bias") is not None:
        return "the adapter has a bias (lora_bias)"
    dropout_p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    if dropout_p >= 1:
        return "the dropout probability is 1"
    return Adapter(parameter(lora_a, "weight"), parameter(lora_b, "weight"), scaling, dropout_p)


def not_plain(
    part: str, module: nn.Module, types: Collection[type[nn.Module]] = (nn.Linear,)
) -> str | None:
    """Return why a module cannot be computed without calling it, or None."""
    if type(module) not in types:
        return f"{part} is a {kind(module)}, not a plain nn.{[*types][-1].__name__}"
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


def parameter(module: Any, name: str) -> Any:
    """Return a parameter of a module, or None where it has none by that name."""
    parameters = module._parameters
    # FSDP and DataParallel keep the tensor in a plain attribute while the module runs.
    return parameters[name] if name in parameters else getattr(module, name)


def kind(thing: object) -> str:
    """Return the full name of a thing's type."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")
