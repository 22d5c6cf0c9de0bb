"""Binds the protocol to pytest-benchmark: options, selection, one row per test, machine facts."""

import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import DIRECTIONS, TABLES, BenchCase
from bench.measure import OUT_OF_TIME, Row, attempt, measure, unmeasured
from bench.providers import AGAIN, FROZEN, PROVIDERS
from bench.results import machine

Rows = dict[tuple[str, str], Row]
_UNTIMED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    table = "gpu" if torch.cuda.is_available() else "cpu"
    group.addoption("--table", default=table, choices=sorted(TABLES), help="which cases")
    group.addoption("--seconds", type=float, default=1.0, help="timing per case and direction")
    group.addoption("--budget", type=float, default=float("inf"), help="seconds for the whole run")
    group.addoption("--isolated", help="measure this peer, and the frozen layer, alone")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_UNTIMED] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench_case" in metafunc.fixturenames:
        alone = metafunc.config.getoption("--isolated")
        rows = [
            (case, direction, provider)
            for case in TABLES[metafunc.config.getoption("--table")]
            for direction in DIRECTIONS
            for provider in PROVIDERS
            if (alone is None and (provider.package is None or not provider.installed))
            or (alone is not None and (provider.frozen or provider.name == alone))
        ]
        ids = [f"{case.name}-{direction}-{provider.name}" for case, direction, provider in rows]
        metafunc.parametrize(("bench_case", "direction", "provider"), rows, ids=ids)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where to measure."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def seconds(request: pytest.FixtureRequest) -> float:
    """Timing for each case and direction."""
    return request.config.getoption("--seconds")


@pytest.fixture(scope="session")
def out_of_time(request: pytest.FixtureRequest) -> Callable[[], bool]:
    """Whether the time of the whole run is spent: then the rest is reported as not measured."""
    deadline = time.monotonic() + request.config.getoption("--budget")
    return lambda: time.monotonic() > deadline


@pytest.fixture(scope="session")
def rows_of(
    request: pytest.FixtureRequest,
    device: torch.device,
    seconds: float,
    out_of_time: Callable[[], bool],
) -> Callable[[BenchCase], Rows]:
    """Measure a case once, for every direction and provider that was selected."""
    selected: defaultdict[str, set[str]] = defaultdict(set)
    for item in request.session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "bench_case" in params:
            names = selected[params["bench_case"].name]
            names |= {params["direction"], params["provider"].name, FROZEN, AGAIN}

    @functools.cache
    def rows(bench_case: BenchCase) -> Rows:
        names = selected[bench_case.name]
        directions = [direction for direction in DIRECTIONS if direction in names]
        providers = [provider for provider in PROVIDERS if provider.name in names]
        outcome: Rows | str = OUT_OF_TIME
        if not out_of_time():
            outcome = attempt(measure, bench_case, providers, directions, device, seconds)
        if isinstance(outcome, str):
            return unmeasured(bench_case, providers, directions, outcome)
        return outcome

    return rows


@pytest.fixture
def record(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture
) -> Callable[[str, Row, bool], None]:
    """Hand a row to pytest-benchmark, or report why it has no time."""

    def hand_over(group: str, row: Row, ours: bool) -> None:
        if row.reason is not None:
            benchmark.skipped = True  # it is reported here, and not by a warning
            request.config.stash[_UNTIMED].append(row.info | {"reason": row.reason})
            if row.reason.startswith("absent"):
                pytest.skip(row.reason)
            (pytest.fail if ours else pytest.xfail)(row.reason)
        benchmark.group = group
        benchmark.extra_info.update(row.info)
        _replay[:] = [tick for duration in reversed(row.seconds) for tick in (duration, 0.0)]
        benchmark.pedantic(lambda: None, rounds=len(row.seconds))

    return hand_over


# The launches of all providers were interleaved, before any of their tests ran. This clock plays
# their times back, so that statistics, storage and comparison remain pytest-benchmark's.
_replay: list[float] = []


def played_back() -> float:
    """Return the next reading of the clock."""
    return _replay.pop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=played_back))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Name what times depend on, and leave out what names the machine."""
    machine_info.pop("node", None)
    machine_info |= machine()


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    """Take the commit from COMMIT where the sources come without their history."""
    if commit := os.environ.get("COMMIT"):
        commit_info["id"] = commit


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    """Keep the rows without a time: absent, wrong and broken providers."""
    output_json["untimed"] = config.stash[_UNTIMED]
