"""The fallback backend, as fast as plain PyTorch gets, and the oracle that judges every backend.

Works on every device and floating dtype. The low-rank path is computed in the adapters' dtype, so
fp32 adapters beside a bf16 base err like fp32, as in PEFT. Where that or dropout would need a
converted or masked copy of x, y or dy, it is made one cache-sized block at a time.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear.operands import Backward, Forward, Gradients
from lora_kernels.ops.lora_linear.philox import GROUP, drop, keep_mask, mask_columns
from lora_kernels.ops.lora_linear.problem import Problem

# Elements of a converted or masked block. On the CPU a block and what is computed from it stay in
# the L2 cache; elsewhere launches are what costs.
_BLOCK_ELEMENTS = {"cpu": 1 << 18}
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 24


def why_not(problem: Problem) -> str | None:
    """Return None: the reference takes every valid problem."""
    return None


def forward(call: Forward) -> tuple[Tensor, Tensor]:
    """Return y and P."""
    x, weight, lora_a, lora_b, bias, seed, _, dropout_p, first = call
    factor, power = call.scale()
    y = F.linear(x, weight, bias)
    if seed is None:
        p = _project(x, lora_a.t(), factor)
    else:
        m, k = x.shape
        p = lora_a.new_empty(m, lora_a.shape[0])
        for rows in _blocks(m, k, x.device):
            block = slice(rows.start, rows.stop)
            (dropped,) = drop(seed, dropout_p, rows, mask_columns(first, range(k)), x[block])
            p[block] = _project(dropped, lora_a.t(), factor)
    if p.dtype == y.dtype:
        y.addmm_(p, lora_b.t(), alpha=power)
    else:
        _add_wider_product(y, p, lora_b.t(), power)
    return y, p


def backward(call: Backward, onto: Tensor | None = None) -> Gradients:
    """Return the needed ones of dx, da and db; dx is added to `onto` in place, where given."""
    dy, x, weight, lora_a, lora_b, p, seed, _, dropout_p, first = call
    factor, power = call.scale()
    dx = da = None
    db = None if p is None else _correlate(dy, p, power)
    if lora_b is None:
        return Gradients(dx, da, db)

    m, _, k, r = call.sizes()
    q = _project(dy, lora_b, factor)
    if weight is not None:
        dx = torch.mm(dy, weight) if onto is None else onto.addmm_(dy, weight)
    if seed is None:
        if dx is not None and lora_a is not None:
            if q.dtype != dx.dtype:
                _add_wider_product(dx, q, lora_a, power)
            elif m < 8:  # for a few rows BLAS adds the R terms to dx one by one, each rounded
                dx.add_(_product(q, lora_a, power))
            else:
                dx.addmm_(q, lora_a, alpha=power)
        if x is not None:
            da = _correlate(q, x, power)
        return Gradients(dx, da, db)

    if x is not None:
        da = q.new_empty(r, k)
    for columns in _blocks(k, m, dy.device):  # one mask serves drop(Q·A) and drop(x)
        block = slice(columns.start, columns.stop)
        tiles = [] if x is None else [x[:, block]]
        if dx is not None and lora_a is not None:
            tiles.append(_product(q, lora_a[:, block], power))
        kept = drop(seed, dropout_p, range(m), mask_columns(first, columns), *tiles)
        if dx is not None and lora_a is not None:
            dx[:, block] += kept.pop()
        if da is not None:
            da[:, block] = _correlate(q, kept.pop(), power)
    return Gradients(dx, da, db)


def compose(call: Forward) -> Tensor:
    """Return y of one token, x (..., K) -> y (..., N), differentiable by autograd alone.

    No dropout, one dtype; `y = x·Wᵀ (+ bias) + s·(x·Aᵀ)·Bᵀ`, s as the last product is added.
    """
    x, weight, lora_a, lora_b, bias, *_ = call
    row = x if x.dim() == 2 else x.reshape(1, -1)
    y = F.linear(row, weight, bias)
    y = y.add_(F.linear(F.linear(row, lora_a), lora_b), alpha=call.scaling)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], -1)


BACKEND = Backend("reference", why_not, forward, backward)


def oracle(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    first_column: int | None = None,
) -> Tensor:
    """Compose `y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ (+ bias)` from differentiable PyTorch operators.

    Shapes as in `lora_linear`. All tensors share one dtype, float64 when it judges others; the
    gradients come from autograd, so the hand-derived backward is checked by independent code.
    """
    dropped = x
    if seed is not None and dropout_p > 0:
        rows, columns = range(x.numel() // max(x.shape[-1], 1)), range(x.shape[-1])
        keep = keep_mask(seed, dropout_p, rows, mask_columns(first_column, columns), x.device)
        dropped = x * keep.reshape(x.shape) / (1 - dropout_p)
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, lora_a), lora_b) * scaling


def _product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """Return `alpha·left·right`, scaled before it is rounded: [M,C]·[C,R] -> [M,R]."""
    if alpha == 1:
        return torch.mm(left, right)  # one operator, not two
    out = left.new_empty(left.shape[0], right.shape[1])
    return out.addmm_(left, right, beta=0, alpha=alpha)


def _project(wide: Tensor, skinny: Tensor, alpha: float) -> Tensor:
    """Return `alpha·wide·skinny` in skinny's dtype: [M,C]·[C,R] -> [M,R]."""
    if wide.dtype == skinny.dtype:
        return _product(wide, skinny, alpha)
    out = skinny.new_empty(wide.shape[0], skinny.shape[1])
    for rows in _blocks(wide.shape[0], wide.shape[1], wide.device):
        block = slice(rows.start, rows.stop)
        out[block].addmm_(wide[block].to(skinny.dtype), skinny, beta=0, alpha=alpha)
    return out


def _add_wider_product(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """Add `alpha·left·right`, computed in their own wider dtype, to `out`: [M,R]·[R,C] -> [M,C]."""
    for rows in _blocks(out.shape[0], out.shape[1], out.device):
        block = slice(rows.start, rows.stop)
        wide = out[block].to(left.dtype)
        out[block].copy_(wide.addmm_(left[block], right, alpha=alpha))


def _correlate(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """Return `alpha·leftᵀ·right` in the wider of both dtypes: [M,L]ᵀ·[M,C] -> [L,C]."""
    if (
        left.is_cpu
        and left.shape[1] > right.shape[1]
        and torch.float32 in (left.dtype, right.dtype)
    ):
        # Its fp32 BLAS is faster with the skinny operand on the left.
        return _correlate(right, left, alpha).t().contiguous()
    if left.dtype == right.dtype:
        return _product(left.t(), right, alpha)
    (m, rows_out), columns_out = left.shape, right.shape[1]
    dtype = torch.promote_types(left.dtype, right.dtype)
    out = left.new_zeros(rows_out, columns_out, dtype=dtype)
    for rows in _blocks(m, max(rows_out, columns_out), left.device):
        block = slice(rows.start, rows.stop)
        out.addmm_(left[block].to(dtype).t(), right[block].to(dtype), alpha=alpha)
    return out


def _blocks(length: int, width: int, device: torch.device) -> Iterator[range]:
    """Split range(length) into blocks of at least 64 whose elements fill the device's block."""
    budget = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    # A mask tile that starts inside a Philox group would compute that group twice.
    step = max(budget // max(width, 1), 64) // GROUP * GROUP
    for start in range(0, length, step):
        yield range(start, min(start + step, length))
