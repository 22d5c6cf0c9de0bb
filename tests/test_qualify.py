"""Qualification: planted backends get the verdicts they deserve, and "auto" obeys records."""

import dataclasses
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels import info
from lora_kernels.dispatch import Backend, select
from lora_kernels.ops.lora_linear import BACKENDS, Problem, reference
from lora_kernels.qualify import __main__ as command
from lora_kernels.qualify import choose, record
from lora_kernels.qualify.checks import Options
from lora_kernels.qualify.parent import listed, qualify
from lora_kernels.qualify.record import Measured, Record, Unreadable, Verdict
from lora_kernels.testing import fp32

CHILD = (sys.executable, str(Path(__file__).parent / "planted_child.py"))
OPTIONS = Options(
    ((64, 128),), (32,), (8,), ("float32",), (0.0,), "cpu", seconds=0.05, limit_s=20.0
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep records in a folder of the test's own, and on the CPU."""
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORA_KERNELS_RECORD", raising=False)
    monkeypatch.setattr(choose, "KEPT_FOR", ("cpu",))
    choose.forget()
    yield
    choose.forget()


# --- Verdicts on planted backends -----------------------------------------------------------------


def verdicts(names: str, **changes: Any) -> dict[str, Verdict]:
    found = qualify(OPTIONS._replace(**changes), child=(*CHILD, names))
    return dict(found.backends)


def test_right_slow_and_out_of_memory_are_told_apart() -> None:
    found = verdicts("fast,slow,out_of_memory,cpu_out_of_memory")
    assert {verdict.outcome for verdict in found.values()} == {record.RIGHT}
    assert found["fast"].checks > 20
    assert 0 < found["fast"].worst_error <= 1
    assert len(found["fast"].measured) == 2
    assert not any(measured.slower for measured in found["fast"].measured)
    assert next(m for m in found["slow"].measured if not m.backward).slower
    # Too little memory is no verdict: one check fewer, and nothing against the backend.
    for name in ("out_of_memory", "cpu_out_of_memory"):
        assert found[name].checks == found["slow"].checks - 1


@pytest.mark.parametrize(
    ("name", "outcome", "detail"),
    [
        ("wrong_in_one_element", record.WRONG, "m=130"),
        ("wrong_for_zero_rows", record.WRONG, "rows of x and dy zero"),
        ("wrong_in_company", record.WRONG, "bit for bit"),
        ("raising", record.CRASHED, "RuntimeError: CUDA error: an illegal memory access"),
        ("aborting", record.CRASHED, "SIGABRT"),
    ],
)
def test_a_defect_gets_its_verdict_and_the_rest_goes_on(
    name: str, outcome: str, detail: str
) -> None:
    found = verdicts(f"{name},fast")
    assert found[name].outcome == outcome
    assert detail in found[name].detail
    assert not found[name].measured
    assert found["fast"].outcome == record.RIGHT
    assert len(found["fast"].measured) == 2


def test_a_time_without_a_check_proves_nothing() -> None:
    found = verdicts("always_out_of_memory")["always_out_of_memory"]
    assert (found.outcome, found.checks) == (record.UNTRIED, 0)


def test_leaving_between_two_steps_is_a_crash() -> None:
    found = verdicts("leaving,fast")
    assert found["leaving"].outcome == record.CRASHED
    assert "ended before it, exit status 0" in found["leaving"].detail
    assert found["fast"].outcome == record.RIGHT


def test_what_failed_once_is_not_made_right_by_other_sizes() -> None:
    wrong, right = (a_record(measured(), outcome=o) for o in (record.WRONG, record.RIGHT))
    for old, new in ((wrong, right), (right, wrong)):
        assert command.merged(old, new).backends["mine"].outcome == record.WRONG


def test_a_hang_costs_its_limit_and_has_a_name() -> None:
    found = verdicts("hanging,fast", limit_s=5.0)
    assert found["hanging"].outcome == record.HUNG
    assert "dropout_p=0.3" in found["hanging"].detail
    assert "no end within 5 s" in found["hanging"].detail
    assert found["fast"].outcome == record.RIGHT


def test_a_child_that_never_leaves_costs_no_verdict() -> None:
    found = verdicts("fast,lingering", limit_s=10.0)["fast"]
    assert found.outcome == record.RIGHT
    assert len(found.measured) == 2


def test_a_budget_cuts_timings_and_never_checks() -> None:
    found = qualify(OPTIONS, 0.0, child=(*CHILD, "fast")).backends["fast"]
    assert found.outcome == record.RIGHT
    assert found.checks > 20
    assert found.measured == ()


def test_a_child_that_cannot_begin_is_an_error_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match=r"nothing can be tried.*KeyError: 'no_such_backend'"):
        qualify(OPTIONS, child=(*CHILD, "no_such_backend"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err


# --- The command ----------------------------------------------------------------------------------

ARGUMENTS = [
    *("--device", "cpu", "--shapes", "64,128", "--tokens", "32", "--rank", "8"),
    *("--dtype", "float32", "--dropout", "0"),
]


def test_the_command_keeps_what_it_found_and_asks_no_second_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    child = (*CHILD, "fast,wrong_for_zero_rows")
    assert command.main([*ARGUMENTS, "--json"], child) == 1
    first = record.from_json(capsys.readouterr().out)
    assert command.main(ARGUMENTS, child) == 1  # from the record: the same times
    table = capsys.readouterr().out
    assert "fast: right in" in table
    assert "wrong_for_zero_rows: wrong: " in table
    assert f"{first.backends['fast'].measured[0].time_us:.1f} us" in table
    here, _ = listed(OPTIONS, child)
    assert record.find(here) == first
    # Another size is measured beside what is known.
    other = [*ARGUMENTS[:2], "--shapes", "72,128", *ARGUMENTS[4:]]
    for arguments, expected in ((other, {64, 72}), ([*other, "--force"], {72})):
        command.main(arguments, child)
        kept = record.find(here)
        assert isinstance(kept, Record)
        verdict = kept.backends["fast"]
        assert {m.n for m in verdict.measured} == expected, record.summary(verdict)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "--model must be a config.json or one of"),
        (["--model", __file__], "is no decoder's config.json"),
        (["--backend", "foo"], "--backend must be one of cuda, triton, got 'foo'"),
        (["--device", "cpu"], "no kernel backend can run here"),
    ],
)
def test_a_bad_model_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_shapes_of_a_config(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    fields = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
    config.write_text(json.dumps(fields | {"num_key_value_heads": 2}))
    assert command.shapes_of(config) == [(64, 64), (32, 64), (192, 64), (64, 192)]
    config.write_text(json.dumps(fields | {"head_dim": 32}))
    assert command.shapes_of(config) == [(128, 64), (64, 128), (192, 64), (64, 192)]


def test_nowhere_to_write_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    assert command.main([*ARGUMENTS, "--budget", "0"], (*CHILD, "fast")) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


# --- Records --------------------------------------------------------------------------------------

HERE = {"lora_kernels": "1", "kernels": "k", "device": "cpu", "name": "x", "arch": 90,
        "triton": "3.9.0", "extension": "e", "torch": "2"}  # fmt: skip


def measured(**changes: Any) -> Measured:
    usual = Measured(1024, 4096, 4096, 16, "float32", "float32", False, False, 90, 100, 80, 0.01)
    return dataclasses.replace(usual, **changes)


def a_record(*sizes: Measured, outcome: str = record.RIGHT, **environment: Any) -> Record:
    verdict = Verdict(outcome, "why" if outcome != record.RIGHT else "", 7, 0.5, sizes)
    return Record({**HERE, **environment}, {"mine": verdict}, "2026-11-25T12:00:00+00:00")


def test_a_record_survives_the_file() -> None:
    kept = a_record(measured(), measured(m=1, x_graph=0.8))
    path = record.save(kept)
    assert record.find(HERE) == kept
    assert path.parent == record.folder()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: "\0\1\2",
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace('"name": "x"', '"name": "y"'),
        lambda text: text.replace('"m": 1024', '"m": "1024"'),
        lambda text: text.replace('"checks": 7', '"checks": 7, "more": 1'),
        lambda text: text.replace('"created"', '"born"'),
        lambda text: "[" * 100_000,
        lambda text: text.replace('"time_us": 90', '"time_us": NaN'),
        lambda text: text.replace('"composition_us": 100', '"composition_us": 0'),
        lambda text: text.replace('"frozen_us": 80', '"frozen_us": 0.0'),
        lambda text: text.replace('"n": 4096', '"n": 1' + 400 * "0"),
        lambda text: text.replace('"x_graph": null', '"x_graph": "fast"'),
    ],
)
def test_a_spoilt_file_is_a_miss_with_a_reason(spoil: Any) -> None:
    path = record.save(a_record(measured()))
    path.write_text(spoil(path.read_text()))
    found = record.find(HERE)
    assert isinstance(found, str)
    assert str(path) in found
    assert "\n" not in found
    with pytest.raises(Unreadable):
        record.from_json(path.read_text())


