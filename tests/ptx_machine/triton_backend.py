"""The Triton backend with its own launchers, whose launches run on the machine."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import triton as backend
from lora_kernels.ops.lora_linear.config import TileConfig, pick
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.ops.lora_linear.triton import backward_kernel, forward_kernel
from ptx_machine.launch import Grid, Memory
from ptx_machine.machine import Machine, inputs, reserved
from ptx_machine.triton_compile import compile_kernel

KERNELS = ((forward_kernel, "lora_linear_forward"), (backward_kernel, "lora_linear_backward"))


def on(machine: Machine, arch: int, config: TileConfig | None = None) -> Backend:
    """Return the Triton backend as it is on a GPU of `arch`, with `config` or what it picks."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(operands: Any, *onto: torch.Tensor | None) -> Any:
            memory = Memory()
            for tensor in inputs(operands):
                memory.add(tensor, writable=False)
            with _launching(machine, arch, config, memory):
                return function(operands, *onto)

        return call

    return Backend("triton", backend.why_not, wrap(backend.forward), wrap(backend.backward))


@contextlib.contextmanager
def _launching(
    machine: Machine, arch: int, config: TileConfig | None, memory: Memory
) -> Iterator[None]:
    """Meanwhile, let the launchers find a GPU of `arch`, and their launches go to `machine`."""

    def has_tma(problem: Problem) -> bool:
        return arch >= 90 and problem.dtype.itemsize == 2

    def ctas(items: int, config: TileConfig, device: torch.device) -> int:
        return min(items, machine.multiprocessors)

    def chosen(problem: Problem, **options: Any) -> TileConfig:
        return config or pick(problem._replace(device="cuda", arch=arch), **options)

    changes: list[tuple[Any, str, Any]] = [
        (backend, "_has_tma", has_tma),
        (backend, "_ctas", ctas),
        (backend, "pick", chosen),
        (backend, "reserve", reserved),
    ]
    for module, name in KERNELS:
        changes.append((module, name, _Launcher(getattr(module, name), machine, arch, memory)))
    saved = [getattr(module, name) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, saved, strict=True):
            setattr(module, name, value)


class _Launcher:
    """Stands for a kernel: compiles it as the launch would, and runs the PTX."""

    def __init__(self, function: Any, machine: Machine, arch: int, memory: Memory) -> None:
        self.function, self.machine, self.arch, self.memory = function, machine, arch, memory

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = compile_kernel(self.function, self.arch, arguments, options)
            names = inspect.signature(self.function.fn).parameters
            values = dict(zip(names, arguments, strict=False))
            shared, warps = compiled.shared_bytes, options["num_warps"]
            self.machine.launch(
                compiled.kernel,
                compiled.pack(values, self.memory),
                self.memory,
                Grid(grid[0], 32 * warps, shared_bytes=shared),
            )

        return launch
