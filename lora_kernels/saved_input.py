"""Whether a layer may save the caller's x for its backward pass, or has to save a copy.

With dropout or wider adapters, or where x has no rows without a copy (a transposed [B, L, K]), PEFT
saves what it made of x, so a caller may write to x in place before the backward pass: `h +=
layer(h)`. Saving x itself costs no memory, but then that raises.
Which of the two a caller does is seen in the first backward pass: until then, and for ever where x
was written to, a layer works on a copy; the others save x itself from their second step on. A write
that begins later raises autograd's error, or is not seen where it goes past the version (x.data).

A checkpoint's second forward, which runs in the backward pass, always works on a copy. By then one
call of the layer may have been looked at and another not, and of what that forward saves PyTorch
compares no version: a write would not raise, it would make gradients wrong.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_kernels.ops.lora_linear import composition
from lora_kernels.ops.lora_linear.validate import PLAIN_TYPES

WRITTEN = "_lora_kernels_x_is_written_to"  # in a layer's __dict__, once that is known


def needs_a_copy(layer: nn.Module, x: Tensor, lora_a: Tensor, made: bool) -> bool:
    """Return whether x would be saved where PEFT saves something else, and may be written to.

    made: whether PEFT saves what it makes of an x of lora_a's dtype, too.
    """
    return (
        not torch.compiler.is_compiling()  # a graph without writes is what gets compiled
        and (made or lora_a.dtype != x.dtype or not _has_rows(x))
        and lora_a.requires_grad
        and torch.is_grad_enabled()
        and type(x) in PLAIN_TYPES
        and composition.surrounds() is None  # what PyTorch's own operators save is as PEFT's
        and (layer.__dict__.get(WRITTEN) is not False or _in_backward())
    )


def _has_rows(x: Tensor) -> bool:
    """Return whether x[..., K] can be viewed as [M, K]; else a product reads a copy of it."""
    if x.dim() < 3 or x.is_nested or x.layout is not torch.strided or x.is_contiguous():
        return True
    axes = zip(x.shape[:-1], x.stride(), strict=False)
    rows = [(size, stride) for size, stride in axes if size != 1]
    return all(outer == size * stride for (_, outer), (size, stride) in itertools.pairwise(rows))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _clone(x: Tensor) -> Tensor:
    # Unseen by dispatch modes: a selective checkpoint expects of its second forward the operators
    # of the first, which need not have copied.
    with torch._C._DisableTorchDispatch():
        return x.clone(memory_format=torch.contiguous_format)  # which has rows


def on_a_copy(
    layer: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor], copied: Tensor | None = None
) -> Tensor:
    """Return `run(copy of x)`; the first backward pass finds out whether x was written to.

    `copied` is a copy that there is already.
    """
    y = run(_clone(x) if copied is None else copied)
    if WRITTEN in layer.__dict__ or x.is_inference() or not y.requires_grad:
        return y
    watched = x.detach()
    watched.data = x.new_empty(0)  # leaves x's memory and keeps its version counter
    version = watched._version

    def look(_: Tensor) -> None:
        state = layer.__dict__
        state[WRITTEN] = state.get(WRITTEN, False) or watched._version != version

    y.register_hook(look)
    return y
