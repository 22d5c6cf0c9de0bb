"""How long a backend takes on this machine, beside the composition and the bare frozen layer."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import reference
from lora_kernels.ops.lora_linear.problem import short
from lora_kernels.testing import Case, Inputs, make_inputs

LEAST_ROUNDS, MOST_ROUNDS = 7, 60
SAMPLE_S = 1e-3  # of calls in a row, timed as one
_AGAIN = "composition again"

Calls = Mapping[str, Callable[[], object]]


def measure(
    backend: Backend, case: Case, backward: bool, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Return the fields of `record.Measured`: medians of interleaved rounds, host time included.

    The composition is the reference backend: `x·Wᵀ` and `addmm_`. It is timed twice in each round;
    how far its two medians are apart is the noise.
    """
    inputs = make_inputs(case, device)
    calls = {
        "ours": _direction(backend, case, inputs, backward),
        "composition": _direction(reference.BACKEND, case, inputs, backward),
        _AGAIN: _direction(reference.BACKEND, case, inputs, backward),
        "frozen": _frozen(inputs, backward),
    }
    times = interleaved(calls, device, seconds)
    name, adapters = short(case.dtype), short(case.adapter_dtype or case.dtype)
    return {
        **{"m": case.m, "n": case.n, "k": case.k, "r": case.r},
        **{"dtype": name, "adapter_dtype": adapters, "dropout": case.dropout_p > 0},
        "backward": backward,
        "time_us": 1e6 * times["ours"],
        "composition_us": 1e6 * times["composition"],
        "frozen_us": 1e6 * times["frozen"],
        "noise": abs(times[_AGAIN] / times["composition"] - 1),
        "x_graph": _in_graphs(calls, device, seconds),
    }


def interleaved(calls: Calls, device: torch.device, seconds: float) -> dict[str, float]:
    """Return the median seconds of each call, all taking turns in random order for `seconds`."""
    for call in calls.values():  # compile, allocate
        call()
    once = max(_sample(call, 1, device) for call in calls.values())
    repeats = max(1, min(round(SAMPLE_S / max(once, 1e-9)), 200))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle, start = list(calls), random.Random(0).shuffle, time.perf_counter()
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for name in order:
            samples[name].append(_sample(calls[name], repeats, device))
    return {name: statistics.median(times) for name, times in samples.items()}


def _sample(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def _direction(
    backend: Backend, case: Case, inputs: Inputs, backward: bool
) -> Callable[[], object]:
    if not backward:
        forward = inputs.forward(case)
        return lambda: backend.forward(forward)
    _, p = reference.forward(inputs.forward(case))
    call = inputs.backward(case, p)
    return lambda: backend.backward(call)


def _frozen(inputs: Inputs, backward: bool) -> Callable[[], object]:
    if backward:
        return lambda: torch.mm(inputs.dy, inputs.weight)
    return lambda: F.linear(inputs.x, inputs.weight, inputs.bias)


def _in_graphs(calls: Calls, device: torch.device, seconds: float) -> float | None:
    """Return ours over the composition when both are replayed, None off CUDA."""
    if device.type != "cuda":
        return None
    replays = {}
    for name in ("ours", "composition"):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls[name]()
        replays[name] = graph.replay
    times = interleaved(replays, device, seconds)
    return times["ours"] / times["composition"]


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing in flight."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
