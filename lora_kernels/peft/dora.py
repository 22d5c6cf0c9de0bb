"""DoRA: `y = m/‖W + s·B·A‖ ∘ (x·Wᵀ + s·x·Aᵀ·Bᵀ) (+ bias)`, the norm of each row a constant.

Kept for the backward beyond what the operator keeps: its result, from which m's gradient is read.
"""

from typing import Any

import torch.nn.functional as F
from peft.tuners.lora import dora as pefts
from torch import Tensor

from lora_kernels.distributed import dropout
from lora_kernels.ops.lora_linear import lora_linear
from lora_kernels.peft.lora import plain
from lora_kernels.peft.parts import Adapter, Factors, parameter
from lora_kernels.peft.patched import replaced
from lora_kernels.peft.rows import rescale, row_norms
from lora_kernels.peft.sharding import out_of_reach


def dora(layer: Any, name: str, now: bool) -> Adapter | str:
    """Return what a DoRA adapter hands over, or why it cannot."""
    found = plain(layer, name, now)
    if isinstance(found, str):
        return found
    if found.derive is not None and not found.collective:
        return "DoRA beside a bias of lora_B"
    if layer.ephemeral_gpu_offload:
        return "DoRA's norms are computed on another device (ephemeral_gpu_offload)"
    vectors = layer._modules["lora_magnitude_vector"]._modules[name]
    magnitude = parameter(vectors, "weight")
    reason = replaced("lora_magnitude_vector", vectors) or out_of_reach(
        "lora_magnitude_vector", magnitude, vectors, now
    )
    if reason:
        return reason
    if now and pefts.ENABLE_DORA_CACHING and not vectors.training:
        return "PEFT keeps DoRA's norms between calls (DoraCaching)"
    # PEFT drops only while the layer trains, too; the other kinds ask their Dropout alone.
    scaling, dropout_p = found.scaling, found.dropout_p if layer.training else 0.0

    def compute(x: Tensor, weight: Tensor, factors: Factors, bias: Tensor | None) -> Tensor:
        lora_a, lora_b, _ = factors
        if vectors._dora_cache:  # as PEFT does wherever it is not to keep them
            vectors._cache_clear()
        x = x.unsqueeze(0) if x.dim() == 1 else x  # PEFT's y is [1,N] then, too
        # The norm is rounded as PEFT rounds it, so that m/n is 1 where training starts.
        scale = magnitude / row_norms(weight, lora_a, lora_b, scaling)
        frozen_bias = None if bias is None else bias.detach()
        if not dropout_p:
            z = lora_linear(x, weight, lora_a, lora_b, scaling, frozen_bias)
            return rescale(z, scale, bias)
        # Then PEFT drops from the scaled frozen product, too, but leaves the other one alone:
        # x·Wᵀ + (m/n - 1)∘drop(x)·Wᵀ + m/n∘s·drop(x)·Aᵀ·Bᵀ with one mask.
        dropped = dropout(layer, x, dropout_p)
        z = lora_linear(dropped, weight, lora_a, lora_b, scaling, frozen_bias)
        return F.linear(x - dropped, weight) + rescale(z, scale, bias)

    return found._replace(compute=compute, dropout_p=dropout_p)
