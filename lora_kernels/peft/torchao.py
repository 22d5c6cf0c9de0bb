"""The kind with a frozen layer that torchao quantised, its weight only.

torchao's own product leaves the dense W to autograd, which keeps it for the backward; here each
direction makes W anew. Merging stays PEFT's.
"""

from typing import Any

import torch
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor

from lora_kernels.peft.layer import Fused
from lora_kernels.peft.parts import Frozen, kind, parameter
from lora_kernels.peft.patched import not_plain

# Columns of W for each row of x, below which keeping W is not slower than making it twice. On a
# CPU, forward and backward took of PEFT's time, at N = K = 576 and 1536, fp32 and bf16:
# Int8Tensor 0.90-0.99 at M = K/2, 1.04 at K/6; the other one 0.88-1.00 at M >= K, 1.04 at K/2.
_COLUMNS_PER_ROW = {"Int8Tensor": 2, "IntxUnpackedToInt8Tensor": 1}


class FusedTorchaoLinear(Fused, TorchaoLoraLinear):
    """PEFT's layer over an integer weight of torchao (`Int8Tensor`, int1 to int8 `Intx`), fused."""

    plain = TorchaoLoraLinear

    @staticmethod
    def frozen(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
        """Return the integer weight and how to scale it, or why torchao has to."""
        reason = not_plain("base layer", base)
        if reason:
            return reason
        weight = parameter(base, "weight")
        name = type(weight).__name__
        if name not in _COLUMNS_PER_ROW:
            return f"base weight is a {kind(weight)}, not an integer one of torchao"
        if _or_none(weight, "act_quant_kwargs", "activation_quantization") is not None:
            return "torchao quantises x, too"
        if _or_none(weight, "act_pre_scale") is not None:
            return "torchao scales x, too"
        inference = not layer.training and not torch.is_grad_enabled()
        rows = base.in_features // _COLUMNS_PER_ROW[name]
        if x is not None and not inference and x.numel() < rows * base.in_features:
            return f"x has fewer than {rows} rows, for which keeping the dense weight is faster"
        bias = parameter(base, "bias")
        if name == "Int8Tensor":  # it computes in x's dtype, and returns that under autocast, too
            dtype = weight.dtype if x is None else x.dtype
            return Frozen(weight, bias, dtype, lambda dtype: _int8(weight, dtype), y_like_x=True)
        return Frozen(weight, bias, weight.dtype, lambda dtype: _intx(weight).to(dtype))

    @staticmethod
    def inside(base: Any) -> list[Any]:
        """Return the tensors inside the weight, and the bias."""
        weight = base.weight
        flatten = getattr(weight, "__tensor_flatten__", None)
        inner = [getattr(weight, name) for name in flatten()[0]] if flatten else [weight]
        return [*inner, base.bias]

    @staticmethod
    def keep(base: Any) -> Any:
        """Return the quantised weight itself: PEFT replaces it."""
        return base.weight

    @staticmethod
    def restore(base: Any, kept: Any) -> None:
        """Put the quantised weight back."""
        base.weight = kept


def _int8(weight: Any, dtype: torch.dtype) -> Tensor:
    if weight.block_size[-1] < weight.shape[-1]:
        return weight.dequantize().to(dtype)
    # Whole rows torchao multiplies by the integers, and then by the scale: no zero point.
    return weight.qdata.to(dtype, copy=True).mul_(weight.scale.to(dtype))


def _intx(weight: Any) -> Tensor:
    """Return the bits of `weight.dequantize()`, made in place, which takes half the time."""
    rows, columns = weight.block_size
    made = weight.qdata.to(weight.dtype, copy=True)
    blocks = made.view(made.shape[0] // rows, rows, made.shape[1] // columns, columns)
    zero, scale = (t.reshape(blocks.shape[0], 1, -1, 1) for t in (weight.zero_point, weight.scale))
    blocks.sub_(zero.to(weight.dtype)).mul_(scale)
    return made


def _or_none(weight: Any, *names: str) -> Any:
    return next((v for name in names if (v := getattr(weight, name, None)) is not None), None)
