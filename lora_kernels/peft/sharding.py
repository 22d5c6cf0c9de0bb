"""What a parameter is where a wrapper shards it: whole while the model runs, or out of reach.

FSDP keeps a shard in a parameter's place, FSDP2 as a DTensor, and puts the whole tensor there while
the module runs that it wraps.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lora_kernels.ops.lora_linear.validate import PLAIN_TYPES
from lora_kernels.peft.parts import kind
from lora_kernels.peft.patched import not_plain

_FSDP = "torch.distributed.fsdp."


def out_of_reach(part: str, tensor: Any, module: nn.Module, now: bool) -> str | None:
    """Return why `lora_linear` cannot take a parameter of `module`, or None.

    Not `now`, but when the model runs: then it is whole if FSDP gathers it.
    """
    if type(tensor) in PLAIN_TYPES:
        if not now and getattr(tensor, "ds_id", None) is not None:
            return f"{part} is gathered by DeepSpeed (ZeRO-3) for its own module's call alone"
        return None if tensor.layout is torch.strided else f"{part} is {tensor.layout}, not dense"
    if type(tensor) is DTensor:
        if not now and "_is_fsdp_managed_module" in module.__dict__:
            return None
        return f"{part} is a shard (DTensor), not a whole tensor"
    return f"{part} is a {kind(tensor)}, not a plain tensor"


# --- A and B that FSDP wraps on their own: gathered by their own module's call, and only there ----


def gathers_itself(module: Any) -> bool:
    """Return whether FSDP wraps this linear layer on its own, and nothing else does."""
    if type(module) is FullyShardedDataParallel:
        return not_plain("", module._fsdp_wrapped_module) is None and not _foreign_hooks(module)
    return (
        isinstance(module, FSDPModule)
        and wrapped_by_fsdp(type(module)) is nn.Linear
        and "forward" not in module.__dict__
        and not _foreign_hooks(module)
    )


def handed_over(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return a copy of the weight, and of the bias, of a linear layer, as its own call finds them.

    Every hook of the call runs, forward and backward, so FSDP gathers the weight and reduces its
    gradient as ever; only the product is left out.
    """
    weight, bias = module(_Request())
    return weight.to(dtype), None if bias is None else bias.to(dtype)


class _Request:
    """An x that `F.linear` answers with the weight and the bias it would have multiplied by."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        _, weight, bias = args
        # Copies: FSDP frees the storage as soon as the call is over.
        return weight.clone(), None if bias is None else bias.clone()


def _foreign_hooks(module: Any) -> bool:
    state = module.__dict__
    hooks = [
        *state["_forward_pre_hooks"].values(),
        *state["_forward_hooks"].values(),
        *state["_backward_hooks"].values(),
        *state["_backward_pre_hooks"].values(),
    ]
    return any(not hook.__module__.startswith(_FSDP) for hook in hooks)


# --- The classes FSDP2 makes ----------------------------------------------------------------------


def wrapped_by_fsdp(cls: type) -> type:
    """Return the class that FSDP2 derived `cls` from, or `cls` itself."""
    bases = cls.__bases__
    return bases[1] if len(bases) == 2 and issubclass(bases[0], FSDPModule) else cls


@functools.cache
def rewrapped(cls: type, inner: type) -> type:
    """Return `inner`, derived from as FSDP2 derived `cls`, if it did."""
    if wrapped_by_fsdp(cls) is cls:
        return inner
    namespace = {name: value for name, value in vars(cls).items() if name != "__doc__"}
    return type(f"FSDP{inner.__name__}", (cls.__bases__[0], inner), namespace)
