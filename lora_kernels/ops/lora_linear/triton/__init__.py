"""The Triton backend: one launch forward and one backward, on every NVIDIA GPU since Ampere.

Importing this module imports no Triton; the kernels load with the first call.
"""

import functools
import importlib.metadata
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import schedule
from lora_kernels.ops.lora_linear.config import TileConfig, pick
from lora_kernels.ops.lora_linear.operands import Backward, Forward, Gradients
from lora_kernels.ops.lora_linear.philox import LOW, threshold
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.ops.lora_linear.workspace import reserve
from lora_kernels.qualify import choose

OLDEST = (3, 6)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(problem: Problem) -> str | None:
    """Return why this backend cannot run `problem`."""
    version = _version()
    if version is None:
        return "Triton is not installed"
    if version < OLDEST:
        return f"Triton {'.'.join(map(str, version))} is older than 3.6"
    if problem.device == "cpu" and not _interpreted():
        return "it needs a CUDA device, or TRITON_INTERPRET=1 on the CPU"
    if problem.device not in ("cpu", "cuda"):
        return f"it needs a CUDA device, not {problem.device}"
    if problem.arch is not None and problem.arch < 80:
        return f"it needs compute capability 8.0 or newer, not {problem.arch / 10}"
    if problem.dtype not in DTYPES:
        return f"{problem.dtype} is not supported".replace("torch.", "")
    if max(problem.m, problem.n, problem.k, problem.r) >= 2**30:
        return "a size of 2**30 or more is not supported"
    return None


def forward(call: Forward) -> tuple[Tensor, Tensor]:
    """Return y and P."""
    from lora_kernels.ops.lora_linear.triton.forward_kernel import lora_linear_forward

    x, weight, lora_a, lora_b, bias, *_ = call
    (m, k), n, r = x.shape, weight.shape[0], lora_a.shape[0]
    y, p = x.new_empty(m, n), lora_a.new_empty(m, r)
    problem = call.problem()
    c = pick(problem)
    p_end, end = schedule.forward_ends(m, n, r, c.bm, c.bn, c.br)
    _launch(
        lora_linear_forward, end, schedule.blocks(m, c.bm), c, x.device,
        (x, weight, lora_a, lora_b, bias, y, p,
         *_descriptors((x, c.bm, c.bk), (weight, c.bn, c.bk), problem=problem)),
        (p_end, end, m, n, k, r),
        (*x.stride(), *weight.stride(), *lora_a.stride(), *lora_b.stride(),
         0 if bias is None else bias.stride(0)),
        call,
    )  # fmt: skip
    return y, p


def backward(call: Backward) -> Gradients:
    """Return those of dx, da and db that are needed."""
    from lora_kernels.ops.lora_linear.triton.backward_kernel import lora_linear_backward

    if not any(call.needs):
        return Gradients(None, None, None)
    dy, (m, n, k, r), dtype = call.dy, call.sizes(), call.adapter_dtype()
    need_dx, need_da, need_db = call.needs
    dx = dy.new_empty(m, k) if need_dx else None
    da = dy.new_empty(r, k, dtype=dtype) if need_da else None
    db = dy.new_empty(n, r, dtype=dtype) if need_db else None
    q = dy.new_empty(m, r, dtype=dtype) if need_dx or need_da else None
    problem = call.problem()
    c = pick(problem, backward=True)
    ends = schedule.backward_ends(m, n, k, r, c.bm, c.bn, c.bk, c.br, *call.needs)
    # One kernel is compiled for every subset of gradients: what an absent operand points to, nobody
    # reads.
    narrow = call.p if q is None else q
    assert narrow is not None
    x, weight = (dy if t is None else t for t in (call.x, call.weight))
    lora_a, lora_b, p, da_, db_, q = (
        narrow if t is None else t for t in (call.lora_a, call.lora_b, call.p, da, db, q)
    )
    _launch(
        lora_linear_backward, ends[-1], schedule.blocks(m, c.bm), c, dy.device,
        (dy, x, weight, lora_a, lora_b, p, dy if dx is None else dx, da_, db_, q,
         *_descriptors((dy, c.bm, c.bk), (x, c.bm, c.bk), (weight, c.bk, c.bn), problem=problem)),
        (*ends, m, n, k, r),
        (*dy.stride(), *x.stride(), *weight.stride(), *lora_a.stride(), *lora_b.stride()),
        call,
    )  # fmt: skip
    return Gradients(dx, da, db)


BACKEND = Backend(
    "triton", why_not, forward, backward, functools.partial(choose.why_not_auto, "triton")
)


def _launch(
    kernel: Any,
    items: int,
    row_blocks: int,
    config: TileConfig,
    device: torch.device,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    call: Forward | Backward,
) -> None:
    """Launch `kernel` once, unless there is nothing to do."""
    if items == 0:
        return
    seed, dropout_p = call.seed, call.dropout_p
    # A seed on the CPU becomes two numbers, one on the device is read by the kernel: no waiting.
    seed_ptr = seed if seed is not None and seed.is_cuda else None
    key = 0 if seed is None or seed_ptr is not None else int(seed)
    debug = os.environ.get("LORA_KERNELS_DEBUG") == "1"
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(_ctas(items, config, device),)](
            *tensors, seed_ptr, reserve(schedule.workspace_length(row_blocks), device),
            *sizes, *strides,
            call.scale().factor, threshold(dropout_p), _int32(key & LOW), _int32(key >> 32),
            DROPOUT=dropout_p > 0, PRECISION=_precision(), DEBUG=debug,
            BM=config.bm, BN=config.bn, BK=config.bk, BR=config.br, BS=config.bs,
            GROUP=config.group, num_warps=config.warps, num_stages=config.stages,
            debug=debug, sanitize_overflow=False, enable_fp_fusion=True,
        )  # fmt: skip


def _descriptors(*operands: tuple[Tensor, int, int], problem: Problem) -> list[Any]:
    """Return what TMA needs to load each (tensor, block rows, block columns), or None where it
    cannot: before Hopper, or for rows that are not contiguous and 16-byte aligned."""
    described: list[Any] = [None] * len(operands)
    if not _has_tma(problem):
        return described
    from triton.tools.tensor_descriptor import TensorDescriptor

    for i, (tensor, *block) in enumerate(operands):
        (rows, columns), (pitch, step) = tensor.shape, tensor.stride()
        aligned = tensor.data_ptr() % 16 == 0 and pitch * tensor.itemsize % 16 == 0
        if step == 1 and pitch >= columns and rows and columns and aligned:
            described[i] = TensorDescriptor(tensor, [rows, columns], [pitch, 1], block)
    return described


def _has_tma(problem: Problem) -> bool:
    return problem.arch is not None and problem.arch >= 90 and problem.dtype.itemsize == 2


def _ctas(items: int, config: TileConfig, device: torch.device) -> int:
    """Return how many CTAs to launch: enough to fill the device; correctness needs just one."""
    if device.type != "cuda":
        return 1  # the interpreter runs one program after another
    return min(items, config.ctas * _multiprocessors(device))


def _int32(word: int) -> int:
    """Return a 32-bit word as the signed number that Triton passes without another variant."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _precision() -> str:
    """Return how fp32 operands are multiplied: as torch's own setting for matrix products says."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _version() -> tuple[int, ...] | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in version.split(".")[:2])
