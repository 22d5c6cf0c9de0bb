"""What x is so small that a call of our operator costs Python more than it saves; what runs then.

Decided by x's shape alone: a checkpoint's second forward must take the way of the first.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# On a CPU a plain adapter beside a dense layer is composed where x and y together have fewer bytes
# than so many rows of _ROW_BYTES (2 MiB), or under dropout, whose mask is what the operator draws
# sooner, fewer elements than such rows of _ROW_DROPPED. Of PEFT's time (one thread; forward,
# forward and backward) the operator takes at
#             fp32        bf16        dropout, fp32   dropout, bf16
#   0.5 MiB:  1.07, 1.12  1.02, 1.13  1.10, 1.16      0.86, 0.97
#     1 MiB:  0.98, 1.03  1.04, 1.06  0.89, 1.02      0.68, 0.93
#     2 MiB:  0.96, 0.98  0.95, 0.97  0.85, 0.96      0.59, 0.82
# and what is composed 0.90 to 1.00. Kinds that cannot be composed so are left to PEFT below that
# size (at 0.6 MiB: two adapters 1.08, 1.05, lora_bias 1.13, 1.12, KaSA 1.05, 1.06, NF4 1.05, 1.03;
# DoRA 0.81, 0.90 is not) and below so many rows, there as elsewhere if factors are made anew.
FEW_ROWS = 64
_ROW_BYTES, _ROW_DROPPED = 1 << 15, 1 << 12
_DISTRIBUTED = dist.is_available()
_is_compiling = torch.compiler.is_compiling


def few_rows(x: Tensor) -> str | None:
    """Return that x has too few rows for any kind of layer, or None."""
    return fewer_rows(x, FEW_ROWS)


def fewer_rows(x: Tensor, rows: int, where: str = "on a CPU") -> str | None:
    """Return that x has fewer than so many rows, if it does: too few for our own code to gain."""
    if x.dim() == 0 or x.numel() >= rows * x.shape[-1]:
        return None
    return f"x has fewer than {rows} rows, for which PEFT's code is faster {where}"


def too_few(layer: Any, x: Tensor) -> str | None:
    """Return that x has too few rows for what cannot be composed to be faster than PEFT's code."""
    if not on_a_cpu(x):
        return fewer_rows(x, FEW_ROWS, "here")
    width = (layer.in_features + layer.out_features) * x.itemsize
    return fewer_rows(x, max(FEW_ROWS, FEW_ROWS * _ROW_BYTES // max(width, 1)))


def on_a_cpu(x: Tensor) -> bool:
    """Return whether a CPU computes and Python is what a call costs: not what is compiled."""
    return (
        x.is_cpu
        and not _is_compiling()
        and not x.is_nested  # which has no shape to decide by
        # Ranks that went different ways would wait for one another, or drop the same elements.
        and not (_DISTRIBUTED and dist.is_initialized())
    )


def is_small(x: Tensor, n: int, dropout_p: float = 0.0) -> bool:
    """Return whether PyTorch's operators, one by one, are faster than one of our own."""
    if x.dim() == 0 or not on_a_cpu(x):
        return False
    k, row = x.shape[-1], _ROW_DROPPED if dropout_p else _ROW_BYTES // x.itemsize
    return x.numel() * (k + n) < FEW_ROWS * row * k


def compose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """Return what PEFT's code would, to the bit, by its operators without its modules."""
    y = F.linear(x, weight, bias)
    if x.dtype != lora_a.dtype:
        x = x.to(lora_a.dtype)
    if dropout_p:
        x = F.dropout(x, dropout_p)
    z = y + F.linear(F.linear(x, lora_a), lora_b) * scaling
    return z if z.dtype == y.dtype else z.to(y.dtype)
