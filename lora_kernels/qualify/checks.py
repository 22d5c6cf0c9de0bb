"""The steps of a qualification: numbers first, then repeats and company, then speed.

A step is a name, a time limit and a function to run in the child; it returns the fields of its
outcome. What is wrong raises AssertionError.
"""

import gc
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from lora_kernels.qualify.timing import measure, synchronize
from lora_kernels.testing import Case, Inputs, Results

SPEED = "speed"  # how the steps begin that a budget may cut
REPEATS, REPEATS_ON_CPU = 200, 20  # a GPU does hundreds in the time of everything else
HOG, HOG_ON_CPU = 4096, 512  # rows and columns of a product that keeps a device busy
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
    seconds: float = 0.05  # of timing for one direction of one size, eager; as much in a graph
    limit_s: float = 60.0  # of a step without progress; the first of a kind compiles


class Step(NamedTuple):
    """One thing to find out about a backend."""

    backend: str
    name: str
    limit_s: float
    run: Callable[[], dict[str, Any]]


def on_trial(options: Options, backends: Sequence[Backend]) -> list[Backend]:
    """Return those of `backends` that need a proof and are asked for."""
    names = options.backends
    needy = [backend for backend in backends if backend.why_not_auto is not None]
    return [backend for backend in needy if names is None or backend.name in names]


def steps(options: Options, backends: Sequence[Backend]) -> list[Step]:
    """List the steps, the same in every process: backend by backend, numbers before speed."""
    device, tried = torch.device(options.device), on_trial(options, backends)
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
    for case in fitted(testing.CASES, options, backend, device):
        yield f"numbers: {case}", partial(_error, backend, case, device)
    for case in fitted(testing.FROZEN_CASES, options, backend, device):
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


def fitted(
    cases: Iterable[Case], options: Options, backend: Backend, device: torch.device
) -> list[Case]:
    """Return `cases` in each dtype that is asked for, with sizes that the backend takes.

    What they are about, a subset of gradients or strides say, is no less to be seen of a backend
    that wants other dtypes or multiples of 8. Those with loud operands are about their own dtype.
    """
    found: dict[Case, None] = {}
    for case in cases:
        for dtype in (getattr(torch, name) for name in options.dtypes):
            if case.dtype != dtype and max(case.magnitudes) > 1:
                continue
            adapters = case.adapter_dtype if dtype.itemsize < 4 else None
            same = case._replace(dtype=dtype, adapter_dtype=adapters)
            n, k, r = (-(-size // 8) * 8 for size in case[1:4])
            tries = same, same._replace(n=n, k=k, r=r)
            found.update(dict.fromkeys([c for c in tries if takes(backend, c, device)][:1]))
    return list(found)


def _spanned(options: Options) -> Iterator[Case]:
    """Yield all that is timed, with no more tokens than the numbers need: each tile is seen."""
    cut = (case._replace(m=min(case.m, NUMERIC_TOKENS)) for case in cases(options))
    yield from dict.fromkeys(cut)


def _company_cases(options: Options, backend: Backend, device: torch.device) -> Iterator[Case]:
    """Yield a few cases with several blocks of everything: one for each dtype, and dropout.

    Under dropout, dx is added to one that is there.
    """
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for dropout_p in (0.0, 0.3):
            case = Case(300, 520, 264, 24, dtype, None, True, dropout_p, onto=dropout_p > 0)
            if takes(backend, case, device):
                yield case


def _company(options: Options, backend: Backend, device: torch.device) -> Iterator[_Found]:
    for case in _company_cases(options, backend, device):
        for name, run in WAYS.items():
            if device.type == "cuda" or run is not replayed:
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
    """Run one call again and again; no memory may stay behind but what the last call needed."""
    inputs = testing.make_inputs(case, device)
    first = testing.run_backend(backend, case, inputs)
    _assert_same(testing.run_backend(backend, case, inputs), first)
    held = _allocated(device)
    for _ in range(_repeats(device)):
        _assert_same(testing.run_backend(backend, case, inputs), first)
    leaked = _allocated(device) - held
    assert leaked <= 0, f"{leaked} bytes are still held after {_repeats(device)} calls"
    return {}


def side_by_side(backend: Backend, case: Case, device: torch.device) -> dict[str, Any]:
    """Run two calls at once, from two threads on two streams, and each alone."""
    inputs = [testing.make_inputs(case, device, seed) for seed in (1, 2)]
    alone = [testing.run_backend(backend, case, each) for each in inputs]
    synchronize(device)
    failed: list[BaseException] = []

    def work(each: Inputs, right: Results) -> None:
        try:
            with _stream(device):
                for _ in range(_repeats(device)):
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
    synchronize(device)
    stop = threading.Event()

    def hog() -> None:
        with _stream(device):
            while not stop.is_set():
                _keep_busy(device)
                synchronize(device)

    thread = threading.Thread(target=hog)
    thread.start()
    try:
        for _ in range(_repeats(device)):
            _assert_same(testing.run_backend(backend, case, inputs), alone)
    finally:
        stop.set()
        thread.join()
    return {}


def in_order(backend: Backend, case: Case, device: torch.device) -> dict[str, Any]:
    """Run a call on a side stream on which its inputs are only being made, and read it at once."""
    inputs = testing.make_inputs(case, device)
    right = testing.run_backend(backend, case, inputs)
    late = testing.make_inputs(case, device, seed=1)._replace(seed=inputs.seed)
    synchronize(device)
    with _stream(device):
        _keep_busy(device)
        for there, ready in zip(late, inputs, strict=True):
            if there is not None and ready is not None:
                there.copy_(ready)
        read = testing.run_backend(backend, case, late).copied()
    synchronize(device)
    _assert_same(read, right)
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
    for _ in range(_repeats(device)):
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


# How a call must give the same bits; the GPU tests of the backends walk them too.
WAYS: dict[str, Callable[[Backend, Case, torch.device], dict[str, Any]]] = {
    "repeated": repeated,
    "side by side": side_by_side,
    "beside a busy device": beside_a_hog,
    "behind others in its stream": in_order,
    "in a graph": replayed,
}


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


def _keep_busy(device: torch.device) -> None:
    """Queue products that take some milliseconds."""
    size = HOG_ON_CPU if device.type == "cpu" else HOG
    square = torch.ones(size, size, device=device)
    for _ in range(10):
        torch.mm(square, square)


def _repeats(device: torch.device) -> int:
    return REPEATS_ON_CPU if device.type == "cpu" else REPEATS


def _allocated(device: torch.device) -> int:
    """Return the bytes of all tensors on the GPU; on the CPU of those that Python can reach."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    found = [t for t in gc.get_objects() if type(t) is torch.Tensor]
    storages = [t.untyped_storage() for t in found if t.layout == torch.strided]
    # By what a storage is, not by its address, which one that a compiler traced with has not.
    return sum({s._cdata: s.nbytes() for s in storages}.values())
