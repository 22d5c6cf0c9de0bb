"""A bad call raises one line that says what was got and what is accepted, before any work."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_kernels import BackendUnavailable, lora_linear
from lora_kernels.ops.lora_linear import op, reference

M, N, K, R = 5, 6, 7, 3
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def good() -> dict[str, Any]:
    return {
        "x": torch.ones(M, K),
        "weight": torch.ones(N, K),
        "lora_a": torch.ones(R, K),
        "lora_b": torch.ones(N, R),
        "scaling": 0.5,
        "bias": torch.ones(N),
    }


def shaped(**shapes: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.ones(shape) for name, shape in shapes.items()}


def typed(dtype: torch.dtype, *names: str) -> Callable[[], dict[str, Any]]:
    return lambda: {name: good()[name].to(dtype) for name in names}


def changed(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: changes


def on_meta(*names: str) -> Callable[[], dict[str, Any]]:
    return lambda: {name: good()[name].to("meta") for name in names}


def training(name: str) -> Callable[[], dict[str, Any]]:
    return lambda: {name: good()[name].requires_grad_()}


OPERANDS = ("x", "weight", "lora_a", "lora_b", "bias")
BACKEND_NAMES = "backend must be one of auto, cuda, triton, reference"
FLOATS = "bfloat16 or float16 or float32 or float64"

# What is changed in a good call, the exception, and what its message says.
# fmt: off
BAD_CALLS = [
    # Shapes
    (shaped(x=()), ValueError, "x must be (..., K=7) to match weight, got shape ()"),
    (shaped(x=(M, 8)), ValueError, "x must be (..., K=7) to match weight, got shape (5, 8)"),
    (shaped(x=(2, M, 1)), ValueError, "x must be (..., K=7) to match weight, got shape (2, 5, 1)"),
    (shaped(x=(0,)), ValueError, "x must be (..., K=7) to match weight, got shape (0,)"),
    (shaped(weight=(N,)), ValueError, "weight must be (N, K), got shape (6,)"),
    (shaped(weight=()), ValueError, "weight must be (N, K), got shape ()"),
    (shaped(weight=(1, N, K)), ValueError, "weight must be (N, K), got shape (1, 6, 7)"),
    (shaped(weight=(K, N)), ValueError, "x must be (..., K=6) to match weight, got shape (5, 7)"),
    (shaped(lora_a=(K, R)), ValueError,
     "lora_a must be (R, K=7) to match weight, got shape (7, 3)"),
    (shaped(lora_a=(K,)), ValueError, "lora_a must be (R, K=7) to match weight, got shape (7,)"),
    (shaped(lora_a=(1, R, K)), ValueError,
     "lora_a must be (R, K=7) to match weight, got shape (1, 3, 7)"),
    (shaped(lora_b=(R, N)), ValueError,
     "lora_b must be (N=6, R) to match weight, got shape (3, 6)"),
    (shaped(lora_b=(N,)), ValueError, "lora_b must be (N=6, R) to match weight, got shape (6,)"),
    (shaped(lora_b=(N, 4)), ValueError,
     "lora_b must be (N, R=3) to match lora_a, got shape (6, 4)"),
    (shaped(lora_b=(N, 1)), ValueError,
     "lora_b must be (N, R=3) to match lora_a, got shape (6, 1)"),
    (shaped(lora_a=(0, K), lora_b=(N, 0)), ValueError, "the rank R must be at least 1, got 0"),
    (shaped(bias=(N + 1,)), ValueError, "bias must be (N=6,) to match weight, got shape (7,)"),
    (shaped(bias=(1,)), ValueError, "bias must be (N=6,) to match weight, got shape (1,)"),
    (shaped(bias=()), ValueError, "bias must be (N=6,) to match weight, got shape ()"),
    (shaped(bias=(1, N)), ValueError, "bias must be (N=6,) to match weight, got shape (1, 6)"),
    # Dtypes
    *[
        (typed(dtype, "x", "weight", "bias"), TypeError, f"x must be {FLOATS}, got {name}")
        for dtype, name in (
            (torch.int32, "int32"),
            (torch.int64, "int64"),
            (torch.uint8, "uint8"),
            (torch.bool, "bool"),
            (torch.complex64, "complex64"),
            (torch.float8_e4m3fn, "float8_e4m3fn"),
            (torch.float8_e5m2, "float8_e5m2"),
        )
    ],
    (typed(torch.int64, *OPERANDS), TypeError, f"x must be {FLOATS}, got int64"),
    (typed(bf16, "weight"), TypeError, "weight must have x's dtype float32, got bfloat16"),
    (typed(torch.int8, "weight"), TypeError, "weight must have x's dtype float32, got int8"),
    (typed(bf16, "x"), TypeError, "weight must have x's dtype bfloat16, got float32"),
    (typed(fp64, "bias"), TypeError, "bias must have x's dtype float32, got float64"),
    (typed(bf16, "lora_a", "lora_b"), TypeError,
     "lora_a must be float32 beside this x, got bfloat16"),
    (typed(fp64, "lora_a", "lora_b"), TypeError,
     "lora_a must be float32 beside this x, got float64"),
    (typed(torch.int32, "lora_a", "lora_b"), TypeError,
     "lora_a must be float32 beside this x, got int32"),
    (typed(fp64, "lora_b"), TypeError, "lora_b must have lora_a's dtype float32, got float64"),
    (typed(fp64, "x", "weight", "bias"), TypeError,
     "lora_a must be float64 beside this x, got float32"),
    (
        lambda: typed(bf16, "x", "weight", "bias")() | typed(fp16, "lora_a", "lora_b")(),
        TypeError,
        "lora_a must be bfloat16 or float32 beside this x, got float16",
    ),
    (
        lambda: typed(fp16, "x", "weight", "bias")() | typed(fp64, "lora_a", "lora_b")(),
        TypeError,
        "lora_a must be float16 or float32 beside this x, got float64",
    ),
    # Types
    *[
        (changed(**{name: None}), TypeError, f"{name} must be a tensor, got NoneType")
        for name in OPERANDS[:4]
    ],
    (changed(x=[[1.0] * K]), TypeError, "x must be a tensor, got list"),
    (changed(weight=torch.nn.Linear(K, N)), TypeError, "weight must be a tensor, got Linear"),
    (changed(bias=True), TypeError, "bias must be a tensor, got bool"),
    (changed(bias=1.0), TypeError, "bias must be a tensor, got float"),
    # Devices
    *[
        (on_meta(name), ValueError, f"{name} must be on x's device cpu, got meta")
        for name in OPERANDS[1:]
    ],
    (on_meta("x"), ValueError, "weight must be on x's device meta, got cpu"),
    # Frozen operands
    *[
        (
            training(name),
            ValueError,
            f"{name} is frozen here but requires grad; call {name}.requires_grad_(False)",
        )
        for name in ("weight", "bias")
    ],
    # Scaling
    (changed(scaling=None), TypeError, "scaling must be a number, got NoneType"),
    (changed(scaling="1"), TypeError, "scaling must be a number, got str"),
    (changed(scaling=True), TypeError, "scaling must be a number, got bool"),
    (changed(scaling=1j), TypeError, "scaling must be a number, got complex"),
    (changed(scaling=torch.tensor(0.5)), TypeError, "scaling must be a number, got Tensor"),
    # Dropout
    (changed(dropout_p=-0.1), ValueError, "dropout_p must be in [0, 1), got -0.1"),
    (changed(dropout_p=1), ValueError, "dropout_p must be in [0, 1), got 1"),
    (changed(dropout_p=1.0), ValueError, "dropout_p must be in [0, 1), got 1.0"),
    (changed(dropout_p=float("nan")), ValueError, "dropout_p must be in [0, 1), got nan"),
    (changed(dropout_p=float("inf")), ValueError, "dropout_p must be in [0, 1), got inf"),
    (changed(dropout_p="x"), TypeError, "dropout_p must be a number, got str"),
    (changed(dropout_p=True), TypeError, "dropout_p must be a number, got bool"),
    (changed(dropout_p=None), TypeError, "dropout_p must be a number, got NoneType"),
    (changed(dropout_p=torch.tensor(0.5)), TypeError, "dropout_p must be a number, got Tensor"),
    # Seed
    *[
        (changed(seed=seed, dropout_p=0.5), kind, message)
        for seed, kind, message in (
            (-1, ValueError, "seed must be in [0, 2**63), got -1"),
            (2**63, ValueError, "seed must be in [0, 2**63), got 9223372036854775808"),
            (1.5, TypeError, "seed must be an int, an int64 tensor or None, got float"),
            ("7", TypeError, "seed must be an int, an int64 tensor or None, got str"),
            (True, TypeError, "seed must be an int, an int64 tensor or None, got bool"),
            (torch.tensor([1.0]), TypeError, "seed must be one int64, got 1 of float32"),
            (torch.tensor(1).int(), TypeError, "seed must be one int64, got 1 of int32"),
            (torch.tensor([1, 2]), TypeError, "seed must be one int64, got 2 of int64"),
            (torch.tensor([], dtype=torch.int64), TypeError,
             "seed must be one int64, got 0 of int64"),
            (torch.tensor([1], device="meta"), ValueError,
             "seed must be on x's device cpu or the cpu, got meta"),
        )
    ],
    # First column
    *[
        (changed(first_column=column, dropout_p=0.5), kind, f"first_column must be {message}")
        for column, kind, message in (
            (-1, ValueError, "in [0, 2**31), got -1"),
            (2**31, ValueError, "in [0, 2**31), got 2147483648"),
            (1.0, TypeError, "an int or None, got float"),
            (True, TypeError, "an int or None, got bool"),
        )
    ],
    (changed(first_column=8, dropout_p=0.5, backend="triton"), BackendUnavailable,
     "no backend for lora_linear M=5 N=6 K=7 R=3"),
    # Backends
    (changed(backend="cudnn"), ValueError, f"{BACKEND_NAMES}, got 'cudnn'"),
    (changed(backend="CUDA"), ValueError, f"{BACKEND_NAMES}, got 'CUDA'"),
    (changed(backend=""), ValueError, f"{BACKEND_NAMES}, got ''"),
    (changed(backend=None), ValueError, f"{BACKEND_NAMES}, got None"),
    (changed(backend=0), ValueError, f"{BACKEND_NAMES}, got 0"),
    (changed(backend=["auto"]), ValueError, f"{BACKEND_NAMES}, got ['auto']"),
    (changed(scaling=math.inf), ValueError, "scaling must be finite in fp32, got inf"),
    (changed(scaling=1e39), ValueError, "scaling must be finite in fp32, got 1e+39"),
    (changed(backend="cuda", dropout_p=0.5), BackendUnavailable, "no backend for lora_linear M=5"),
    (changed(backend="cuda"), BackendUnavailable, "no backend for lora_linear M=5 N=6 K=7 R=3"),
    (changed(backend="triton"), BackendUnavailable, "no backend for lora_linear M=5 N=6 K=7 R=3"),
]
# fmt: on


@pytest.mark.parametrize(
    ("changes", "kind", "message"), BAD_CALLS, ids=[f"{i}-{c[2]}" for i, c in enumerate(BAD_CALLS)]
)
@pytest.mark.parametrize("grad", [False, True], ids=["", "training"])
def test_a_bad_call_raises_one_line_and_runs_nothing(
    changes: Callable[[], dict[str, Any]],
    kind: type[Exception],
    message: str,
    grad: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*arguments: Any) -> Any:
        pytest.fail("a backend ran")

    lora_linear(**good())  # what was found to be right must not speak for what is not
    backends = [b._replace(forward=forbidden, backward=forbidden) for b in op.BACKENDS]
    monkeypatch.setattr(op, "BACKENDS", tuple(backends))
    call = good()
    if grad:
        call["lora_b"].requires_grad_()
    call |= changes()
    generator = torch.get_rng_state()
    with pytest.raises(kind) as raised:
        lora_linear(call.pop("x"), **call)
    assert type(raised.value) is kind
    text = str(raised.value)
    assert message in text
    assert "lora_linear" in text
    assert "\n" not in text
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_unavailable_backend_says_why_and_names_the_problem(name: str) -> None:
    call = good() | {"backend": name}
    with pytest.raises(BackendUnavailable) as raised:
        lora_linear(call.pop("x"), **call)
    problem, reason = str(raised.value).split(f": {name}: ")
    assert problem == "no backend for lora_linear M=5 N=6 K=7 R=3 (float32, adapters float32, cpu)"
    assert len(reason) > 10


def test_the_good_call_is_good() -> None:
    call = good()
    y = lora_linear(call.pop("x"), **call)
    assert torch.equal(y, torch.full((M, N), K + 0.5 * K * R + 1))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_frozen_operand_that_requires_grad_is_fine_under_no_grad(name: str) -> None:
    call = good() | training(name)()
    with torch.no_grad():
        assert lora_linear(call.pop("x"), **call).shape == (M, N)


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (1.5, TypeError), ("x", TypeError)])
def test_a_bad_seed_shows_before_dropout_is_on(seed: Any, error: type[Exception]) -> None:
    call = good() | {"seed": seed}
    with pytest.raises(error, match="seed"):
        lora_linear(call.pop("x"), **call)


def test_a_missing_scaling_is_pythons_own_error() -> None:
    call = good()
    del call["scaling"]
    with pytest.raises(TypeError, match="scaling"):
        lora_linear(call.pop("x"), **call)


def test_options_are_keyword_only() -> None:
    call = good()
    with pytest.raises(TypeError, match="positional"):
        lora_linear(*call.values(), 0.5)


def test_a_failing_backend_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        raise RuntimeError("out of registers")

    broken = reference.BACKEND._replace(name="cuda", forward=failing)
    monkeypatch.setattr(op, "BACKENDS", (broken, reference.BACKEND))
    call = good()
    with pytest.raises(RuntimeError, match="out of registers"):
        lora_linear(call.pop("x"), **call)
