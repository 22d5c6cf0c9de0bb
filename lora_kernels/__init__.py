"""LoRA linear layers as one operator: `lora_linear`, `LoRALinear`, `lora_kernels.peft.fuse`.

Importing this package touches no GPU and imports neither Triton nor the compiled extension.
"""

from lora_kernels.dispatch import BackendUnavailable
from lora_kernels.layers import LoRALinear
from lora_kernels.ops.lora_linear import lora_linear

__version__ = "0.1.0"

__all__ = ["BackendUnavailable", "LoRALinear", "lora_linear"]
