"""The dropout mask as a pure function of (seed, row, column): nothing is stored, any tiling agrees.

Element (m, k) of x[M,K] is kept when its random number is at least `threshold(p)`. The number is
one of the eight 16-bit halves of Philox 4x32-10 at counter `(k div 8, m mod 2³², m div 2³², 0)`
under the 64-bit key `seed` (low word first): half `k mod 8`, counted from the low half of word 0.
Sixteen bits resolve p to 2⁻¹⁶ at half the price of a word per element. Source: Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC'11. Every backend implements this, bit for bit.
"""

import ctypes

import torch
from torch import Tensor

from lora_kernels import extension

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
GROUP = 8  # consecutive elements of a row that share one counter
LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Return the 16-bit number below which an element is dropped: `round(p·2¹⁶)`, below 2¹⁶."""
    return min(round(p * 2**16), 2**16 - 1)


def philox4x32(counter: tuple[Tensor, ...], seed: Tensor) -> list[Tensor]:
    """Return the four random words of each counter.

    Args:
        counter: four int64 tensors holding 32-bit words, broadcast against one another.
        seed: int64, one element; its two 32-bit halves are the key.

    Returns:
        Four int64 tensors of the broadcast shape; the low 32 bits of each element are the word.
    """
    c0, c1, c2, c3 = (c.clone() for c in torch.broadcast_tensors(*counter))
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    # On the CPU the key becomes Python numbers; on a GPU that would wait for the device, and a
    # compiled graph would break there.
    known = seed.device.type == "cpu" and not torch.compiler.is_compiling()
    key = int(seed) if known else seed
    key0, key1 = key & LOW, (key >> 32) & LOW
    # The rounds run in place over six buffers: this loop is bound by memory traffic. A word that is
    # only ever xored may keep garbage in its upper half.
    for i in range(ROUNDS):
        round_key0, round_key1 = key0 + i * WEYL[0] & LOW, key1 + i * WEYL[1] & LOW
        torch.mul(c0, MULTIPLIERS[0], out=product0)
        torch.mul(c2, MULTIPLIERS[1], out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(round_key0).bitwise_and_(LOW)
        torch.bitwise_right_shift(product0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(round_key1).bitwise_and_(LOW)
        c1, product1, c3, product0 = product1, c1, product0, c3
    return [c0, c1, c2, c3]


def keep_mask(
    seed: Tensor, p: float, rows: range, columns: range, device: torch.device | None = None
) -> Tensor:
    """Return which elements of a tile of x survive dropout, as bool[len(rows), len(columns)].

    `keep[m, k] = number(m, k) >= threshold(p)`; the caller scales survivors by `1 / (1 - p)`.

    Args:
        seed: int64, one element, on `device` or on the CPU.
        p: probability of dropping an element, in [0, 1).
        rows, columns: the tile, as ranges of step 1 over M and K.
        device: where the mask is made; the seed's device by default.
    """
    device = seed.device if device is None else device
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    group = torch.arange(columns.start // GROUP, -(-columns.stop // GROUP), device=device)[None, :]
    words = philox4x32((group, row & LOW, row >> 32, torch.zeros_like(row)), seed)
    packed = torch.empty(*words[0].shape, 4, dtype=torch.int32, device=device)
    for j, word in enumerate(words):
        packed[..., j] = word
    # There is no uint16 comparison: flipping the top bit maps the order of uint16 to int16's.
    halves = packed.view(torch.int16).bitwise_xor_(-(2**15))
    skip = columns.start % GROUP
    return halves.flatten(1)[:, skip : skip + len(columns)] >= threshold(p) - 2**15


def mask_columns(first: int | None, columns: range) -> range:
    """Return which columns of the mask those of an x are that starts at column `first` or 0."""
    return range(columns.start + first, columns.stop + first) if first else columns


def is_uneven(first: int | None, k: int) -> bool:
    """Return whether a slice of k columns begins or ends within the `GROUP` of a counter."""
    return first is not None and (first % GROUP != 0 or k % GROUP != 0)


def drop(seed: Tensor, p: float, rows: range, columns: range, *tiles: Tensor) -> list[Tensor]:
    """Return tiles of x's shape with the dropped elements times zero, the others as they are.

    `out[m, k] = tile[m, k] · keep[m, k]`, with the mask of `keep_mask`. On the CPU a
    compiled routine does it in one pass where it was built, else PyTorch's operators do.

    Args:
        seed, p, rows, columns: as in `keep_mask`.
        tiles: [len(rows), len(columns)] each, floating, all on one device.
    """
    library = extension.load_cpu() if tiles[0].device.type == "cpu" else ""
    # What watches operators (a dispatch mode) would not see the routine.
    if isinstance(library, str) or torch._C._len_torch_dispatch_stack() > 0:
        keep = keep_mask(seed, p, rows, columns, tiles[0].device)
        return [tile * keep for tile in tiles]
    tiles = tuple(t.resolve_neg() if t.stride(1) == 1 else t.contiguous() for t in tiles)
    kept = [torch.empty_like(tile, memory_format=torch.contiguous_format) for tile in tiles]
    described = [
        _Tile(
            *(t.data_ptr(), t.stride(0) * t.itemsize, out.data_ptr(), out.stride(0) * t.itemsize),
            *(t.itemsize, _EXPONENTS[t.dtype]),
        )
        for t, out in zip(tiles, kept, strict=True)
    ]
    library.lora_drop(
        ctypes.c_uint64(int(seed)), ctypes.c_uint16(threshold(p)),
        *map(ctypes.c_int64, (rows.start, len(rows), columns.start, len(columns))),
        (_Tile * len(tiles))(*described), ctypes.c_int64(len(tiles)),
    )  # fmt: skip
    return kept


_EXPONENTS = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


class _Tile(ctypes.Structure):
    """`Tile` of csrc/cpu/dropout.cpp."""

    _fields_ = (
        ("from", ctypes.c_void_p),
        ("from_stride", ctypes.c_int64),
        ("to", ctypes.c_void_p),
        ("to_stride", ctypes.c_int64),
        ("itemsize", ctypes.c_int64),
        ("exponent", ctypes.c_int64),
    )


def seed_tensor(seed: int | Tensor | None, x: Tensor) -> Tensor:
    """Return the seed as int64[1], drawn from torch's generator if it is None.

    A draw comes from the CPU generator, which needs neither a launch nor a synchronisation, unless
    x's device is recording a graph: then every replay must draw anew, on the device.
    """
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    if seed is not None:
        return torch.tensor([seed], device="cpu")  # whatever the default device is
    recording = torch.compiler.is_compiling() or (
        x.is_cuda and torch.cuda.is_current_stream_capturing()
    )
    return torch.randint(2**63 - 1, (1,), device=x.device if recording else "cpu")
