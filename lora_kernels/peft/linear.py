"""The kind with a dense frozen layer: PEFT's `lora.Linear` over `nn.Linear` and its like."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from lora_kernels.distributed import if_trained
from lora_kernels.ops.lora_linear.op import autocasts
from lora_kernels.ops.lora_linear.problem import short
from lora_kernels.peft import kinds
from lora_kernels.peft.layer import Fused
from lora_kernels.peft.parts import Frozen, computed_in, kind, parameter
from lora_kernels.peft.patched import replaced
from lora_kernels.peft.tensor_parallel import split_of
from lora_kernels.peft.usual import usual

# `nn.MultiheadAttention` multiplies by its weight and never calls it.
_NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear


class FusedLinear(Fused, Linear):
    """PEFT's `lora.Linear`, fused, over whatever `kinds.BASES` names or computes as `nn.Linear`."""

    plain = Linear
    usual = staticmethod(usual)

    @staticmethod
    def frozen(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
        """Return the weight and bias of what is a linear layer and nothing else, or why not."""
        own = type(base)
        hands_over = _known.get(own) or _look_up(own)
        if hands_over is None:
            return f"base layer is a {kind(base)}, not a plain nn.Linear"
        reason = replaced("base layer", base)
        if reason:
            return _shards(base, x is not None) or reason
        return hands_over(layer, base, x)


def dense(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
    """Return W[N,K] and bias of a layer that computes `x·Wᵀ + bias`."""
    weight = if_trained(parameter(base, "weight"), base, "weight")
    return Frozen(weight, if_trained(parameter(base, "bias"), base, "bias"), weight.dtype)


def biased(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
    """Return W[N,K] and bias of a layer that adds the bias on its own, as `FalconLinear` does.

    Autocast then leaves the bias alone, and y is of the wider dtype.
    """
    found: Any = dense(layer, base, x)
    weight, bias, *_ = found
    if bias is not None and autocasts(weight):
        autocast = torch.get_autocast_dtype(weight.device.type)
        if computed_in(bias.dtype, autocast) != bias.dtype:
            return f"base layer adds a {short(bias.dtype)} bias to a {short(autocast)} product"
    return found


def transposed(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
    """Return W[N,K] and bias of a layer that stores Wᵀ, as `Conv1D` does."""
    found: Any = dense(layer, base, x)
    return found._replace(weight=found.weight.t())


_HandsOver = Callable[[Any, Any, Tensor | None], Frozen | str]
# A compiler finds here what `fuse` has looked up.
_known: dict[type, _HandsOver] = {nn.Linear: dense}


def _look_up(own: type) -> _HandsOver | None:
    found: _HandsOver | None = kinds.base_of(own)
    if found is None and _is_linear(own):
        found = dense
    if found is not None:
        _known[own] = found
    return found


def _shards(base: Any, now: bool) -> Frozen | None:
    split = split_of(base, now)
    if split is None:
        return None
    weight, bias = base.weight.to_local(), base.bias
    return Frozen(weight, None if bias is None else bias.to_local(), weight.dtype, split=split)


def _is_linear(own: Any) -> bool:
    """Return whether a subclass of `nn.Linear` keeps its forward and its parameters."""
    if not issubclass(own, nn.Linear) or own is _NEVER_CALLED:
        return False
    if own.forward is not nn.Linear.forward:
        return False
    added = own.__mro__[: own.__mro__.index(nn.Linear)]  # a parametrised weight is a property
    overridden = {"weight", "bias", "__call__", "__getattr__", "__getattribute__"}
    return not any(overridden & vars(c).keys() for c in added)
