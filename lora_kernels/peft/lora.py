"""The plain adapter: LoRA with or without a bias of its own."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from lora_kernels.ops.lora_linear.validate import FP32_MAX
from lora_kernels.peft.parts import Adapter, Factors, kind, not_plain, parameter, short

_DROPOUT = (nn.Identity, nn.Dropout)
_TENSOR = (nn.Parameter, Tensor)


def plain(
    layer: Any, name: str, types: Collection[type[nn.Module]] = (nn.Linear,)
) -> Adapter | str:
    """Return what an adapter hands over whose A and B are modules of `types`, or why it cannot.

    It runs at every call, so it reads `_modules` and `_parameters`: `nn.Module.__getattr__` costs
    about a microsecond each time, a dictionary a twentieth of that.
    """
    children = layer._modules
    lora_a = children["lora_A"]._modules[name]
    lora_b = children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    reason = (
        not_plain("lora_A", lora_a, types)
        or not_plain("lora_B", lora_b, types)
        or not_plain("lora_dropout", dropout, _DROPOUT)
    )
    if reason:
        return reason
    scaling = layer.scaling[name]
    if not isinstance(scaling, (int, float)) or isinstance(scaling, bool):
        return f"scaling is a {kind(scaling)}, not a number"
    if not abs(scaling) <= FP32_MAX:
        return f"scaling is {scaling}"
    dropout_p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    if dropout_p >= 1:
        return "the dropout probability is 1"
    a, b = parameter(lora_a, "weight"), parameter(lora_b, "weight")
    if type(a) not in _TENSOR:
        return f"lora_A is a {kind(a)}, not a plain tensor"
    if type(b) not in _TENSOR:
        return f"lora_B is a {kind(b)}, not a plain tensor"
    if b.dtype != a.dtype:
        return f"lora_A is {short(a.dtype)}, lora_B {short(b.dtype)}"
    bias = lora_b._parameters.get("bias")
    if bias is None:
        return Adapter(a, b, scaling, dropout_p)
    if bias.dtype != a.dtype:
        return f"the bias of lora_B is {short(bias.dtype)}"
    return Adapter(a, b, scaling, dropout_p, lambda: Factors(a, b, bias * scaling))
