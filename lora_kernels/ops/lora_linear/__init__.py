"""The LoRA linear operator; README.md beside this file holds the mathematics."""

from lora_kernels.ops.lora_linear.op import BACKENDS, lora_linear
from lora_kernels.ops.lora_linear.problem import Problem

__all__ = ["BACKENDS", "Problem", "lora_linear"]
