"""What the launchers launch, on a GPU that does nothing; `test_launch_plan.py` runs this file."""

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from stubbed import (  # ahead of lora_kernels: the GPU must be there first
    Arena,
    K,
    M,
    N,
    R,
    Seen,
    backward_call,
    extension,
    forward_call,
    gpu,
    hopper,
    launched,
    other_device,
    padded,
    random,
    seen,
    shifted,
    transposed,
)
from stubbed import cold as cold
from stubbed import new_arena as new_arena
from torch import Tensor

from bench import stub
from lora_kernels import lora_linear
from lora_kernels.ops.lora_linear import cuda
from lora_kernels.ops.lora_linear import triton as backend


@pytest.mark.parametrize("module", [backend, pytest.param(cuda, marks=extension)])
def test_a_dx_is_added_to_by_the_same_kernel_told_so(module: Any, arena: Arena) -> None:
    call = backward_call()
    gpu.struct_bytes.value = 11 * 128 + 9  # the extension's: as far as the flag

    def run(adds: bool) -> Seen:
        arena.used = 0
        there = arena.new_empty(call.dy, M, K) if adds else None  # where a new dx would be
        before = gpu.record.launches
        found = module.backward(call, there)
        assert there is None or found.dx is there
        assert gpu.record.launches == before + 1
        return seen(gpu.last)

    for _ in range(2):  # compiled, and kept
        new, added = run(False), run(True)
        pairs = zip(new.parameters, added.parameters, strict=True)
        assert [pair for pair in pairs if pair[0] != pair[1]] == [(0, 1)]
        assert new._replace(parameters=b"") == added._replace(parameters=b"")


def test_what_a_kernel_receives(arena: Arena) -> None:
    call = forward_call()._replace(bias=random(N), scaling=0.75)
    for _ in range(2):
        launch = launched(arena, call)
        operands = [*call[:4], call.bias]
        for tensor in operands:
            assert tensor is not None
            assert struct.pack("<Q", tensor.data_ptr()) in launch.parameters
        assert struct.pack("<f", call.scale().factor) in launch.parameters
        assert launch.kernel == "lora_linear_forward"
        assert launch.cluster == (1, 1, 1)
        assert 0 < launch.grid[0] <= gpu.multiprocessors * 2
        assert launch.shared_bytes <= 227 * 1024


