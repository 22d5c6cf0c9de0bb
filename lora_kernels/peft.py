"""Drop-in for PEFT: `fuse(model)` makes the LoRA layers of a PEFT model run `lora_linear`.

Fusing changes the class of a layer and nothing else: parameters, names, checkpoints, optimizer
state and PEFT's own methods stay as they are. Whatever a layer cannot fuse at the moment of a call
runs PEFT's own forward.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.layers import LoRALinear
from lora_kernels.ops.lora_linear import lora_linear
from lora_kernels.ops.lora_linear.validate import DTYPES, adapter_dtypes

_LINEAR = (nn.Linear,)
_DROPOUT = (nn.Identity, nn.Dropout)
_TENSOR = (nn.Parameter, Tensor, type(None))


@dataclass(frozen=True)
class Report:
    """What `fuse` did: the names of the layers that now run `lora_linear`, and why the rest do not.

    Printed, it is a table with one row for each group of layers whose names differ only in numbers
    and which share one outcome.
    """

    fused: list[str]
    not_fused: dict[str, str]

    def __str__(self) -> str:
        total = len(self.fused) + len(self.not_fused)
        if not total:
            return "no PEFT layer found, nothing is fused"
        outcomes = dict.fromkeys(self.fused, "fused") | self.not_fused
        groups: dict[tuple[str, str], list[str]] = {}
        for name, outcome in outcomes.items():
            groups.setdefault((re.sub(r"\d+", "*", name), outcome), []).append(name)
        rows = [
            (str(len(names)), names[0] if len(names) == 1 else pattern, outcome)
            for (pattern, outcome), names in groups.items()
        ]
        width = max(len(name) for _, name, _ in rows)
        lines = [f"{count:>5}  {name:<{width}}  {outcome}" for count, name, outcome in rows]
        header = f"{'count':>5}  {'module':<{width}}  outcome"
        return "\n".join([header, *lines, f"{len(self.fused)} of {total} PEFT layers fused"])


class FusedLinear(Linear):
    """PEFT's `lora.Linear` whose forward is `lora_linear` wherever `why_not` has no objection.

    Made by `fuse` only. Dropout draws another mask than `nn.Dropout` does from the same torch seed;
    its distribution is the same. A second derivative raises.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ (+ bias)`: x[..., K] -> y[..., N]."""
        if type(self) is not FusedLinear:  # someone kept this bound method across `unfuse`
            return Linear.forward(self, x, *args, **kwargs)
        found = _operands(self, x, args, kwargs)
        if isinstance(found, str):
            return Linear.forward(self, x, *args, **kwargs)
        weight, lora_a, lora_b, scaling, bias, dropout_p = found
        return lora_linear(x, weight, lora_a, lora_b, scaling, bias, dropout_p=dropout_p)


def fuse(model: nn.Module) -> Report:
    """Make every eligible PEFT LoRA layer of `model` run `lora_linear`, in place; say which are.

    Eligible are the layers for which `why_not` returns None now. A fused layer asks again at every
    call, so merging, disabling, adding or switching adapters later needs no further step; a layer
    that becomes eligible only later needs another `fuse`, which is harmless to the others. Fuse
    before sharding: the weights of a sharded model are plain tensors only while it runs.
    """
    fused, not_fused = [], {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        reason = why_not(layer)
        if reason is None:
            layer.__class__ = FusedLinear
            fused.append(name)
        else:
            not_fused[name] = reason
    return Report(fused, not_fused)


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: every layer of `model` is PEFT's own again."""
    for layer in model.modules():
        if type(layer) is FusedLinear:
            layer.__class__ = Linear  # type: ignore[assignment]


def why_not(layer: Any, x: Tensor | None = None, *args: Any, **kwargs: Any) -> str | None:
    """Return why `layer(x, *args, **kwargs)` cannot run fused as things are, or None if it can.

    Without x the answer is for an x of the base weight's dtype. Autocast counts.
    """
    found = _operands(layer, x, args, kwargs)
    return found if isinstance(found, str) else None


def from_peft(layer: Linear, adapter: str = "default") -> LoRALinear:
    """Return a `LoRALinear` that shares W, bias, A and B with one adapter of a PEFT layer.

    Merging the PEFT layer writes to the shared W; a `LoRALinear` never does.

    Raises:
        TypeError: `layer` is not a `lora.Linear`.
        ValueError: the adapter is merged, or it is not one that could be fused.
    """
    if type(layer) not in (Linear, FusedLinear):
        raise TypeError(f"from_peft takes a PEFT lora.Linear, got {_kind(layer)}")
    found = "adapters are merged" if layer.merged else _adapter_operands(layer, adapter, None)
    if isinstance(found, str):
        raise ValueError(f"from_peft: cannot convert adapter {adapter!r}: {found}")
    base: Any = layer.base_layer
    with torch.device("meta"):  # every parameter is replaced: neither memory nor random numbers
        converted = LoRALinear(
            base.in_features,
            base.out_features,
            found.lora_a.shape[0],
            lora_alpha=layer.lora_alpha[adapter],
            lora_dropout=getattr(layer.lora_dropout[adapter], "p", 0.0),
            bias=base.bias is not None,
            use_rslora=layer.use_rslora[adapter],
        )
    converted.weight, converted.bias = found.weight, found.bias
    converted.lora_A, converted.lora_B = found.lora_a, found.lora_b  # type: ignore[assignment]
    converted.scaling = found.scaling  # PEFT lets a caller rescale it
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


class _Operands(NamedTuple):
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None
    dropout_p: float


def _operands(
    layer: Any, x: Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> _Operands | str:
    """Return what a fused call of `layer` hands to `lora_linear`, or why PEFT has to run it.

    It runs at every call, so it reads `_modules` and `_parameters`: `nn.Module.__getattr__` costs
    about a microsecond each time, a dictionary a twentieth of that.
    """
    if type(layer) is not FusedLinear:
        if type(layer) is not Linear:
            return f"the layer is a {_kind(layer)}, not a PEFT lora.Linear"
        if "forward" in layer.__dict__:
            return "its forward was replaced on the instance"
    if args or kwargs:
        return f"called with extra arguments: {', '.join(kwargs) or len(args)}"
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged"
    present = layer._modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in present]
    if len(active) != 1:
        return f"{len(active)} active adapters in this layer" if active else "no active adapter"
    return _adapter_operands(layer, active[0], x)


def _adapter_operands(layer: Any, adapter: str, x: Tensor | None) -> _Operands | str:
    children = layer._modules
    if adapter not in children["lora_A"]._modules:
        return f"there is no adapter {adapter!r} in this layer"
    if adapter in layer.lora_variant:
        return f"variant {type(layer.lora_variant[adapter]).__name__}"
    base, lora_a, lora_b, dropout = (
        children["base_layer"],
        children["lora_A"]._modules[adapter],
        children["lora_B"]._modules[adapter],
        children["lora_dropout"]._modules[adapter],
    )
    for part, module, kinds in (
        ("base layer", base, _LINEAR),
        ("lora_A", lora_a, _LINEAR),
        ("lora_B", lora_b, _LINEAR),
        ("lora_dropout", dropout, _DROPOUT),
    ):
        if type(module) not in kinds:
            return f"{part} is a {_kind(module)}, not a plain nn.{kinds[-1].__name__}"
        state = module.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        ):
            return f"{part} has hooks, which only its own call would run"
        if "forward" in state:
            return f"the forward of {part} was replaced on the instance"
    if _has_any_global_hook():
        return "global module hooks are set, which only module calls run"
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if torch.jit.is_tracing():
        return "inside torch.jit.trace, which would keep this x's shape"

    scaling = layer.scaling[adapter]
    if not isinstance(scaling, (int, float)):
        return f"scaling is a {_kind(scaling)}, not a number"
    if _parameter(lora_a, "bias") is not None or _parameter(lora_b, "bias") is not None:
        return "the adapter has a bias (lora_bias)"
    dropout_p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    if dropout_p >= 1:
        return "the dropout probability is 1"
    found = _Operands(
        _parameter(base, "weight"),
        _parameter(lora_a, "weight"),
        _parameter(lora_b, "weight"),
        scaling,
        _parameter(base, "bias"),
        dropout_p,
    )
    return _tensors_why_not(layer, found, x) or found


def _parameter(module: Any, name: str) -> Any:
    parameters = module._parameters
    # FSDP and DataParallel keep the tensor in a plain attribute while the module runs.
    return parameters[name] if name in parameters else getattr(module, name)


def _tensors_why_not(layer: Linear, operands: _Operands, x: Tensor | None) -> str | None:
    weight, lora_a, lora_b, _, bias, _ = operands
    x = weight if x is None else x
    for part, tensor in (
        ("base weight", weight),
        ("base bias", bias),
        ("lora_A", lora_a),
        ("lora_B", lora_b),
        ("x", x),
    ):
        if type(tensor) not in _TENSOR:
            return f"{part} is a {_kind(tensor)}, not a plain tensor"
    if x.is_nested:
        return "x is a nested tensor"
    if weight.requires_grad:
        return "base weight is trainable"
    if bias is not None and bias.requires_grad:
        return "base bias is trainable"

    autocast = None
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(weight.device.type):
        autocast = torch.get_autocast_dtype(weight.device.type)
    dtype = _computed_in(weight.dtype, autocast)
    if dtype not in DTYPES:
        return f"base weight is {_short(dtype)}"
    for part, tensor in (("x", x), ("base bias", bias)):
        if tensor is not None and _computed_in(tensor.dtype, autocast) != dtype:
            return f"{part} is {_short(tensor.dtype)} beside a {_short(weight.dtype)} base weight"
    if lora_b.dtype != lora_a.dtype:
        return f"lora_A is {_short(lora_a.dtype)}, lora_B {_short(lora_b.dtype)}"
    if lora_a.dtype != dtype:
        if lora_a.dtype not in adapter_dtypes(dtype):
            return f"the adapter is {_short(lora_a.dtype)} where x is {_short(dtype)}"
        if not layer.cast_input_dtype_enabled:
            return "casting x to the adapter's dtype is disabled"
    return None


def _computed_in(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """Return the dtype that autocast turns `dtype` into for a linear layer."""
    if autocast is None or dtype == torch.float64 or not dtype.is_floating_point:
        return dtype
    return autocast


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
