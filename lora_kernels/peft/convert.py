"""The way between a PEFT layer and a `LoRALinear`, sharing every tensor."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

from lora_kernels.layers import LoRALinear
from lora_kernels.peft.adapters import adapter_of
from lora_kernels.peft.layer import find_for
from lora_kernels.peft.linear import FusedLinear
from lora_kernels.peft.parts import Found, kind


def from_peft(layer: Linear, adapter: str = "default") -> LoRALinear:
    """Return a `LoRALinear` that shares W, bias, A and B with one adapter of a PEFT layer.

    Merging the PEFT layer writes to the shared W; a `LoRALinear` never does.

    Raises:
        TypeError: `layer` is not a `lora.Linear`.
        ValueError: the adapter is merged, or it is not one that could be fused.
    """
    if type(layer) not in (Linear, FusedLinear):
        raise TypeError(f"from_peft takes a PEFT lora.Linear, got {kind(layer)}")
    merged = "adapters are merged" if layer.merged else None
    found = merged or find_for(layer, FusedLinear, adapter_of(layer, adapter, now=True), None)
    if not isinstance(found, str):
        found = _more_than_a_lora_linear(layer, found) or found
    if isinstance(found, str):
        raise ValueError(f"from_peft: cannot convert adapter {adapter!r}: {found}")
    frozen, factors, _ = found
    base: Any = layer.base_layer
    with torch.device("meta"):  # every parameter is replaced: neither memory nor random numbers
        converted = LoRALinear(
            base.in_features,
            base.out_features,
            factors.lora_a.shape[0],
            lora_alpha=layer.lora_alpha[adapter],
            lora_dropout=getattr(layer.lora_dropout[adapter], "p", 0.0),
            bias=base.bias is not None,
            use_rslora=layer.use_rslora[adapter],
        )
    converted.weight, converted.bias = frozen.weight, frozen.bias
    converted.lora_A, converted.lora_B = factors.lora_a, factors.lora_b  # type: ignore[assignment]
    converted.scaling = factors.scaling  # PEFT lets a caller rescale it
    return converted.train(layer.training)


def to_peft(layer: LoRALinear, adapter: str = "default") -> Linear:
    """Return a PEFT `lora.Linear` that shares W, bias, A and B with `layer`.

    Raises:
        ValueError: `layer` is merged.
    """
    if layer.merged:
        raise ValueError("to_peft: the layer is merged; call unmerge() first")
    alpha: Any = layer.lora_alpha  # PEFT says int and takes any number
    config = LoraConfig(
        r=layer.r,
        lora_alpha=alpha,
        lora_dropout=layer.lora_dropout,
        use_rslora=layer.use_rslora,
        init_lora_weights=False,
    )
    with torch.device("meta"):  # as in from_peft
        base = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        converted = Linear(base, adapter, config, r=layer.r, lora_alpha=alpha)
    base.weight, base.bias = layer.weight, layer.bias  # type: ignore[assignment]
    converted.lora_A[adapter].weight = layer.lora_A
    converted.lora_B[adapter].weight = layer.lora_B
    converted.scaling[adapter] = layer.scaling
    return converted.train(layer.training)


def _more_than_a_lora_linear(layer: Linear, found: Found) -> str | None:
    """Return what a fused PEFT layer has and a `LoRALinear` has not, or None."""
    if type(layer.base_layer).forward is not nn.Linear.forward:
        return f"base layer is a {kind(layer.base_layer)}, not a plain nn.Linear"
    if found.frozen.split is not None:
        return "tensor parallelism shares it out"
    if found.adapter.compute is not None:
        return "it is DoRA"
    if found.adapter.derive is not None:
        return "its factors are derived, or it has a bias (lora_bias)"
    if found.frozen.bias is not None and found.frozen.bias.requires_grad:
        return "base bias is trainable"
    return None
