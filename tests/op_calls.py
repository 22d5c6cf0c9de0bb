"""A call of `lora_linear` on a test's operands."""

from typing import Any

from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.testing import Inputs


def call_on(inputs: Inputs, **options: Any) -> Tensor:
    x, weight, lora_a, lora_b, bias, *_ = inputs
    return lora_linear(x, weight, lora_a, lora_b, 0.75, bias, **options)


def with_grad(inputs: Inputs, x: bool = True, a: bool = True, b: bool = True) -> Inputs:
    return inputs._replace(
        x=inputs.x.detach().requires_grad_(x),
        lora_a=inputs.lora_a.detach().requires_grad_(a),
        lora_b=inputs.lora_b.detach().requires_grad_(b),
    )
