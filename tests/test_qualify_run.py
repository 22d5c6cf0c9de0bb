"""The run: planted backends get the verdicts they deserve, and a budget is kept."""

import time
from typing import Any

import pytest
import torch
from qualified import CHILD, OPTIONS, PROBLEM, a_record, measured
from qualified import own_cache as own_cache

from lora_kernels.qualify import __main__ as command
from lora_kernels.qualify import choose, parent, record
from lora_kernels.qualify.checks import cases
from lora_kernels.qualify.parent import qualify
from lora_kernels.qualify.record import Verdict


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


PLANTED = {
    "wrong_in_one_element": (record.WRONG, "m=130"),
    "wrong_for_zero_rows": (record.WRONG, "rows of x and dy zero"),
    "wrong_for_odd_m": (record.WRONG, "y of Case(m=1, "),
    "nan_in_the_last_block_of_rows": (record.WRONG, "elements are not finite"),
    "wrong_da_under_dropout": (record.WRONG, "da of Case(m=67, n=131, k=89, r=5, "),
    "wrong_in_the_last_row_past_128": (record.WRONG, "y of Case(m=129, "),
    "wrong_db_under_dropout": (record.WRONG, "db of Case(m=67, n=131, k=89, r=5, "),
    "wrong_da_alone": (record.WRONG, "da of Case(m=40, n=50, k=60, r=8, "),
    "adding_anew": (record.WRONG, "dx is not the tensor it was to be added to"),
    "ignoring_what_is_there": (record.WRONG, "dx is not the tensor it was to be added to"),
    "adding_twice": (record.WRONG, "dx of Case(m=300, n=72, k=264, r=20, "),
    "another_da_in_one_of_20_calls": (record.WRONG, "da is not the same bit for bit"),
    "nan_to_zero": (record.WRONG, "y has nan elsewhere than PyTorch"),
    "writing_beside_y": (record.WRONG, "something was written beside a new tensor of (67, 131)"),
    "coming_late": (record.WRONG, "elements are not finite"),
    "leaking": (record.WRONG, "bytes are still held after 20 calls"),
    "changing_dy": (record.WRONG, "dy was written to"),
    "crashing_at_import": (record.CRASHED, "asked what it can run: signal SIGSEGV"),
    "flooding": (record.CRASHED, "spam the last words"),
    "wrong_in_company": (record.WRONG, "bit for bit side by side"),
    "without_db_in_company": (record.WRONG, "db is missing in one of two calls"),
    "returning_part_of_a_buffer": (record.WRONG, "a result is not contiguous"),
    "returning_x": (record.WRONG, "a result shares memory with an operand"),
    "keeping_one_buffer": (record.WRONG, "y of two calls is in the same memory"),
    "changing_x": (record.WRONG, "x was written to"),
    "changing_the_default_dtype": (record.WRONG, "it changes the default dtype"),
    "seeding": (record.WRONG, "it changes the random state"),
    "changing_determinism": (record.WRONG, "it changes the deterministic mode"),
    "raising": (record.CRASHED, "RuntimeError: CUDA error: an illegal memory access"),
    "failing_import": (record.CRASHED, "ImportError: libsomething.so.4"),
    "exiting": (record.CRASHED, "exit status 0"),
    "aborting": (record.CRASHED, "SIGABRT"),
    "aborting_with_a_survivor": (record.CRASHED, "SIGABRT"),
    "chatty": (record.RIGHT, ""),
    "slow_backward": (record.RIGHT, ""),
    "fast": (record.RIGHT, ""),
}


@pytest.fixture(scope="module")
def beside_one_another() -> dict[str, Verdict]:
    """What became of all of them in one qualification."""
    return verdicts(",".join(PLANTED))


@pytest.mark.parametrize("name", PLANTED)
def test_each_gets_the_verdict_it_deserves(
    name: str, beside_one_another: dict[str, Verdict]
) -> None:
    found, (outcome, detail) = beside_one_another[name], PLANTED[name]
    assert found.outcome == outcome, found
    assert detail in found.detail
    assert len(found.measured) == 2 * (outcome == record.RIGHT)


def test_slow_in_one_direction_is_slow_in_that_one_alone(
    beside_one_another: dict[str, Verdict],
) -> None:
    measured = {m.backward: m for m in beside_one_another["slow_backward"].measured}
    assert measured[True].x_composition > 2 * measured[False].x_composition
    assert measured[True].slower


def test_a_survivor_of_the_child_costs_no_time() -> None:
    """It holds the pipe for 15 seconds; who waited for the pipe's end would not be done by then."""
    start = time.monotonic()
    found = verdicts("aborting_with_a_survivor")
    assert "SIGABRT" in found["aborting_with_a_survivor"].detail
    assert time.monotonic() - start < 14


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


