"""The choice: "auto" obeys the record, direction by direction, and says what it obeys."""

import timeit
from typing import Any

import pytest
import torch
from qualified import HERE, PROBLEM, a_record, measured, proven
from qualified import own_cache as own_cache

from lora_kernels import info
from lora_kernels.dispatch import select
from lora_kernels.ops.lora_linear import BACKENDS, Problem, reference
from lora_kernels.qualify import choose, record
from lora_kernels.qualify.record import Record, Verdict


@pytest.mark.parametrize(
    ("sizes", "problem", "expected"),
    [
        # The very size, and sizes within an octave of it.
        ([{}], {}, [1024]),
        ([{}], {"n": 8192, "k": 2048, "r": 32}, [1024]),
        ([{}], {"n": 8193}, []),
        ([{}], {"r": 33}, []),
        # The nearest in N, K and R, not the nearest in M.
        ([{}, {"n": 5120, "m": 8192}], {"n": 5000, "m": 1024}, []),
        ([{}, {"n": 5120, "m": 512}], {"n": 5000}, [512]),
        # M on either side.
        ([{"m": 512}, {"m": 2048}, {"m": 8192}], {"m": 1000}, [512, 2048]),
        ([{"m": 512}, {"m": 2048}], {"m": 10**6}, [2048]),
        ([{"m": 512}, {"m": 2048}], {"m": 256}, [512]),
        ([{"m": 512}, {"m": 2048}], {"m": 255}, []),
        ([{"m": 512}, {"m": 2048}], {"m": 0}, []),
        # Another kind says nothing.
        ([{"dtype": "bfloat16"}], {}, []),
        ([{"adapter_dtype": "bfloat16"}], {}, []),
        ([{"dropout": True}], {}, []),
        ([{"backward": True}], {}, []),
        ([{"dropout": True}], {"dropout": True}, [1024]),
        ([], {}, []),
        ([{"time_us": 50.0}, {"time_us": 60.0}], {}, [1024, 1024]),  # and so do doubles
        # Of two equally near, both speak.
        ([{"n": 2048}, {"n": 8192}], {}, [1024, 1024]),
    ],
)
def test_which_measurements_are_nearest(
    sizes: list[dict[str, Any]], problem: dict[str, Any], expected: list[int]
) -> None:
    found = choose.nearest([measured(**s) for s in sizes], PROBLEM._replace(**problem), False)
    assert [m.m for m in found] == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([{}], None),
        ([{"time_us": 100.9}], None),  # within the noise
        ([{"time_us": 102.0}], "1.02 x the composition's time at M=1024 N=4096 K=4096 R=16"),
        ([{"time_us": 108.0, "noise": 0.3}], "1.08 x"),  # noise forgives five per cent at most
        ([{"x_graph": 1.2}], "1.20 x"),
        ([{"x_graph": 0.9}], None),
        ([{"m": 512}, {"m": 2048, "time_us": 200.0}], "2.00 x the composition's time at M=2048"),
        ([{"n": 1}], "no size near this one"),
    ],
)
def test_auto_wants_it_not_slower_where_it_was_measured_nearest(
    sizes: list[dict[str, Any]], expected: str | None
) -> None:
    reason = choose.judge(a_record(*(measured(**s) for s in sizes)), "mine", PROBLEM, False)
    assert (reason is None) if expected is None else (expected in (reason or ""))


@pytest.mark.parametrize("outcome", [record.WRONG, record.HUNG, record.CRASHED])
def test_auto_leaves_alone_what_failed(outcome: str) -> None:
    found = a_record(measured(), outcome=outcome)
    assert choose.judge(found, "mine", PROBLEM, False) == f"{outcome} on this machine: why"
    assert "not yet tried" in (choose.judge(found, "another", PROBLEM, False) or "")


def test_auto_obeys_the_record_direction_by_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = (proven("mine"), reference.BACKEND)
    monkeypatch.setattr(record, "environment", lambda device_type: dict(HERE))
    assert select(backends, PROBLEM).name == "reference"  # nothing known
    record.save(a_record(measured(), measured(backward=True, time_us=200)))
    choose.forget()  # and with it what was chosen
    assert select(backends, PROBLEM).name == "mine"
    assert select(backends, PROBLEM, backward=True).name == "reference"
    with pytest.warns(UserWarning, match=r"the mine backend is unproven here: 2\.00 x"):
        assert select(backends, PROBLEM, "mine", backward=True).name == "mine"


def test_a_gpu_of_another_kind_beside_it_makes_auto_careful(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record, "environment", lambda device_type: {**HERE, "mixed": True})
    assert "CUDA_VISIBLE_DEVICES" in str(choose.known("cpu"))


def test_auto_measures_and_reads_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def environment(device_type: str) -> dict[str, Any]:
        asked.append(device_type)
        return dict(HERE)

    monkeypatch.setattr(record, "environment", environment)
    record.save(a_record(measured()))
    backends = (proven("mine"), reference.BACKEND)
    for m in range(1024, 1034):
        select(backends, PROBLEM._replace(m=m))
        select(backends, PROBLEM._replace(m=m), backward=True)
    assert asked == ["cpu"]


def test_every_kernel_backend_needs_a_proof() -> None:
    assert [b.name for b in BACKENDS if b.why_not_auto is None] == ["reference"]
    gpu = Problem(1024, 4096, 4096, 16)
    for backend in BACKENDS[:-1]:
        assert backend.unproven(gpu) is not None


def test_info_says_what_is_proven(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "environment", lambda device_type: dict(HERE))
    info.main([])
    assert "triton: it has not been tried on this machine: python -m" in capsys.readouterr().out
    verdicts = {
        "triton": Verdict(record.RIGHT, "", 88, 0.61, (measured(), measured(time_us=200))),
        "cuda": Verdict(record.HUNG, "speed forward: no end within 60 s"),
    }
    record.save(Record(HERE, verdicts, "2026-11-25T12:00:00+00:00"))
    choose.forget()
    info.main([])
    report = capsys.readouterr().out
    assert "triton: proven on 2026-11-25: right in 88 checks, largest error 0.61" in report
    assert "1.45 x the time of plain PyTorch (median)" in report
    assert "on 1 of 2 sizes" in report
    assert "cuda: failed on 2026-11-25, hung: speed forward: no end within 60 s" in report
    assert "to try it anew: python -m lora_kernels.qualify --force" in report


def test_the_report_of_fuse_ends_with_what_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    report = pytest.importorskip("lora_kernels.peft.report")
    shown = report.Report(["layer"], {})
    assert str(shown).endswith("1 of 1 PEFT layers fused")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choose, "known", lambda device_type: f"untried: {choose.COMMAND}")
    *_, cuda, triton = str(shown).splitlines()
    assert cuda == "cuda: untried: python -m lora_kernels.qualify"
    assert triton == "triton: untried: python -m lora_kernels.qualify"


def test_the_choice_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a microsecond where nothing else runs; ten times that even under load."""
    monkeypatch.setattr(record, "environment", lambda device_type: dict(HERE))
    record.save(a_record(measured()))
    backends = (proven("mine"), reference.BACKEND)
    select(backends, PROBLEM)
    best = min(timeit.repeat(lambda: select(backends, PROBLEM), number=1000, repeat=20)) / 1000
    assert best < 10e-6
