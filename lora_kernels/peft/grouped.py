"""The LoRA product of many experts at once: rows sorted by expert, no delta of W's size."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops.lora_linear import composition


def grouped_lora(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, ends: Tensor
) -> Tensor:
    """Return `y = x·W_e + s·x·A_eᵀ·B_eᵀ` for every row of x, e being the row's expert.

    x[S,K] holds the rows of expert 0, then those of expert 1, ...; ends[E] (int32) says where the
    rows of each end. weight[E,K,N] is frozen, of any strides. As PEFT stores them, lora_a[E·R,K]
    has expert e's rank r in row e·R + r, lora_b[N,R·E] in column r·E + e. x and W are bf16, fp16 or
    fp32; A and B are rounded to that dtype first, as PEFT rounds them. Returns y[S,N].

    With s = m·2ᶜ, `P = x·A_eᵀ` and `Q = m·dy·B_e` [S,R]: `dx = dy·W_eᵀ + 2ᶜ·Q·A_e`,
    `dA_e = 2ᶜ·Qᵀ·x` and `dB_e = s·dyᵀ·P` over the rows of e, zero where there are none. Three
    grouped products forward, five backward; kept are x and P.

    Raises:
        RuntimeError: a second derivative is asked for where A is frozen.
    """
    return _GroupedLoRA.apply(x, weight, lora_a, lora_b, float(scaling), ends)


class _GroupedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor,
        scaling: float, ends: Tensor,
    ) -> Tensor:  # fmt: skip
        factor, power = _split(scaling)
        p = F.grouped_mm(x, _stack_a(lora_a, weight).transpose(1, 2), offs=ends)
        y = F.grouped_mm(x, weight, offs=ends)
        y.add_(F.grouped_mm(p, _stack_b(lora_b, weight, factor), offs=ends), alpha=power)
        need_dx, _, need_da, need_db, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_da else None,
            weight,
            lora_a if need_dx or need_da else None,
            lora_b,
            p if need_db else None,
            ends,
        )
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, p, ends = ctx.saved_tensors
        need_dx, _, need_da, need_db, *_ = ctx.needs_input_grad
        factor, power = _split(ctx.scaling)
        if torch.is_grad_enabled() and need_db:  # create_graph=True: of P, x and A are to be known
            if need_da:
                p = _product(x, _stack_a(lora_a, weight).transpose(1, 2), ends)
            elif need_dx:
                raise RuntimeError("experts: double backward beside a frozen A is not supported")
        dy = dy.contiguous()
        dx = da = db = None
        if need_dx or need_da:
            q = _product(dy, _stack_b(lora_b, weight, factor).transpose(1, 2), ends)
            if composition.surrounds(dy):  # a batch has lost the strides q was made with
                q = _with_strides(q)
        if need_dx:
            dx = _product(dy, weight.transpose(1, 2), ends)
            dx.add_(_product(q, _stack_a(lora_a, weight), ends), alpha=power)
        if need_da:
            stack = _product(q.t(), x, ends)  # [E,R,K]
            da = stack.to(lora_a.dtype).mul_(power).view_as(lora_a)
        if need_db:
            stack = _product(p.t(), dy, ends)  # [E,R,N]
            db = stack.permute(2, 1, 0).reshape(lora_b.shape).to(lora_b.dtype).mul_(ctx.scaling)
        return dx, None, da, db, None, None


def _product(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    y = F.grouped_mm(rows, stack, offs=ends)
    if y.requires_grad:  # of a second derivative anything may arrive
        y.register_hook(_with_strides)
    return y


def _with_strides(t: Tensor) -> Tensor:
    """Return what grouped products ask for: rows that begin at multiples of 16 bytes."""
    columns = t.shape[-1]
    return F.pad(t.contiguous(), (0, -columns % 8))[..., :columns]


def _split(scaling: float) -> tuple[float, float]:
    """Return m and 2ᶜ, m·2ᶜ = s: addition takes 2ᶜ, which no 16-bit dtype rounds, and fp32 sums."""
    exponent = min(max(math.frexp(scaling)[1], -14), 15)  # fp16 reaches no further
    return math.ldexp(scaling, -exponent), math.ldexp(1.0, exponent)


def _stack_a(lora_a: Tensor, weight: Tensor) -> Tensor:
    """Return A as [E,R,K], in W's dtype."""
    return lora_a.to(weight.dtype).view(len(weight), -1, lora_a.shape[1])


def _stack_b(lora_b: Tensor, weight: Tensor, factor: float) -> Tensor:
    """Return m·B as [E,R,N], in W's dtype; contiguous, which grouped products ask for."""
    stack = lora_b.view(len(lora_b), -1, len(weight)).permute(2, 1, 0) * factor
    return stack.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