def test_a_record_of_another_environment_is_not_found() -> None:
    record.save(a_record(measured()))
    for key in HERE:
        assert isinstance(record.find({**HERE, key: "another"}), str), key


def test_a_record_under_another_environment_s_name_is_a_miss() -> None:
    path = record.save(a_record(measured()))
    record.save(a_record(measured(), name="another"), path)
    assert "of another environment" in str(record.find(HERE))


def test_two_writers_at_once_leave_a_whole_record() -> None:
    records = [a_record(*[measured(m=m + 1)] * 50) for m in range(8)]
    threads = [threading.Thread(target=record.save, args=(r,)) for r in records for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert record.find(HERE) in records
    assert [path.suffix for path in record.folder().iterdir()] == [".json"]


def test_no_home_is_a_miss_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LORA_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert "there is no cache folder" in str(record.find(HERE))
    with pytest.raises(RuntimeError):
        record.save(a_record())


def test_a_shipped_record_serves_the_same_kernels_on_the_same_kind_of_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "SHIPPED", tmp_path)
    shipped = a_record(measured(), name="another of the kind", torch="3", triton="3.9.7")
    record.save(dataclasses.replace(shipped), tmp_path / "h100.json")
    assert record.find(HERE) == shipped
    for key, value in {"kernels": "other", "arch": 80, "triton": "3.6.0"}.items():
        assert isinstance(record.find({**HERE, key: value}), str)
    compiled = Record(shipped.environment, {"cuda": Verdict(record.RIGHT)}, "")
    record.save(compiled, tmp_path / "h100.json")
    assert record.find({**HERE, "extension": "another build"}) == Record(
        shipped.environment, {}, ""
    )
    own = a_record(measured(m=2))
    record.save(own)
    assert record.find(HERE) == own


