"""The run: planted backends get the verdicts they deserve, from the child to the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qualified import CHILD, OPTIONS, a_record, measured
from qualified import own_cache as own_cache

from lora_kernels.qualify import __main__ as command
from lora_kernels.qualify import record
from lora_kernels.qualify.parent import listed, qualify
from lora_kernels.qualify.record import Record, Verdict

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
