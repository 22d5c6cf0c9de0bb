"""Shared by the tests of qualification: records of a machine that is not there."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import Problem, reference
from lora_kernels.qualify import choose, record
from lora_kernels.qualify.checks import Options
from lora_kernels.qualify.record import Measured, Record, Verdict
from lora_kernels.testing import fp32

CHILD = (sys.executable, str(Path(__file__).parent / "planted_child.py"))
OPTIONS = Options(
    ((64, 128),), (32,), (8,), ("float32",), (0.0,), "cpu", seconds=0.05, limit_s=20.0
)


HERE = {"lora_kernels": "1", "kernels": "k", "device": "cpu", "name": "x", "arch": 90,
        "triton": "3.9.0", "extension": "e", "torch": "2"}  # fmt: skip
PROBLEM = Problem(1024, 4096, 4096, 16, fp32, fp32, "cpu", None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep records in a folder of the test's own, and on the CPU."""
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORA_KERNELS_RECORD", raising=False)
    monkeypatch.setattr(choose, "KEPT_FOR", ("cpu",))
    choose.forget()
    yield
    choose.forget()


def measured(**changes: Any) -> Measured:
    usual = Measured(1024, 4096, 4096, 16, "float32", "float32", False, False, 90, 100, 80, 0.01)
    return dataclasses.replace(usual, **changes)


def a_record(*sizes: Measured, outcome: str = record.RIGHT, **environment: Any) -> Record:
    verdict = Verdict(outcome, "why" if outcome != record.RIGHT else "", 7, 0.5, sizes)
    return Record({**HERE, **environment}, {"mine": verdict}, "2026-11-25T12:00:00+00:00")


def proven(name: str) -> Backend:
    def why_not_auto(problem: Problem, backward: bool) -> str | None:
        return choose.why_not_auto(name, problem, backward)

    return reference.BACKEND._replace(name=name, why_not_auto=why_not_auto)
