"""The Triton backend: one launch forward and one backward, on every NVIDIA GPU since Ampere.

Importing this module imports no Triton; the kernels load with the first call.
"""

import functools
import importlib.metadata
import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import schedule
from lora_kernels.ops.lora_linear.config import TileConfig, in_eights, pick
from lora_kernels.ops.lora_linear.device import current_stream, made_current
from lora_kernels.ops.lora_linear.operands import Backward, Forward, Gradients
from lora_kernels.ops.lora_linear.philox import GROUP, LOW, threshold
from lora_kernels.ops.lora_linear.problem import UNEVEN, Problem, short
from lora_kernels.ops.lora_linear.workspace import reserve
from lora_kernels.qualify import choose

# Waits that are bounded and end in a trap; read once, as an environment variable is slow to read.
DEBUG = os.environ.get("LORA_KERNELS_DEBUG") == "1"

OLDEST = (3, 6)
# Before it, no fence stands between cp.async and tcgen05, and none can be put there from outside:
# it crashes the pipeliner. (On Hopper `primitives.proxy_fence` does it.)
OLDEST_ON_TCGEN05 = (3, 8)
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
    if problem.arch is not None and 100 <= problem.arch < 120 and version < OLDEST_ON_TCGEN05:
        return (
            f"Triton {'.'.join(map(str, version))} orders shared memory wrongly on compute "
            f"capability {problem.arch / 10}; 3.8 is the first that does not"
        )
    if problem.dtype not in DTYPES:
        return f"{short(problem.dtype)} is not supported"
    if problem.uneven:
        return UNEVEN
    if max(problem.m, problem.n, problem.k, problem.r) >= 2**30:
        return "a size of 2**30 or more is not supported"
    return None


def forward(call: Forward) -> tuple[Tensor, Tensor]:
    """Return y and P."""
    x, weight, lora_a, *_ = call
    (m, k), n, r = x.shape, weight.shape[0], lora_a.shape[0]
    y, p = x.new_empty(m, n), lora_a.new_empty(m, r)
    kind = m, n, k, r, x.dtype, lora_a.dtype
    _launch(_plan_forward, call, kind, call[:5], (*call[:5], y, p))
    return y, p


def backward(call: Backward, onto: Tensor | None = None) -> Gradients:
    """Return those of dx, da and db that are needed, dx added to `onto`."""
    dy, x, weight, lora_a, lora_b, p, *_ = call
    narrow = p if lora_b is None else lora_b
    if narrow is None:
        return Gradients(None, None, None)
    m, n, k, r = call.sizes()
    dx = dy.new_empty(m, k) if weight is not None and onto is None else onto
    da = None if x is None else narrow.new_empty(r, k)
    db = None if p is None else narrow.new_empty(n, r)
    q = None if lora_b is None else narrow.new_empty(m, r)
    # One kernel is compiled for every subset of gradients: what an absent operand points to, nobody
    # reads.
    tensors = (
        dy, dy if x is None else x, dy if weight is None else weight,
        narrow if lora_a is None else lora_a, narrow if lora_b is None else lora_b,
        narrow if p is None else p, dy if dx is None else dx, narrow if da is None else da,
        narrow if db is None else db, narrow if q is None else q,
    )  # fmt: skip
    kind = m, n, k, r, dy.dtype, narrow.dtype
    _launch(_plan_backward, call, kind, call[:6], tensors, int(onto is not None))
    return Gradients(dx, da, db)


BACKEND = Backend(
    "triton", why_not, forward, backward, functools.partial(choose.why_not_auto, "triton")
)


class _Plan(NamedTuple):
    """A launch but for its tensors and numbers."""

    kernel: Any
    items: int
    ctas: int
    words: int  # of the workspace
    sizes: tuple[int, ...]  # tickets, sizes and strides, as the kernel takes them
    descriptors: tuple[Any, ...]  # of the first tensors, for TMA
    constants: dict[str, Any]
    options: dict[str, Any]  # of the compiler


