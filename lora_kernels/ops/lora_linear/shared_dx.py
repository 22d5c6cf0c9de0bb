"""One dx for all layers that read one x: each adds its part to it inside its own products.

Autograd sums the dx of q, k and v in further passes over M×K. `stand_in` puts a node between x and
such layers, which hands on x and is run by autograd only after every one of them that takes part
in a backward pass. They leave their sum with it (`add`) and return no dx of their own; the node
returns the sum. The graph is thus as ever for everybody else: what hooks on x see is whole.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.lora_linear.operands import Backward, Gradients

# For fewer bytes of x the node costs as much as the passes over dx that it saves (README.md).
FEW_BYTES = 1 << 20


class _Joint(torch.autograd.Function):
    """The node: `x' = x`, converted or copied once for all where they would do so one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, copy: bool) -> Tensor:
        ctx.set_materialize_grads(False)  # nothing may arrive but by `add`
        ctx.dtype, ctx.shape = x.dtype, x.shape
        # By backward pass: several may run at a time, and one that raised leaves its sum behind.
        ctx.sums = {}
        if copy or dtype != x.dtype:
            return x.to(dtype, copy=copy)
        return x.detach()  # shares x's version, so that a write to x is noticed as ever

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None) -> tuple[Tensor | None, None, None]:
        total = ctx.sums.pop(torch._C._current_graph_task_id(), None)
        if total is not None:
            total = total.view(ctx.shape)
            # From readers that do not `add`: a batch of gradients, other operators.
            dx = total if dx is None else dx + total
        return None if dx is None else dx.to(ctx.dtype), None, None


class _Latest:
    """The x that a node was made for last, what it is valid for, and what stands for x."""

    def __init__(self) -> None:
        self.x: Callable[[], Tensor | None] = lambda: None
        self.key: Any = None
        self.copied = False
        self.stand_in: Tensor | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.latest = _Latest()


_thread = _Thread()


def stand_in(x: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor | None:
    """Return what every layer reads in place of x[..., K], in `dtype`, or None for x itself.

    The same for all calls in a row with the same x, unless x was written to in between; with
    `copy` it is none of x's memory. It is kept for as long as x lives. A write past x's version
    (x.data, NumPy) is not seen where x is copied or converted; `x.data = ...` is, unless the new
    memory is where the old was.
    """
    if (
        x.is_leaf  # needs no gradient; or nothing is above x, and keeping its node would keep x
        or not torch.is_grad_enabled()
        or x.numel() * dtype.itemsize < FEW_BYTES
        or torch._C._len_torch_dispatch_stack()  # who watches operators sees each layer's own
    ):
        return None
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None
    # What was put in x's place by `x.data = ...` has its version, too.
    key = x._version, x.data_ptr(), x.shape, x.stride(), dtype, stream
    latest = _thread.latest
    if latest.x() is x and latest.key == key:
        return latest.stand_in if latest.copied or not copy else None
    made = _Joint.apply(x, dtype, copy)
    latest.key, latest.copied, latest.stand_in = key, copy or dtype != x.dtype, made

    def forget(reference: Any) -> None:
        if latest.x is reference:
            latest.stand_in = None

    latest.x = weakref.ref(x, forget)
    return made


def node_of(x: Tensor) -> Any:
    """Return the node that x[..., K] comes from, or None where it is not such a stand-in."""
    node = x.grad_fn
    return node if type(node) is _Joint._backward_cls else None


def add(node: Any, call: Backward, backward: Callable[..., Gradients]) -> Gradients:
    """Run a layer's backward, which leaves its dx with `node` and returns None for it.

    `backward(call, onto)` adds dx[M,K] to `onto` and returns that. Where no backward pass will ask
    the node, dx is returned.
    """
    task = torch._C._current_graph_task_id()
    if task < 0 or not torch._C._will_engine_execute_node(node):
        return backward(call)
    gradients = backward(call, node.sums.get(task))
    node.sums[task] = gradients.dx
    return gradients._replace(dx=None)