@hopper
def test_a_tensor_map_says_where_and_how_large(arena: Arena) -> None:
    call = forward_call()
    memory = random(M * K)
    for rows in (M, M // 2, M):  # the same address, with another matrix at it
        x = memory[: rows * K].view(rows, K)
        launch = launched(arena, call._replace(x=x))
        found = stub.Map.from_buffer_copy(map_at(launch, x.data_ptr()))
        assert (found.address, *found.sizes) == (x.data_ptr(), K, rows)
        assert found.pitch_bytes == 2 * K
        weight = stub.Map.from_buffer_copy(map_at(launch, call.weight.data_ptr()))
        assert (*weight.sizes, weight.pitch_bytes) == (K, N, 2 * K)


def map_at(launch: Seen, address: int) -> bytes:
    """Return the tensor map of that address among the parameters."""
    for start in range(0, len(launch.parameters) - 127, 8):
        if struct.unpack_from("<Q", launch.parameters, start)[0] == address:
            found = launch.parameters[start : start + 128]
            if stub.Map.from_buffer_copy(found).rank == 2:
                return found
    raise AssertionError("there is no tensor map of that address")


@pytest.mark.parametrize("module", [backend, pytest.param(cuda, marks=extension)])
def test_the_workspace_belongs_to_the_device_of_the_tensors(
    module: Any, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reserved while that device is current: the capture that counts is that device's."""
    other_device(monkeypatch)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(gpu.device))
    for call in (forward_call(), backward_call()):
        launched(arena, call, module)
    assert asked == [1, 1]
    assert gpu.device == 0


kernel_names = pytest.mark.parametrize(
    "name",
    ["triton", pytest.param("cuda", marks=[extension, pytest.mark.filterwarnings("ignore")])],
)


@kernel_names
@pytest.mark.parametrize("shape", [(M, K), (4, M // 4, K), (K,)])
def test_training_launches_once_each_way(name: str, shape: tuple[int, ...]) -> None:
    call = forward_call()
    x, a, b = (t.requires_grad_() for t in (random(*shape), call.lora_a, call.lora_b))
    for _ in range(2):
        before = gpu.record.launches
        y = lora_linear(x, call.weight, a, b, 0.5, dropout_p=0.1, backend=name)
        assert gpu.record.launches == before + 1
        y.sum().backward()
        assert gpu.record.launches == before + 2


@kernel_names
@pytest.mark.parametrize("change", [torch.clone, padded, shifted, transposed])
def test_a_backward_reads_its_operands_where_they_are_by_then(
    name: str, change: Callable[[Tensor], Tensor], arena: Arena
) -> None:
    """`param.data = ...` between the passes, as wrappers that move parameters do it."""
    call = forward_call()
    leaves = x, a, b = tuple(t.requires_grad_() for t in (call.x, call.lora_a, call.lora_b))
    operands, dy = (x, call.weight, a, b), random(M, N)
    if name == "cuda":
        gpu.struct_bytes.value = 11 * 128

    def backward(moved: Sequence[Tensor] = ()) -> bytes:
        y = lora_linear(*operands, 0.5, backend=name)
        for tensor, data in zip(operands, moved, strict=False):
            tensor.data = data
        arena.used = 1 << 19  # out of the forward's way
        torch.autograd.grad(y, leaves, dy)
        return seen(gpu.last).parameters

    backward()
    moved = [change(t.detach()) for t in operands]
    late = backward(moved)
    for tensor in moved:
        copied = name == "cuda" and cuda._addressed(tensor)[1] != []
        assert (struct.pack("<Q", tensor.data_ptr()) in late) != copied
    if not copied:  # copies lie anywhere
        assert late == backward()


@kernel_names
@pytest.mark.parametrize("grad", [True, False])
def test_what_a_transform_left_behind_is_launched_as_what_it_wraps(name: str, grad: bool) -> None:
    call, functorch = forward_call(), torch._C._functorch
    wrapped = [functorch._wrap_for_grad(t, functorch._grad_increment_nesting()) for t in call[:4]]
    for _ in wrapped:
        functorch._grad_decrement_nesting()
    with torch.set_grad_enabled(grad):
        for operands in (call[:4], wrapped):
            before = gpu.record.launches
            operands[2].requires_grad_(grad)
            lora_linear(*operands, 0.5, backend=name)
            assert gpu.record.launches == before + 1


@extension
@pytest.mark.filterwarnings("ignore")
def test_what_the_extension_launches(arena: Arena) -> None:
    call = forward_call()
    gpu.struct_bytes.value = 6 * 128
    launch = launched(arena, call, cuda)
    assert "lora_linear_forward" in launch.kernel
    assert (launch.grid, launch.cluster, launch.block[0]) == ((2, 1, 1), (1, 1, 1), 384)
    assert launch.shared_bytes <= 227 * 1024
    for i, (tensor, rows) in enumerate(zip(call[:4], (M, N, R, N), strict=True)):
        found = stub.Map.from_buffer_copy(launch.parameters[128 * i : 128 * i + 128])
        assert (found.address, found.sizes[1]) == (tensor.data_ptr(), rows)
        assert found.pitch_bytes == 2 * tensor.stride(0)
    tall = launched(arena, call._replace(x=random(1000, K)), cuda)
    assert tall.cluster == (2, 1, 1)
    gpu.stream = 4711
    assert launched(arena, call, cuda).stream == 4711


@extension
def test_a_fresh_thread_has_a_context_before_it_encodes() -> None:
    """A driver encodes tensor maps in the current context; autograd's threads begin without one."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cuda.BACKEND.forward, forward_call()).result()
