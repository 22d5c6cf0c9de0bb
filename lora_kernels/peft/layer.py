"""A fused layer: what a call finds in it, and the call of `lora_linear` that this becomes."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.ops.lora_linear import lora_linear
from lora_kernels.ops.lora_linear.validate import DTYPES, adapter_dtypes
from lora_kernels.peft.parts import Adapter, Frozen, adapter_of, computed_in, kind, short

_TENSOR = (nn.Parameter, Tensor, type(None))


class Fused:
    """What makes a PEFT layer run `lora_linear` wherever `why_not` has no objection.

    Made by `fuse` only. A kind of layer inherits from this and from PEFT's class, names the latter
    as `plain` and says in `frozen` what its base layer hands over. Dropout draws another mask than
    `nn.Dropout` does from the same torch seed; its distribution is the same. A second derivative
    raises.
    """

    plain: ClassVar[type[nn.Module]]

    @staticmethod
    def frozen(base: Any) -> Frozen | str:
        """Return what the base layer hands over, or why it cannot."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ (+ bias)`: x[..., K] -> y[..., N]."""
        own = type(self)
        if "plain" not in own.__dict__:  # this bound method was kept across `unfuse`, or a wrapper
            return getattr(own, "plain", own).forward(self, x, *args, **kwargs)
        found = find(self, own, x, args, kwargs)
        if isinstance(found, str):
            return own.plain.forward(self, x, *args, **kwargs)
        frozen, adapter = found
        return lora_linear(
            x,
            frozen.weight,
            adapter.lora_a,
            adapter.lora_b,
            adapter.scaling,
            frozen.bias,
            dropout_p=adapter.dropout_p,
        )


def find(
    layer: Any, own: type[Fused], x: Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Frozen, Adapter] | str:
    """Return what a call of `layer` as an `own` hands to `lora_linear`, or why PEFT has to run it.

    Without x the answer is for an x of the base weight's dtype.
    """
    if type(layer) is own.plain and "forward" in layer.__dict__:
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
    return find_for(layer, own, active[0], x)


def find_for(
    layer: Any, own: type[Fused], name: str, x: Tensor | None
) -> tuple[Frozen, Adapter] | str:
    """Do as `find` for the adapter of that name, active or not."""
    adapter = adapter_of(layer, name)
    if isinstance(adapter, str):
        return adapter
    frozen = own.frozen(layer._modules["base_layer"])
    if isinstance(frozen, str):
        return frozen
    return _surroundings() or _tensors(layer, frozen, adapter, x) or (frozen, adapter)


def _surroundings() -> str | None:
    if _has_any_global_hook():
        return "global module hooks are set, which only module calls run"
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if torch.jit.is_tracing():
        return "inside torch.jit.trace, which would keep this x's shape"
    return None


def _tensors(layer: Any, frozen: Frozen, adapter: Adapter, x: Tensor | None) -> str | None:
    weight, bias = frozen
    lora_a, lora_b, *_ = adapter
    x = weight if x is None else x
    for part, tensor in (
        ("base weight", weight),
        ("base bias", bias),
        ("lora_A", lora_a),
        ("lora_B", lora_b),
        ("x", x),
    ):
        if type(tensor) not in _TENSOR:
            return f"{part} is a {kind(tensor)}, not a plain tensor"
    if x.is_nested:
        return "x is a nested tensor"
    if weight.requires_grad:
        return "base weight is trainable"
    if bias is not None and bias.requires_grad:
        return "base bias is trainable"

    autocast = None
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(weight.device.type):
        autocast = torch.get_autocast_dtype(weight.device.type)
    dtype = computed_in(weight.dtype, autocast)
    if dtype not in DTYPES:
        return f"base weight is {short(dtype)}"
    for part, tensor in (("x", x), ("base bias", bias)):
        if tensor is not None and computed_in(tensor.dtype, autocast) != dtype:
            return f"{part} is {short(tensor.dtype)} beside a {short(weight.dtype)} base weight"
    if lora_b.dtype != lora_a.dtype:
        return f"lora_A is {short(lora_a.dtype)}, lora_B {short(lora_b.dtype)}"
    if lora_a.dtype != dtype:
        if lora_a.dtype not in adapter_dtypes(dtype):
            return f"the adapter is {short(lora_a.dtype)} where x is {short(dtype)}"
        if not layer.cast_input_dtype_enabled:
            return "casting x to the adapter's dtype is disabled"
    return None
