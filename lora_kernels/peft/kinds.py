"""`fuse`, `unfuse` and `why_not`, and the list of the kinds of layer that can be fused."""

import importlib
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_kernels.peft import calls
from lora_kernels.peft.layer import Fused
from lora_kernels.peft.parts import kind, without_ours
from lora_kernels.peft.report import Report
from lora_kernels.peft.sharding import rewrapped, wrapped_by_fsdp
from lora_kernels.peft.sharing import share

# PEFT's class, and the fused one: imported when such a layer is met, for its library may be heavy.
KINDS = {
    "peft.tuners.lora.layer.Linear": "lora_kernels.peft.linear.FusedLinear",
    "peft.tuners.lora.bnb.Linear4bit": "lora_kernels.peft.quantised.FusedLinear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt": "lora_kernels.peft.quantised.FusedLinear8bitLt",
    "peft.tuners.lora.layer.ParamWrapper": "lora_kernels.peft.experts.ParamWrapper",
    "peft.tuners.lora.hqq.HqqLoraLinear": "lora_kernels.peft.hqq.FusedHqqLinear",
    "peft.tuners.lora.torchao.TorchaoLoraLinear": "lora_kernels.peft.torchao.FusedTorchaoLinear",
}

# Base layers under PEFT's `lora.Linear`, beside `nn.Linear` and subclasses that keep its forward,
# and the function that says what one hands over, as `Fused.frozen` does.
BASES = {
    "transformers.models.falcon.modeling_falcon.FalconLinear": "lora_kernels.peft.linear.biased",
    "transformers.pytorch_utils.Conv1D": "lora_kernels.peft.linear.transposed",
}


def fuse(model: nn.Module, *, strict: bool = False, share_inputs: bool = True) -> Report:
    """Make every eligible PEFT LoRA layer of `model` run `lora_linear`, in place; say which are.

    Eligible are the layers for which `why_not` returns None now. A fused layer asks again at every
    call, so merging, disabling, adding or switching adapters later needs no further step; a layer
    that becomes eligible only later needs another `fuse`, which is harmless to the others and whose
    report is of the model as it is then. Before or after FSDP shards it is the same.

    The report says what is eligible now; `report.calls()` says what really ran. A pickled or
    `torch.save`d model holds PEFT's own layers, which need `fuse` again; a deep copy stays fused.

    Args:
        model: searched for PEFT layers.
        strict: raise where a PEFT layer cannot be fused, now or at a call, instead of running
            PEFT's code; a call without an adapter (disabled, merged, none active) is no such case.
        share_inputs: let layers that read one x, as q, k and v do, add up their dx inside their
            products, where that saves time; the sum is rounded where autograd's is, or less often.

    Raises:
        NotFused: strict, and a layer is not eligible, or there is none; nothing was changed.
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse takes an nn.Module, got {type(model).__name__}")
    fused, not_fused = {}, {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        reason = why_not(layer)
        if reason is None:
            fused[name] = layer
        else:
            not_fused[name] = reason
    if strict and not_fused:
        name, reason = next(iter(not_fused.items()))
        rest = f", and {len(not_fused) - 1} more" if len(not_fused) > 1 else ""
        raise calls.NotFused(f"fuse(strict=True): {name} cannot be fused: {reason}{rest}")
    if strict and not fused:
        raise calls.NotFused("fuse(strict=True): the model has no PEFT layer")
    for layer in fused.values():
        layer.__class__ = rewrapped(type(layer), fused_class(layer))
    counts = {name: calls.watch(layer, strict) for name, layer in fused.items()}
    own: dict[str, Any] = fused
    linear = {name: layer for name, layer in own.items() if type(layer).forward is Fused.forward}
    return Report([*fused], not_fused, share(linear, share_inputs), counts)


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: every layer of `model` is PEFT's own again."""
    for layer in model.modules():
        own = fused_class(layer) if isinstance(layer, Fused) else None
        if own is not None:
            now: Any = type(layer)
            layer.__class__ = rewrapped(now, own.plain)
            layer.__dict__ = without_ours(layer.__dict__)


def why_not(layer: Any, x: Tensor | None = None, *args: Any, **kwargs: Any) -> str | None:
    """Return why `layer(x, *args, **kwargs)` cannot run fused as things are, or None if it can.

    Without x the answer is for training on an x of the base weight's dtype. Autocast counts.
    """
    own = fused_class(layer)
    if own is None:
        return f"the layer is a {kind(layer)}, not a PEFT lora.Linear"
    found = own.find(layer, x, args, kwargs)
    return found if isinstance(found, str) else None


def fused_class(layer: Any) -> Any:
    """Return the class that `fuse` gives a layer of this very type, or has given it, or None."""
    own = wrapped_by_fsdp(type(layer))
    if issubclass(own, Fused):
        return own if "plain" in vars(own) else None
    return _registered(KINDS, own)


def base_of(own: type) -> Any:
    """Return the function that says what a base layer of this very type hands over, or None."""
    return _registered(BASES, own)


def _registered(table: dict[str, str], own: type) -> Any:
    """Return what a table of paths names for a type, or None."""
    path = table.get(f"{own.__module__}.{own.__qualname__}")
    if path is None:
        return None
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