def _plan_forward(call: Forward, tensors: Sequence[Any]) -> _Plan:
    from lora_kernels.ops.lora_linear.triton.forward_kernel import lora_linear_forward

    (m, k), (n, _), r = call.x.shape, call.weight.shape, call.lora_a.shape[0]
    problem = call.problem()
    c = pick(problem, tf32=_precision(problem.dtype) == "tf32")
    ends = schedule.forward_ends(m, n, r, c.bm, c.bn, c.br)
    strides = [s for t in call[:4] for s in t.stride()]
    bias_n = 0 if call.bias is None else call.bias.stride(0)
    blocks = (c.bm, c.bk), (c.bn, c.bk)
    eights = in_eights(r, call.lora_b.stride(0))
    sizes = m, n, k, r, *strides, bias_n
    first = _first_group(call)
    return _plan(lora_linear_forward, c, problem, tensors, blocks, ends, sizes, eights, first)


def _plan_backward(call: Backward, tensors: Sequence[Any]) -> _Plan:
    from lora_kernels.ops.lora_linear.triton.backward_kernel import lora_linear_backward

    problem, (m, n, k, r) = call.problem(), call.sizes()
    c = pick(problem, backward=True, tf32=_precision(problem.dtype) == "tf32")
    ends = schedule.backward_ends(m, n, k, r, c.bm, c.bn, c.bk, c.br, *call.needs)
    strides = [s for t in tensors[:5] for s in t.stride()]
    blocks = (c.bm, c.bk), (c.bm, c.bk), (c.bk, c.bn)
    eights = in_eights(r, tensors[4].stride(0))
    sizes = m, n, k, r, *strides
    first = _first_group(call)
    return _plan(lora_linear_backward, c, problem, tensors, blocks, ends, sizes, eights, first)


def _plan(
    kernel: Any,
    c: TileConfig,
    problem: Problem,
    tensors: Sequence[Tensor],
    blocks: Sequence[tuple[int, int]],
    ends: Sequence[int],
    sizes: Sequence[int],
    eights: bool,
    first_group: int,
) -> _Plan:
    """Return the plan of a launch that reads its first tensors by `blocks`."""
    debug = DEBUG
    return _Plan(
        kernel,
        ends[-1],
        _ctas(ends[-1], c, tensors[0].device),
        schedule.workspace_length(schedule.blocks(problem.m, c.bm)),
        (*ends, *sizes),
        _descriptors(tensors, blocks, problem),
        {
            "DROPOUT": problem.dropout, "FIRST": first_group,
            "PRECISION": _precision(problem.dtype), "EIGHTS": eights, "DEBUG": debug,
            "BM": c.bm, "BN": c.bn, "BK": c.bk, "BR": c.br, "BS": c.bs, "GROUP": c.group,
        },
        {
            "num_warps": c.warps, "num_stages": c.stages, "debug": debug,
            "sanitize_overflow": False, "enable_fp_fusion": True,
        },
    )  # fmt: skip


class _Kept(NamedTuple):
    """What is left of a plan once its kernel is compiled."""

    direct: Any  # direct.Direct
    words: int
    sizes: tuple[int, ...]
    constants: tuple[Any, ...]


_kept: dict[tuple[Any, ...], _Kept] = {}
_keeping = threading.Lock()  # readers need none
_MOST = 1024  # kept plans, of a few hundred bytes each


