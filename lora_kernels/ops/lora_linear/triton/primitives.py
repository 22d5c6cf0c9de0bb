"""What both kernels are made of: one contraction loop, the dropout mask, and the flag protocol."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from triton.language.random import philox_impl
from triton.language.target_info import cuda_capability_geq

from lora_kernels.ops.lora_linear import schedule
from lora_kernels.ops.lora_linear.triton import OLDEST, _version

# The interpreter's dot is wrong on bf16 operands; compiled code never sees the branch on this.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
TICKET = tl.constexpr(schedule.TICKET)
FINISHED = tl.constexpr(schedule.FINISHED)
ALL_READY = tl.constexpr(schedule.ALL_READY)
READY = tl.constexpr(schedule.READY)
# Spins before a debug build gives up: seconds on a GPU. One program alone never waits.
PATIENCE = tl.constexpr(2 if triton.knobs.runtime.interpret else 1 << 22)

# Triton before 3.7.1 lets wgmma read what cp.async wrote without a fence between the two.
FENCE = tl.constexpr(not INTERPRET and (_version() or OLDEST) < (3, 7, 1))

# How `contract` masks its left operand: not, or as drop(x)[m,k] with m the row or the depth.
KEEP_ALL = tl.constexpr(0)
DROP_ROW_IS_M = tl.constexpr(1)
DROP_DEPTH_IS_M = tl.constexpr(2)

# The interpreter runs plain Python as it is.
skinny = schedule.skinny if INTERPRET else triton.jit(schedule.skinny)
tile = schedule.tile if INTERPRET else triton.jit(schedule.tile)


@triton.jit
def contract(
    acc,  # [BL, BC], fp32
    l_ptr, r_ptr,
    l_desc, r_desc,  # TMA descriptors or None; of the transposed matrix where FLIP says so
    row_start, col_start,
    rows, cols, depth,
    l_row, l_depth, r_depth, r_col,  # strides
    threshold, key_low, key_high,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, DROP: tl.constexpr,
    BD: tl.constexpr, L_FLIP: tl.constexpr = False, R_FLIP: tl.constexpr = False,
    TRANSPOSED: tl.constexpr = False, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Return `acc + L·Rt` for the tile at (row_start, col_start) of L[rows, depth]·Rt[depth, cols].

    Both operands are converted to OPERAND, unless EXACT asks to keep a wider Rt (`dot`). TRANSPOSED
    asks for the tile `acc + Rtᵀ·Lᵀ`.
    """
    BL: tl.constexpr = acc.shape[1] if TRANSPOSED else acc.shape[0]
    BC: tl.constexpr = acc.shape[0] if TRANSPOSED else acc.shape[1]
    row = row_start + tl.arange(0, BL)
    col = col_start + tl.arange(0, BC)
    d = tl.arange(0, BD)
    l_ptrs = l_ptr + row[:, None].to(tl.int64) * l_row + d[None, :].to(tl.int64) * l_depth
    r_ptrs = r_ptr + d[:, None].to(tl.int64) * r_depth + col[None, :].to(tl.int64) * r_col
    l_step = tl.full((), BD, tl.int64) * l_depth
    r_step = tl.full((), BD, tl.int64) * r_depth
    in_rows, in_cols = row[:, None] < rows, col[None, :] < cols
    for start in range(0, depth, BD):
        left = depth - start
        if l_desc is None:
            lhs = tl.load(l_ptrs, mask=in_rows & (d[None, :] < left), other=0.0)  # [BL, BD]
        elif L_FLIP:
            lhs = tl.trans(l_desc.load([start, row_start]))
        else:
            lhs = l_desc.load([row_start, start])
        if r_desc is None:
            rhs = tl.load(r_ptrs, mask=in_cols & (d[:, None] < left), other=0.0)  # [BD, BC]
        elif R_FLIP:
            rhs = tl.trans(r_desc.load([col_start, start]))
        else:
            rhs = r_desc.load([start, col_start])
        if DROP == DROP_ROW_IS_M:
            keep = keep_tile(row, start, threshold, key_low, key_high, BD, FIRST)
            lhs = tl.where(keep, lhs, 0.0)
        elif DROP == DROP_DEPTH_IS_M:
            keep = keep_tile(start + d, row_start, threshold, key_low, key_high, BL, FIRST)
            lhs = tl.where(tl.trans(keep), lhs, 0.0)
        if FENCE and (l_desc is None or r_desc is None):
            proxy_fence()
        acc = dot(lhs, rhs, acc, OPERAND, PRECISION, EXACT, TRANSPOSED)
        l_ptrs += l_step
        r_ptrs += r_step
    return acc


