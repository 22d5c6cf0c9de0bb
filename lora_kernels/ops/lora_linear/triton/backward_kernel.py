"""The backward kernel: dx, da and db in one launch.

`dx = dy·W + 2ᵉ·keep(Q·A)`, `da = 2ᵉ·Qᵀ·keep(x)`, `db = 2ᵉ·dyᵀ·P`, where `Q = m·dy·B`.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from lora_kernels.ops.lora_linear.triton.primitives import (
    ALL_READY,
    DROP_DEPTH_IS_M,
    KEEP_ALL,
    READY,
    contract,
    finish,
    keep_tile,
    not_hoisted,
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
def _q_item(
    item, dy_ptr, dy_desc, b_ptr, q_ptr, workspace_ptr,
    m, n, r, dy_m, dy_n, b_n, b_r, scale,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Write `Q[BM, BR] = scale·dy·B` and release the flag of its rows."""
    row_block, rank_tile = skinny(item, tl.cdiv(r, BR))
    skinny_item(
        dy_ptr, b_ptr, q_ptr, dy_desc, row_block * BM, rank_tile * BR, m, r, n,
        dy_m, dy_n, b_n, b_r, r, 1, scale, 0, 0, 0, PRECISION, KEEP_ALL, BM, BR, BK,
    )  # fmt: skip
    publish(workspace_ptr, row_block, COUNT_ALL=True)


