"""What the launchers launch, on a GPU that does nothing; `test_launch_plan.py` runs this file.

It needs a process of its own, for bench/stub changes what torch says about devices. STUB_ARCH is
the compute capability of that GPU.
"""

import gc
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import stub

ARCH = int(os.environ.get("STUB_ARCH", "90"))
gpu = stub.install(ARCH)

from lora_kernels import lora_linear  # noqa: E402 (the GPU must be there first)
from lora_kernels.ops.lora_linear import cuda, workspace  # noqa: E402
from lora_kernels.ops.lora_linear import triton as backend  # noqa: E402
from lora_kernels.ops.lora_linear.config import TileConfig  # noqa: E402
from lora_kernels.ops.lora_linear.operands import Backward, Forward  # noqa: E402
from lora_kernels.ops.lora_linear.triton import direct  # noqa: E402

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
M, N, K, R = 96, 64, 80, 16
NEEDS = [(dx, da, db) for dx in (1, 0) for da in (1, 0) for db in (1, 0) if dx or da or db]
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


@pytest.fixture(autouse=True)
def arena(monkeypatch: pytest.MonkeyPatch) -> Arena:
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


# Each changes one thing about a call, or what surrounds it.
Change = Callable[[Any, pytest.MonkeyPatch], Any]


def on(**fields: Callable[[Any], Any]) -> Change:
    return lambda call, _: call._replace(
        **{name: change(getattr(call, name)) for name, change in fields.items()}
    )


def around(change: Callable[[pytest.MonkeyPatch], None]) -> Change:
    def changed(call: Any, patch: pytest.MonkeyPatch) -> Any:
        change(patch)
        return call

    return changed


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


CHANGES: dict[str, Change] = {
    "nothing": on(),
    "another B": on(lora_b=torch.clone),
    "scaling": on(scaling=lambda _: 3.0),
    "dropout": on(dropout_p=lambda _: 0.25, seed=lambda _: on_cpu(2**40 + 5)),
    "seed on the GPU": on(dropout_p=lambda _: 0.25, seed=lambda _: on_gpu(7)),
    "pitch of A": on(lora_a=padded),
    "columns of W apart": on(weight=transposed),
    "address of W": on(weight=shifted),
    "address of B": on(lora_b=shifted),
    "B transposed": on(lora_b=transposed),
    "DEBUG": around(lambda patch: patch.setattr(backend, "DEBUG", True)),
    "tile": around(
        lambda patch: patch.setattr(
            backend, "pick", lambda *_, **__: TileConfig(64, 32, 32, warps=4, stages=2, br=16)
        )
    ),
    "few CTAs": around(lambda patch: patch.setattr(backend, "_ctas", lambda *_: 1)),
    "no TMA": around(lambda patch: patch.setattr(backend, "_has_tma", lambda _: False)),
    "device": around(other_device),
    "stream": around(lambda patch: patch.setattr(gpu, "stream", 4711)),
    "capture": around(lambda patch: patch.setattr(gpu, "capturing", True)),
}
OF_FORWARD = CHANGES | {
    "bias": on(bias=lambda _: random(N)),
    "bias apart": on(bias=lambda _: random(N, 2)[:, 0]),
    "pitch of x": on(x=padded),
    "address of x": on(x=shifted),
    "rows of x": on(x=lambda x: x[:33]),
    "rank": on(lora_a=lambda a: a[:8], lora_b=lambda b: b[:, :8]),
    "fp16": lambda *_: forward_call(fp16),
    "fp32": lambda *_: forward_call(fp32),
    "fp32 adapters": lambda *_: forward_call(bf16, fp32),
}
OF_BACKWARD = CHANGES | {
    "pitch of dy": on(dy=padded),
    "dy expanded": on(dy=lambda dy: dy[:1].expand(M, N)),
    "address of x": on(x=shifted),
    "rows": on(**dict.fromkeys(("dy", "x", "p"), lambda t: t[:33])),
    "fp16": lambda *_: backward_call(dtype=fp16),
    "fp32": lambda *_: backward_call(dtype=fp32),
    "fp32 adapters": lambda *_: backward_call(adapters=fp32),
    **{f"needs {needs}": (lambda *_, needs=needs: backward_call(needs)) for needs in NEEDS[1:]},
}
# Changes that change nothing about the launch: there is no TMA before Hopper.
NEUTRAL = {"nothing"} if ARCH >= 90 else {"nothing", "no TMA"}


