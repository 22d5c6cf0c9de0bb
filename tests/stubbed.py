"""Calls and their launches on a GPU that does nothing, of compute capability STUB_ARCH.

Only for a process of its own: bench/stub changes what torch says about devices.
"""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import stub

ARCH = int(os.environ.get("STUB_ARCH", "90"))
gpu = stub.install(ARCH)

from lora_kernels.ops.lora_linear import triton as backend  # noqa: E402 (the GPU must be there first)
from lora_kernels.ops.lora_linear.operands import Backward, Forward  # noqa: E402

bf16 = torch.bfloat16
M, N, K, R = 96, 64, 80, 16
hopper = pytest.mark.skipif(ARCH != 90, reason="of sm_90")

no_extension = gpu.load_extension() if ARCH == 90 else "of sm_90"
extension = pytest.mark.skipif(no_extension is not None, reason=str(no_extension))


class Seen(NamedTuple):
    """All that the driver was told of a launch."""

    kernel: str
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    cluster: tuple[int, ...]
    shared_bytes: int
    stream: int
    parameters: bytes


def seen(launch: stub.Launch) -> Seen:
    return Seen(
        launch.kernel.decode(), launch.function, tuple(launch.grid), tuple(launch.block),
        tuple(launch.cluster), launch.shared_bytes, launch.stream,
        bytes(launch.parameters[: launch.parameter_bytes]),
    )  # fmt: skip


class Arena:
    """Hands out the memory of new tensors, the same for every call, so that launches compare."""

    memory = torch.empty(1 << 20, dtype=torch.uint8)
    used = 0

    def new_empty(self, tensor: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.empty(*size, dtype=dtype or tensor.dtype, device="meta")
        start = -(-(self.memory.data_ptr() + self.used) // 512) * 512 - self.memory.data_ptr()
        self.used = start + made.nbytes
        return self.memory[start : self.used].view(made.dtype).view(made.shape)


@pytest.fixture(autouse=True, name="arena")
def new_arena(monkeypatch: pytest.MonkeyPatch) -> Arena:
    arena = Arena()
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *s, **d: arena.new_empty(t, *s, **d))
    return arena


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    backend._kept.clear()
    yield
    gpu.device, gpu.stream, gpu.capturing = 0, 0, False


def launched(arena: Arena, call: Forward | Backward, module: Any = backend) -> Seen:
    """Run a call and return its launch: there is just one."""
    arena.used = 0
    before = gpu.record.launches
    (module.forward if isinstance(call, Forward) else module.backward)(call)
    assert gpu.record.launches == before + 1
    return seen(gpu.last)


def random(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def forward_call(dtype: torch.dtype = bf16, adapters: torch.dtype | None = None) -> Forward:
    a, b = random(R, K, dtype=adapters or dtype), random(N, R, dtype=adapters or dtype)
    return Forward(random(M, K, dtype=dtype), random(N, K, dtype=dtype), a, b, None, None, 0.5, 0.0)


def backward_call(
    needs: tuple[int, int, int] = (1, 1, 1),
    dtype: torch.dtype = bf16,
    adapters: torch.dtype | None = None,
) -> Backward:
    (dx, da, db), x = needs, random(M, K, dtype=dtype)
    a, b, p = (random(*s, dtype=adapters or dtype) for s in ((R, K), (N, R), (M, R)))
    return Backward(
        random(M, N, dtype=dtype), x if da else None, random(N, K, dtype=dtype) if dx else None,
        a if dx else None, b if dx or da else None, p if db else None, None, 0.5, 0.0,
    )  # fmt: skip


def shifted(t: Tensor) -> Tensor:
    """The same values, at an address that is no multiple of 16."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def padded(t: Tensor) -> Tensor:
    """The same values, in longer rows."""
    return torch.cat([t, t], 1)[:, : t.shape[1]]


def on_gpu(seed: int) -> Tensor:
    return torch.tensor([seed])


def on_cpu(seed: int) -> Tensor:
    made = torch.tensor([seed])
    made.device, made.is_cuda = torch.device("cpu"), False  # type: ignore[misc]
    return made


def transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def other_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "device", torch.device("cuda", 1))
    patch.setattr(torch.cuda, "device", _Guard)


class _Guard:
    """torch.cuda.device, on this GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, gpu.device

    def __enter__(self) -> None:
        gpu.device = self.device.index

    def __exit__(self, *_: object) -> None:
        gpu.device = self.before