@triton.jit
def dot(
    lhs, rhs, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Return `acc + lhs·rhs`, or `acc + rhsᵀ·lhsᵀ` (TRANSPOSED), on operands of type OPERAND.

    EXACT keeps the bits of an fp32 `rhs` beside a 16-bit OPERAND, as the sum of two operands: the
    adapters' gradients then err like fp32, at no cost where reading `lhs` is the bottleneck.
    """
    if EXACT and rhs.dtype != OPERAND:
        high = rhs.to(OPERAND)
        wide = high.to(rhs.dtype)
        low = tl.where(tl.abs(wide) == float("inf"), 0.0, rhs - wide)
        acc = dot(lhs, low.to(OPERAND), acc, OPERAND, PRECISION, False, TRANSPOSED)
        rhs = high
    lhs, rhs = lhs.to(OPERAND), rhs.to(OPERAND)
    if INTERPRET:
        lhs, rhs = lhs.to(tl.float32), rhs.to(tl.float32)
    if TRANSPOSED:
        lhs, rhs = tl.trans(rhs), tl.trans(lhs)
    return tl.dot(lhs, rhs, acc, input_precision=PRECISION)


@triton.jit
def scale_by(acc, power):
    """Return `acc·power` for a power of two, mostly 1: then it costs a branch."""
    if power != 1.0:
        acc *= power
    return acc


@triton.constexpr_function
def asynchronous():
    """Return whether products run beside the instructions that follow: wgmma and tcgen05."""
    return cuda_capability_geq(9, 0) and not cuda_capability_geq(12, 0)


@triton.jit
def proxy_fence():
    """Let wgmma, which Hopper alone has, see what this thread knows to be in shared memory."""
    if asynchronous() and not cuda_capability_geq(10, 0):
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.u32 $0, 0;", "=r", [],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def skinny_item(
    l_ptr, r_ptr, out_ptr, l_desc,
    row_start, col_start, rows, cols, depth,
    l_row, l_depth, r_depth, r_col, out_row, out_col,  # strides
    factor, threshold, key_low, key_high,
    PRECISION: tl.constexpr, DROP: tl.constexpr,
    BL: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, L_FLIP: tl.constexpr = False,
    FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Write the tile `factor·drop(L)·Rt` at (row_start, col_start) of out[rows, cols].

    wgmma takes a left operand that was computed, as a masked one is, from registers, and Triton
    before 3.9 lets the next step of the loop overwrite them while wgmma still reads; the right
    operand always goes through shared memory. So a masked L is multiplied from the right. Not
    beside a wider Rt: it is split in every step, which then waits for wgmma to end.
    """
    OPERAND: tl.constexpr = l_ptr.dtype.element_ty
    MASKED: tl.constexpr = DROP != KEEP_ALL and r_ptr.dtype.element_ty == OPERAND
    TRANSPOSED: tl.constexpr = MASKED and (INTERPRET or asynchronous())
    if DROP != KEEP_ALL:
        key_low, key_high = not_hoisted(key_low), not_hoisted(key_high)
    acc = contract(
        tl.zeros((BC, BL) if TRANSPOSED else (BL, BC), tl.float32), l_ptr, r_ptr, l_desc, None,
        row_start, col_start, rows, cols, depth,
        l_row, l_depth, r_depth, r_col, threshold, key_low, key_high,
        OPERAND, PRECISION, True, DROP, BD, L_FLIP=L_FLIP, TRANSPOSED=TRANSPOSED,
        FIRST=FIRST,
    )  # fmt: skip
    acc *= factor
    if TRANSPOSED:
        store(out_ptr, acc, col_start, row_start, cols, rows, out_col, out_row)
    else:
        store(out_ptr, acc, row_start, col_start, rows, cols, out_row, out_col)


@triton.jit
def store(out_ptr, acc, row_start, col_start, rows, cols, out_row, out_col, adds=False):
    """Round `acc` once and write it as the tile at (row_start, col_start) of out[rows, cols].

    Where `adds`, a number known at run time, is not 0, the rounded tile is added to what is there
    and the sum rounded again: an fp32 `acc` kept for the sum would take the registers of the loads.
    """
    row = row_start + tl.arange(0, acc.shape[0])[:, None]
    col = col_start + tl.arange(0, acc.shape[1])[None, :]
    out_ptrs = out_ptr + row.to(tl.int64) * out_row + col.to(tl.int64) * out_col
    mask = (row < rows) & (col < cols)
    value = acc.to(out_ptr.dtype.element_ty)
    if adds:
        there = tl.load(out_ptrs, mask=mask, other=0.0)
        total = there.to(tl.float32) + value.to(tl.float32)  # the interpreter adds no bf16
        tl.store(out_ptrs, total.to(value.dtype), mask=mask)
    else:
        tl.store(out_ptrs, value, mask=mask)


@triton.jit
def keep_tile(row, column, threshold, key_low, key_high, BC: tl.constexpr, FIRST: tl.constexpr):
    """Return which elements of x[row, column : column + BC] survive dropout.

    Bit for bit `philox.keep_mask` from column 8·FIRST; `column` and BC are multiples of 8, the
    elements that one Philox call serves.
    """
    group = column // 8 + (FIRST + tl.arange(0, BC // 8))
    c0 = tl.broadcast_to(group[None, :], (row.shape[0], BC // 8)).to(tl.uint32)  # [BL, BC/8]
    c1 = tl.broadcast_to(row[:, None], (row.shape[0], BC // 8)).to(tl.uint32)
    zero = tl.zeros_like(c0)
    word0, word1, word2, word3 = philox_impl(c0, c1, zero, zero, key_low, key_high)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # [BL, BC/8, 2, 2]
    keep = tl.join((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)
    return tl.reshape(keep, (row.shape[0], BC))


@triton.jit
def philox_key(seed_ptr, key_low, key_high):
    """Return the two halves of the seed: from device memory if it is there, else as passed."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        key_low, key_high = seed & 0xFFFFFFFF, seed >> 32
    return key_low.to(tl.uint32), key_high.to(tl.uint32)


@triton.jit
def not_hoisted(word):
    """Return `word`, but let nothing derived from it be computed before this point.

    The round keys of the dropout mask are the same for all items: hoisted out of the loop over
    tickets, they take the registers of the loops that need no mask.
    """
    if not INTERPRET:
        word = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [word], dtype=tl.uint32, is_pure=False, pack=1
        )
    return word


@triton.jit
def take_ticket(workspace_ptr):
    """Return the next item nobody has taken."""
    return tl.atomic_add(workspace_ptr + TICKET, 1, sem="relaxed")


@triton.jit
def publish(workspace_ptr, row_block, COUNT_ALL: tl.constexpr):
    """Tell the readers of a row block, or of all, that one more tile of P or Q is in memory."""
    # Without the barrier Triton 3.6 lets thread 0 release before the other threads have stored.
    tl.debug_barrier()
    tl.atomic_add(workspace_ptr + READY + row_block, 1, sem="release")
    if COUNT_ALL:
        tl.atomic_add(workspace_ptr + ALL_READY, 1, sem="release")


@triton.jit
def wait(counter_ptr, target, ticket, DEBUG: tl.constexpr):
    """Return once `target` P or Q items counted there are visible to every thread of this CTA."""
    if DEBUG:
        spins = 0
        while (tl.atomic_add(counter_ptr, 0, sem="acquire") < target) & (spins < PATIENCE):
            spins += 1
        if spins == PATIENCE:
            tl.device_print("lora_linear waits in vain, item", ticket)
        tl.device_assert(spins < PATIENCE, "lora_linear: an item waits in vain for P or Q")
    else:
        while tl.atomic_add(counter_ptr, 0, sem="acquire") < target:
            pass


@triton.jit
def finish(workspace_ptr, row_blocks):
    """Let the last CTA leave the workspace zeroed: by then nobody reads it any more."""
    tl.debug_barrier()
    finished = tl.atomic_add(workspace_ptr + FINISHED, 1, sem="acq_rel")
    if finished == tl.num_programs(0) - 1:
        for start in range(0, row_blocks + READY, 256):
            i = start + tl.arange(0, 256)
            tl.store(workspace_ptr + i, 0, mask=i < row_blocks + READY)
