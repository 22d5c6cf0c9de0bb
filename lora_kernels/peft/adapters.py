"""The list of the kinds of adapter, and several adapters as one."""

from typing import Any

import torch

from lora_kernels.ops.lora_linear.problem import short
from lora_kernels.peft.dora import dora
from lora_kernels.peft.lora import plain
from lora_kernels.peft.parts import Adapter, Factors, kind
from lora_kernels.peft.patched import patched
from lora_kernels.peft.variants import bdlora, kasa

# PEFT's variants by full name, and what hands over the factors of each. MiCA trains something else
# and is the same.
_PEFTS = "peft.tuners.lora.variants."
VARIANTS = {
    _PEFTS + "BdLoraLinearVariant": bdlora,
    _PEFTS + "DoraLinearVariant": dora,
    _PEFTS + "KasaLinearVariant": kasa,
    _PEFTS + "MiCALinearVariant": plain,
}
# What the others do that no `lora_linear` does.
_MORE = {
    _PEFTS + "ALoraLinearVariant": "which acts on some rows, and alone",
    _PEFTS + "ArrowLinearVariant": "which picks adapters for each token",
    _PEFTS + "MontecloraLinearVariant": "which samples A in training",
    _PEFTS + "VeloraLinearVariant": "which compresses the x that A's gradient reads",
}


def adapter_of(layer: Any, name: str, *, now: bool) -> Adapter | str:
    """Return what one adapter of a PEFT layer hands over, or why it cannot.

    Not `now`, but when the model runs, where the two differ (`sharding.py`).
    """
    if name not in layer._modules["lora_A"]._modules:
        return f"there is no adapter {name!r} in this layer"
    if name not in layer.lora_variant:
        return plain(layer, name, now)
    given = layer.lora_variant[name]
    variant = kind(given)
    if variant in VARIANTS:
        return changed(given) or VARIANTS[variant](layer, name, now)
    name = variant.removeprefix(_PEFTS)
    return ", ".join(filter(None, (f"variant {name}", _MORE.get(variant))))


def changed(variant: Any) -> str | None:
    """Return why a variant does something else than its class was defined to, or None."""
    own = type(variant)
    if "forward" in variant.__dict__:
        return f"the forward of {own.__name__} was replaced on the instance"
    return patched(own)


def joined(adapters: list[Adapter]) -> Adapter | str:
    """Return several adapters as one whose rank is the sum of theirs, or why they cannot be.

    Under dropout the first one takes the others along: on a CPU, with two and four adapters of rank
    16 at p = 0.05, that runs in 0.80 to 0.90 of PEFT's time forward, 0.90 to 0.99 with gradients.
    """
    first = adapters[0]
    if any(adapter.compute for adapter in adapters):
        return f"{len(adapters)} active adapters, one of them more than LoRA (DoRA)"
    dtypes = sorted({short(adapter.lora_a.dtype) for adapter in adapters})
    if len(dtypes) > 1:
        return f"active adapters of different dtypes: {', '.join(dtypes)}"
    if any(adapter.dropout_p for adapter in adapters):
        waits = any(adapter.collective for adapter in adapters)
        return first._replace(others=tuple(adapters[1:]), collective=waits)
    same = all(adapter.scaling == first.scaling for adapter in adapters)

    def derive() -> Factors:
        factors = [adapter.factors() for adapter in adapters]
        lora_b = [
            f.lora_b if same else f.lora_b * adapter.scaling
            for f, adapter in zip(factors, adapters, strict=True)
        ]
        biases = [f.bias for f in factors if f.bias is not None]
        return Factors(
            torch.cat([f.lora_a for f in factors]),
            torch.cat(lora_b, dim=1),
            torch.stack(biases).sum(0) if biases else None,
        )

    return first._replace(
        # x is saved if one of them is trained.
        lora_a=next((a.lora_a for a in adapters if a.lora_a.requires_grad), first.lora_a),
        scaling=first.scaling if same else 1.0,
        derive=derive,
        collective=any(adapter.collective for adapter in adapters),
    )
