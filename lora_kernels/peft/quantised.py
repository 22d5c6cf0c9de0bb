"""The kinds with a frozen layer that bitsandbytes quantised to 4 or 8 bits.

Each direction dequantises W into a transient of the dtype it computes in, as bitsandbytes' own
training does; the graph keeps the quantised tensor. Merging stays PEFT's.
"""

from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import Tensor

from lora_kernels.peft.layer import Fused
from lora_kernels.peft.parts import Frozen, kind, parameter
from lora_kernels.peft.patched import not_plain

_4BIT = (bnb.nn.LinearFP4, bnb.nn.LinearNF4, bnb.nn.Linear4bit)
# On a GPU, bitsandbytes multiplies by the 4-bit weight itself up to some number of rows.
_PACKED_ROWS = 64


class FusedLinear4bit(Fused, Linear4bit):
    """PEFT's layer over `bitsandbytes.nn.Linear4bit` (NF4, FP4, nested or not), fused."""

    plain = Linear4bit

    @staticmethod
    def left_to_base(layer: Any, x: Tensor) -> str | None:
        """Return why bitsandbytes has to multiply x, if it does."""
        if not layer.training and not torch.is_grad_enabled():
            return "in inference bitsandbytes may multiply by the 4-bit weight itself"
        if x.is_cuda and x.numel() <= _PACKED_ROWS * layer.in_features:
            return "for a few rows bitsandbytes multiplies by the 4-bit weight itself"
        return None

    @staticmethod
    def frozen(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
        """Return the packed weight and how to unpack it, or why bitsandbytes has to."""
        reason = not_plain("base layer", base, _4BIT)
        if reason:
            return reason
        weight = parameter(base, "weight")
        # A weight that FSDP gathers is a plain tensor; the layer holds the same state for it.
        state = getattr(weight, "quant_state", None) or base.quant_state
        if state is None:
            return f"base weight is a {kind(weight)} without its quantisation state"
        if tuple(state.shape) != (base.out_features, base.in_features):
            return f"base weight was quantised as {tuple(state.shape)}"
        if getattr(state, "packing_format_for_cpu", False):
            return "base weight is repacked for inference on this CPU, which passes no gradient"
        reason = None if x is None else FusedLinear4bit.left_to_base(layer, x)
        if reason:
            return reason
        dtype = base.compute_dtype
        if not base.compute_type_is_set or dtype is None:  # then x decides
            dtype = state.dtype if x is None else x.dtype

        def dense(dtype: torch.dtype) -> Tensor:
            absmax = state.absmax
            if state.nested:
                absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
            return torch.ops.bitsandbytes.dequantize_4bit.default(
                weight.view(-1, 1), absmax, state.blocksize, state.quant_type, state.shape, dtype
            )

        return Frozen(weight, parameter(base, "bias"), dtype, dense, y_like_x=True)

    @staticmethod
    def keep(base: Any) -> Any:
        """Return the packed weight itself: PEFT replaces it."""
        return base.weight

    @staticmethod
    def restore(base: Any, kept: Any) -> None:
        """Put the packed weight back."""
        base.weight, base.quant_state = kept, kept.quant_state


class FusedLinear8bitLt(Fused, Linear8bitLt):
    """PEFT's layer over `bitsandbytes.nn.Linear8bitLt`, fused where it does not quantise x."""

    plain = Linear8bitLt

    @staticmethod
    def left_to_base(layer: Any, x: Tensor) -> str | None:
        """Return why bitsandbytes has to multiply x, if it does."""
        if x.device.type not in ("cpu", "xpu"):
            return "bitsandbytes quantises x, too"
        if not layer._modules["base_layer"].training:
            return "bitsandbytes quantises x, too, outside training"
        return None

    @staticmethod
    def frozen(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
        """Return the int8 weight and how to scale it, or why bitsandbytes has to."""
        reason = not_plain("base layer", base, (bnb.nn.Linear8bitLt,))
        if reason:
            return reason
        weight = parameter(base, "weight")
        state = base.state
        if state.has_fp16_weights:
            return "base weight is quantised anew at every call"
        if weight.device.type not in ("cpu", "xpu"):
            return "bitsandbytes quantises x, too"
        reason = None if x is None else FusedLinear8bitLt.left_to_base(layer, x)
        if reason:
            return reason
        values, scales = _held(base, "CB"), _held(base, "SCB")
        if values is None or scales is None:
            return "base weight is not quantised yet"

        def dense(dtype: torch.dtype) -> Tensor:
            return values.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))

        dtype = torch.float32 if x is None else x.dtype
        return Frozen(weight, parameter(base, "bias"), dtype, dense)

    @staticmethod
    def keep(base: Any) -> Any:
        """Return the int8 values and their scales: PEFT replaces both."""
        return {name: _held(base, name) for name in ("CB", "SCB")}

    @staticmethod
    def restore(base: Any, kept: Any) -> None:
        """Put a weight of those values back, from which the next call takes them over."""
        base.weight = bnb.nn.Int8Params(kept["CB"], requires_grad=False, **kept)
        base.state.reset_grads()


def _held(base: Any, name: str) -> Tensor | None:
    """Return what the next call has in its state: of a weight set since the last one, or that."""
    new: Tensor | None = getattr(parameter(base, "weight"), name, None)
    return getattr(base.state, name) if new is None else new
