"""The kind with a dense frozen layer: PEFT's `lora.Linear` over `nn.Linear` and its like."""

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.distributed import if_trained
from lora_kernels.peft.layer import Fused
from lora_kernels.peft.parts import Frozen, kind, parameter, replaced
from lora_kernels.peft.tensor_parallel import split_of

# Subclasses that compute `x·Wᵀ + bias` in a forward of their own.
_ALIKE = {"transformers.models.falcon.modeling_falcon.FalconLinear"}
# `nn.MultiheadAttention` multiplies by its weight and never calls it.
_NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear


class FusedLinear(Fused, Linear):
    """PEFT's `lora.Linear`, fused: W[N,K] as it is stored, or transposed for a `Conv1D`."""

    plain = Linear

    @staticmethod
    def frozen(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
        """Return the weight and bias of what is a linear layer and nothing else, or why not."""
        own = type(base)
        if own is not nn.Linear and own is not Conv1D and not _is_linear(base):
            return f"base layer is a {kind(base)}, not a plain nn.Linear"
        reason = replaced("base layer", base)
        if reason:
            return _shards(base, x is not None) or reason
        weight = if_trained(parameter(base, "weight"), base, "weight")
        bias = if_trained(parameter(base, "bias"), base, "bias")
        if own is Conv1D:
            weight = weight.t()
        return Frozen(weight, bias, weight.dtype)


def _shards(base: Any, now: bool) -> Frozen | None:
    split = split_of(base, now)
    if split is None:
        return None
    weight, bias = base.weight.to_local(), base.bias
    return Frozen(weight, None if bias is None else bias.to_local(), weight.dtype, split=split)


def _is_linear(base: Any) -> bool:
    """Return whether a subclass of `nn.Linear` keeps its forward and its parameters."""
    own = type(base)
    if not issubclass(own, nn.Linear) or own is _NEVER_CALLED:
        return False
    if own.forward is not nn.Linear.forward and kind(base) not in _ALIKE:
        return False
    added = own.__mro__[: own.__mro__.index(nn.Linear)]  # a parametrised weight is a property
    overridden = {"weight", "bias", "__call__", "__getattr__", "__getattribute__"}
    return not any(overridden & vars(c).keys() for c in added)
