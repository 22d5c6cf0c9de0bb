"""The command: what it keeps, what it asks again, and what it says where it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
from qualified import CHILD, a_record, measured
from qualified import own_cache as own_cache

from lora_kernels.qualify import __main__ as command
from lora_kernels.qualify import record
from lora_kernels.qualify.record import Record, Verdict

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
    here = first.environment
    assert record.find(here) == first
    # Another size is measured beside what is known.
    other = [*ARGUMENTS[:2], "--shapes", "72,128", *ARGUMENTS[4:]]
    for arguments, expected in ((other, {64, 72}), ([*other, "--force"], {72})):
        command.main(arguments, child)
        kept = record.find(here)
        assert isinstance(kept, Record)
        verdict = kept.backends["fast"]
        assert {m.n for m in verdict.measured} == expected, record.summary(verdict)


def test_what_a_record_answers_is_not_tried_again() -> None:
    steps = [
        (backend, step, 1.0)
        for backend in ("right", "wrong", "whole", "cut", "new")
        for step in ("numbers: 1", "speed: 1", "speed: 2")
    ]
    known = Record(
        {},
        {
            "right": Verdict(record.RIGHT, timed=("speed: 1",)),
            "wrong": Verdict(record.WRONG, "why"),
            "whole": Verdict(record.RIGHT, timed=("speed: 1", "speed: 2")),
            "cut": Verdict(record.UNTRIED, timed=("speed: 1",)),
        },
    )
    everything = [step[:2] for step in steps]
    assert command.unanswered(None, steps) == everything
    again = [
        *[("right", "numbers: 1"), ("right", "speed: 2")],
        *[key for key in everything if key[0] in ("cut", "new")],
    ]
    assert command.unanswered(known, steps) == again


def test_the_reader_is_told_how_to_go_on() -> None:
    def told(verdict: Verdict) -> list[str]:
        return list(command.advice(Record({}, {"mine": verdict}), "--rank 8"))

    again = "python -m lora_kernels.qualify --rank 8"
    assert told(Verdict(record.RIGHT)) == []
    cut = Verdict(record.RIGHT, unreached=("speed: 1",))
    assert told(cut) == [f"to go on with the 1 steps that were not reached: {again}"]
    sooner = Verdict(record.UNTRIED, unreached=("numbers: 1", "speed: 1"))
    assert told(sooner)[0].endswith(f"not reached: {again} --budget 300")
    assert told(Verdict(record.HUNG)) == [f"to try again what hung or crashed: {again} --force"]


def test_what_cannot_be_kept_is_shown_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(found: Record) -> Path:
        raise OSError("No space left on device")

    monkeypatch.setattr(command, "qualify", lambda *_: a_record(measured()))
    monkeypatch.setattr(record, "save", full)
    assert command.main([]) == 2
    said = capsys.readouterr()
    assert "mine: right in 7 checks" in said.out
    assert said.err == "lora_kernels.qualify: it could not be kept: No space left on device\n"


def test_what_another_run_kept_meanwhile_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def two_at_once(*arguments: Any) -> Record:
        record.save(a_record(measured(m=1)))
        return a_record(measured(m=2))

    monkeypatch.setattr(command, "qualify", two_at_once)
    for arguments, expected in (([], {1, 2}), (["--force"], {2})):
        assert command.main(arguments) == 0
        kept = record.find(a_record().environment)
        assert isinstance(kept, Record)
        assert {m.m for m in kept.backends["mine"].measured} == expected
    assert "kept in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model nothing", "--model must be a config.json or one of"),
        (f"--model {__file__}", "is no decoder's config.json"),
        ("--backend foo", "--backend must be one of cuda, triton, got 'foo'"),
        ("--device cpu", "no kernel backend can run here"),
        ("--device foo", "argument --device: must be cuda, cuda:N or cpu, got 'foo'"),
        ("--device cuda:x", "must be cuda, cuda:N or cpu"),
        ("--device meta", "must be cuda, cuda:N or cpu"),
        ("--shapes 5", "argument --shapes: must be N,K, two positive numbers, got '5'"),
        ("--shapes 0,5", "argument --shapes: must be a positive whole number, got '0'"),
        ("--shapes 1,2,3", "must be a positive whole number, got '2,3'"),
        ("--shapes", "argument --shapes: expected at least one argument"),
        ("--budget nan", "argument --budget: must be a number of seconds, got 'nan'"),
        ("--budget -1", "must be a number of seconds, got '-1'"),
        ("--budget soon", "must be a number, got 'soon'"),
        ("--rank 0", "argument --rank: must be a positive whole number, got '0'"),
        ("--rank 1.5", "must be a positive whole number"),
        ("--tokens -3", "must be a positive whole number"),
        ("--dropout 1", "argument --dropout: must be at least 0 and below 1, got '1'"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_a_bad_argument_is_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = command.main(arguments.split())
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("lora_kernels.qualify: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_the_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    assert "Exit status" in capsys.readouterr().out
    assert all(action.help for action in command._parser()._actions)


def test_an_interruption_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "qualify", interrupted)
    assert command.main([]) == 130
    assert capsys.readouterr().err == "lora_kernels.qualify: interrupted, nothing of it is kept\n"


def test_the_shapes_of_a_config(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    fields = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
    config.write_text(json.dumps(fields | {"num_key_value_heads": 2}))
    assert command.shapes_of(config) == [(64, 64), (32, 64), (192, 64), (64, 192)]
    assert command._options(command._parser().parse_args(["--model", str(tmp_path)])).shapes == (
        *((64, 64), (32, 64), (192, 64), (64, 192)),
    )
    config.write_text(json.dumps(fields | {"head_dim": 32}))
    assert command.shapes_of(config) == [(128, 64), (64, 128), (192, 64), (64, 192)]


def test_nowhere_to_write_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    assert command.main(ARGUMENTS, (*CHILD, "fast")) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
