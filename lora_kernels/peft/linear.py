"""The kind with a dense frozen layer: PEFT's `lora.Linear` over `nn.Linear`."""

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor

from lora_kernels.peft.layer import Fused
from lora_kernels.peft.parts import Frozen, not_plain, parameter


class FusedLinear(Fused, Linear):
    """PEFT's `lora.Linear`, fused: W[N,K] as it is stored."""

    plain = Linear

    @staticmethod
    def frozen(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
        """Return the weight and bias of a plain `nn.Linear`, or why not."""
        reason = not_plain("base layer", base)
        if reason:
            return reason
        weight = parameter(base, "weight")
        return Frozen(weight, parameter(base, "bias"), weight.dtype)