def test_a_pinned_record_serves_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pinned.json"
    monkeypatch.setenv("LORA_KERNELS_RECORD", str(path))
    with pytest.raises(RuntimeError, match="LORA_KERNELS_RECORD="):
        record.find(HERE)
    pinned = a_record(measured(), torch="another torch")
    record.save(pinned, path)
    assert record.find(HERE) == pinned
    with pytest.raises(RuntimeError, match="is for arch 90, this is 80"):
        record.find({**HERE, "arch": 80})


# --- The choice -----------------------------------------------------------------------------------

PROBLEM = Problem(1024, 4096, 4096, 16, fp32, fp32, "cpu", None)


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


def proven(name: str) -> Backend:
    def why_not_auto(problem: Problem, backward: bool) -> str | None:
        return choose.why_not_auto(name, problem, backward)

    return reference.BACKEND._replace(name=name, why_not_auto=why_not_auto)


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


def test_the_kernels_digest_follows_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = record.environment("cpu")
    json.dumps(before)
    shutil.copytree(record.PACKAGE, tmp_path / "package")
    monkeypatch.setattr(record, "PACKAGE", tmp_path / "package")
    record._digest_of_files.cache_clear()
    assert record.environment("cpu") == before
    for name in ("config.py", "operands.py", "triton/forward_kernel.py"):
        with (tmp_path / "package/ops/lora_linear" / name).open("a") as source:
            source.write("# changed\n")
        record._digest_of_files.cache_clear()
        after = record.environment("cpu")
        assert after["kernels"] != before["kernels"], name
        before = after
    record._digest_of_files.cache_clear()