@triton.jit
def _low_rank(
    acc, row, col, ticket, q_ptr, a_ptr, workspace_ptr, m, k, r, a_r, a_k, lower, upper,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, DEBUG: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Return `acc[BM, BN] + upper·Q·A` once the Q of these rows is there; `lower` is 1/upper."""
    wait(workspace_ptr + READY + row // BM, tl.cdiv(r, BR), ticket, DEBUG)
    acc = contract(
        scale_by(acc, lower), q_ptr, a_ptr, None, None, row, col, m, k, r,
        r, 1, a_r, a_k, 0, 0, 0, OPERAND, PRECISION, False, KEEP_ALL, BS,
    )  # fmt: skip
    return scale_by(acc, upper)


@triton.jit
def _dx_tile(
    item, ticket, dy_ptr, w_ptr, dy_desc, w_desc, a_ptr, q_ptr, dx_ptr, workspace_ptr,
    m, n, k, r, dy_m, dy_n, w_n, w_k, a_r, a_k, lower, upper, threshold, key_low, key_high, adds_dx,
    DROPOUT: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr, DEBUG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Write `dx[BM, BN] = dy·W + upper·keep(Q·A)`, or add it to what is there (`adds_dx`).

    Dropout masks Q·A alone, so that it must come first; else it comes last, when Q is long there.
    """
    OPERAND: tl.constexpr = dy_ptr.dtype.element_ty
    row_block, column_block = tile(item, tl.cdiv(m, BM), tl.cdiv(k, BN), GROUP)
    row, col = row_block * BM, column_block * BN
    acc = tl.zeros((BM, BN), tl.float32)
    if DROPOUT:
        acc = _low_rank(
            acc, row, col, ticket, q_ptr, a_ptr, workspace_ptr, m, k, r, a_r, a_k, 1.0, upper,
            OPERAND, PRECISION, DEBUG, BM, BR, BS,
        )  # fmt: skip
        keep = keep_tile(
            row + tl.arange(0, BM), col, threshold, not_hoisted(key_low), not_hoisted(key_high), BN,
            FIRST,
        )  # fmt: skip
        acc = tl.where(keep, acc, 0.0)
    acc = contract(
        acc, dy_ptr, w_ptr, dy_desc, w_desc, row, col, m, k, n,
        dy_m, dy_n, w_n, w_k, 0, 0, 0, OPERAND, PRECISION, False, KEEP_ALL, BK,
    )  # fmt: skip
    if not DROPOUT:
        acc = _low_rank(
            acc, row, col, ticket, q_ptr, a_ptr, workspace_ptr, m, k, r, a_r, a_k, lower, upper,
            OPERAND, PRECISION, DEBUG, BM, BR, BS,
        )  # fmt: skip
    store(dx_ptr, acc, row, col, m, k, k, 1, adds_dx)


@triton.jit
def _gradient_item(
    item, wide_ptr, wide_desc, narrow_ptr, out_ptr,
    m, c, r, wide_m, wide_c, out_c, out_r, upper, threshold, key_low, key_high,
    PRECISION: tl.constexpr, DROP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Write `out[BK, BR] = upper·wideᵀ·narrow`, over all of M in order: no other item adds to it.

    db is `dyᵀ·P`; daᵀ is `keep(x)ᵀ·Q`, and the strides of `out` transpose it back.
    """
    column_block, rank_tile = skinny(item, tl.cdiv(r, BR))
    skinny_item(
        wide_ptr, narrow_ptr, out_ptr, wide_desc, column_block * BK, rank_tile * BR, c, r, m,
        wide_c, wide_m, r, 1, out_c, out_r, upper, threshold, key_low, key_high,
        PRECISION, DROP, BK, BR, BM, L_FLIP=True, FIRST=FIRST,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "q_end", "db_end", "dx_end", "end", "m", "threshold", "key_low", "key_high", "adds_dx",
    ]
)  # fmt: skip
def lora_linear_backward(
    dy_ptr, x_ptr, w_ptr, a_ptr, b_ptr, p_ptr, dx_ptr, da_ptr, db_ptr, q_ptr,
    dy_desc, x_desc, w_desc, seed_ptr, workspace_ptr,
    q_end, db_end, dx_end, end, m, n, k, r,
    dy_m, dy_n, x_m, x_k, w_n, w_k, a_r, a_k, b_n, b_r,
    scale, lower, upper, threshold, key_low, key_high, adds_dx,
    DROPOUT: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr, EIGHTS: tl.constexpr,
    DEBUG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Work off Q items, db items, dx tiles and da items by ticket; any number of CTAs.

    p, q[M,R], dx[M,K], da[R,K] and db[N,R] are contiguous, every other operand may have any
    strides. A gradient that is not needed has no tickets, and its pointer is not followed.
    """
    DROP: tl.constexpr = DROP_DEPTH_IS_M if DROPOUT else KEEP_ALL
    if EIGHTS:  # the compiler learns that these are multiples of 8 (`config.in_eights`)
        r, b_n = r // 8 * 8, b_n // 8 * 8
    key_low, key_high = philox_key(seed_ptr, key_low, key_high)
    ticket = take_ticket(workspace_ptr)
    while ticket < end:
        if ticket < q_end:
            _q_item(
                ticket, dy_ptr, dy_desc, b_ptr, q_ptr, workspace_ptr,
                m, n, r, dy_m, dy_n, b_n, b_r, scale, PRECISION, BM, BK, BR,
            )  # fmt: skip
        elif ticket < db_end:
            _gradient_item(
                ticket - q_end, dy_ptr, dy_desc, p_ptr, db_ptr,
                m, n, r, dy_m, dy_n, r, 1, upper, 0, 0, 0, PRECISION, KEEP_ALL, BM, BK, BR,
            )  # fmt: skip
        elif ticket < dx_end:
            _dx_tile(
                ticket - db_end, ticket, dy_ptr, w_ptr, dy_desc, w_desc, a_ptr, q_ptr,
                dx_ptr, workspace_ptr,
                m, n, k, r, dy_m, dy_n, w_n, w_k, a_r, a_k, lower, upper,
                threshold, key_low, key_high, adds_dx,
                DROPOUT, FIRST, PRECISION, DEBUG, BM, BN, BK, BR, BS, GROUP,
            )  # fmt: skip
        else:
            wait(workspace_ptr + ALL_READY, q_end, ticket, DEBUG)
            _gradient_item(
                ticket - dx_end, x_ptr, x_desc, q_ptr, da_ptr,
                m, k, r, x_m, x_k, 1, k, upper, threshold, key_low, key_high,
                PRECISION, DROP, BM, BK, BR, FIRST,
            )  # fmt: skip
        ticket = take_ticket(workspace_ptr)
    finish(workspace_ptr, tl.cdiv(m, BM))
