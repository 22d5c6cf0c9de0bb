"""`audit(model, step)`: one training step of any LoRA model, judged layer by layer by float64.

The model runs as it is. Each LoRA layer's x, y, dy and dx are caught on their way by hooks on the
layer and an identity in the graph behind it; the gradients of A and B by hooks on the parameters.
"""

from collections.abc import Callable

import torch
from torch import nn

from lora_kernels.audit.layer import lora_layers
from lora_kernels.audit.report import Report, Verdict
from lora_kernels.audit.watch import Watch

__all__ = ["Report", "Verdict", "audit"]


def audit(model: nn.Module, step: Callable[[], object]) -> Report:
    """Run `step` once and compare every LoRA layer of `model` with the oracle in float64.

    For each call of a layer, on its own captured x and dy,
    `y = x·Wᵀ + Σ s·drop(x)·Aᵀ·Bᵀ (+ bias)` and the gradients dx, da and db, the latter two summed
    over all calls of the step, must satisfy the rule of `lora_kernels.testing.assert_accurate`.
    Layers are `LoRALinear` and everything built like PEFT's `lora.Linear`: fused, plain, or with a
    forward of someone else's. The report tells wrong, doubled, mispaired, bypassed and dead layers
    apart (`Verdict`), and says which ones it could not judge.

    What it judges is the computation, with the parameters as they are: it cannot know that a
    checkpoint holds the wrong values. Right after initialisation B is zero and y and dx show only
    the frozen layer, so that only db says something of A and of the scaling.

    - *Dropout*: layers that run `lora_linear` keep theirs, for the mask follows from the seed. For
      others p is 0 during the audit; the report says so.
    - *Left as it was*: dropout probabilities, hooks and every `.grad`, also when `step` raises.
      Torch's random state and buffers move on as in any step.
    - *Cost*: each call of a layer is computed again, twice in the forward and, with gradients,
      twice in the backward pass: in its own dtype, and in float64 on the device of x, one layer at
      a time. x is kept for the backward pass where the layer itself does not keep it, and the
      float64 gradients of A and B until the end.

    Args:
        model: any module, DDP and gradient checkpointing included. What is compiled runs eagerly.
        step: runs forward and backward, `lambda: model(**batch).loss.backward()`; what it returns
            is ignored. It may run under autocast or a gradient scaler, several micro-batches too.
    """
    watch = Watch(lora_layers(model), list(model.parameters()))
    with watch, torch.compiler.set_stance("force_eager"):
        watch.start()
        step()
    return watch.report()
