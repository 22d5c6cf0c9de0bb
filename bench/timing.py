"""The protocol: launches of all calls interleaved, warm until the times settle, one time each.

On CUDA the time is the GPU's own, between two events: every round is queued behind a spinning
kernel, so that no launch waits for Python. A round whose backlog ran dry is thrown away.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

WINDOW, DRIFT = 5, 0.02  # settled: two windows of rounds whose medians differ by less than 2 %
MIN_ROUNDS, MAX_ROUNDS = 10, {"cpu": 1000, "cuda": 100}
MAX_BACKLOG_S = 0.05
_CYCLES_PER_S = 2e9  # of the spinning kernel, roughly


class Call(NamedTuple):
    """What is timed: `run(prepare(i))` for the i-th launch; only `run` counts."""

    prepare: Callable[[int], Any]
    run: Callable[[Any], object]


class Sample(NamedTuple):
    """Seconds of each round: of the device, and of the host until the launches were queued."""

    device: list[float]
    host: list[float]


def interleave(calls: Sequence[Call], device: torch.device, seconds: float) -> list[Sample]:
    """Time `calls` launch by launch in random order, for about `seconds` once settled."""
    clock = _CudaRound() if device.type == "cuda" else _cpu_round
    order, shuffle, launches = list(range(len(calls))), random.Random(0).shuffle, 0
    most = MAX_ROUNDS[device.type]

    def one_round() -> list[tuple[float, float]]:
        nonlocal launches
        shuffle(order)  # or each call would always run in the wake of the same other one
        times = dict(zip(order, clock([calls[i] for i in order], launches), strict=True))
        launches += len(calls)
        return [times[i] for i in range(len(calls))]

    gc.collect()
    gc.disable()
    try:
        _settle(one_round, seconds)
        rounds: list[list[tuple[float, float]]] = []
        start = time.perf_counter()
        while len(rounds) < MIN_ROUNDS or (
            len(rounds) < most and time.perf_counter() - start < seconds
        ):
            rounds.append(one_round())
    finally:
        gc.enable()
    return [Sample(*map(list, zip(*times, strict=True))) for times in zip(*rounds, strict=True)]


def _settle(one_round: Callable[[], list[tuple[float, float]]], seconds: float) -> None:
    """Run rounds for `seconds`, and on for up to three times as long until the times settle."""
    totals: list[float] = []
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < 3 * seconds:
        totals.append(sum(device_s for device_s, _ in one_round()))
        before, now = totals[-2 * WINDOW : -WINDOW], totals[-WINDOW:]
        if elapsed < seconds or len(before) < WINDOW:
            continue
        if abs(statistics.median(now) / statistics.median(before) - 1) < DRIFT:
            return


def _cpu_round(calls: Sequence[Call], launch: int) -> list[tuple[float, float]]:
    times = []
    for i, call in enumerate(calls):
        state = call.prepare(launch + i)
        start = time.perf_counter()
        result = call.run(state)
        elapsed = time.perf_counter() - start
        times.append((elapsed, elapsed))
        del state, result  # outside the timed region, as the allocator's work is not the call's
    return times


class _CudaRound:
    """One round on the current stream; remembers how long a backlog the host needed so far."""

    def __init__(self) -> None:
        self.backlog_s = 1e-3

    def __call__(self, calls: Sequence[Call], launch: int) -> list[tuple[float, float]]:
        while True:
            states = [call.prepare(launch + i) for i, call in enumerate(calls)]
            torch.cuda._sleep(int(self.backlog_s * _CYCLES_PER_S))
            slept = torch.cuda.Event()
            slept.record()
            marks, host = [], []
            for call, state in zip(calls, states, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                called = time.perf_counter()
                call.run(state)
                host.append(time.perf_counter() - called)
                end.record()
                marks.append((start, end))
            ran_dry = slept.query()
            torch.cuda.synchronize()
            if not ran_dry or self.backlog_s >= MAX_BACKLOG_S:
                device = [start.elapsed_time(end) * 1e-3 for start, end in marks]
                return list(zip(device, host, strict=True))
            self.backlog_s *= 2
