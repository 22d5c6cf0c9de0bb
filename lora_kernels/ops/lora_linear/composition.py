"""The operator as PyTorch's own: differentiable, out of place, fit for any transform or tool.

It runs where a kernel would hide from what surrounds the call: under `torch.func` transforms and
forward-mode differentiation, on batched gradients, and in what `torch.export` records, so that an
exported program names no operator of this package.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import is_autocast_available
from torch.autograd import forward_ad

from lora_kernels.ops.lora_linear.operands import Backward, Forward, Gradients
from lora_kernels.ops.lora_linear.philox import keep_mask, mask_columns

_in_transform = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor
_is_functional = torch._is_functional_tensor
_unwrap_once = torch._C._functorch.unwrap_if_dead


def surrounds(dy: Tensor | None = None) -> str | None:
    """Return which transform surrounds this point, or dy's computation, or None."""
    if _in_transform():
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    if dy is None or _is_compiling():
        return None
    if _is_legacy_batch(dy):
        return "on a batch of gradients"  # is_grads_batched=True
    return functional((dy,))


def functional(tensors: Sequence[Tensor]) -> str | None:
    """Return whether torch.func.functionalize has left one of the tensors behind."""
    return "on a functional tensor" if any(map(_is_functional, tensors)) else None


def unwrap(value: Any) -> Any:
    """Return a tensor without what transforms that have ended left around it; others as they are.

    A wrapper has no data of its own, where a kernel reads an address, and asks for the gradients
    of its transform.
    """
    if not isinstance(value, Tensor):
        return value
    inner = _unwrap_once(value)
    return value if inner is value else unwrap(inner)  # one layer for each transform


def forward(call: Forward) -> Tensor:
    """Return y (..., N) of x (..., K), as PEFT computes it: `s` after the products.

    Without a seed torch's own dropout runs, so that `vmap(randomness=...)` is heeded.
    """
    x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, first = call
    dropped = x.to(lora_a.dtype)
    if seed is not None:
        m, k = math.prod(x.shape[:-1]), x.shape[-1]
        keep = keep_mask(seed, dropout_p, range(m), mask_columns(first, range(k)), x.device)
        dropped = dropped * keep.reshape(x.shape) / (1 - dropout_p)
    elif dropout_p:
        dropped = F.dropout(dropped, dropout_p)
    y = F.linear(x, weight, bias)
    return (y + F.linear(F.linear(dropped, lora_a), lora_b) * scaling).to(y.dtype)


def backward(call: Backward) -> Gradients:
    """Return the needed ones of dx, da and db; dy may be a batch, in any of PyTorch's ways."""
    dy, x, weight, lora_a, lora_b, p, seed, _, dropout_p, first = call
    factor, power = call.scale()
    dx = da = db = q = keep = None
    if p is not None:
        db = dy.to(p.dtype).t() @ p * power
    if lora_b is not None:
        q = dy.to(lora_b.dtype) @ lora_b * factor
    if seed is not None:
        m, _, k, _ = call.sizes()
        keep = keep_mask(seed, dropout_p, range(m), mask_columns(first, range(k)), dy.device)
    if weight is not None:
        dx = dy @ weight
        if q is not None and lora_a is not None:
            low_rank = q @ lora_a * power
            dx = (dx + (low_rank if keep is None else low_rank * keep)).to(dx.dtype)
    if x is not None and q is not None:
        da = q.t() @ (x if keep is None else x * keep).to(q.dtype) * power
    return Gradients(dx, da, db)


def is_differentiable(call: Backward) -> bool:
    """Return whether all that the gradients are functions of is at hand."""
    # db is one of x, too, which is saved for A's gradient alone.
    lost = call.p is not None and call.x is None and call.weight is not None
    return not lost and not _is_compiling()


def differentiable(call: Backward, unread: tuple[Tensor, int] | None) -> Gradients:
    """Do as `backward`, and let dx, da and db be differentiated by dy, x, A and B.

    unread: A and its version in the forward where db alone depends on it, and nothing reads it.
    """
    x, lora_a = call.x, call.lora_a
    if unread is not None:
        lora_a, version = unread
        if lora_a._version != version:
            raise RuntimeError("lora_linear: lora_a was modified by an inplace operation")
    device = call.dy.device.type
    with torch.autocast(device if is_autocast_available(device) else "cpu", enabled=False):
        if call.p is not None and x is not None and lora_a is not None:  # else P is a constant
            if call.seed is not None:
                rows, columns = range(len(x)), mask_columns(call.first_column, range(x.shape[1]))
                x = x * keep_mask(call.seed, call.dropout_p, rows, columns, x.device)
            call = call._replace(p=x.to(lora_a.dtype) @ lora_a.t() * call.scale().factor)
        return backward(call)
