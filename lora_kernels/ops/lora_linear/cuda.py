"""The CUDA C++ backend for Hopper (sm_90a): one launch forward and one backward, through TMA.

Importing this module loads no extension. csrc/lora_linear has the kernels, README.md the design.
"""

import functools

import torch
from torch import Tensor

from lora_kernels import extension
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear.device import current_stream, made_current
from lora_kernels.ops.lora_linear.operands import Backward, Forward, Gradients
from lora_kernels.ops.lora_linear.philox import GROUP, LOW, threshold
from lora_kernels.ops.lora_linear.problem import UNEVEN, Problem
from lora_kernels.ops.lora_linear.workspace import reserve
from lora_kernels.qualify import choose

_ALIGNMENT = 16  # bytes, of what TMA reads and writes: addresses and row pitches
_DTYPES = (torch.bfloat16, torch.float16)


def why_not(problem: Problem) -> str | None:
    """Return why this backend cannot run `problem`."""
    p = problem
    if p.device != "cuda":
        return f"it needs a CUDA device, not {p.device}"
    if p.arch is not None and p.arch != 90:
        return f"it needs compute capability 9.0, not {p.arch / 10}"
    if p.dtype not in _DTYPES:
        return f"{p.dtype} is not supported, only bfloat16 and float16".replace("torch.", "")
    if p.adapter_dtype not in (p.dtype, torch.float32):
        return f"adapters must have x's dtype or float32, not {p.adapter_dtype}".replace(
            "torch.", ""
        )
    for name, size, dtype in (
        ("K", p.k, p.dtype),
        ("N", p.n, p.dtype),
        ("R", p.r, p.adapter_dtype),
    ):
        unit = _ALIGNMENT // dtype.itemsize
        if size % unit != 0:
            rows = "TMA needs rows of a multiple of 16 bytes"
            return f"{rows}: {name}={size} is no multiple of {unit}"
    if p.uneven:
        return UNEVEN
    if min(p.m, p.n, p.k) == 0:
        return "an empty problem is not supported"
    if max(p.m, p.n, p.k, p.r) >= 2**31 - 256:
        return "a size of nearly 2**31 or more is not supported"
    return extension.why_absent()


def forward(call: Forward) -> tuple[Tensor, Tensor]:
    """Return y and P.

    An operand whose rows TMA cannot address (columns apart, or a pitch or address that is no
    multiple of 16 bytes) is copied first.
    """
    x, weight, lora_a, lora_b = map(_addressable, call[:4])
    (m, k), (n, _), r = x.shape, weight.shape, lora_a.shape[0]
    bias = None if call.bias is None else _addressable(call.bias.unsqueeze(0))
    y, p = x.new_empty(m, n), lora_a.new_empty(m, r)
    device = x.device
    with made_current(device):
        stream = current_stream(device)
        flags = reserve(_words(m), device, stream)
        extension.load().lora_linear_forward(
            x.dtype == torch.bfloat16, p.dtype == torch.float32, m, n, k, r,
            *map(_matrix, (x, weight, lora_a, lora_b)),
            0 if bias is None else bias.data_ptr(), _matrix(y), _matrix(p), flags.data_ptr(),
            call.scale(), _dropout(call), stream,
        )  # fmt: skip
    return y, p


def backward(call: Backward) -> Gradients:
    """Return the needed ones of dx, da and db; copies as `forward` does."""
    if not any(call.needs):
        return Gradients(None, None, None)
    (m, n, k, r), (need_dx, need_da, need_db) = call.sizes(), call.needs
    dy, x, weight, lora_a, lora_b, p = (None if t is None else _addressable(t) for t in call[:6])
    assert dy is not None
    dtype = call.adapter_dtype()
    dx = dy.new_empty(m, k) if need_dx else None
    da = dy.new_empty(r, k, dtype=dtype) if need_da else None
    db = dy.new_empty(n, r, dtype=dtype) if need_db else None
    q = dy.new_empty(m, r, dtype=dtype) if need_dx or need_da else None
    device = dy.device
    with made_current(device):
        stream = current_stream(device)
        flags = reserve(_words(m), device, stream)
        extension.load().lora_linear_backward(
            dy.dtype == torch.bfloat16, dtype == torch.float32, m, n, k, r,
            *map(_matrix, (dy, x, weight, lora_a, lora_b, p, q, dx, da, db)),
            flags.data_ptr(), call.scale(), _dropout(call), stream,
        )  # fmt: skip
    return Gradients(dx, da, db)


BACKEND = Backend(
    "cuda", why_not, forward, backward, functools.partial(choose.why_not_auto, "cuda")
)


def _words(m: int) -> int:
    """Return the workspace of a launch: ticket, finished CTAs, items ready in all, flags of rows.

    A flag is for a block of 128 rows; CTAs work in pairs, so there is an even number of them.
    """
    return 3 + 2 * -(-m // 256)


def _addressable(matrix: Tensor) -> Tensor:
    """Return `matrix`, or a copy of it that TMA can address."""
    row_stride, column_stride = matrix.stride()
    if (
        column_stride == 1
        and row_stride >= matrix.shape[1]
        and row_stride * matrix.element_size() % _ALIGNMENT == 0
        and matrix.data_ptr() % _ALIGNMENT == 0
    ):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _matrix(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.data_ptr(), matrix.stride(0))


def _dropout(call: Forward | Backward) -> tuple[bool, int, int, int, int, int]:
    """Return whether, the threshold, the key's words, the first counter of a row, and where the
    seed is if it is on a GPU."""
    seed, first = call.seed, (call.first_column or 0) // GROUP
    if seed is None:
        return False, 0, 0, 0, 0, 0
    if seed.device.type != "cpu":
        return True, threshold(call.dropout_p), 0, 0, first, seed.data_ptr()
    key = int(seed)
    return True, threshold(call.dropout_p), key & LOW, key >> 32 & LOW, first, 0
