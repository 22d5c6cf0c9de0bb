"""The CUDA C++ backend for Hopper (sm_90a): one launch forward and one backward, through TMA.

Importing this module loads no extension. csrc/ has the kernels, and their design in its README.md.
"""

import functools

import torch
from torch import Tensor

from lora_kernels import extension
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear.device import current_stream, made_current
from lora_kernels.ops.lora_linear.operands import Backward, Forward, Gradients
from lora_kernels.ops.lora_linear.philox import GROUP, LOW, threshold
from lora_kernels.ops.lora_linear.problem import UNEVEN, Problem, short
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
        return f"{short(p.dtype)} is not supported, only bfloat16 and float16"
    if p.adapter_dtype not in (p.dtype, torch.float32):
        return f"adapters must have x's dtype or float32, not {short(p.adapter_dtype)}"
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
    x, weight, lora_a, lora_b, bias, *_ = call
    (m, k), (n, _), r = x.shape, weight.shape, lora_a.shape[0]
    read, copies = _addressed(x, weight, lora_a, lora_b, None if bias is None else bias[None])
    y, p = x.new_empty(m, n), lora_a.new_empty(m, r)
    device = x.device
    with made_current(device):
        stream = current_stream(device)
        flags = reserve(_words(m), device, stream)
        extension.load().lora_linear_forward(
            x.dtype == torch.bfloat16, p.dtype == torch.float32, m, n, k, r, *read[:4],
            read[4][0], (y.data_ptr(), n), (p.data_ptr(), r), flags.data_ptr(),
            call.scale(), _dropout(call), stream,
        )  # fmt: skip
    del copies  # the launch is queued: their memory is used again after it
    return y, p


def backward(call: Backward, onto: Tensor | None = None) -> Gradients:
    """Return the needed ones of dx, da and db, dx added to `onto`; copies as `forward` does."""
    dy, x, weight, _, lora_b, p, *_ = call
    narrow = p if lora_b is None else lora_b
    if narrow is None:
        return Gradients(None, None, None)
    m, n, k, r = call.sizes()
    read, copies = _addressed(*call[:6])
    dx = dy.new_empty(m, k) if weight is not None and onto is None else onto
    da = None if x is None else narrow.new_empty(r, k)
    db = None if p is None else narrow.new_empty(n, r)
    q = None if lora_b is None else narrow.new_empty(m, r)
    made = [
        _ABSENT if t is None else (t.data_ptr(), pitch)
        for t, pitch in ((q, r), (dx, k), (da, k), (db, r))
    ]
    device = dy.device
    with made_current(device):
        stream = current_stream(device)
        flags = reserve(_words(m), device, stream)
        extension.load().lora_linear_backward(
            dy.dtype == torch.bfloat16, narrow.dtype == torch.float32, m, n, k, r, *read, *made,
            onto is not None, flags.data_ptr(), call.scale(), _dropout(call), stream,
        )  # fmt: skip
    del copies
    return Gradients(dx, da, db)


BACKEND = Backend(
    "cuda", why_not, forward, backward, functools.partial(choose.why_not_auto, "cuda")
)


def _words(m: int) -> int:
    """Return the workspace of a launch: ticket, finished CTAs, items ready in all, flags of rows.

    A flag is for a block of 128 rows; CTAs work in pairs, so there is an even number of them.
    """
    return 3 + 2 * -(-m // 256)


_ABSENT = 0, 0


def _addressed(*matrices: Tensor | None) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Return the address and row pitch of each, and the copies among them, which must live on."""
    found, copies = [], []
    for matrix in matrices:
        if matrix is None:
            found.append(_ABSENT)
            continue
        (pitch, step), address = matrix.stride(), matrix.data_ptr()
        if (
            step != 1
            or pitch < matrix.shape[1]
            or (address | pitch * matrix.element_size()) % _ALIGNMENT != 0
        ):
            copy = matrix.clone(memory_format=torch.contiguous_format)
            copies.append(copy)
            pitch, address = copy.shape[1], copy.data_ptr()
        found.append((address, pitch))
    return found, copies


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
