"""The item order of the one-launch kernels, as plain integer functions that both sides run.

The Triton kernels compile `skinny` and `tile`, the launchers size a launch with the others, and the
tests model-check them all. What Triton compiles means the same there as in Python for the
non-negative numbers that occur here.

Items are numbered by ticket. A CTA takes the next ticket whenever it is free, so tickets start in
order; and every wait is for items with smaller tickets. README.md concludes: no deadlock.
"""

# Workspace, int32: it is all zero between launches, and the last CTA to finish leaves it so.
TICKET, FINISHED, ALL_READY, READY = 0, 1, 2, 3


def workspace_length(row_blocks: int) -> int:
    """Return how many int32 a launch needs: the next ticket, the number of CTAs that have finished,
    the number of P (or Q) items done in all, and that number for each block of rows."""
    return READY + row_blocks


def blocks(size: int, block: int) -> int:
    """Return how many blocks cover `size`."""
    return (size + block - 1) // block


def forward_ends(m: int, n: int, r: int, bm: int, bn: int, br: int) -> tuple[int, int]:
    """Return the ticket after the last P item and the one after the last main tile."""
    p_end = blocks(m, bm) * blocks(r, br)
    return p_end, p_end + blocks(m, bm) * blocks(n, bn)


def backward_ends(
    m: int, n: int, k: int, r: int, bm: int, bn: int, bk: int, br: int,
    need_dx: bool, need_da: bool, need_db: bool,
) -> tuple[int, int, int, int]:  # fmt: skip
    """Return the tickets after the last Q item, db item, dx tile and da item."""
    rank_tiles = blocks(r, br)
    q_end = blocks(m, bm) * rank_tiles * (need_dx or need_da)
    db_end = q_end + blocks(n, bk) * rank_tiles * need_db
    dx_end = db_end + blocks(m, bm) * blocks(k, bn) * need_dx
    return q_end, db_end, dx_end, dx_end + blocks(k, bk) * rank_tiles * need_da


def skinny(item: int, rank_tiles: int) -> tuple[int, int]:
    """Return the block of rows and the rank tile of a P, Q, da or db item."""
    return item // rank_tiles, item % rank_tiles


def tile(item: int, row_blocks: int, column_blocks: int, group: int) -> tuple[int, int]:
    """Return the row block and column block of a main or dx tile.

    `group` row blocks at a time are walked column by column, so that the tiles in flight share
    rows and columns in the L2 cache.
    """
    band = item // (group * column_blocks)
    left = row_blocks - band * group
    height = group if left > group else left
    inside = item - band * group * column_blocks
    return band * group + inside % height, inside // height
