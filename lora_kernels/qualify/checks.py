"""The steps of a qualification: numbers first, then repeats and company, then speed.

A step is a name, a time limit and a function to run in the child; it returns the fields of its
outcome. What is wrong raises AssertionError.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from lora_kernels import testing
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import reference
from lora_kernels.ops.lora_linear.operands import Forward
from lora_kernels.ops.lora_linear.problem import arch
from lora_kernels.qualify.guard import guarded
from lora_kernels.qualify.timing import measure
from lora_kernels.testing import Case, Inputs, Results

SPEED = "speed"  # how the steps begin that a budget may cut
REPEATS = 20
NUMERIC_TOKENS = 1024  # enough for several blocks of rows of every tile


class Options(NamedTuple):
    """What a qualification covers: each (N, K) with each of the rest."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]
    dropouts: tuple[float, ...]
    device: str
    backends: tuple[str, ...] | None = None
    seconds: float = 0.1  # of timing for one direction of one size
    limit_s: float = 60.0  # of a step without progress; the first of a kind compiles


class Step(NamedTuple):
    """One thing to find out about a backend."""

    backend: str
    name: str
    limit_s: float
    run: Callable[[], dict[str, Any]]


def steps(options: Options, backends: Sequence[Backend]) -> list[Step]:
    """List the steps, the same in every process: backend by backend, numbers before speed."""
    device = torch.device(options.device)
    tried = [
        b
        for b in backends
        if b.why_not_auto is not None and (options.backends is None or b.name in options.backends)
    ]
    numbers = [
        Step(backend.name, name, options.limit_s, run)
        for backend in tried
        for listed in (_numbers, _company)
        for name, run in listed(options, guarded(backend), device)
    ]
    # In turns, so that a budget that ends leaves no backend behind.
    speed = [
        Step(backend.name, name, options.limit_s, run)
        for case in cases(options)
        for backend in tried
        for name, run in _speed(options, backend, case, device)
    ]
    return numbers + speed


def takes(backend: Backend, case: Case, device: torch.device) -> bool:
    """Return whether the backend supports a case on the device."""
    return backend.why_not(case.problem(device.type, arch(device))) is None


def cases(options: Options) -> Iterator[Case]:
    """Yield what the options span, the most tokens first: a budget may end anywhere."""
    for tokens in sorted(options.tokens, reverse=True):
        for dtype in (getattr(torch, name) for name in options.dtypes):
            adapters = (None, torch.float32) if dtype.itemsize < 4 else (None,)
            for adapter_dtype in adapters:
                for rank in options.ranks:
                    for dropout_p in options.dropouts:
                        for n, k in options.shapes:
                            yield Case(tokens, n, k, rank, dtype, adapter_dtype, False, dropout_p)


_Found = tuple[str, Callable[[], dict[str, Any]]]


def _numbers(options: Options, backend: Backend, device: torch.device) -> Iterator[_Found]:
    for case in testing.CASES:
        if takes(backend, case, device):
            yield f"numbers: {case}", partial(_error, backend, case, device)
    for case in testing.FROZEN_CASES:
        if takes(backend, case, device):
            yield f"B = 0: {case}", partial(_frozen, backend, case, device)
    for case in _company_cases(options, backend, device):
        for what, change in (("all", _zero_rows), ("half", _half_zero)):
            name = f"{what} rows of x and dy zero: {case}"
            yield name, partial(_error, backend, case, device, change)
        for value in (float("nan"), float("inf")):
            name = f"{value} in x and dy: {case}"
            yield name, partial(_non_finite, backend, case, device, value)
    for case in _spanned(options):
        if takes(backend, case, device):
            yield f"numbers: {case}", partial(_error, backend, case, device)
    far = Case(2**17 + 8, 2**14 + 8, 64, 8, torch.bfloat16)
    if device.type == "cuda" and takes(backend, far, device):
        yield "offsets past 2^31", partial(_far, backend, far, device)


def _spanned(options: Options) -> Iterator[Case]:
    """Yield what the options span, but for M: every (N, K) with many tokens, one with each M."""
    shape = options.shapes[0]
    many = min(max(options.tokens), NUMERIC_TOKENS)
    cut = (case._replace(m=min(case.m, many)) for case in cases(options))
    for case in dict.fromkeys(cut):
        if case.m == many or (case.n, case.k) == shape:
            yield case


def _company_cases(options: Options, backend: Backend, device: torch.device) -> Iterator[Case]:
    """Yield a few cases with several blocks of everything: one for each dtype, and dropout."""
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for dropout_p in (0.0, 0.3):
            case = Case(300, 520, 264, 24, dtype, None, True, dropout_p)
            if takes(backend, case, device):
                yield case


def _company(options: Options, backend: Backend, device: torch.device) -> Iterator[_Found]:
    ways = {
        "repeated": repeated,
        "side by side": side_by_side,
        "beside a busy device": beside_a_hog,
    }
    if device.type == "cuda":
        ways["in a graph"] = replayed
    for case in _company_cases(options, backend, device):
        for name, run in ways.items():
            yield f"bit for bit {name}: {case}", partial(run, backend, case, device)


def _speed(
    options: Options, backend: Backend, case: Case, device: torch.device
) -> Iterator[_Found]:
    if takes(backend, case, device):
        for backward, direction in enumerate(("forward", "backward")):
            run = partial(_measure, backend, case, bool(backward), device, options.seconds)
            yield f"{SPEED} {direction}: {case}", run


