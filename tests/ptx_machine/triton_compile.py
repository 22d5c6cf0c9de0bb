"""Compile Triton kernels for a GPU that is not there, and launch their PTX on the machine."""

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_offline import Target

from ptx_machine.launch import Grid, Memory, Run, pack, run, tensor_map
from ptx_machine.parse import Kernel, parse


@contextlib.contextmanager
def active(arch: int) -> Iterator[None]:
    """Let Triton compile for `arch`."""
    saved = driver._active
    driver.set_active(Target(arch))
    try:
        yield
    finally:
        driver._active = saved


@dataclass
class Compiled:
    """A compiled kernel: its program, and what a launch needs to know of it."""

    kernel: Kernel
    signature: dict[str, str]
    shared_bytes: int
    descriptors: list[dict[str, Any]]

    def pack(self, arguments: dict[str, Any], memory: Memory) -> bytes:
        """Return the parameters for `arguments` by name: CPU tensors, descriptors and numbers."""
        values: list[int | float | bytes] = []
        descriptors = iter(self.descriptors)
        for name, kind in self.signature.items():
            if kind == "constexpr":
                continue
            value = arguments[name]
            if kind.startswith("tensordesc"):
                values += _describe(value, next(descriptors), memory)
            elif isinstance(value, torch.Tensor):
                values.append(memory.add(value, writable=True))
            else:
                values.append(float(value) if kind.startswith("fp") else int(value))
        # The kernel's own scratch memory follows, of which these kernels need none.
        values += [0] * (len(self.kernel.parameters) - len(values))
        return pack(self.kernel, values)

    def launch(self, arguments: dict[str, Any], memory: Memory, grid: Grid) -> Run:
        """Run the kernel on `arguments`, by name."""
        grid = replace(grid, shared_bytes=self.shared_bytes)
        return run(self.kernel, self.pack(arguments, memory), memory, grid)


def _describe(
    descriptor: TensorDescriptor, meta: dict[str, Any], memory: Memory
) -> list[int | bytes]:
    """Return what stands for a descriptor among the parameters: its map, sizes and strides."""
    base, size = descriptor.base, descriptor.base.element_size()
    box = list(meta["block_size"])
    packed = tensor_map(
        memory.add(base, writable=True),
        descriptor.shape[::-1],
        [s * size for s in descriptor.strides[-2::-1]],
        box[::-1],
        size,
        (0, 32, 64, 128)[meta["swizzle"]],
    )
    return [packed, *descriptor.shape, *descriptor.strides]


def compile_kernel(
    function: Any, arch: int, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Compiled:
    """Compile `function` as a launch with `arguments` and `options` would."""
    with active(arch):
        made = function.warmup(*arguments, grid=(1,), **options)
    metadata = made.metadata
    return Compiled(
        _parsed(made.asm["ptx"]),
        {name: str(kind) for name, kind in made.src.signature.items()},
        metadata.shared,
        list(getattr(metadata, "tensordesc_meta", None) or []),
    )


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Kernel:
    return parse(text)


VERSION = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