def test_every_kernel_backend_needs_a_proof() -> None:
    assert [b.name for b in BACKENDS if b.why_not_auto is None] == ["reference"]
    gpu = Problem(1024, 4096, 4096, 16)
    for backend in BACKENDS[:-1]:
        assert backend.unproven(gpu) is not None


def test_info_says_what_is_proven(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "environment", lambda device_type: dict(HERE))
    info.main()
    assert "triton: it has not been tried on this machine: python -m" in capsys.readouterr().out
    verdicts = {
        "triton": Verdict(record.RIGHT, "", 88, 0.61, (measured(), measured(time_us=200))),
        "cuda": Verdict(record.HUNG, "speed forward: no end within 60 s"),
    }
    record.save(Record(HERE, verdicts, "2026-11-25T12:00:00+00:00"))
    choose.forget()
    info.main()
    report = capsys.readouterr().out
    assert "triton: 2026-11-25: right in 88 checks, largest error 0.61" in report
    assert "on 1 of 2 sizes" in report
    assert "cuda: 2026-11-25: hung: speed forward: no end within 60 s" in report


def test_the_report_of_fuse_ends_with_what_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    report = pytest.importorskip("lora_kernels.peft.report")
    shown = report.Report(["layer"], {})
    assert str(shown).endswith("1 of 1 PEFT layers fused")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choose, "known", lambda device_type: f"untried: {choose.COMMAND}")
    *_, cuda, triton = str(shown).splitlines()
    assert cuda == "cuda: untried: python -m lora_kernels.qualify"
    assert triton == "triton: untried: python -m lora_kernels.qualify"


# --- Ranks ----------------------------------------------------------------------------------------


class Group:
    """As much of a process group as `choose` asks for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = torch.distributed.HashStore()
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        c10d = torch.distributed.distributed_c10d
        monkeypatch.setattr(c10d, "_get_default_store", lambda: self.store)


def test_ranks_use_the_record_of_the_one_that_asked_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Group(monkeypatch)
    monkeypatch.setattr(record, "environment", lambda device_type: dict(HERE))
    record.save(a_record(measured()))
    first = choose.known("cpu")
    choose.forget()  # a second rank, with a cache of its own
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "another node"))
    assert choose.known("cpu") == first
    choose.forget()  # a third, with another record
    record.save(a_record(measured(time_us=300)))
    assert choose.known("cpu") == first
    choose.forget()  # a fourth, on another GPU
    monkeypatch.setattr(record, "environment", lambda device_type: {**HERE, "name": "other"})
    with pytest.raises(RuntimeError, match=r"name is 'other' here.*LORA_KERNELS_RECORD"):
        choose.known("cpu")


def test_a_choice_from_before_the_group_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "environment", lambda device_type: dict(HERE))
    record.save(a_record(measured(), outcome=record.WRONG))
    other_rank = a_record(measured())
    backends = (proven("mine"), reference.BACKEND)
    assert select(backends, PROBLEM).name == "reference"
    group = Group(monkeypatch)
    group.store.compare_set("lora_kernels/record", "", other_rank.to_json())
    assert select(backends, PROBLEM._replace(m=1025)).name == "mine"
    assert select(backends, PROBLEM).name == "mine"


def test_ranks_agree_on_having_none(monkeypatch: pytest.MonkeyPatch) -> None:
    Group(monkeypatch)
    monkeypatch.setattr(record, "environment", lambda device_type: dict(HERE))
    assert isinstance(choose.known("cpu"), str)
    choose.forget()
    record.save(a_record(measured()))
    assert "another rank has no record" in str(choose.known("cpu"))


def test_the_choice_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a microsecond where nothing else runs; ten times that even under load."""
    import timeit

    monkeypatch.setattr(record, "environment", lambda device_type: dict(HERE))
    record.save(a_record(measured()))
    backends = (proven("mine"), reference.BACKEND)
    select(backends, PROBLEM)
    best = min(timeit.repeat(lambda: select(backends, PROBLEM), number=1000, repeat=20)) / 1000
    assert best < 10e-6
    assert os.environ["LORA_KERNELS_CACHE"]
