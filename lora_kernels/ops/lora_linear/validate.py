"""Every check on a call, before any work: one line that says what was got and what is accepted."""

import functools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from lora_kernels.ops.lora_linear.philox import is_uneven
from lora_kernels.ops.lora_linear.problem import Problem, arch, short

Shape = Sequence[int]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
FP32_MAX = torch.finfo(torch.float32).max
_NAMES = ("x", "weight", "lora_a", "lora_b", "bias")


def validate(
    tensors: tuple[Any, ...],
    scaling: Any,
    dropout_p: Any,
    seed: Any,
    first_column: Any,
    rebuild: Any,
    backend: Any,
    backends: tuple[str, ...],
    traced: bool,
) -> Problem | None:
    """Raise TypeError or ValueError unless the arguments are as `lora_linear` documents them.

    tensors: x, weight, lora_a, lora_b and, if there is one, bias.

    Return the problem, or None where something traces. Elsewhere shapes, dtypes and devices are
    looked at once for each kind of tensors.
    """
    if traced:  # also by what is no tensor
        for name, tensor in zip(_NAMES, tensors, strict=False):
            if not isinstance(tensor, Tensor):
                _type_error(f"{name} must be a tensor, got {type(tensor).__name__}")
    x, weight, lora_a, lora_b = tensors[:4]
    bias = tensors[4] if len(tensors) == 5 else None
    # All that a problem, and whether it is one, depends on.
    facts: tuple[Any, ...] = (
        x.shape, weight.shape, lora_a.shape, lora_b.shape,
        x.dtype, weight.dtype, lora_a.dtype, lora_b.dtype,
        x.device, weight.device, lora_a.device, lora_b.device,
    )  # fmt: skip
    if bias is not None:
        facts += bias.shape, bias.dtype, bias.device
    problem = None
    if traced:
        _validate_facts(*facts)
    else:
        problem = _problem(*facts)
    if (weight.requires_grad or (bias is not None and bias.requires_grad)) and (
        torch.is_grad_enabled()
    ):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                hint = (
                    f"call {name}.requires_grad_(False) or train it with an ordinary linear layer"
                )
                _value_error(f"{name} is frozen here but requires grad; {hint}")

    if type(scaling) is not float and not _is_number(scaling):
        _type_error(f"scaling must be a number, got {type(scaling).__name__}")
    if not abs(scaling) <= FP32_MAX:
        _value_error(f"scaling must be finite in fp32, got {scaling}")
    if type(dropout_p) is not float and not _is_number(dropout_p):
        _type_error(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        _value_error(f"dropout_p must be in [0, 1), got {dropout_p}")
    if seed is not None:
        _validate_seed(seed, x.device)
    if backend not in backends:
        _value_error(f"backend must be one of {', '.join(backends)}, got {backend!r}")
    if rebuild is not None and not callable(rebuild):
        _type_error(f"rebuild must be callable, got {type(rebuild).__name__}")
    if first_column is not None:
        _validate_column(first_column)
    if problem is None or float(dropout_p) == 0:
        return problem
    return problem._replace(dropout=True, uneven=is_uneven(first_column, problem.k))


def is_traced(tensors: tuple[Any, ...], plain: frozenset[type] = PLAIN_TYPES) -> bool:
    """Return whether something watches operators: torch.compile, a dispatch mode, a subclass.

    If nothing does, the dispatcher is skipped, which small calls are bound by (README.md).
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or not plain.issuperset(map(type, tensors))
    )


def _validate_facts(
    x_shape: Shape, w_shape: Shape, a_shape: Shape, b_shape: Shape,
    dtype: torch.dtype, w_dtype: torch.dtype, a_dtype: torch.dtype, b_dtype: torch.dtype,
    device: torch.device, w_device: torch.device, a_device: torch.device, b_device: torch.device,
    bias_shape: Shape | None = None, bias_dtype: torch.dtype | None = None,
    bias_device: torch.device | None = None,
) -> None:  # fmt: skip
    if len(w_shape) != 2:
        _value_error(f"weight must be (N, K), got shape {_shape(w_shape)}")
    n, k = w_shape
    if len(x_shape) == 0 or x_shape[-1] != k:
        _value_error(f"x must be (..., K={k}) to match weight, got shape {_shape(x_shape)}")
    if len(a_shape) != 2 or a_shape[1] != k:
        _value_error(f"lora_a must be (R, K={k}) to match weight, got shape {_shape(a_shape)}")
    if len(b_shape) != 2 or b_shape[0] != n:
        _value_error(f"lora_b must be (N={n}, R) to match weight, got shape {_shape(b_shape)}")
    r = a_shape[0]
    if b_shape[1] != r:
        _value_error(f"lora_b must be (N, R={r}) to match lora_a, got shape {_shape(b_shape)}")
    if r == 0:
        _value_error("the rank R must be at least 1, got 0")
    if bias_shape is not None and (len(bias_shape) != 1 or bias_shape[0] != n):
        _value_error(f"bias must be (N={n},) to match weight, got shape {_shape(bias_shape)}")

    if dtype not in DTYPES:
        _type_error(f"x must be {' or '.join(map(short, DTYPES))}, got {short(dtype)}")
    if w_dtype != dtype:
        _type_error(f"weight must have x's dtype {short(dtype)}, got {short(w_dtype)}")
    if bias_dtype is not None and bias_dtype != dtype:
        _type_error(f"bias must have x's dtype {short(dtype)}, got {short(bias_dtype)}")
    if a_dtype != dtype and a_dtype not in adapter_dtypes(dtype):
        accepted = " or ".join(map(short, adapter_dtypes(dtype)))
        _type_error(f"lora_a must be {accepted} beside this x, got {short(a_dtype)}")
    if b_dtype != a_dtype:
        _type_error(f"lora_b must have lora_a's dtype {short(a_dtype)}, got {short(b_dtype)}")

    devices = w_device, a_device, b_device, bias_device
    for name, other in zip(_NAMES[1:], devices, strict=True):
        if other is not None and other != device:
            _value_error(f"{name} must be on x's device {device}, got {other}")


@functools.lru_cache(maxsize=4096)
def _problem(*facts: Any) -> Problem:
    """Return the problem that plain tensors with these facts pose without dropout, or raise."""
    _validate_facts(*facts)
    (*leading, k), (n, _), (r, _), _, dtype, _, adapter_dtype, _, device, _, _, _, *bias = facts
    where = device.type, arch(device)
    return Problem(math.prod(leading), n, k, r, dtype, adapter_dtype, *where, bias=bool(bias))


def adapter_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the dtypes that A and B may have beside x of `dtype`: its own, and fp32 if wider."""
    return (dtype, torch.float32) if dtype.itemsize < 4 else (dtype,)


def _validate_seed(seed: Any, device: torch.device) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            _type_error(f"seed must be one int64, got {seed.numel()} of {short(seed.dtype)}")
        if seed.device != device and seed.device.type != "cpu":
            _value_error(f"seed must be on x's device {device} or the cpu, got {seed.device}")
    elif isinstance(seed, bool) or not isinstance(seed, int):
        _type_error(f"seed must be an int, an int64 tensor or None, got {type(seed).__name__}")
    elif not 0 <= seed < 2**63:
        _value_error(f"seed must be in [0, 2**63), got {seed}")


def _validate_column(first_column: Any) -> None:
    if isinstance(first_column, bool) or not isinstance(first_column, int):
        _type_error(f"first_column must be an int or None, got {type(first_column).__name__}")
    if not 0 <= first_column < 2**31:
        _value_error(f"first_column must be in [0, 2**31), got {first_column}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _type_error(message: str) -> NoReturn:
    raise TypeError(f"lora_linear: {message}")


def _value_error(message: str) -> NoReturn:
    raise ValueError(f"lora_linear: {message}")


def _shape(shape: Shape) -> str:
    return str(tuple(shape))
