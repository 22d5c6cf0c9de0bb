"""What a LoRA layer is made of, read from its attributes at the moment of a call.

Nothing here imports PEFT: a layer is known by the attributes that PEFT's `lora.Linear` has, whoever
wrote its class or patched its forward.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.layers import LoRALinear
from lora_kernels.ops.lora_linear.validate import DTYPES

Index = slice | list[int]
WHOLE = slice(None)


class Part(NamedTuple):
    """The term `scaling·drop(x)·A[rows]ᵀ·B[:, columns]ᵀ` of y."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    rows: Index = WHOLE
    columns: Index = WHOLE


class Operands(NamedTuple):
    """What the output of a layer is made of: `y = x·Wᵀ + Σ parts (+ bias)`.

    Attributes:
        parts: one for each active adapter; none where the adapters are merged or disabled.
        off: why there is no part, or None.
        nominal: alpha/R or alpha/√R of each part, as the layer states them; None if it does not.
        dropout_p: the largest probability by which a part drops x at present.
    """

    weight: Tensor
    bias: Tensor | None
    parts: tuple[Part, ...]
    off: str | None = None
    nominal: tuple[float | None, ...] = ()
    dropout_p: float = 0.0


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the LoRA layers of `model` by name: `LoRALinear`, and whatever looks like PEFT's."""
    dictionaries = nn.ModuleDict, nn.ParameterDict
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
        or (
            hasattr(module, "base_layer")
            and isinstance(getattr(module, "lora_A", None), dictionaries)
        )
    }


def adapter_parameters(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ("da", A) and ("db", B) for every adapter of a layer, active or not."""
    for name, role in (("lora_A", "da"), ("lora_B", "db")):
        held = getattr(layer, name)
        for parameter in held.parameters() if isinstance(held, nn.Module) else (held,):
            yield role, parameter


def dropouts(layer: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yield the object and the attribute that hold each dropout probability of a layer."""
    if isinstance(layer, LoRALinear):
        yield layer, "lora_dropout"
        return
    for module in getattr(layer, "lora_dropout", nn.Module()).modules():
        if isinstance(module, nn.Dropout):
            yield module, "p"


def read(layer: Any) -> Operands | str:
    """Return what `layer` computes with as things are, or why that cannot be said."""
    if isinstance(layer, LoRALinear):
        if layer.merged:
            return Operands(layer.weight, layer.bias, (), "the adapter is merged")
        own = (Part(layer.lora_A, layer.lora_B, layer.scaling),)
        nominal = _nominal(layer.lora_alpha, layer.r, layer.use_rslora)
        dropout_p = layer.lora_dropout if layer.training else 0.0
        return Operands(layer.weight, layer.bias, own, None, (nominal,), dropout_p)

    kinds = [f"{c.__module__}.{c.__name__}" for c in type(layer).__mro__]
    from_peft = any(kind.startswith("peft.tuners.") for kind in kinds)
    if from_peft and "peft.tuners.lora.layer.Linear" not in kinds:
        return f"the layer is a {_kind(layer)}"
    base = layer.base_layer
    if not isinstance(base, nn.Linear):
        return f"the base layer is a {_kind(base)}"
    weight, bias = base.weight, base.bias
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in DTYPES:
        return f"the base weight is a {_kind(weight)} of {weight.dtype}"
    if weight.device.type == "meta":
        return "the base weight is on the meta device"
    if getattr(layer, "disable_adapters", False):
        return Operands(weight, bias, (), "adapters are disabled")
    if getattr(layer, "merged", False):
        return Operands(weight, bias, (), "adapters are merged")
    present = layer.lora_A.keys()
    active = [name for name in getattr(layer, "active_adapters", present) if name in present]
    if not active:
        return Operands(weight, bias, (), "no active adapter")
    parts = []
    for name in active:
        part = _part(layer, name)
        if isinstance(part, str):
            return part
        parts.append(part)
    return Operands(
        weight,
        bias,
        tuple(parts),
        None,
        tuple(_stated(layer, name) for name in active),
        max(_dropout_p(layer, name) for name in active),
    )


def _part(layer: Any, adapter: str) -> Part | str:
    variant = _held(layer, "lora_variant", adapter)
    if variant is not None:
        return f"its adapter is a {_kind(variant)}"
    weights: list[Tensor] = []
    for name in ("lora_A", "lora_B"):
        module = _held(layer, name, adapter)
        weight: Any = getattr(module, "weight", None)
        if type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 2 or weight.is_meta:
            return f"{name} is a {_kind(module)} without a plain weight"
        if getattr(module, "bias", None) is not None:
            return "the adapter has a bias (lora_bias)"
        weights.append(weight)
    scaling = _held(layer, "scaling", adapter)
    if not isinstance(scaling, (int, float)):
        return f"scaling is {scaling!r}, not a number for each adapter"
    return Part(weights[0], weights[1], float(scaling))


def _dropout_p(layer: Any, adapter: str) -> float:
    module = _held(layer, "lora_dropout", adapter)
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def _stated(layer: Any, adapter: str) -> float | None:
    rank, alpha = _held(layer, "r", adapter), _held(layer, "lora_alpha", adapter)
    if not rank or alpha is None:
        return None
    return _nominal(alpha, rank, bool(_held(layer, "use_rslora", adapter)))


def _held(layer: Any, name: str, adapter: str) -> Any:
    """Return what a layer holds for an adapter under a name, or None."""
    held = getattr(layer, name, None)
    if isinstance(held, (dict, nn.ModuleDict, nn.ParameterDict)) and adapter in held:
        return held[adapter]
    return None


def _nominal(alpha: float, rank: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def computed_in(x: Tensor, operands: Operands) -> torch.dtype:
    """Return autocast's dtype, or the coarsest of the layer's tensors."""
    kind = x.device.type
    if operands.weight.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    adapters = (t.dtype for part in operands.parts for t in part[:2])
    return coarsest(operands.weight.dtype, *adapters)


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of the largest rounding errors."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
