"""Every check on a call, before any work: one line that says what was got and what is accepted."""

from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
FP32_MAX = torch.finfo(torch.float32).max
_NAMES = ("x", "weight", "lora_a", "lora_b", "bias")


def validate(
    x: Any,
    weight: Any,
    lora_a: Any,
    lora_b: Any,
    scaling: Any,
    bias: Any,
    dropout_p: Any,
    seed: Any,
    backend: Any,
    backends: tuple[str, ...],
) -> None:
    """Raise TypeError or ValueError unless the arguments are as `lora_linear` documents them."""
    tensors = (x, weight, lora_a, lora_b) if bias is None else (x, weight, lora_a, lora_b, bias)
    if not PLAIN_TYPES.issuperset(map(type, tensors)):  # that fails, or a subclass
        for name, tensor in zip(_NAMES, tensors, strict=False):  # there may be no bias
            if not isinstance(tensor, Tensor):
                _type_error(f"{name} must be a tensor, got {type(tensor).__name__}")
    _validate_shapes(x, weight, lora_a, lora_b, bias)
    _validate_dtypes(x, weight, lora_a, lora_b, bias)
    device = x.device
    if not (device == weight.device == lora_a.device == lora_b.device == tensors[-1].device):
        for name, tensor in zip(_NAMES, tensors, strict=False):
            if tensor.device != device:
                _value_error(f"{name} must be on x's device {device}, got {tensor.device}")
    if torch.is_grad_enabled() and (weight.requires_grad or (tensors[4:] and bias.requires_grad)):
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
        _validate_seed(seed, device)
    if backend not in backends:
        _value_error(f"backend must be one of {', '.join(backends)}, got {backend!r}")


def _validate_shapes(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None
) -> None:
    x_shape, w_shape, a_shape, b_shape = x.shape, weight.shape, lora_a.shape, lora_b.shape
    if len(w_shape) != 2:
        _value_error(f"weight must be (N, K), got shape {_shape(weight)}")
    n, k = w_shape
    if len(x_shape) == 0 or x_shape[-1] != k:
        _value_error(f"x must be (..., K={k}) to match weight, got shape {_shape(x)}")
    if len(a_shape) != 2 or a_shape[1] != k:
        _value_error(f"lora_a must be (R, K={k}) to match weight, got shape {_shape(lora_a)}")
    if len(b_shape) != 2 or b_shape[0] != n:
        _value_error(f"lora_b must be (N={n}, R) to match weight, got shape {_shape(lora_b)}")
    r = a_shape[0]
    if b_shape[1] != r:
        _value_error(f"lora_b must be (N, R={r}) to match lora_a, got shape {_shape(lora_b)}")
    if r == 0:
        _value_error("the rank R must be at least 1, got 0")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n):
        _value_error(f"bias must be (N={n},) to match weight, got shape {_shape(bias)}")


def _validate_dtypes(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None
) -> None:
    dtype, adapter_dtype = x.dtype, lora_a.dtype
    if dtype not in DTYPES:
        _type_error(f"x must be {' or '.join(map(_dtype, DTYPES))}, got {_dtype(dtype)}")
    if weight.dtype != dtype:
        _type_error(f"weight must have x's dtype {_dtype(dtype)}, got {_dtype(weight.dtype)}")
    if bias is not None and bias.dtype != dtype:
        _type_error(f"bias must have x's dtype {_dtype(dtype)}, got {_dtype(bias.dtype)}")
    if adapter_dtype != dtype and adapter_dtype not in adapter_dtypes(dtype):
        accepted = " or ".join(map(_dtype, adapter_dtypes(dtype)))
        _type_error(f"lora_a must be {accepted} beside this x, got {_dtype(adapter_dtype)}")
    if lora_b.dtype != adapter_dtype:
        got = _dtype(lora_b.dtype)
        _type_error(f"lora_b must have lora_a's dtype {_dtype(adapter_dtype)}, got {got}")


def adapter_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the dtypes that A and B may have beside x of `dtype`: its own, and fp32 if wider."""
    return (dtype, torch.float32) if dtype.itemsize < 4 else (dtype,)


def _validate_seed(seed: Any, device: torch.device) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            _type_error(f"seed must be one int64, got {seed.numel()} of {_dtype(seed.dtype)}")
        if seed.device != device and seed.device.type != "cpu":
            _value_error(f"seed must be on x's device {device} or the cpu, got {seed.device}")
    elif isinstance(seed, bool) or not isinstance(seed, int):
        _type_error(f"seed must be an int, an int64 tensor or None, got {type(seed).__name__}")
    elif not 0 <= seed < 2**63:
        _value_error(f"seed must be in [0, 2**63), got {seed}")


def validate_options(first_column: Any, rebuild: Any) -> None:
    """Raise TypeError or ValueError unless each is None or what `lora_linear` says it is."""
    if rebuild is not None and not callable(rebuild):
        _type_error(f"rebuild must be callable, got {type(rebuild).__name__}")
    if first_column is None:
        return
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


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
