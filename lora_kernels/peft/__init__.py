"""Drop-in for PEFT: `fuse(model)` makes the LoRA layers of a PEFT model run `lora_linear`.

Fusing changes the class of a layer and nothing else: parameters, names, checkpoints, optimizer
state and PEFT's own methods stay as they are. Whatever a layer cannot fuse at the moment of a call
runs PEFT's own forward.
"""

from lora_kernels.peft.calls import NotFused
from lora_kernels.peft.convert import from_peft, to_peft
from lora_kernels.peft.kinds import fuse, unfuse, why_not
from lora_kernels.peft.linear import FusedLinear
from lora_kernels.peft.merging import merge_loss
from lora_kernels.peft.report import Calls, Report

__all__ = [
    "Calls",
    "FusedLinear",
    "NotFused",
    "Report",
    "from_peft",
    "fuse",
    "merge_loss",
    "to_peft",
    "unfuse",
    "why_not",
]
