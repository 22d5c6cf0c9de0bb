"""What is done to whole rows, a cache-sized block of them at a time: no wider copy of y, no N×K."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.lora_linear import composition

# Elements that exist at a time. On the CPU they stay in the cache; elsewhere launches cost.
_BLOCK_ELEMENTS = {"cpu": 1 << 17}
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 24


def add_row(y: Tensor, row: Tensor) -> Tensor:
    """Return `y + row` for every row of y[..., N], rounded once, to y's dtype; row is [N].

    Beside a wider row, autograd's own addition copies y in that dtype, or sums row's gradient in
    the narrower one.
    """
    return y + row if row.dtype == y.dtype else _AddRow.apply(y, row)


def rescale(z: Tensor, scale: Tensor, row: Tensor | None) -> Tensor:
    """Return `z + (scale - 1)∘(z - row)` for every row of z[..., N]: scale acts on z less row.

    scale and row are [N], row may be None for 0. Rounded once, to z's dtype; a scale of 1 changes
    no bit. z was made with row in it, as a constant: row's gradient here is the whole one, Σ dy.
    """
    return _Rescale.apply(z, scale, row)


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return the norm of every row of `W + s·B·A`, [N] in A's dtype, as a constant.

    The sum is made and rounded as such, so rows where it nearly cancels are as right as others,
    which the factored ‖W‖² + 2s·W·(B·A) + s²·‖B·A‖² are not.
    """
    n, k = weight.shape
    dtype, device = lora_a.dtype, weight.device.type
    norms = lora_a.new_empty(n)
    known = device if torch.amp.is_autocast_available(device) else "cpu"  # meta knows none
    with torch.no_grad(), torch.autocast(known, enabled=False):
        for rows in _blocks(n, k, device):
            summed = torch.addmm(weight[rows].to(dtype), lora_b[rows], lora_a, alpha=scaling)
            norms[rows] = torch.linalg.vector_norm(summed, dim=1)
    return norms


class _AddRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, row: Tensor) -> Tensor:
        ctx.row_dtype = row.dtype
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        n = y.shape[-1]
        flat, out_flat = y.reshape(-1, n), out.view(-1, n)
        for rows in _blocks(flat.shape[0], n, y.device.type):
            out_flat[rows] = flat[rows] + row
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        return dy, _sum(dy, ctx.row_dtype) if ctx.needs_input_grad[1] else None


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, row: Tensor | None) -> Tensor:
        ctx.save_for_backward(*((z, row) if ctx.needs_input_grad[1] else (None, None)), scale)
        ctx.row_dtype = None if row is None else row.dtype
        n = z.shape[-1]
        y = torch.empty_like(z, memory_format=torch.contiguous_format)
        flat, out, less_one = z.reshape(-1, n), y.view(-1, n), scale - 1
        for rows in _blocks(flat.shape[0], n, z.device.type):
            block = flat[rows].to(scale.dtype)
            out[rows] = block.addcmul(block if row is None else block - row, less_one)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        z, row, scale = ctx.saved_tensors
        n = dy.shape[-1]
        row = None if row is None else row.detach()  # a constant in z, and in what is made of z
        # Nothing may be written to in place, or the result is to be differentiated again.
        if composition.surrounds(dy) or torch.is_grad_enabled():
            wide = dy.to(scale.dtype)
            dz = (wide * scale).to(dy.dtype)
            d_scale = None
            if ctx.needs_input_grad[1]:
                d_scale = (wide * (z if row is None else z - row)).reshape(-1, n).sum(0)
            return dz, d_scale, _sum(dy, ctx.row_dtype) if ctx.needs_input_grad[2] else None
        dz = torch.empty_like(dy, memory_format=torch.contiguous_format)
        flat, out = dy.reshape(-1, n), dz.view(-1, n)
        d_scale = torch.zeros_like(scale) if ctx.needs_input_grad[1] else None
        for rows in _blocks(flat.shape[0], n, dy.device.type):
            block = flat[rows].to(scale.dtype)
            out[rows] = block * scale
            if d_scale is not None:
                made = z.reshape(-1, n)[rows]
                d_scale += (block * (made if row is None else made - row)).sum(0)
        return dz, d_scale, _sum(dy, ctx.row_dtype) if ctx.needs_input_grad[2] else None


def _sum(dy: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=dtype)


def _blocks(length: int, width: int, device_type: str) -> Iterator[slice]:
    elements = _BLOCK_ELEMENTS.get(device_type, _BLOCK_ELEMENTS_ELSEWHERE)
    step = max(elements // max(width, 1), 16)
    for start in range(0, length, step):
        yield slice(start, start + step)