@pytest.mark.parametrize(
    ("base", "change"),
    [
        *((forward_call, change) for change in OF_FORWARD),
        *((backward_call, change) for change in OF_BACKWARD),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_kept_plan_serves_just_its_own_kind(
    base: Callable[[], Any], change: str, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plans kept of the call before and of its own, a call is launched as by a fresh process.

    A fresh launch goes through Triton's own machinery, so this also compares the two ways to
    launch, down to every byte of the parameters.
    """
    call = base()
    unchanged = [launched(arena, call) for _ in range(2)]
    assert unchanged[0] == unchanged[1]
    with monkeypatch.context() as patch:
        changes = OF_FORWARD if base is forward_call else OF_BACKWARD
        changed = changes[change](call, patch)
        if change == "capture":  # each captured launch has a workspace of its own
            words = torch.zeros(999, dtype=torch.int32)
            patch.setattr(workspace, "_cut", lambda *_: words)
        warm = [launched(arena, changed) for _ in range(2)]
        backend._kept.clear()
        fresh = launched(arena, changed)
    assert warm == [fresh, fresh]
    assert (fresh == unchanged[0]) == (change in NEUTRAL)
    assert launched(arena, call) == unchanged[0]


@pytest.mark.parametrize("base", [forward_call, backward_call])
def test_a_seed_is_passed_from_where_it_is(base: Callable[[], Any], arena: Arena) -> None:
    calls = [base()._replace(dropout_p=0.25, seed=seed) for seed in (on_cpu(7), on_gpu(7))]
    fresh = []
    for call in calls:
        backend._kept.clear()
        fresh.append(launched(arena, call))
    assert fresh[0].function != fresh[1].function
    assert [launched(arena, call) for call in calls * 2] == fresh * 2


@pytest.mark.parametrize("base", [forward_call, backward_call])
def test_a_slice_of_x_is_launched_with_its_own_mask(base: Callable[[], Any], arena: Arena) -> None:
    call = base()._replace(dropout_p=0.25, seed=on_cpu(7))
    calls = [call._replace(first_column=first) for first in (None, 0, 16, 80)]
    fresh = []
    for call in calls:
        backend._kept.clear()
        fresh.append(launched(arena, call))
    assert fresh[0] == fresh[1]
    assert len({launch.function for launch in fresh}) == 3
    assert [launched(arena, call) for call in calls * 2] == fresh * 2


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


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_the_precision_of_fp32_products_is_read_anew(
    setting: str, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = forward_call(fp32)
    functions = []
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee", "tf32", setting):
            torch.backends.cuda.matmul.fp32_precision = precision
            functions.append(launched(arena, call).function)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert functions[:2] == functions[2:4]
    assert functions[0] != functions[1]
    assert functions[4] == functions[("ieee", "tf32").index(setting)]


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


def test_a_warm_call_asks_the_driver_for_nothing_but_the_launch(arena: Arena) -> None:
    calls = forward_call(), backward_call()
    for call in calls * 2:
        launched(arena, call)
    counts = gpu.record.maps, gpu.record.pointer_queries, gpu.record.modules
    for call in calls:
        launched(arena, call)
    assert counts == (gpu.record.maps, gpu.record.pointer_queries, gpu.record.modules)


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


def test_a_kept_plan_keeps_no_tensor_alive(arena: Arena) -> None:
    call = forward_call()
    for _ in range(2):
        launched(arena, call)
    assert backend._kept
    alive = [weakref.ref(t) for t in call[:4]]
    del call
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_a_kept_plan_keeps_its_kernel_loaded(arena: Arena) -> None:
    from lora_kernels.ops.lora_linear.triton import forward_kernel

    def forget() -> None:
        """Let Triton drop every kernel that nobody else holds."""
        forward_kernel.lora_linear_forward.device_caches.clear()
        gc.collect()

    forget()
    call = forward_call()
    plain = [launched(arena, call) for _ in range(2)]
    modules = gpu.record.modules
    forget()
    assert gpu.record.modules == modules
    assert launched(arena, call) == plain[0]


def test_few_plans_are_kept(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_MOST", 3)
    calls = [forward_call()._replace(x=random(m, K)) for m in range(1, 9)]
    first = [launched(arena, call) for call in calls]
    assert len(backend._kept) == 3
    assert [launched(arena, call) for call in calls] == first
    assert len(backend._kept) == 3


def test_threads_launch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_MOST", 2)  # evicted while others read
    calls = [forward_call()._replace(x=random(m, K)) for m in (16, 32, 48, 64)]
    failures: list[BaseException] = []

    def run(call: Forward) -> None:
        try:
            for _ in range(8):
                backend.forward(call)
        except BaseException as error:
            failures.append(error)

    monkeypatch.setattr(torch.Tensor, "new_empty", torch._C.TensorBase.new_empty)
    before = gpu.record.launches
    threads = [threading.Thread(target=run, args=(call,)) for call in calls * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert gpu.record.launches == before + 64
    rows = [struct.pack("<Q", call.x.data_ptr()) for call in calls]
    parameters = [seen(launch).parameters for launch in gpu.record.last]
    assert [sum(x in p for p in parameters) for x in rows] == [16] * 4


def test_a_profiler_hears_of_every_launch(arena: Arena) -> None:
    from triton import knobs

    call, heard = forward_call(), []
    plain = [launched(arena, call) for _ in range(2)]
    knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        assert [launched(arena, call) for _ in range(2)] == plain
    finally:
        knobs.runtime.launch_enter_hook.remove(heard.append)
    assert len(heard) == 2


def test_a_triton_that_nobody_has_read_launches_its_own_way(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = forward_call()
    known = [launched(arena, call) for _ in range(2)]
    backend._kept.clear()
    monkeypatch.setattr(direct, "VERSION", (direct.NEWEST[0], direct.NEWEST[1] + 1))
    assert [launched(arena, call) for _ in range(2)] == known
    assert backend._kept == {}


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
