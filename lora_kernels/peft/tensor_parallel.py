"""Linear layers shared out by PyTorch's or transformers' tensor parallelism, as products of shards.

Columns: W and B are cut along N, each process makes its own columns of y from the whole x. Rows: W
and A are cut along K, each process has those columns of x, and y is the sum over processes, of the
low-rank path and the frozen one in one collective. What every process holds whole, x and A or B,
has a gradient that is a sum over processes, too. Each draws the mask of one process, for the
columns of x that it has: ranks seeded alike agree on it.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

# By the dimension of W that is cut: the layouts of x and y for which a product of shards is exact.
_LAYOUTS = {0: (Replicate(), Shard(-1)), 1: (Shard(-1), Replicate())}
_TRANSFORMERS = "transformers.distributed.tensor_parallel"


class Split(NamedTuple):
    """Which dimension of W[N,K] is cut, and the processes that share it out."""

    dim: int
    group: dist.ProcessGroup
    # Where the x of this process starts in the whole one, or None where it has that.
    first_column: int | None = None

    def inward(
        self, x: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the operands of this process's product."""
        if self.dim == 0:
            x, lora_a = (_SumBackward.apply(t, self.group) for t in (x, lora_a))
            return x, lora_a, lora_b, bias
        first = dist.get_rank(self.group) == 0
        return x, lora_a, _SumBackward.apply(lora_b, self.group), bias if first else None

    def outward(self, y: Tensor) -> Tensor:
        """Return this process's y of its product, which is overwritten."""
        return y if self.dim == 0 else _SumForward.apply(y, self.group)


def split_of(module: Any, now: bool) -> Split | None:
    """Return how a linear layer is shared out, or None where that is not, or not exactly, known.

    Not `now`, but when the model runs: FSDP, too, then no longer cuts what it has cut on top.
    """
    weight = module._parameters.get("weight")
    if type(module) is not nn.Linear or not isinstance(weight, DTensor):
        return None
    mesh, placement = weight.device_mesh, weight.placements[-1]
    on_top = not now and "_is_fsdp_managed_module" in module.__dict__
    if not (mesh.ndim == 1 or on_top) or not isinstance(placement, Shard):
        return None
    dim = placement.dim % 2
    found = _by_transformers(module) if "forward" in module.__dict__ else _by_torch(module)
    if found != (*_LAYOUTS[dim], True):
        return None
    group = mesh.get_group(mesh.ndim - 1)
    if dim == 0:
        return Split(dim, group)
    k, share = weight.shape[1], -(-weight.shape[1] // group.size())  # as `torch.chunk` cuts
    return Split(dim, group, min(group.rank() * share, k))


def _by_torch(module: Any) -> Any:
    """Return what `parallelize_module` was given: layouts of x and y, and whether y is local."""
    state = module.__dict__
    before, after = state["_forward_pre_hooks"], state["_forward_hooks"]
    if len(before) != 1 or len(after) != 1 or state["_backward_hooks"]:
        return None
    (before,), (after,) = before.values(), after.values()
    before, after = _closure(before).get("input_fn"), _closure(after).get("output_fn")
    styles = (ColwiseParallel, RowwiseParallel)
    if not isinstance(before, partial) or before.func not in [s._prepare_input_fn for s in styles]:
        return None
    if not isinstance(after, partial) or after.func not in [s._prepare_output_fn for s in styles]:
        return None
    (x_layouts, _), (y_layouts, local) = before.args, after.args
    return (*x_layouts, *y_layouts, local)


def _by_transformers(module: Any) -> Any:
    """Return the same of the style that replaced the forward."""
    state = module.__dict__
    if any(state[hooks] for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")):
        return None
    found = _closure(state["forward"])
    style: Any = found.get("self")
    inner = found.get("original_forward")
    known = type(style).__module__ == _TRANSFORMERS and type(style).__name__ in (
        "ColwiseParallel",
        "RowwiseParallel",
    )
    if not known or getattr(inner, "__func__", None) is not nn.Linear.forward:
        return None
    return style.input_layouts, style.output_layouts, style.use_local_output


def _closure(function: Any) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(y)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        dx = dx.clone()  # others may hold this one
        dist.all_reduce(dx, group=ctx.group)
        return dx, None