def _launch(
    plan_of: Callable[[Any, Sequence[Any]], _Plan],
    call: Forward | Backward,
    kind: tuple[Any, ...],
    operands: tuple[Any, ...],
    tensors: tuple[Any, ...],
    *flags: int,
) -> None:
    """Launch a direction's kernel once, unless there is nothing to do.

    The first launch of a kind goes through Triton's own machinery, which compiles; what that found
    is kept, and further ones cost a tenth. The key holds all that decides anything but addresses
    and numbers, so that none is ever served another's launch: M, N, K, R and the two dtypes
    (`kind`), strides, low bits of addresses; also the rules, which tests and the tuner replace.
    `flags` are the numbers that one direction alone has.
    """
    seed, device = call.seed, tensors[0].device
    # A seed on the CPU becomes two numbers, one on the device is read by the kernel: no waiting.
    seed_ptr = seed if seed is not None and seed.is_cuda else None
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    key = (
        plan_of, device, seed is None, seed_ptr is None, _first_group(call),
        _precision(tensors[0].dtype),
        DEBUG, pick, _has_tma, _ctas, kind,
        *[None if t is None else t.stride() for t in operands],
        *[a and a & 15 for a in addresses],
    )  # fmt: skip
    factor, power = call.scale()
    numbers = (factor, 1 / power, power, *_mask(call.dropout_p, seed, seed_ptr), *flags)
    kept = _kept.get(key)
    with made_current(device):
        stream = current_stream(device)
        if kept is not None and not kept.direct.hooked():
            arguments = [
                *addresses, *kept.direct.described(addresses),
                None if seed_ptr is None else seed_ptr.data_ptr(),
                reserve(kept.words, device, stream).data_ptr(),
                *kept.sizes, *numbers, *kept.constants,
            ]  # fmt: skip
            kept.direct.run(stream, arguments)
            return
        plan = plan_of(call, tensors)
        if plan.items == 0:
            return
        compiled = plan.kernel[(plan.ctas,)](
            *tensors, *plan.descriptors, seed_ptr, reserve(plan.words, device, stream),
            *plan.sizes, *numbers, **plan.constants, **plan.options,
        )  # fmt: skip
        _keep(key, plan, compiled)


def _keep(key: tuple[Any, ...], plan: _Plan, compiled: Any) -> None:
    """Keep what launches `compiled` again, if this Triton's own launch can be done without."""
    from lora_kernels.ops.lora_linear.triton.direct import Direct

    direct = Direct.of(compiled, plan.ctas, plan.descriptors)
    if direct is not None:
        with _keeping:
            while len(_kept) >= _MOST:
                del _kept[next(iter(_kept))]  # the oldest
            _kept[key] = _Kept(direct, plan.words, plan.sizes, tuple(plan.constants.values()))


def _descriptors(
    tensors: Sequence[Tensor], blocks: Sequence[tuple[int, int]], problem: Problem
) -> tuple[Any, ...]:
    """Return what TMA needs to load each tensor by blocks of (rows, columns), or None where it
    cannot: before Hopper, or for rows that are not contiguous and 16-byte aligned."""
    described: list[Any] = [None] * len(blocks)
    if not _has_tma(problem):
        return tuple(described)
    from triton.tools.tensor_descriptor import TensorDescriptor

    for i, (tensor, block) in enumerate(zip(tensors, blocks, strict=False)):
        (rows, columns), (pitch, step) = tensor.shape, tensor.stride()
        aligned = tensor.data_ptr() % 16 == 0 and pitch * tensor.itemsize % 16 == 0
        if step == 1 and pitch >= columns and rows and columns and aligned:
            described[i] = TensorDescriptor(tensor, [rows, columns], [pitch, 1], list(block))
    return tuple(described)


def _has_tma(problem: Problem) -> bool:
    return problem.arch is not None and problem.arch >= 90 and problem.dtype.itemsize == 2


def _ctas(items: int, config: TileConfig, device: torch.device) -> int:
    """Return how many CTAs to launch: enough to fill the device; correctness needs just one."""
    if device.type != "cuda":
        return 1  # the interpreter runs one program after another
    return min(items, config.ctas * _multiprocessors(device))


def _first_group(call: Forward | Backward) -> int:
    """Return the counter that draws the first columns of x."""
    return (call.first_column or 0) // GROUP


def _mask(dropout_p: float, seed: Tensor | None, seed_ptr: Tensor | None) -> tuple[int, int, int]:
    """Return the threshold and the two halves of the key of the dropout mask."""
    if seed is None:
        return 0, 0, 0
    key = int(seed) if seed_ptr is None else 0
    return threshold(dropout_p), _int32(key & LOW), _int32(key >> 32)


def _int32(word: int) -> int:
    """Return a 32-bit word as the signed number that Triton passes without another variant."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _precision(dtype: torch.dtype) -> str:
    """Return how operands are multiplied: fp32 ones as torch's own setting for products says."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


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
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
