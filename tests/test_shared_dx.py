"""Layers that read one x add up their dx in their own products, and nobody sees a difference."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import test_shared_dx_passes as passes
import torch
from peft_models import bf16, fp32, fp64, llama, one_thread, peft_model, randomise, run, x_for
from readers import check_readers
from sharing_models import MEMBERS, Readers, assert_right, inner, judge, models, onto, small_x
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lora_kernels.ops.lora_linear import reference, shared_dx
from lora_kernels.peft import fuse, unfuse
from lora_kernels.testing import Case, assert_accurate

__all__ = ["one_thread", "onto", "small_x"]  # fixtures


@pytest.mark.parametrize("order", [MEMBERS, ("v", "q", "k"), ("k", "q", "v", "q")], ids=str)
@pytest.mark.parametrize("dtype", [fp32, bf16, fp64], ids=str)
def test_all_add_to_one_dx(dtype: torch.dtype, order: tuple[str, ...], onto: list[bool]) -> None:
    trio = models(dtype=dtype)
    for model in trio:
        inner(model).order = order
    judge(*trio)
    assert onto == [False] + [True] * (len(order) - 1)


def test_autograd_adds_less() -> None:
    sharing, apart, plain = models()
    adds = []
    for model in (sharing, apart):
        y = model(x_for(plain).requires_grad_() * 1)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            y.sum().backward()
        names = ("aten::add", "aten::add_")
        adds.append(sum(e.count for e in profiled.key_averages() if e.key in names))
    assert adds == [1, 3]  # one for the residual


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_calls_of_the_operator_sum_as_layers_do(
    dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do on the kernels, in `test_ptx_kernels.py` and `triton_interpreted.py`."""
    check_readers(reference.BACKEND, Case(40, 24, 48, 8, bf16, None, True, dropout_p), monkeypatch)


@pytest.mark.parametrize("rank", [4, 20])
def test_wide_sums_are_as_right_as_autograds(rank: int) -> None:
    torch.manual_seed(0)
    base = Readers()
    for name in MEMBERS:
        setattr(base, name, nn.Linear(96, 700))
    trio = models(base, dtype=bf16, r=rank)
    x = torch.randn(64, 96).to(bf16)
    exact = copy.deepcopy(trio[2]).to(fp64)
    assert_right(run(trio[0], x), run(trio[1], x), run(exact, x.to(fp64)))


# --- Members that take no part -------------------------------------------------------------------


def test_a_member_without_gradient(onto: list[bool]) -> None:
    trio = models()
    for model in trio:
        inner(model).watch = lambda name, t: t.detach() if name == "k" else t
        for p in inner(model).q.parameters():
            p.requires_grad_(False)  # passes dx on nevertheless
    judge(*trio)
    assert onto == [False, True]


def test_a_member_that_peft_runs(onto: list[bool]) -> None:
    trio = models()
    for model in trio:
        inner(model).k.base_layer.register_forward_hook(lambda *_: None)
    judge(*trio)
    assert onto == [False, True]


