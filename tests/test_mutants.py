"""The shared checks pass the reference and kill every mutant of it."""

import pytest
from mutants import MUTANTS

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear.reference import BACKEND
from lora_kernels.testing import CASES, Case, check_backend


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_passes_every_case(case: Case, device: str) -> None:
    check_backend(BACKEND, case, device)


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
