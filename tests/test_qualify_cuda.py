"""The steps that only a GPU has, run on a stand-in: they work, and planted mistakes show."""

import ctypes
import gc
import json
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import eager_cuda
import pytest
import torch
from eager_cuda import Gpu
from torch.utils.weak import WeakIdKeyDictionary

from lora_kernels import testing
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import Problem, reference
from lora_kernels.ops.lora_linear.operands import Forward
from lora_kernels.qualify import checks, record, timing
from lora_kernels.qualify.checks import Options
from lora_kernels.qualify.child import attempt
from lora_kernels.testing import fp32

OPTIONS = Options(((40, 24),), (33,), (8,), ("float32",), (0.0, 0.3), "cuda", seconds=0.0)
COMPANY = (
    *("repeated", "side by side", "beside a busy device", "behind others in its stream"),
    "in a graph",
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    monkeypatch.setattr(checks, "REPEATS", 3)
    monkeypatch.setattr(checks, "HOG", 64)
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # how many a BLAS takes, which a busy machine decides, moves the bits
    with eager_cuda.installed() as gpu:
        gpu.threads = threading.active_count()
        yield gpu
    torch.set_num_threads(threads)


Defect = Callable[[Gpu, torch.Tensor, int], None]


def planted(gpu: Gpu, defect: Defect, dtype: torch.dtype = fp32) -> Backend:
    """The reference backend for one dtype; `defect(gpu, y, number of the stream)` spoils y."""

    def forward(call: Forward) -> Any:
        stream = gpu.launch()
        y, p = reference.forward(call)
        defect(gpu, y, stream)
        return y, p

    def why_not(problem: Problem) -> str | None:
        return None if problem.dtype == dtype else "another dtype"

    return Backend("mine", why_not, forward, reference.backward, lambda problem, backward: None)


def right(gpu: Gpu, y: torch.Tensor, stream: int) -> None:
    pass


def outcomes(gpu: Gpu, backend: Backend, *words: str) -> dict[str, str]:
    """The outcome of each step whose name has one of `words`, by name."""
    found = {}
    for step in checks.steps(OPTIONS, (backend,)):
        if any(word in step.name for word in words):
            outcome, detail, _ = attempt(step)
            found[step.name] = f"{outcome} {detail}".strip()
    return found


def test_every_step_passes_on_what_is_right(gpu: Gpu) -> None:
    found = outcomes(gpu, planted(gpu, right), "")
    assert set(found.values()) == {record.RIGHT}
    for way in COMPANY:
        assert sum(f"bit for bit {way}" in name for name in found) == 2, way
    assert sum(name.startswith(checks.SPEED) for name in found) == 4
    assert gpu.mistakes == []
    assert gpu.streams > 10
    assert gpu.synchronized > 50


class InTheThirdCall:
    """As from a buffer that runs over."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gpu: Gpu, y: torch.Tensor, stream: int) -> None:
        self.calls += 1
        if self.calls % 4 == 3:
            y[0, 0] += 1e-3


class InOneReplay:
    """As from a workspace that is not left as it was found: in the replay of that number alone."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.replays = [torch.tensor(-1.0) for _ in range(10)]  # one for each graph

    def __call__(self, gpu: Gpu, y: torch.Tensor, stream: int) -> None:
        if gpu.capturing:
            replays = self.replays.pop()
            replays += 1  # to 0 by the capture, which the stand-in computes too
            y[0, 0] += 1e-3 * (replays == self.number)


def on_every_second_stream(gpu: Gpu, y: torch.Tensor, stream: int) -> None:
    if stream > 0 and stream % 2 == 0:
        y[0, 0] += 1e-3


def beside_other_threads(gpu: Gpu, y: torch.Tensor, stream: int) -> None:
    if stream == 0 and threading.active_count() > gpu.threads:  # other tests may have left some
        y[0, 0] += 1e-3


@pytest.mark.parametrize(
    ("defect", "ways"),
    [
        (InTheThirdCall(), {"repeated", "beside a busy device"}),
        (on_every_second_stream, {"side by side"}),
        (beside_other_threads, {"beside a busy device"}),
        (InOneReplay(1), {"in a graph"}),
        (InOneReplay(2), {"in a graph"}),
        (InOneReplay(3), {"in a graph"}),
    ],
)
def test_what_is_wrong_only_in_company_is_found_there(
    defect: Defect, ways: set[str], gpu: Gpu
) -> None:
    found = outcomes(gpu, planted(gpu, defect), "bit for bit")
    bad = {name for name, outcome in found.items() if outcome != record.RIGHT}
    assert all("y is not the same bit for bit" in found[name] for name in bad), found
    assert ways <= {way for way in COMPANY for name in bad if way in name}
    if not isinstance(defect, InTheThirdCall):
        others = {"in a graph", "behind others in its stream"}  # these are on side streams too
        assert {way for way in COMPANY for name in bad if way in name} <= {*ways, *others}


def test_memory_that_stays_behind_is_found(gpu: Gpu) -> None:
    kept: list[torch.Tensor] = []

    def keeping(gpu: Gpu, y: torch.Tensor, stream: int) -> None:
        kept.append(torch.zeros(256))

    found = outcomes(gpu, planted(gpu, keeping), "bit for bit repeated")
    assert len(found) == 2
    for outcome in found.values():
        assert (
            outcome == f"{record.WRONG} {checks.REPEATS * 1024} bytes are still held after 3 calls"
        )


def test_a_stream_of_its_own_that_does_not_wait_for_the_caller_is_found(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a backend sees x as it was when all of the device was last waited for."""
    then = WeakIdKeyDictionary()

    def synchronize(device: Any = None) -> None:
        gpu.synchronize(device)
        then.clear()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == fp32]
        then.update((t, t.clone()) for t in tensors)

    def forward(call: Forward) -> Any:
        gpu.launch()
        return reference.forward(call._replace(x=then.get(call.x, call.x)))

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    backend = planted(gpu, right)._replace(forward=forward)
    found = outcomes(gpu, backend, "side by side", "behind others")
    for name, outcome in found.items():
        expected = "y is not the same bit for bit" if "behind others" in name else record.RIGHT
        assert expected in outcome, found


def far(gpu: Gpu, rows_right: int) -> Backend:
    """A backend for bf16 whose y is right in its last rows alone: the others are never touched."""

    def forward(call: Forward) -> Any:
        gpu.launch()
        y = torch.empty(call.x.shape[0], call.weight.shape[0], dtype=call.x.dtype)
        last, p = reference.forward(call._replace(x=call.x[-300:]))
        y[-300:] = last
        y[-300 : -rows_right or None] = 0
        return y, p

    return planted(gpu, right, torch.bfloat16)._replace(forward=forward)


@pytest.mark.parametrize(("rows_right", "expected"), [(300, record.RIGHT), (299, record.WRONG)])
def test_offsets_past_2_to_the_31(
    rows_right: int, expected: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testing, "is_large", lambda case: False)  # a generator is not doubled
    (found,) = outcomes(gpu, far(gpu, rows_right), "offsets past").values()
    assert found.startswith(expected), found


def test_too_little_memory_for_far_offsets_is_no_verdict(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_little(call: Forward) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")

    monkeypatch.setattr(testing, "is_large", lambda case: False)
    backend = far(gpu, 300)._replace(forward=too_little)
    (found,) = outcomes(gpu, backend, "offsets past").values()
    assert found.startswith(record.MEMORY)


def test_a_side_stream_waits_for_what_the_default_one_computed(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in sees a synchronisation that is left out."""
    monkeypatch.setattr(checks, "synchronize", lambda device: None)
    outcomes(gpu, planted(gpu, right), "side by side")
    assert gpu.mistakes


def test_a_replay_that_nobody_waits_for_is_seen(gpu: Gpu) -> None:
    x, graph = torch.ones(3), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
    graph.replay()
    assert y.isnan().all()
    torch.cuda.synchronize()
    assert torch.equal(y, x * 2)


def test_calls_that_torch_would_refuse_are_refused(gpu: Gpu) -> None:
    for call in (
        lambda: torch.cuda.synchronize("cuda", 1),
        lambda: torch.cuda.Stream(dev=0),
        lambda: torch.cuda.graph(),
        lambda: torch.cuda.get_device_properties(index=0),
    ):
        with pytest.raises(TypeError):
            call()


def test_the_environment_of_a_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(pointer: Any) -> int:
        pointer._obj.value = 13010
        return 0

    driver = SimpleNamespace(cuDriverGetVersion=version)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    here = record.environment("cuda")
    assert (here["name"], here["arch"], here["multiprocessors"]) == ("stand-in", 90, 132)
    assert (here["driver"], here["mixed"]) == (13010, False)
    json.dumps(here)
