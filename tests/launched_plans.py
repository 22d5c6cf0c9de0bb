"""The plans that Triton's launcher keeps between calls; `test_launch_plan.py` runs this file."""

import gc
import struct
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stubbed import (  # ahead of lora_kernels: the GPU must be there first
    ARCH,
    Arena,
    K,
    M,
    N,
    backward_call,
    bf16,
    forward_call,
    gpu,
    launched,
    on_cpu,
    on_gpu,
    other_device,
    padded,
    random,
    seen,
    shifted,
    transposed,
)
from stubbed import cold as cold
from stubbed import new_arena as new_arena

from lora_kernels.ops.lora_linear import triton as backend
from lora_kernels.ops.lora_linear import workspace
from lora_kernels.ops.lora_linear.config import TileConfig
from lora_kernels.ops.lora_linear.operands import Forward
from lora_kernels.ops.lora_linear.triton import direct

fp16, fp32 = torch.float16, torch.float32
NEEDS = [(dx, da, db) for dx in (1, 0) for da in (1, 0) for db in (1, 0) if dx or da or db]

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


def test_a_warm_call_asks_the_driver_for_nothing_but_the_launch(arena: Arena) -> None:
    calls = forward_call(), backward_call()
    for call in calls * 2:
        launched(arena, call)
    counts = gpu.record.maps, gpu.record.pointer_queries, gpu.record.modules
    for call in calls:
        launched(arena, call)
    assert counts == (gpu.record.maps, gpu.record.pointer_queries, gpu.record.modules)


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