@pytest.mark.parametrize("wanted", ["x", "h", "A", "h, then x"])
def test_a_part_of_the_gradients(wanted: str) -> None:
    sharing, apart, plain = models()
    results = []
    for model in (sharing, apart):
        kept: dict[str, Tensor] = {}
        inner(model).watch = lambda name, t, kept=kept: kept.setdefault(name, t)
        x = x_for(plain).requires_grad_()
        loss = model(x).square().sum()
        of = {"x": x, "h": kept["h"], "A": inner(model).k.lora_A["default"].weight}
        for name in wanted.split(", then "):
            gradient = torch.autograd.grad(loss, of[name], retain_graph=True)
        loss.backward()  # nothing of the first is left
        results.append((*gradient, x.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


# --- Where nothing is shared ---------------------------------------------------------------------


def test_what_is_not_shared(onto: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    sharing, apart, plain = models()
    run(apart, x_for(plain))
    with torch.no_grad():
        sharing(x_for(plain))
    layer = inner(sharing)
    leaf = x_for(plain).requires_grad_()  # nothing above it: its node would keep it for ever
    (layer.q(leaf).sum() + layer.k(leaf).sum()).backward()
    monkeypatch.setattr(shared_dx, "FEW_BYTES", x_for(plain).nbytes + 1)
    run(sharing, x_for(plain))
    assert onto == []


def test_the_mark_goes_with_the_fused_layer(onto: list[bool]) -> None:
    sharing, _, plain = models()
    run(copy.deepcopy(sharing), x_for(plain))
    assert onto == [False, True, True]
    loaded = pickle.loads(pickle.dumps(inner(sharing).q))
    assert not any("_lora_kernels" in name for name in loaded.__dict__)
    unfuse(sharing)
    assert not any("_lora_kernels" in name for name in inner(sharing).q.__dict__)
    assert fuse(sharing).may_share
    assert not fuse(sharing, share_inputs=False).may_share
    run(sharing, x_for(plain))
    assert len(onto) == 3


def test_nothing_outlives_x() -> None:
    sharing, *_ = models()
    layer = inner(sharing)
    gc.collect()
    gc.disable()
    try:
        for keep_graph in (False, True):
            x = x_for(sharing).requires_grad_() * 1
            y = layer.q(x).sum() + layer.k(x).sum()
            stand_in = shared_dx._thread.latest.stand_in
            assert stand_in is not None
            node = weakref.ref(stand_in.grad_fn)
            del stand_in
            if not keep_graph:
                del y
                assert node() is not None  # x may have other readers yet
                del x
            else:
                del x
                assert shared_dx._thread.latest.stand_in is None
                assert node() is not None  # y's graph holds it
                del y
            assert shared_dx._thread.latest.stand_in is None
            assert node() is None
    finally:
        gc.enable()


def test_nothing_outlives_an_x_that_dies_in_another_thread() -> None:
    sharing, *_ = models()
    held = [x_for(sharing).requires_grad_() * 1]
    inner(sharing).q(held[0])
    assert shared_dx._thread.latest.stand_in is not None
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert shared_dx._thread.latest.stand_in is None


def test_a_language_model_trains_the_same(onto: list[bool]) -> None:
    sharing = randomise(llama())
    apart, exact = copy.deepcopy(sharing), copy.deepcopy(sharing).to(fp64)
    groups = fuse(sharing).may_share
    assert [len(group) for group in groups] == [4, 2] * 2
    fuse(apart, share_inputs=False)
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    gradients = []
    for model in (sharing, exact, apart):
        model.enable_input_require_grads()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert onto.count(True) == 2 * (2 + 1)
    for name, got in gradients[0].items():
        assert_accurate(name, got, gradients[1][name], gradients[2][name])


def test_a_quantised_group(onto: list[bool]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base: Any = Readers()
    base.is_loaded_in_4bit = True
    for name in MEMBERS:
        packed = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=fp32, quant_type="nf4")
        packed.load_state_dict({"weight": torch.randn(32, 64)})
        setattr(base, name, packed.to("cpu"))
    sharing = peft_model(base, target_modules=[*MEMBERS]).train()
    apart = copy.deepcopy(sharing)
    assert fuse(sharing).may_share
    fuse(apart, share_inputs=False)
    exact = copy.deepcopy(apart)
    for dtype in (fp32, bf16):
        x = torch.randn(70, 64).to(dtype)
        got, other, expected = run(sharing, x), run(apart, x), run(exact, x.float())
        assert got.keys() == other.keys()
        for name in got:
            assert got[name].dtype == other[name].dtype
            assert_accurate(name, got[name], expected[name].double(), other[name])
    assert onto == [False, True, True] * 2


# --- Planted mistakes ----------------------------------------------------------------------------


def _lost(node: Any, call: Any, backward: Callable[..., Any]) -> Any:
    task = torch._C._current_graph_task_id()
    gradients = backward(call, None)
    node.sums.setdefault(task, gradients.dx)
    return gradients._replace(dx=None)


def _twice(node: Any, call: Any, backward: Callable[..., Any]) -> Any:
    task = torch._C._current_graph_task_id()
    gradients = backward(call, node.sums.get(task))
    node.sums[task] = gradients.dx
    return gradients


def _stale(node: Any, call: Any, backward: Callable[..., Any]) -> Any:
    task = torch._C._current_graph_task_id()
    gradients = backward(call, next(iter(node.sums.values()), None))
    node.sums[task] = gradients.dx
    return gradients._replace(dx=None)


def _unasked(node: Any, call: Any, backward: Callable[..., Any]) -> Any:
    task = 0
    gradients = backward(call, node.sums.get(task))
    node.sums[task] = gradients.dx
    node.sums[torch._C._current_graph_task_id()] = gradients.dx
    return gradients._replace(dx=None)


@pytest.mark.parametrize(
    ("mistake", "test"),
    [
        (_lost, lambda: test_all_add_to_one_dx(fp32, MEMBERS, [False, True, True])),
        (_twice, lambda: test_all_add_to_one_dx(fp32, MEMBERS, [False, True, True])),
        (_stale, lambda: passes.test_a_pass_that_fails_leaves_nothing_behind("k")),
        (_stale, passes.test_a_pass_inside_a_pass_keeps_its_own_sum),
        (_unasked, passes.test_a_retained_graph_gives_the_same_again),
        (_unasked, lambda: test_a_part_of_the_gradients("A")),
    ],
)
def test_a_planted_mistake_is_noticed(
    mistake: Any, test: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_dx, "add", mistake)
    with pytest.raises(AssertionError):
        test()
