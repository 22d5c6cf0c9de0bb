"""A fused layer: what a call finds in it, and the call of `lora_linear` that this becomes."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from lora_kernels.distributed import dropout_seed
from lora_kernels.ops.lora_linear import composition, lora_linear
from lora_kernels.ops.lora_linear.op import autocasts
from lora_kernels.ops.lora_linear.problem import short
from lora_kernels.ops.lora_linear.validate import DTYPES, PLAIN_TYPES, adapter_dtypes
from lora_kernels.peft import calls, sharing
from lora_kernels.peft.adapters import adapter_of, changed, joined
from lora_kernels.peft.by_row import ARGUMENTS, by_row, is_alora
from lora_kernels.peft.lora import plain
from lora_kernels.peft.merging import ExactMerge
from lora_kernels.peft.parts import Adapter, Found, Frozen, computed_in, kind, without_ours
from lora_kernels.peft.patched import patched, patched_functions
from lora_kernels.peft.rows import add_row
from lora_kernels.peft.sharding import out_of_reach
from lora_kernels.peft.small import compose, few_rows, is_small, on_a_cpu, too_few
from lora_kernels.peft.usual import usual, usual_parts
from lora_kernels.saved_input import needs_a_copy, on_a_copy


class Fused(ExactMerge):
    """What makes a PEFT layer run `lora_linear` wherever `why_not` has no objection.

    Made by `fuse` only. A kind of layer inherits from this and from PEFT's class, names the latter
    as `plain` and says in `frozen` what its base layer hands over, or has a `find` and a `forward`
    of its own. Dropout draws another mask than `nn.Dropout` does from the same torch seed; its
    distribution is the same.
    """

    @staticmethod
    def frozen(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
        """Return what the base layer of `layer` hands over, or why it cannot.

        Without x, for an x of the dtype that the base layer computes in, and for training: models
        are often fused before `train()`.
        """
        raise NotImplementedError

    @staticmethod
    def usual(layer: Any, x: Tensor) -> Found | None:
        """Return what `find` would for the most usual x and layer, sooner, or None for others."""
        return None

    @staticmethod
    def left_to_base(layer: Any, x: Tensor) -> str | None:
        """Return why the base layer has to multiply x, if that is soon seen."""
        return None

    @classmethod
    def find(
        cls, layer: Any, x: Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return what a call of `layer` computes with, or why PEFT has to run it."""
        return find(layer, cls, x, args, kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ (+ bias)`: x[..., K] -> y[..., N]."""
        own: Any = type(self)
        if "plain" not in own.__dict__:  # the class was wrapped
            own = fused_by(own)
        if own is not None and not args and not kwargs:
            y = _composed(self, own, x)
            if y is not None:
                return y
        if own is not None:
            plain, found = own.plain, find(self, own, x, args, kwargs)
        else:  # this bound method was kept across `unfuse`
            plain, found = type(self), f"the layer became a {kind(self)}"
        if isinstance(found, str):
            calls.note(self, found)
            return plain.forward(self, x, *args, **kwargs)
        calls.note(self, calls.FUSED)
        lora_a, lora_b, scaling, dropout_p, *_ = found.adapter
        weight, bias, *_ = found.frozen
        layer: Any = self
        rows = bool(kwargs)  # of the rows of some adapters PEFT saves copies
        if _is_plain(found) and is_small(x, weight.shape[0], dropout_p):
            if rows and needs_a_copy(layer, x, lora_a, made=True):
                parts = weight, bias, lora_a, lora_b, scaling, dropout_p
                return on_a_copy(layer, x, lambda x: compose(x, *parts))
            return compose(x, weight, bias, lora_a, lora_b, scaling, dropout_p)
        # Where x is converted for the call, or DoRA drops from it, it is not the caller's that is
        # saved.
        made = x.dtype != found.dtype or (found.adapter.compute is not None and dropout_p > 0)
        copy = not made and needs_a_copy(layer, x, lora_a, dropout_p > 0 or rows)
        shared = None
        if not rows and not found.adapter.others:  # else x is read outside the operator, too
            shared = sharing.stand_in(layer, *found[:2], x, found.dtype, copy)
        if copy:
            return on_a_copy(layer, x, functools.partial(_run, layer, found, x.dtype), shared)
        return _run(layer, found, x.dtype, x if shared is None else shared)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Pickle as PEFT's layer, which any machine can load; there, `fuse` fuses it again."""
        return object.__new__, (self.plain,), without_ours(self.__getstate__())

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        """Copy as what it is: a copy stays fused, and counts its own calls."""
        memo[id(self)] = copied = object.__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


def fused_by(cls: type) -> Any:
    """Return the kind of fused layer that a class is or derives from, or None."""
    return next((c for c in cls.__mro__ if "plain" in vars(c)), None)


def find(
    layer: Any, own: type[Fused], x: Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Found | str:
    """Return what a call of `layer` as an `own` hands to `lora_linear`, or why PEFT has to run it.

    Without x the answer is for an x of the base weight's dtype.
    """
    if not isinstance(layer, own) and "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    if x is not None and not args and not kwargs:
        found = own.usual(layer, x)
        if found is not None and not (patched(own.plain) or surroundings()):
            return found
        # Before more is asked, where that is what a call costs.
        some = isinstance(x, Tensor) and not (layer.merged_adapters or layer._disable_adapters)
        reason = own.left_to_base(layer, x) if some else None
        if some and reason is None and on_a_cpu(x):
            reason = few_rows(x)
            if reason is None and own.usual is Fused.usual:
                reason = too_few(layer, x)
        if reason:
            return reason if _active(layer) else calls.NO_ADAPTER
    if args or not ARGUMENTS.issuperset(kwargs):
        return f"called with extra arguments: {', '.join(kwargs) or len(args)}"
    if layer.disable_adapters:
        return calls.DISABLED
    if layer.merged:
        return calls.MERGED
    names, offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
    if names is not None and x is not None:
        return find_for(layer, own, by_row(layer, x, names, offsets), x)
    active, now = _active(layer), x is not None
    if not active:
        return calls.NO_ADAPTER
    if len(active) > 1 and not kwargs and isinstance(x, Tensor) and on_a_cpu(x):
        reason = too_few(layer, x)
        if reason:
            return reason
    if len(active) == 1:
        return find_for(layer, own, _the_one(layer, active[0], x, offsets), x)
    adapters = []
    for name in active:
        adapter = adapter_of(layer, name, now=now)
        if isinstance(adapter, str):
            return f"{adapter} (adapter {name!r} of {len(active)} active ones)"
        adapters.append(adapter)
    return find_for(layer, own, joined(adapters), x)


def _active(layer: Any) -> list[str]:
    """Return the active adapters that this layer has."""
    present = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in present]


def _the_one(layer: Any, name: str, x: Tensor | None, offsets: Any) -> Adapter | str:
    """Return the only active adapter."""
    if not is_alora(layer, name):
        return adapter_of(layer, name, now=x is not None)
    if x is None:
        return changed(layer.lora_variant[name]) or plain(layer, name, now=False)
    return by_row(layer, x, [name] * len(x), offsets)


def find_for(layer: Any, own: type[Fused], adapter: Adapter | str, x: Tensor | None) -> Found | str:
    """Do as `find` for that adapter, active or not."""
    if isinstance(adapter, str):
        return adapter
    frozen = own.frozen(layer, layer._modules["base_layer"], x)
    if isinstance(frozen, str):
        return frozen
    autocast = None
    if torch._C._is_any_autocast_enabled() and autocasts(frozen.weight):
        autocast = torch.get_autocast_dtype(frozen.weight.device.type)
    dtype = computed_in(frozen.dtype, autocast)
    reason = (
        patched(own.plain)
        or surroundings()
        or _tensors(frozen, layer._modules["base_layer"], x)
        or _dtypes(layer, frozen, adapter, x, dtype, autocast)
        or _splits(frozen, adapter)
    )
    found = Found(frozen, adapter, dtype)
    if reason is None and isinstance(x, Tensor) and adapter.compute is None:
        made_anew = adapter.derive is not None and not adapter.collective
        if made_anew or (on_a_cpu(x) and not _is_plain(found)):
            reason = too_few(layer, x)
    return reason or found


def surroundings() -> str | None:
    """Return why a call at this place needs PEFT's own code, or None."""
    if _has_any_global_hook():
        return "global module hooks are set, which only module calls run"
    if torch.jit.is_tracing():
        return "inside torch.jit.trace, which would keep this x's shape"
    if torch._C._len_torch_function_stack() and not torch.compiler.is_compiling():
        # All but a default device may replace the functions that PEFT's code calls.
        modes = [type(mode) for mode in _get_current_function_mode_stack()]
        other = next((own for own in modes if own is not DeviceContext), None)
        if other is not None:
            return f"a {other.__name__} sees the functions that PEFT's code calls"
    return patched_functions() or composition.surrounds()


def _tensors(frozen: Frozen, base: nn.Module, x: Tensor | None) -> str | None:
    weight, bias, _, dense, *_ = frozen
    now = x is not None
    packed = dense is not None and type(weight) is not DTensor
    for part, tensor in (("base weight", None if packed else weight), ("base bias", bias)):
        if tensor is None:
            continue
        if not (now and type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided):
            reason = out_of_reach(part, tensor, base, now)
            if reason:
                return reason
    if weight.requires_grad:
        return "base weight is trainable"
    if x is None:
        return None
    if type(x) not in PLAIN_TYPES:
        return f"x is a {kind(x)}, not a plain tensor"
    return "x is nested or sparse" if x.is_nested or x.layout is not torch.strided else None


def _dtypes(
    layer: Any,
    frozen: Frozen,
    adapter: Adapter,
    x: Tensor | None,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> str | None:
    """Return why the operands' dtypes do not fit the `dtype` to compute in."""
    if dtype not in DTYPES:
        return f"base weight is {short(dtype)}"
    lora_a, bias = adapter.lora_a, frozen.bias
    if frozen.dense is None:
        if x is not None and computed_in(x.dtype, autocast) != dtype:
            return f"x is {short(x.dtype)} beside a {short(frozen.dtype)} base weight"
        if bias is not None and computed_in(bias.dtype, autocast) != dtype:
            return f"base bias is {short(bias.dtype)} beside a {short(frozen.dtype)} base weight"
    elif (
        x is not None
        and x.dtype != dtype
        and not (frozen.y_like_x and x.dtype.itemsize < dtype.itemsize)
    ):
        rounded_by_autocast = autocast is not None and x.dtype == torch.float32
        # One rounding of x cannot serve both: PEFT's low-rank path reads x as it is.
        if not rounded_by_autocast:
            return f"x is {short(x.dtype)} where the base computes in {short(dtype)}"
    if adapter.compute is not None:
        if frozen.dense is not None:
            return "DoRA, or an adapter for some rows alone, over a quantised base"
        if adapter.dropout_p and autocast is None and lora_a.dtype != dtype:
            return f"DoRA drops from an x of {short(lora_a.dtype)}, the base reads {short(dtype)}"
    if lora_a.dtype != dtype:
        widens = frozen.dense is not None and lora_a.dtype.itemsize < dtype.itemsize
        if lora_a.dtype not in adapter_dtypes(dtype) and not widens:
            return f"the adapter is {short(lora_a.dtype)} where x is {short(dtype)}"
        if not layer.cast_input_dtype_enabled:
            return "casting x to the adapter's dtype is disabled"
    return None


def _splits(frozen: Frozen, adapter: Adapter) -> str | None:
    if frozen.split is None and adapter.split is None:
        return None
    if frozen.split != adapter.split:
        return "tensor parallelism shares out the base weight and the adapter in different ways"
    if adapter.derive is not None or adapter.compute is not None or adapter.others:
        return "tensor parallelism of factors that are derived (several adapters, DoRA, KaSA)"
    trains = frozen.bias is not None and frozen.bias.requires_grad
    return "base bias is trainable under tensor parallelism" if trains else None


def _composed(layer: Any, own: Any, x: Any) -> Tensor | None:
    """Return y where it is small and the layer as usual, by the least Python, or None."""
    if type(x) not in PLAIN_TYPES or not is_small(x, layer.out_features):
        return None
    parts = usual_parts(layer, x) if own.usual is usual else None
    if parts is None or (parts[5] and not is_small(x, layer.out_features, parts[5])):
        return None
    if patched(own.plain) or surroundings():
        return None
    calls.note(layer, calls.FUSED)
    return compose(x, *parts[:6])


def _is_plain(found: Found) -> bool:
    """Return whether nothing has to be made for a call, or added to what `lora_linear` returns."""
    frozen, adapter, _ = found
    return (
        adapter.derive is None
        and adapter.compute is None
        and not adapter.others
        and frozen.dense is None
        and frozen.split is None
    )


def _run(layer: Any, found: Found, x_dtype: torch.dtype, x: Tensor) -> Tensor:
    """Run `lora_linear` on what is found and x, or its stand-in in another dtype than x has."""
    frozen, adapter, _ = found
    bias = frozen.bias
    if _is_plain(found) and (bias is None or not bias.requires_grad):
        lora_a, lora_b, scaling, dropout_p, *_ = adapter
        seed = dropout_seed(layer, x) if dropout_p else None
        return lora_linear(
            x, frozen.weight, lora_a, lora_b, scaling, bias, dropout_p=dropout_p, seed=seed
        )
    return _make_and_run(layer, found, x_dtype, x)


def _make_and_run(layer: Any, found: Found, x_dtype: torch.dtype, x: Tensor) -> Tensor:
    """Run `lora_linear` on what has to be made for this call, and add what it does not take."""
    frozen, adapter, dtype = found
    factors, bias = adapter.factors(), frozen.bias
    if adapter.compute is not None:
        return adapter.compute(x, frozen.weight, factors, bias)
    lora_a, lora_b, outside = factors
    weight, as_given, make = frozen.weight, x, None
    if frozen.dense is not None:
        make = functools.partial(frozen.dense, dtype)  # again in the backward
        weight, x, bias = make(), x.to(dtype), None if bias is None else bias.to(dtype)
        if lora_a.dtype.itemsize < dtype.itemsize:
            lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    if bias is not None and bias.requires_grad:
        outside, bias = bias if outside is None else outside + bias, None
    split = frozen.split
    if split is not None:
        x, lora_a, lora_b, bias = split.inward(x, lora_a, lora_b, bias)
    scaling, dropout_p = adapter.scaling, adapter.dropout_p
    seed = dropout_seed(layer, x) if dropout_p else None
    y = lora_linear(
        x, weight, lora_a, lora_b, scaling, bias, dropout_p=dropout_p, seed=seed,
        first_column=None if split is None else split.first_column, rebuild=make,
    )  # fmt: skip
    if split is not None:
        y = split.outward(y)
    if outside is not None:
        y = add_row(y, outside)
    y_dtype = x_dtype if frozen.y_like_x else y.dtype
    for other in adapter.others:
        y = other.added_to(y, as_given, layer)
    return y.to(y_dtype)
