"""A stand-in for torch.cuda that computes on the CPU, at once, and watches the order of things.

Under `installed()` code that says `device="cuda"` gets CPU tensors; streams, graphs and
synchronisation are doubles. Every call is first bound to the signature of torch's own function. A
captured graph holds NaN until it is replayed, a replay happens at the next synchronisation, as late
as a GPU may do it, and work that a side stream begins while the default stream has unfinished work
is a mistake in `Gpu.mistakes`. It says nothing about what a GPU computes.
"""

import contextlib
import gc
import inspect
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from lora_kernels.ops.lora_linear.problem import arch


class OnCpu(TorchFunctionMode):
    """Reads cuda as cpu wherever an operator is told a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs or {}))


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("cpu") if is_cuda else value


class Recorded(TorchDispatchMode):
    """Keeps every operation, so that it can be done again into the same results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def again(self) -> None:
        for func, args, kwargs, result in self.operations:
            for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)

    def poison(self) -> None:
        """Let what a capture computed be unknown, as on a GPU."""
        for _, args, kwargs, result in self.operations:
            inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            for tensor in _tensors(result):
                if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in inputs:
                    tensor.fill_(torch.nan)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [v for v in tree_flatten(values)[0] if isinstance(v, torch.Tensor)]


class Gpu:
    """What stands for the device: the streams, and what was done with them."""

    def __init__(self) -> None:
        self.mistakes: list[str] = []
        self.synchronized = self.streams = 0
        self.capturing = False
        self._default_is_busy = False
        self._here = threading.local()
        self._replays: list[Callable[[], None]] = []

    def current_stream(self, device: Any = None) -> int:
        """Return the number of this thread's stream; that of the default one is 0."""
        return getattr(self._here, "stream", 0)

    def launch(self) -> int:
        """Note that work begins on the current stream; return its number."""
        number = self.current_stream()
        if number == 0:
            self._default_is_busy = True
        elif self._default_is_busy:
            self.mistakes.append(f"stream {number} begins while the default one is at work")
        return number

    def make_stream(self, device: Any = None) -> int:
        self.streams += 1
        return self.streams

    def synchronize(self, device: Any = None) -> None:
        self.synchronized += 1
        self._default_is_busy = False
        replays, self._replays = self._replays, []
        for replay in replays:
            replay()

    def replay_later(self, recorded: Recorded) -> None:
        self._replays.append(recorded.again)

    @contextlib.contextmanager
    def stream(self, stream: int) -> Iterator[None]:
        before, self._here.stream = self.current_stream(), stream
        torch.set_num_threads(1)  # each thread has a number of its own
        try:
            with OnCpu():  # modes belong to a thread
                yield
        finally:
            self._here.stream = before

    @contextlib.contextmanager
    def graph(self, cuda_graph: "Graph") -> Iterator[None]:
        self.synchronize()  # as torch's does
        self.capturing = True
        with self.stream(self.make_stream()), cuda_graph.recorded:
            yield
        self.capturing = False
        cuda_graph.recorded.poison()

    def memory_allocated(self, device: Any = None) -> int:
        """Return the bytes of all tensors that Python can still reach."""
        found = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}
        return sum(storages.values())


class Graph:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.recorded = gpu, Recorded()

    def replay(self) -> None:
        self.gpu.replay_later(self.recorded)


@contextlib.contextmanager
def installed() -> Iterator[Gpu]:
    """Let this process have a GPU."""
    gpu = Gpu()
    properties = SimpleNamespace(name="stand-in", major=9, minor=0, multi_processor_count=132)
    doubles: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "synchronize": gpu.synchronize,
        "memory_allocated": gpu.memory_allocated,
        "current_stream": gpu.current_stream,
        "stream": gpu.stream,
        "Stream": gpu.make_stream,
        "is_current_stream_capturing": lambda: gpu.capturing,
        "CUDAGraph": lambda: Graph(gpu),
        "graph": gpu.graph,
    }
    arch.cache_clear()
    with pytest.MonkeyPatch.context() as patch, OnCpu():
        for name, double in doubles.items():
            patch.setattr(torch.cuda, name, _as_torch_takes_it(getattr(torch.cuda, name), double))
        yield gpu
    arch.cache_clear()


def _as_torch_takes_it(real: Any, double: Callable[..., Any]) -> Callable[..., Any]:
    """Return `double`, which may only be called in ways that `real` could be."""
    if not isinstance(real, type):
        signature = inspect.signature(real)
    else:
        maker = real.__init__ if "__init__" in vars(real) else real.__new__
        bound = inspect.signature(maker)
        signature = bound.replace(parameters=list(bound.parameters.values())[1:])

    def checked(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return double(*args, **kwargs)

    return checked
