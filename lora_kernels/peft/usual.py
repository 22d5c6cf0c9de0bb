"""What most calls are, found in a third of the time: one plain adapter beside a plain `nn.Linear`.

What is asked at a call costs several times what it seems to, for by the time a layer is called
again the caches hold the others'. So the usual answer is looked for first, without reasons.
"""

from typing import Any

import torch
from torch import nn

from lora_kernels.ops.lora_linear.op import autocasts
from lora_kernels.ops.lora_linear.validate import DTYPES, FP32_MAX, PLAIN_TYPES
from lora_kernels.peft.parts import Adapter, Found, Frozen, computed_in
from lora_kernels.peft.patched import altered, patched


def usual(layer: Any, x: Any) -> Found | None:
    """Return what a call of a layer with x alone computes, or None where only `find` can tell."""
    parts = usual_parts(layer, x)
    if parts is None:
        return None
    weight, bias, a, b, scaling, dropout_p, dtype = parts
    return Found(Frozen(weight, bias, weight.dtype), Adapter(a, b, scaling, dropout_p), dtype)


def usual_parts(layer: Any, x: Any) -> tuple[Any, ...] | None:
    """Return W, bias, A, B, s, p and the dtype to compute in: named tuples cost as much again."""
    names, children = layer._active_adapter, layer.__dict__["_modules"]
    name = names if type(names) is str else _only(names)
    first = children["lora_A"]._modules
    if (
        name not in first
        or name in layer.lora_variant
        or layer._disable_adapters
        or layer.merged_adapters
    ):
        return None
    base: Any = children["base_layer"]
    lora_a: Any = first[name]
    lora_b: Any = children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    if (
        type(base) is not nn.Linear
        or type(lora_a) is not nn.Linear
        or type(lora_b) is not nn.Linear
        or type(dropout) not in _DROPOUT
        or altered("", base)
        or altered("", lora_a)
        or altered("", lora_b)
        or altered("", dropout)
        or patched(nn.Linear)
        or patched(type(dropout))
    ):
        return None
    weight: Any = base._parameters.get("weight")
    bias: Any = base._parameters.get("bias", base)
    a: Any = lora_a._parameters.get("weight")
    b: Any = lora_b._parameters.get("weight")
    if not PLAIN_TYPES.issuperset((type(x), type(weight), type(a), type(b))):
        return None
    autocast = None
    if torch._C._is_any_autocast_enabled() and autocasts(weight):
        autocast = torch.get_autocast_dtype(weight.device.type)
    dtype = computed_in(weight.dtype, autocast)
    if (
        weight.requires_grad
        or computed_in(x.dtype, autocast) != dtype
        or dtype not in DTYPES
        or (bias is not None and not _fits(bias, dtype, autocast))
        or b.dtype != a.dtype
        or lora_a._parameters.get("bias", lora_a) is not None
        or lora_b._parameters.get("bias", lora_b) is not None
        or x.is_nested
        or x.layout is not torch.strided
        or weight.layout is not torch.strided
        or a.layout is not torch.strided
        or b.layout is not torch.strided
    ):
        return None
    if a.dtype != dtype and not (
        a.dtype == torch.float32 and dtype.itemsize < 4 and layer.cast_input_dtype_enabled
    ):
        return None
    scaling, dropout_p = layer.scaling[name], 0.0
    if type(dropout) is nn.Dropout and dropout.training:
        dropout_p = dropout.p
    if type(scaling) not in _NUMBERS or not abs(scaling) <= FP32_MAX or dropout_p >= 1:
        return None
    return weight, bias, a, b, scaling, dropout_p, dtype


def _only(names: Any) -> Any:
    return names[0] if type(names) is list and len(names) == 1 else None


def _fits(bias: Any, dtype: torch.dtype, autocast: torch.dtype | None) -> bool:
    return (
        type(bias) in PLAIN_TYPES
        and not bias.requires_grad
        and bias.layout is torch.strided
        and computed_in(bias.dtype, autocast) == dtype
    )


_DROPOUT = frozenset((nn.Identity, nn.Dropout))
_NUMBERS = frozenset((float, int))
