"""The shared checks pass the reference and kill every mutant of it."""

import ctypes
from typing import Any

import pytest
import torch
from mutants import MUTANTS, given

from lora_kernels import testing
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import operands
from lora_kernels.ops.lora_linear.operands import Scale
from lora_kernels.ops.lora_linear.reference import BACKEND
from lora_kernels.testing import (
    CASES,
    FROZEN_CASES,
    Case,
    bf16,
    check_backend,
    check_frozen,
    check_non_finite,
    fp16,
    fp32,
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_passes_every_case(case: Case, device: str) -> None:
    check_backend(BACKEND, case, device)


@pytest.mark.parametrize("case", FROZEN_CASES, ids=str)
def test_b_zero_is_the_frozen_layer_bit_for_bit(case: Case, device: str) -> None:
    check_frozen(BACKEND, case, device)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_non_finite_numbers_are_judged_where_dropout_keeps_them(
    value: float, dropout_p: float
) -> None:
    case = Case(60, 52, 64, 24, bf16, None, True, dropout_p)
    check_non_finite(BACKEND, case, value)

    def clears(call: operands.Forward) -> operands.Forward:
        return call._replace(x=call.x.nan_to_num(0.0, 0.0, 0.0))

    with pytest.raises(AssertionError):
        check_non_finite(given(clears, "y")(BACKEND), case, value)


@pytest.mark.parametrize("where", [0, -1], ids=["before", "behind"])
@pytest.mark.parametrize("result", ["y", "dx"])
def test_what_is_written_beside_a_result_is_noticed(where: int, result: str) -> None:
    def beside(got: torch.Tensor) -> torch.Tensor:
        new = torch.empty_like(got).copy_(got)
        ctypes.memset(new.data_ptr() - 1 if where == 0 else new.data_ptr() + new.nbytes, 0, 1)
        return new

    def forward(call: operands.Forward) -> tuple[torch.Tensor, torch.Tensor]:
        y, p = BACKEND.forward(call)
        return (beside(y) if result == "y" else y), p

    def backward(call: operands.Backward, onto: torch.Tensor | None = None) -> operands.Gradients:
        found = BACKEND.backward(call, onto)
        return found._replace(dx=beside(found.dx)) if result == "dx" else found

    mutant = BACKEND._replace(forward=forward, backward=backward)
    with pytest.raises(AssertionError, match=r"written beside a new tensor of \(40, [56]0\)"):
        check_backend(mutant, Case(40, 50, 60, 8, bf16))


def test_a_result_that_comes_late_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a launch on another stream than the caller's; it is there when it is compared."""
    own, pending = testing.expected, []

    def forward(call: operands.Forward) -> tuple[torch.Tensor, torch.Tensor]:
        y, p = BACKEND.forward(call)
        late = torch.zeros_like(y)
        pending.append((late, y))
        return late, p

    def expected(*arguments: Any) -> dict[str, torch.Tensor]:
        for late, y in pending:
            late.copy_(y)
        return own(*arguments)

    monkeypatch.setattr(testing, "expected", expected)
    with pytest.raises(AssertionError, match=r"^y of "):
        check_backend(BACKEND._replace(forward=forward), Case(40, 50, 60, 8, bf16))
    assert pending


def test_a_scaling_that_passes_through_16_bits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole_in_p(scaling: float, dropout_p: float, dtype: torch.dtype) -> Scale:
        return Scale(scaling / (1 - dropout_p), 1.0)

    for module in (operands, testing):
        monkeypatch.setattr(module, "split_scaling", whole_in_p)
    sixteen_bit = [c for c in CASES if c.magnitudes[0] > 1e3 and c.adapter_dtype is None]
    assert {case.dtype for case in sixteen_bit} == {fp16, bf16}
    tiny = [c for c in CASES if c.dtype == fp16 and abs(c.scaling) < 1e-3]
    for case in (*sixteen_bit, *tiny):
        assert kills(case, BACKEND), case
    noisy = next(c for c in FROZEN_CASES if c.dtype == fp16 and c.magnitudes[0] > 1e3)
    with pytest.raises(AssertionError):
        check_frozen(BACKEND, noisy)


@pytest.mark.parametrize(
    ("scaling", "dropout_p", "dtype", "expected"),
    [
        (0.0, 0.0, fp16, (0.0, 1.0)),
        (1.0, 0.0, fp16, (1.0, 1.0)),
        (2.0, 0.0, bf16, (1.0, 2.0)),
        (-3.0, 0.0, fp16, (-0.75, 4.0)),
        (0.75, 0.0, fp16, (0.75, 1.0)),
        (0.25, 0.0, fp16, (1.0, 0.25)),
        (0.25, 0.0, bf16, (0.25, 1.0)),
        (1.0, 0.5, fp32, (1.0, 2.0)),
        (2.0**120, 0.0, fp16, (1.0, 2.0**100)),
        (-(2.0**120), 0.0, fp16, (-1.0, 2.0**100)),
        (2.0**-80, 0.0, fp16, (2.0**-16, 2.0**-64)),
        (2.0**30, 0.0, bf16, (2.0**6, 2.0**24)),
    ],
)
def test_how_a_scaling_is_split(
    scaling: float, dropout_p: float, dtype: torch.dtype, expected: tuple[float, float]
) -> None:
    assert operands.split_scaling(scaling, dropout_p, dtype) == expected


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed(name: str) -> None:
    mutant = MUTANTS[name](BACKEND)
    assert any(kills(case, mutant) for case in CASES), f"no case sees: {name}"


def kills(case: Case, mutant: Backend) -> bool:
    try:
        check_backend(mutant, case)
    except AssertionError:
        return True
    return False
