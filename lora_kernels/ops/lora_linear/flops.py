"""What PyTorch's `FlopCounterMode` has to know: the floating-point operations of both operators."""

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_Shape = tuple[int, ...]
_ops = torch.ops.lora_kernels


def teach() -> None:
    """Give the formulas to `torch.utils.flop_counter` and to the counters that are at work.

    Importing it would import Triton, so this waits until somebody counts, and a counter has by then
    made a copy of the formulas that there were.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    for operator, formula in (
        (_ops.lora_linear, _forward),
        (_ops.lora_linear_backward, _backward),
    ):
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, counter._FlopCounterMode):
                known = mode.counter.flop_registry
                known.setdefault(operator, counter.flop_registry[operator])


def _forward(x: _Shape, weight: _Shape, lora_a: _Shape, *_: Any, **__: Any) -> int:
    """Return `2MNK + 2MR(K+N)`."""
    (m, k), n, r = x, weight[0], lora_a[0]
    return 2 * m * (n * k + r * (k + n))


def _backward(
    dy: _Shape, x: _Shape | None, weight: _Shape | None, lora_a: _Shape | None,
    lora_b: _Shape | None, p: _Shape | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Return `2MNK` for dy·W, `2MRK` each for Q·A and da, and `2MNR` each for Q and db."""
    m, n = dy
    macs = 0
    if weight is not None and lora_a is not None:
        macs += m * n * weight[1] + m * lora_a[0] * lora_a[1]
    if lora_b is not None:
        macs += m * n * lora_b[1]
        if x is not None:
            macs += m * lora_b[1] * x[1]
    if p is not None:
        macs += m * n * p[1]
    return 2 * macs