def _error(
    backend: Backend,
    case: Case,
    device: torch.device,
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> dict[str, Any]:
    return {"error": testing.check_backend(backend, case, device, change)}


def _frozen(backend: Backend, case: Case, device: torch.device) -> dict[str, Any]:
    testing.check_frozen(backend, case, device)
    return {}


def _non_finite(backend: Backend, case: Case, device: torch.device, value: float) -> dict[str, Any]:
    testing.check_non_finite(backend, case, value, device)
    return {}


def _measure(*arguments: Any) -> dict[str, Any]:
    return {"measured": measure(*arguments)}


# --- Inputs that random numbers never give --------------------------------------------------------


def _zero_rows(inputs: Inputs) -> Inputs:
    return inputs._replace(x=torch.zeros_like(inputs.x), dy=torch.zeros_like(inputs.dy))


def _half_zero(inputs: Inputs) -> Inputs:
    inputs.x[::2] = 0
    inputs.dy[1::2] = 0
    return inputs


def far_call(case: Case, device: torch.device | str) -> Forward:
    """Return a forward call so large that its dy would take the time and memory of the check."""
    tall = testing.make_inputs(case._replace(n=8), device).forward(case)
    wide = testing.make_inputs(case._replace(m=8), device)
    return tall._replace(weight=wide.weight, lora_b=wide.lora_b)


def _far(backend: Backend, case: Case, device: torch.device) -> dict[str, Any]:
    return {"error": check_far(backend, far_call(case, device))}


def check_far(backend: Backend, call: Forward) -> float:
    """Assert that the last rows of a y with more than 2³¹ elements are right; return the error."""
    y, _ = backend.forward(call)
    assert y.numel() > 2**31
    last = call._replace(x=call.x[-300:])
    x, weight, lora_a, lora_b, *others = last
    wide = (t.double() for t in (x, weight, lora_a, lora_b))
    exact, _ = reference.forward(Forward(*wide, *others))  # type: ignore[call-arg, arg-type]
    eager, _ = reference.forward(last)
    return testing.assert_accurate("the last rows of y", y[-300:], exact.cpu(), eager)


# --- Bit for bit: alone, in company, replayed -----------------------------------------------------


def repeated(backend: Backend, case: Case, device: torch.device) -> dict[str, Any]:
    """Run one call again and again; no memory may stay behind."""
    inputs = testing.make_inputs(case, device)
    first = testing.run_backend(backend, case, inputs)
    held = _allocated(device)
    for _ in range(REPEATS):
        _assert_same(testing.run_backend(backend, case, inputs), first)
    leaked = _allocated(device) - held
    assert leaked <= 0, f"{leaked} bytes are still held after {REPEATS} calls"
    return {}


def side_by_side(backend: Backend, case: Case, device: torch.device) -> dict[str, Any]:
    """Run two calls at once, from two threads on two streams, and each alone."""
    inputs = [testing.make_inputs(case, device, seed) for seed in (1, 2)]
    alone = [testing.run_backend(backend, case, each) for each in inputs]
    _synchronize(device)
    failed: list[BaseException] = []

    def work(each: Inputs, right: Results) -> None:
        try:
            with _stream(device):
                for _ in range(REPEATS):
                    _assert_same(testing.run_backend(backend, case, each), right)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return {}


def beside_a_hog(backend: Backend, case: Case, device: torch.device) -> dict[str, Any]:
    """Run a call while products of another stream or thread keep the device busy."""
    inputs = testing.make_inputs(case, device)
    alone = testing.run_backend(backend, case, inputs)
    _synchronize(device)
    stop = threading.Event()

    def hog() -> None:
        size = 4096 if device.type == "cuda" else 512
        with _stream(device):
            square = torch.ones(size, size, device=device)
            while not stop.is_set():
                for _ in range(10):
                    torch.mm(square, square)
                _synchronize(device)

    thread = threading.Thread(target=hog)
    thread.start()
    try:
        for _ in range(REPEATS):
            _assert_same(testing.run_backend(backend, case, inputs), alone)
    finally:
        stop.set()
        thread.join()
    return {}


def replayed(backend: Backend, case: Case, device: torch.device) -> dict[str, Any]:
    """Replay two captured graphs of one call at once; every replay is looked at."""
    inputs = testing.make_inputs(case, device)
    right = testing.run_backend(backend, case, inputs)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    results: list[Results] = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            results.append(testing.run_backend(backend, case, inputs))
    streams = [torch.cuda.Stream(device) for _ in graphs]
    for _ in range(REPEATS):
        for got in results:  # or what a replay leaves out would still be right
            for result in got:
                if result is not None:
                    result.fill_(torch.nan)
        torch.cuda.synchronize(device)
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize(device)
        for got in results:
            _assert_same(got, right)
    return {}


def _assert_same(got: Results, right: Results) -> None:
    """Assert that two calls gave the same bits, in memory of their own."""
    for name, one, other in zip(Results._fields, got, right, strict=True):
        if one is None or other is None:
            assert one is other, f"{name} is missing in one of two calls"
            continue
        assert torch.equal(one, other), f"{name} is not the same bit for bit"
        assert one.data_ptr() != other.data_ptr(), f"{name} of two calls is in the same memory"


@contextmanager
def _stream(device: torch.device) -> Iterator[None]:
    with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
        yield


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    """Return the bytes of all tensors on the GPU; 0 on the CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
