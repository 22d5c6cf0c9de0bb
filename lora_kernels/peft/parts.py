"""The contract of a kind: what a frozen layer and an adapter hand over, and what both need."""

from collections.abc import Callable
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
    # Makes A and B from the parameters, differentiably, where they are not those two themselves:
    # A then says in which dtype, and whether x is saved for a gradient.
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


def without_ours(state: dict[str, Any]) -> dict[str, Any]:
    """Return the `__dict__` of a layer less what a fused one keeps there."""
    return {name: value for name, value in state.items() if not name.startswith("_lora_kernels_")}
