"""The kind with a frozen layer that HQQ quantised, to 1 to 8 bits.

HQQ itself makes the dense W once per direction, and so does this. Merging stays PEFT's.
"""

from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from peft.tuners.lora.hqq import HqqLoraLinear
from torch import Tensor

from lora_kernels.peft.layer import Fused
from lora_kernels.peft.parts import Frozen
from lora_kernels.peft.patched import replaced
from lora_kernels.peft.small import fewer_rows

# The forwards, of which one is the class's at a time, that multiply by `dequantize()`.
_EXACT = (
    "forward_pytorch_backprop",
    "forward_pytorch_backprop_compile",
    "forward_pytorch",
    "forward_pytorch_compile",
)
# Of PEFT's time, forward and backward, on a CPU: 0.78-0.98 from 256 rows on, up to 1.09 at 64.
FEW_ROWS = 256


class FusedHqqLinear(Fused, HqqLoraLinear):
    """PEFT's layer over `hqq.core.quantize.HQQLinear`, fused where it computes in plain PyTorch."""

    plain = HqqLoraLinear

    @staticmethod
    def frozen(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
        """Return the packed weight and how to unpack it, or why HQQ has to."""
        if not base.ready:
            return "base weight is not quantised yet"
        if type(base).forward not in [vars(HQQLinear)[name] for name in _EXACT]:
            return f"HQQ computes by {HQQLinear.backend}, not by plain PyTorch"
        reason = replaced("base layer", base)
        if reason is None and x is not None and x.is_cpu:
            reason = fewer_rows(x, FEW_ROWS)
        if reason:
            return reason

        def dense(dtype: torch.dtype) -> Tensor:
            return base.dequantize().to(dtype)

        return Frozen(base.W_q, base.bias, base.compute_dtype, dense)

    @staticmethod
    def inside(base: Any) -> list[Any]:
        """Return the packed values, what scales them, and the bias."""
        return [base.W_q, *(v for v in base.meta.values() if isinstance(v, Tensor)), base.bias]

    @staticmethod
    def keep(base: Any) -> Any:
        """Return the very tensors: PEFT puts another layer in place of this one."""
        return {name: getattr(base, name) for name in ("W_q", "meta", "bias")}

    @staticmethod
    def restore(base: Any, kept: Any) -> None:
        """Give the layer that PEFT made those tensors."""
        for name, value in kept.items():
            setattr(base, name, value)
