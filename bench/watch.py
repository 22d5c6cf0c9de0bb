"""`python -m bench.watch [pytest's arguments]`: run tests so that a hang has a name and costs 30 s.

A hung kernel cannot be interrupted from Python. So pytest runs in processes of its own, with this
module as a plugin that keeps a journal and ends the process at the limit; a new process goes on
with the tests that have not begun. So it is after a crash, and after an error that leaves the CUDA
context unusable, which would fail every test that follows.
"""

import argparse
import faulthandler
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.process import JOBS, run

LIMIT_S = 30
STARTED, DONE, OVER = "started", "done", "over"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
NONE_LEFT = pytest.ExitCode.NO_TESTS_COLLECTED
PLUGINS = ("benchmark", "cacheprovider", "xdist")  # that these runs do without


def main(argv: list[str] | None = None) -> int:
    """Run the tests and print what failed, hung and crashed; the exit status is 1 if any did."""
    parser = argparse.ArgumentParser(prog="python -m bench.watch", description=__doc__)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds a test (default: 30)")
    parser.add_argument("--budget", type=float, default=600, help="seconds for all (default: 600)")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes side by side")
    options, arguments = parser.parse_known_args(argv)
    deadline = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        journals = [Path(folder, f"{i}.jsonl") for i in range(options.jobs)]
        shares = [f"{i}/{options.jobs}" for i in range(options.jobs)]
        work = partial(_work, arguments, deadline, options.limit)
        lost = [line for lines in pool.map(work, journals, shares) for line in lines]
        events = [event for journal in journals for event in _read(journal)]
    verdicts = {name: kind for kind, name, _ in events if kind in (PASSED, SKIPPED)}
    verdicts |= {name: kind for kind, name, _ in events if kind == FAILED}
    failed = [f"{FAILED}: {name}" for name, kind in verdicts.items() if kind == FAILED]
    counts = Counter(verdicts.values())
    print("", *failed, *lost, sep="\n")
    numbers = {**{kind: counts[kind] for kind in (PASSED, FAILED, SKIPPED)}, "lost": len(lost)}
    print(", ".join(f"{number} {kind}" for kind, number in numbers.items()))
    return int(bool(failed or lost) or not events)


def _work(
    arguments: list[str], deadline: float, limit_s: float, journal: Path, share: str
) -> list[str]:
    """Run a share of the tests in as many processes as it takes; return what was lost, and how."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--no-summary"]
    command += ["--continue-on-collection-errors", "-p", "bench.watch"]
    command += [word for plugin in PLUGINS for word in ("-p", f"no:{plugin}")]
    command += [f"--journal={journal}", f"--share={share}", f"--limit={limit_s}", *arguments]
    lost: list[str] = []
    while (left_s := deadline - time.monotonic()) > 0:
        known = _begun(journal)
        outcome = run(command, left_s, print)
        begun, events = _begun(journal), _read(journal)
        ended = {name for kind, name, _ in events if kind == DONE}
        if begun and begun[-1][0] not in ended:
            name, at = begun[-1]
            if time.time() - at >= limit_s:
                outcome = f"hung: more than {limit_s:g} s"
            elif time.monotonic() >= deadline:
                outcome = "out of time"
            elif outcome == "ok":
                outcome = "crashed: it ended its process"
            lost.append(f"{outcome}: {name}")
            _write(journal, DONE, name)
        elif events and events[-1][0] == OVER:
            return lost
        elif begun == known:
            return [*lost, f"{outcome}: pytest itself"]
    return [*lost, f"out of time: share {share}, with tests that were not started"]


def _read(journal: Path) -> list[tuple[str, str, float]]:
    if not journal.exists():
        return []
    return [tuple(json.loads(line)) for line in journal.read_text().splitlines()]


def _begun(journal: Path) -> list[tuple[str, float]]:
    return [(name, at) for kind, name, at in _read(journal) if kind == STARTED]


def _write(journal: Path, kind: str, name: str) -> None:
    with journal.open("a") as file:
        file.write(json.dumps([kind, name, time.time()]) + "\n")


# --- The plugin -----------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("watch")
    group.addoption("--journal", type=Path, required=True)
    group.addoption("--share", required=True, help="i/n: the tests whose number is i modulo n")
    group.addoption("--limit", type=float, required=True, help="seconds a test")


def pytest_configure(config: pytest.Config) -> None:
    # What pytest captures of a test that does not end would be lost.
    config.stash[_STDERR] = os.fdopen(os.dup(2), "w")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = map(int, config.getoption("--share").split("/"))
    begun = {name for kind, name, _ in _read(config.getoption("--journal")) if kind == STARTED}
    items[:] = [item for item in items[index::count] if item.nodeid not in begun]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    journal, limit_s = (item.config.getoption(name) for name in ("--journal", "--limit"))
    _write(journal, STARTED, item.nodeid)
    faulthandler.dump_traceback_later(limit_s, exit=True, file=item.config.stash[_STDERR])
    result = yield
    faulthandler.cancel_dump_traceback_later()
    _write(journal, DONE, item.nodeid)
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            item.session.shouldstop = f"the CUDA context is lost: {error}"
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[pytest.TestReport]:
    report = yield
    if report.when == "call" or report.outcome != PASSED:
        _report(item.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[pytest.CollectReport]:
    report = yield
    if report.failed:
        _report(collector.config, report)
    return report


def _report(config: pytest.Config, report: pytest.TestReport | pytest.CollectReport) -> None:
    _write(config.getoption("--journal"), report.outcome, report.nodeid)
    if report.failed:  # now: this process may not live to print a summary
        text = f"\n{FAILED}: {report.nodeid}\n{report.longreprtext}"
        print(text, file=config.stash[_STDERR], flush=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, NONE_LEFT):
        _write(session.config.getoption("--journal"), OVER, "")


_STDERR = pytest.StashKey[Any]()

if __name__ == "__main__":
    sys.exit(main())
