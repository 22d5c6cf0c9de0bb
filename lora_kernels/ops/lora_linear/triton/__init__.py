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
from lora_kernels.ops.lora_linear.philox import LOW, threshold
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.ops.lora_linear.workspace import reserve

# Set to None, with the record of the GPU tests beside it in bench/results/, "auto" may choose this
# backend.
UNVERIFIED: str | None = "interpreted and compiled, but run on no GPU yet"

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


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return `y = x·Wᵀ + P·Bᵀ (+ bias)` and `P = s·drop(x)·Aᵀ`; see `reference.forward`."""
    from lora_kernels.ops.lora_linear.triton.forward_kernel import lora_linear_forward

    (m, k), n, r = x.shape, weight.shape[0], lora_a.shape[0]
    y, p = x.new_empty(m, n), lora_a.new_empty(m, r)
    problem = Problem.of(m, weight, lora_a, bias, dropout_p)
    c = pick(problem)
    p_end, end = schedule.forward_ends(m, n, r, c.bm, c.bn, c.br)
    _launch(
        lora_linear_forward, end, schedule.blocks(m, c.bm), c, x.device,
        (x, weight, lora_a, lora_b, bias, y, p,
         *_descriptors((x, c.bm, c.bk), (weight, c.bn, c.bk), problem=problem)),
        (p_end, end, m, n, k, r),
        (*x.stride(), *weight.stride(), *lora_a.stride(), *lora_b.stride(),
         0 if bias is None else bias.stride(0)),
        scaling, dropout_p, seed,
    )  # fmt: skip
    return y, p


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    p: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return those of dx, da and db that are needed; see `reference.backward`."""
    from lora_kernels.ops.lora_linear.triton.backward_kernel import lora_linear_backward

    (m, n), k, r = dy.shape, weight.shape[1], lora_a.shape[0]
    dx = dy.new_empty(m, k) if need_dx else None
    da = None if x is None else lora_a.new_empty(r, k)
    db = None if p is None else lora_a.new_empty(n, r)
    if dx is None and da is None and db is None:
        return None, None, None
    q = None if dx is None and da is None else lora_a.new_empty(m, r)
    problem = Problem.of(m, weight, lora_a, None, dropout_p)
    c = pick(problem, backward=True)
    ends = schedule.backward_ends(
        *(m, n, k, r, c.bm, c.bn, c.bk, c.br), need_dx, x is not None, p is not None
    )

    def or_like(tensor: Tensor | None, like: Tensor) -> Tensor:
        """Keep one compiled kernel for every subset of gradients: nobody follows this pointer."""
        return like if tensor is None else tensor

    x_ = or_like(x, dy)
    _launch(
        lora_linear_backward, ends[-1], schedule.blocks(m, c.bm), c, dy.device,
        (dy, x_, weight, lora_a, lora_b, or_like(p, lora_b),
         or_like(dx, dy), or_like(da, lora_a), or_like(db, lora_b), or_like(q, lora_b),
         *_descriptors((dy, c.bm, c.bk), (x_, c.bm, c.bk), (weight, c.bk, c.bn), problem=problem)),
        (*ends, m, n, k, r),
        (*dy.stride(), *x_.stride(), *weight.stride(), *lora_a.stride(), *lora_b.stride()),
        scaling, dropout_p, seed,
    )  # fmt: skip
    return dx, da, db


BACKEND = Backend(
    "triton",
    why_not,
    forward,
    backward,
    not_auto=UNVERIFIED and f"only when asked for by name: {UNVERIFIED}",
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
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Launch `kernel` once, unless there is nothing to do."""
    if items == 0:
        return
    # A seed on the CPU becomes two numbers, one on the device is read by the kernel: no waiting.
    seed_ptr = seed if seed is not None and seed.is_cuda else None
    key = 0 if seed is None or seed_ptr is not None else int(seed)
    debug = os.environ.get("LORA_KERNELS_DEBUG") == "1"
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(_ctas(items, config, device),)](
            *tensors, seed_ptr, reserve(schedule.workspace_length(row_blocks), device),
            *sizes, *strides,
            scaling / (1 - dropout_p), threshold(dropout_p), _int32(key & LOW), _int32(key >> 32),
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
