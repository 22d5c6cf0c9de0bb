"""Run a kernel on CPU tensors, and judge the run."""

import functools
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ptx_machine import build
from ptx_machine.parse import Kernel

MAGIC = 0x70616D726F736E74  # as in core/tensor_map.h


class Wrong(AssertionError):  # noqa: N818 (reads as what happened)
    """A run that stopped, raced or left something in flight."""


@dataclass
class Memory:
    """What a kernel may touch: address, bytes, and whether it may write there."""

    ranges: dict[tuple[int, int], bool] = field(default_factory=dict)

    def add(self, tensor: torch.Tensor, *, writable: bool) -> int:
        """Let the kernel use `tensor`, and return its address; what is an input stays one."""
        address = tensor.data_ptr()
        if tensor.numel() > 0:
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            span = (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()
            self.ranges.setdefault((address, span), writable)
        return address


@dataclass(frozen=True)
class Grid:
    """How a kernel is launched, and what of its timing is to be tried."""

    ctas: int | tuple[int, int, int]
    threads: int = 0  # 0: as the kernel says
    cluster: int = 1
    shared_bytes: int = 0
    resident: int = 3  # clusters that run at the same time
    seed: int = 0
    adversarial: bool = True  # else for counting: no races, and nothing counted hangs on chance
    limit: int = 100_000_000  # warp instructions


@dataclass
class Run:
    """What came of a launch."""

    kernel: Kernel
    failure: str
    reports: list[str]
    counts: list[tuple[int, ...]]
    instructions: int

    def check(self) -> "Run":
        """Raise `Wrong` unless everything went well."""
        problems = [p for p in (self.failure, *self.reports) if p]
        if problems:
            raise Wrong("\n".join(problems[:20]))
        return self

    def executed(self) -> set[int]:
        """Return the statements that some lane has executed."""
        return {i for i, count in enumerate(self.counts) if count[1]}

    def by_opcode(self) -> Counter[str]:
        """Count the executed warp instructions by opcode."""
        total: Counter[str] = Counter()
        for statement, count in zip(self.kernel.statements, self.counts, strict=True):
            total[statement.opcode] += count[0]
        return total


@functools.lru_cache(maxsize=64)
def _program(key: "_Key") -> Any:
    return build.core().Program(key.kernel.register_bits, key.kernel.statements)


class _Key:
    """A kernel by identity: kernels are not changed after parsing."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __hash__(self) -> int:
        return id(self.kernel)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.kernel is self.kernel


def run(kernel: Kernel, parameters: bytes, memory: Memory, grid: Grid) -> Run:
    """Launch `kernel` with the bytes of its parameters."""
    ctas = grid.ctas if isinstance(grid.ctas, tuple) else (grid.ctas, 1, 1)
    result = build.core().run(
        _program(_Key(kernel)),
        grid=ctas,
        cluster=grid.cluster,
        threads=grid.threads or kernel.threads,
        shared_bytes=kernel.static_shared + grid.shared_bytes,
        resident=grid.resident,
        seed=grid.seed,
        adversarial=grid.adversarial,
        limit=grid.limit,
        memory=[(*where, writable) for where, writable in memory.ranges.items()],
        parameters=parameters,
    )
    return Run(kernel=kernel, **result)


def pack(kernel: Kernel, values: Iterable[int | float | bytes]) -> bytes:
    """Lay out parameters as the kernel declares them."""
    blob = bytearray()
    for parameter, value in zip(kernel.parameters, values, strict=True):
        if isinstance(value, float):
            value = struct.pack({4: "<f", 8: "<d"}[parameter.size], value)
        elif isinstance(value, int):
            value = (value % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
        assert len(value) == parameter.size, f"{parameter} is given {len(value)} bytes"
        blob += bytes(parameter.offset - len(blob)) + value
    return bytes(blob)


def tensor_map(
    address: int,
    sizes: Sequence[int],
    pitches: Sequence[int],
    box: Sequence[int],
    element_bytes: int,
    swizzle_bytes: int,
    element: torch.dtype | None = None,
) -> bytes:
    """Return the 128 bytes that stand for a tensor map; innermost dimension first, pitches in bytes
    from the second dimension on. Where boxes are added to the tensor, `element` is its dtype."""
    rank = len(sizes)
    assert len(pitches) == rank - 1
    assert len(box) == rank
    assert address % 16 == 0
    assert all(p % 16 == 0 for p in pitches)
    assert all(0 < b <= 256 for b in box)
    assert swizzle_bytes == 0 or box[0] * element_bytes <= swizzle_bytes

    def five(values: Sequence[int], length: int = 5) -> list[int]:
        return [*values, *[0] * (length - len(values))]

    packed = struct.pack(
        "<QQ5I4x4Q5H4B", MAGIC, address, *five(sizes), *five(pitches, 4), *five(box), rank,
        element_bytes, {0: 0, 32: 1, 64: 2, 128: 3}[swizzle_bytes],
        {None: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}[element],
    )  # fmt: skip
    return packed.ljust(128, b"\0")