def test_a_backend_that_hangs_or_closes_the_pipe_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parent, "START_S", 40.0)
    names = ("hanging_at_import", "hanging_backward", "closing_all_files_and_hanging", "right")
    found = verdicts(",".join(names), limit_s=5.0)
    assert [found[name].outcome for name in names] == [record.HUNG] * 3 + [record.RIGHT]
    assert found[names[0]].detail == "asked what it can run: no end within 40 s"
    assert "dropout_p=0.3" in found[names[1]].detail


def test_a_child_that_starts_slowly_is_waited_for_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, child = OPTIONS._replace(limit_s=2.0), (*CHILD, "right,starting_slowly")
    found = qualify(options, child=child, wanted=lambda environment, steps: [steps[0][:2]])
    assert found is not None
    assert found.backends["right"].checks == 1
    monkeypatch.setattr(parent, "START_S", 0.5)
    with pytest.raises(RuntimeError, match="nothing can be tried: signal SIGKILL"):
        qualify(options, child=child)


def test_a_clock_that_jumps_gives_no_time_and_costs_no_verdict() -> None:
    found = verdicts("right,under_a_wild_clock")["right"]
    assert (found.outcome, found.measured, found.timed) == (record.RIGHT, (), ())


def test_a_device_that_is_lost_ends_it() -> None:
    """Each new child would be refused, for ever."""
    whole = qualify(OPTIONS, child=(*CHILD, "aborting,right,losing_the_device"))
    assert whole is not None
    assert whole.backends["aborting"].outcome == record.CRASHED
    left = whole.backends["right"]
    assert left.outcome == record.UNTRIED
    assert "a new child could not begin (exit status 3: there is no CUDA device here)" in (
        left.detail
    )


def test_a_child_that_never_leaves_costs_no_verdict() -> None:
    found = verdicts("fast,lingering", limit_s=10.0)["fast"]
    assert found.outcome == record.RIGHT
    assert len(found.measured) == 2


def test_no_check_begins_beyond_the_budget_and_without_it_there_is_no_verdict() -> None:
    start = time.monotonic()
    whole = qualify(OPTIONS, 8.0, child=(*CHILD, "dawdling"))
    assert whole is not None
    assert time.monotonic() - start < 8 + 60  # and the child's start
    found = whole.backends["dawdling"]
    assert found.outcome == record.UNTRIED
    assert found.detail.startswith("the budget ended")
    assert record.from_json(whole.to_json()) == whole
    assert "the budget ended" in (choose.judge(whole, "dawdling", PROBLEM, False) or "")


class Clock:
    """The real one, until someone puts it forward."""

    ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def test_timings_beyond_the_budget_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(parent, "time", clock)
    timings: list[str] = []

    def progress(done: int, total: int, name: str) -> None:
        if " speed " in name:
            timings.append(name)
            clock.ahead = 1e6 * (len(timings) > 3)

    shapes = ((64, 128), (72, 128))
    options = OPTIONS._replace(shapes=shapes, tokens=(16, 32), seconds=0.0)
    whole = qualify(options, 1e5, progress, (*CHILD, "fast,slow"))
    for name, verdict in whole.backends.items():
        assert verdict.outcome == record.RIGHT
        assert verdict.checks > 20
        expected = {"fast": (2, 6), "slow": (1, 7)}[name]
        assert (len(verdict.measured), len(verdict.unreached)) == expected
        assert set(verdict.unreached).isdisjoint(verdict.timed)
    # In turns, and the most tokens first.
    assert {m.m for v in whole.backends.values() for m in v.measured} == {32}
    lines = list(command.table(whole))
    assert "6 more were not reached in the budget" in lines[0]
    assert sum("not reached: speed" in line for line in lines) == 13
    assert record.from_json(whole.to_json()) == whole


def test_most_tokens_come_first_and_then_what_was_named_first() -> None:
    options = command._options(command._parser().parse_args(["--rank", "64", "8"]))
    listed = list(cases(options))
    sizes = [(-case.m, case.adapter_dtype is not None, -case.r) for case in listed]
    assert sizes == sorted(sizes)
    assert [(case.n, case.k) for case in listed[:4]] == list(command.MODELS["llama-3.1-8b"])


def test_a_budget_too_small_for_the_checks_takes_no_proof_away() -> None:
    proven = a_record(measured())
    cut = a_record(outcome=record.UNTRIED)
    assert command.merged(proven, cut).backends == proven.backends
    assert command.merged(cut, proven).backends == proven.backends


def test_a_child_that_cannot_begin_is_an_error_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match=r"nothing can be tried.*KeyError: 'no_such_backend'"):
        qualify(OPTIONS, child=(*CHILD, "no_such_backend"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err
