"""The forward kernel: `y = x·Wᵀ + 2ᵉ·P·Bᵀ (+ bias)` and `P = m·keep(x)·Aᵀ` in one launch."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from lora_kernels.ops.lora_linear.triton.primitives import (
    DROP_ROW_IS_M,
    KEEP_ALL,
    READY,
    contract,
    finish,
    philox_key,
    publish,
    scale_by,
    skinny,
    skinny_item,
    store,
    take_ticket,
    tile,
    wait,
)  # fmt: skip


@triton.jit
def _p_item(
    item, x_ptr, x_desc, a_ptr, p_ptr, workspace_ptr,
    m, k, r, x_m, x_k, a_r, a_k, scale, threshold, key_low, key_high,
    DROP: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Write `P[BM, BR] = scale·keep(x)·Aᵀ` and release the flag of its rows."""
    row_block, rank_tile = skinny(item, tl.cdiv(r, BR))
    skinny_item(
        x_ptr, a_ptr, p_ptr, x_desc, row_block * BM, rank_tile * BR, m, r, k,
        x_m, x_k, a_k, a_r, r, 1, scale, threshold, key_low, key_high, PRECISION, DROP, BM, BR, BK,
        FIRST=FIRST,
    )  # fmt: skip
    publish(workspace_ptr, row_block, COUNT_ALL=False)


@triton.jit
def _main_tile(
    item, ticket, x_ptr, w_ptr, x_desc, w_desc, b_ptr, bias_ptr, p_ptr, y_ptr, workspace_ptr,
    m, n, k, r, x_m, x_k, w_n, w_k, b_n, b_r, bias_n, lower, upper,
    PRECISION: tl.constexpr, DEBUG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Write `y[BM, BN] = x·Wᵀ + upper·P·Bᵀ (+ bias)`; P is awaited only once x·Wᵀ is done.

    The accumulator is lowered for the rank loop, `lower` being 1/upper, and raised after it: exact.
    """
    OPERAND: tl.constexpr = x_ptr.dtype.element_ty
    row_block, column_block = tile(item, tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP)
    row, col = row_block * BM, column_block * BN
    acc = contract(
        tl.zeros((BM, BN), tl.float32), x_ptr, w_ptr, x_desc, w_desc, row, col, m, n, k,
        x_m, x_k, w_k, w_n, 0, 0, 0, OPERAND, PRECISION, False, KEEP_ALL, BK, R_FLIP=True,
    )  # fmt: skip
    wait(workspace_ptr + READY + row_block, tl.cdiv(r, BR), ticket, DEBUG)
    acc = contract(
        scale_by(acc, lower), p_ptr, b_ptr, None, None, row, col, m, n, r,
        r, 1, b_r, b_n, 0, 0, 0, OPERAND, PRECISION, False, KEEP_ALL, BS,
    )  # fmt: skip
    acc = scale_by(acc, upper)
    if bias_ptr is not None:
        i = col + tl.arange(0, BN)
        bias = tl.load(bias_ptr + i.to(tl.int64) * bias_n, mask=i < n, other=0.0)  # [BN]
        acc += bias[None, :].to(tl.float32)
    store(y_ptr, acc, row, col, m, n, n, 1)


@triton.jit(do_not_specialize=["p_end", "end", "m", "threshold", "key_low", "key_high"])
def lora_linear_forward(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, y_ptr, p_ptr,
    x_desc, w_desc, seed_ptr, workspace_ptr,
    p_end, end, m, n, k, r,
    x_m, x_k, w_n, w_k, a_r, a_k, b_n, b_r, bias_n,
    scale, lower, upper, threshold, key_low, key_high,
    DROPOUT: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr, EIGHTS: tl.constexpr,
    DEBUG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Work off P items, then main tiles, by ticket; any number of CTAs, in any order.

    y[M,N] and p[M,R] are contiguous, every other operand may have any strides.
    """
    DROP: tl.constexpr = DROP_ROW_IS_M if DROPOUT else KEEP_ALL
    if EIGHTS:  # the compiler learns that these are multiples of 8 (`config.in_eights`)
        r, b_n = r // 8 * 8, b_n // 8 * 8
    key_low, key_high = philox_key(seed_ptr, key_low, key_high)
    ticket = take_ticket(workspace_ptr)
    while ticket < end:
        if ticket < p_end:
            _p_item(
                ticket, x_ptr, x_desc, a_ptr, p_ptr, workspace_ptr,
                m, k, r, x_m, x_k, a_r, a_k, scale, threshold, key_low, key_high,
                DROP, FIRST, PRECISION, BM, BK, BR,
            )  # fmt: skip
        else:
            _main_tile(
                ticket - p_end, ticket, x_ptr, w_ptr, x_desc, w_desc, b_ptr, bias_ptr, p_ptr, y_ptr,
                workspace_ptr,
                m, n, k, r, x_m, x_k, w_n, w_k, b_n, b_r, bias_n, lower, upper,
                PRECISION, DEBUG, BM, BN, BK, BR, BS, GROUP,
            )  # fmt: skip
        ticket = take_ticket(workspace_ptr)
    finish(workspace_ptr, tl.cdiv(m, BM))
