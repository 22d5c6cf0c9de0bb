"""Layers that read one x add up their dx in their own products, and nobody sees a difference."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft_models import (
    H,
    K,
    N,
    bf16,
    fp32,
    fp64,
    llama,
    one_thread,
    peft_model,
    randomise,
    run,
    x_for,
)
from readers import check_readers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels.ops.lora_linear import reference, shared_dx
from lora_kernels.peft import fuse, unfuse
from lora_kernels.testing import Case, assert_accurate

__all__ = ["one_thread"]  # a fixture

MEMBERS = ("q", "k", "v")


@pytest.fixture(autouse=True)
def small_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the small x of these tests be shared."""
    monkeypatch.setattr(shared_dx, "FEW_BYTES", 1)


@pytest.fixture
def onto(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note for each shared backward whether it added to the dx of another."""
    seen: list[bool] = []
    add = shared_dx.add

    def spy(node: Any, call: Any, backward: Callable[..., Any]) -> Any:
        def noted(call: Any, onto: Tensor | None = None) -> Any:
            seen.append(onto is not None)
            return backward(call, onto)

        return add(node, call, noted)

    monkeypatch.setattr(shared_dx, "add", spy)
    return seen


class Readers(nn.Module):
    """Three layers that read one h, and a residual that reads it, too."""

    order = MEMBERS
    between: Callable[[Tensor], Tensor] = staticmethod(lambda h: h)
    watch: Callable[[str, Tensor], Tensor] = staticmethod(lambda name, t: t)

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, H), nn.Linear(K, N), nn.Linear(K, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.watch("h", x * 1.5)
        made = []
        for name in self.order:
            made.append(self.watch(name, getattr(self, name)(h)))
            h = self.between(h)
        return torch.cat([*made, torch.tanh(h)], -1)


def models(base: nn.Module | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """The same adapters three times: sharing, fused without sharing, and PEFT's own."""
    targets = {"target_modules": [*MEMBERS]}
    plain = peft_model(base or Readers(), **(targets | options))
    sharing, apart = copy.deepcopy(plain), copy.deepcopy(plain)
    assert [len(group) for group in fuse(sharing).may_share] == [3]
    assert fuse(apart, share_inputs=False).may_share == []
    return sharing, apart, plain


def inner(model: Any) -> Any:
    return model.base_model.model


def assert_right(
    got: dict[str, Tensor], apart: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Judge every result by float64; those that no sum enters are the unshared ones bit for bit."""
    assert got.keys() == apart.keys() == exact.keys()
    for name, expected in exact.items():
        assert got[name].dtype == apart[name].dtype
        assert_accurate(name, got[name], expected, apart[name])
        if name != "dx":
            assert torch.equal(got[name], apart[name]), name


def judge(sharing: Any, apart: Any, plain: Any, **inputs: Any) -> None:
    x = x_for(plain)
    exact = copy.deepcopy(plain).to(fp64)
    assert_right(run(sharing, x, **inputs), run(apart, x, **inputs), run(exact, x.to(fp64)))


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


# --- Passes that repeat, nest or fail ------------------------------------------------------------


def test_a_retained_graph_gives_the_same_again() -> None:
    sharing, _, plain = models()
    x = x_for(plain).requires_grad_()
    loss = sharing(x).square().sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("where", MEMBERS)
def test_a_pass_that_fails_leaves_nothing_behind(where: str) -> None:
    sharing, _, plain = models()
    expected = run(sharing, x_for(plain))["dx"]
    broken = [True]

    def fail(dy: Tensor) -> None:
        if broken:
            broken.clear()
            raise RuntimeError("planted")

    def watch(name: str, t: Tensor) -> Tensor:
        if name == where:
            t.register_hook(fail)
        return t

    inner(sharing).watch = watch
    x = x_for(plain).requires_grad_()
    y = sharing(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=fp64).reshape(y.shape)
    loss = (y.to(fp64) * weights).sum()
    with pytest.raises(RuntimeError, match="planted"):
        loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(x.grad, expected)


def test_a_pass_inside_a_pass_keeps_its_own_sum() -> None:
    sharing, _, plain = models()
    nested: list[Tensor] = []
    x = x_for(plain).requires_grad_()

    def watch(name: str, t: Tensor) -> Tensor:
        if name == "k":  # with v's part already in the outer sum, q's not yet

            def again(dy: Tensor) -> None:
                if not nested:
                    nested.append(dy)
                    nested[0] = torch.autograd.grad(loss, x, retain_graph=True)[0]

            t.register_hook(again)
        return t

    inner(sharing).watch = watch
    loss = sharing(x).square().sum()
    loss.backward(retain_graph=True)
    assert torch.equal(nested[0], x.grad)
    assert torch.equal(torch.autograd.grad(loss, x)[0], x.grad)


def test_threads_share_nothing() -> None:
    sharing, _, plain = models()
    shapes = [(2, 4, K), (3, 5, K), (7, K), (2, 2, 2, K)]
    # The parameters' own gradients would be summed by all threads.
    for p in sharing.parameters():
        p.requires_grad_(False)

    def dx(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(sharing(x).square().sum(), x)[0]

    inputs = [x_for(plain, *shape) for shape in shapes]
    expected = [dx(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        bound = 1e-5 * expected[i].abs().max()  # a BLAS in another thread may sum otherwise
        wrong.extend(i for _ in range(20) if (dx(inputs[i]) - expected[i]).abs().max() > bound)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- Hooks ---------------------------------------------------------------------------------------


def test_hooks_on_x_see_the_whole_gradient_once() -> None:
    seen = []
    sharing, apart, plain = models()
    for model in (sharing, apart):
        gradients: list[Tensor] = []

        def watch(name: str, t: Tensor, gradients: list[Tensor] = gradients) -> Tensor:
            if name == "h":
                t.retain_grad()
                t.register_hook(gradients.append)
                gradients.append(t)
            return t

        inner(model).watch = watch
        x = x_for(plain).requires_grad_()
        model(x).square().sum().backward()
        h, *hooked = gradients
        assert len(hooked) == 1
        assert torch.equal(hooked[0], h.grad)
        seen.append((h.grad, x.grad))
    for got, expected in zip(*seen, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("full", [True, False])
def test_module_hooks_see_their_layers_own_dx(full: bool, onto: list[bool]) -> None:
    seen: list[list[Any]] = [[], []]
    sharing, apart, plain = models()
    for model, gradients in zip((sharing, apart), seen, strict=True):
        layer = inner(model).k
        register = layer.register_full_backward_hook if full else layer.register_backward_hook
        register(lambda _, dx, dy, gradients=gradients: gradients.extend([dx[0], dy[0]]))
        model(x_for(plain).requires_grad_()).square().sum().backward()
    assert onto.count(True) == 1
    assert len(seen[0]) == 2
    for got, expected in zip(*seen, strict=True):
        assert torch.equal(got, expected)


def test_forward_hooks_may_exchange_x() -> None:
    trio = models()
    for model in trio:
        inner(model).v.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
        inner(model).q.register_forward_hook(lambda module, inputs, y: y + inputs[0].sum())
    judge(*trio)


# --- A caller that writes to x -------------------------------------------------------------------


def test_an_x_written_to_between_readers(onto: list[bool]) -> None:
    """Adapters wider than x: there PEFT keeps a copy of its own, too."""
    trio = models(dtype=bf16)
    for model in trio:
        inner(model).between = lambda h: h.add_(1)
        for name, p in model.named_parameters():
            p.data = p.data.float() if "lora_" in name else p.data
    sharing, apart, plain = trio
    x = x_for(plain).to(bf16)
    exact = copy.deepcopy(plain).to(fp64)
    inner(exact).between = lambda h: h + 1  # where PEFT keeps x itself
    for _ in range(2):
        assert_right(run(sharing, x), run(apart, x), run(exact, x.to(fp64)))
    assert onto == [False] * 6


def test_a_write_after_all_readers_is_noticed() -> None:
    sharing, _, plain = models()
    kept = []
    inner(sharing).watch = lambda name, t: kept.append(t) or t
    y = sharing(x_for(plain).requires_grad_())
    kept[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_first_step_gives_the_bits_of_the_second(dropout: float, onto: list[bool]) -> None:
    """In the first, layers work on a copy of x where PEFT keeps another tensor than x."""
    sharing, *_ = models(dtype=bf16, lora_dropout=dropout)
    for name, p in sharing.named_parameters():
        p.data = p.data.float() if "lora_" in name else p.data
    steps = []
    for _ in range(3):
        torch.manual_seed(1)
        steps.append(run(sharing.train(), x_for(sharing).to(bf16)))
    assert onto == [False, True, True] * 3
    for name, first in steps[0].items():
        assert torch.equal(first, steps[1][name]), name
        assert torch.equal(first, steps[2][name]), name


# --- Checkpointing, DDP, autocast, transforms, tools ---------------------------------------------


class Checkpointed(Readers):
    """Recomputed in the backward: the whole of it, or one of its readers."""

    what, reentrant = "all", False

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "all":
            return checkpoint(super().forward, x, use_reentrant=self.reentrant)
        h = x * 1.5
        made = [
            checkpoint(layer, h, use_reentrant=self.reentrant) if name == self.what else layer(h)
            for name, layer in ((name, getattr(self, name)) for name in ("k", "q", "v"))
        ]
        return torch.cat([*made, torch.tanh(h)], -1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("what", ["all", "k", "q", "v"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing(what: str, reentrant: bool, dropout: float) -> None:
    trio = models(Checkpointed(), lora_dropout=dropout)
    for model in trio:
        inner(model).what, inner(model).reentrant = what, reentrant
        model.train()
    if not dropout:
        judge(*trio)
        return
    steps = []  # PEFT draws other masks
    for model in trio[:2]:
        torch.manual_seed(3)
        steps.append(run(model, x_for(model)))
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[1][name])


def test_distributed_data_parallel(tmp_path: Path, onto: list[bool]) -> None:
    sharing, _, plain = models()
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        wrapped = DistributedDataParallel(sharing, find_unused_parameters=True)
        got = run(wrapped, x_for(plain))
    finally:
        dist.destroy_process_group()
    assert onto == [False, True, True]
    expected = run(sharing, x_for(plain))
    for name in got:
        assert torch.equal(got[name], expected[name.removeprefix("module.")]), name


@pytest.mark.parametrize("adapters", [fp32, bf16], ids=str)
def test_under_autocast_x_is_converted_and_kept_once(
    adapters: torch.dtype, onto: list[bool]
) -> None:
    trio = models()
    kept = []
    for model in trio:
        for name, p in model.named_parameters():
            p.data = p.data.to(adapters) if "lora_" in name else p.data
        saved: set[int] = set()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (t.shape[-1] == K and saved.add(t.data_ptr())) or t, lambda t: t
        )
        with torch.autocast("cpu", bf16), hooks:
            y = model(x_for(plain := trio[2]).to(fp32).requires_grad_())
        kept.append(len(saved))
        del y
    assert kept[0] == kept[1] - 2
    sharing, apart, plain = trio
    x = x_for(plain).to(fp32)
    exact = run(copy.deepcopy(plain).to(fp64), x.to(fp64))
    with torch.autocast("cpu", bf16):
        got, other = run(sharing, x), run(apart, x)
    assert onto == [False, True, True]
    for name, expected in exact.items():
        assert got[name].dtype == other[name].dtype
        assert_accurate(name, got[name], expected, other[name].to(bf16))


def test_batched_gradients_and_second_derivatives_are_as_ever() -> None:
    sharing, apart, plain = models()
    results = []
    for model in (sharing, apart, plain):
        x = x_for(plain).requires_grad_()
        y = model(x)
        dy = torch.randn(4, *y.shape, generator=torch.Generator().manual_seed(0))
        batched = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)[0]
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append((batched, dx, *torch.autograd.grad(dx.square().sum(), [x, *trained])))
    for got, *others in zip(*results, strict=True):
        for expected in others:
            assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_transforms_and_tools_see_what_they_saw() -> None:
    sharing, apart, plain = models()
    x = x_for(plain)
    results = []
    for model in (sharing, apart):
        gradient = torch.func.grad(lambda x, model=model: model(x).square().sum())(x)
        with FlopCounterMode(display=False) as flops:
            run(model, x)
        results.append((gradient, flops.get_total_flops()))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_compiles_without_a_graph_break(onto: list[bool]) -> None:
    sharing, apart, plain = models()
    torch._dynamo.reset()
    compiled = torch.compile(inner(sharing), backend="aot_eager", fullgraph=True)
    got, expected = run(compiled, x_for(plain)), run(apart, x_for(plain))
    torch.testing.assert_close(got["dx"], expected["dx"])
    assert onto == []


def test_compiled_autograd_sums_as_ever() -> None:
    sharing, apart, plain = models()
    results = []
    for model in (sharing, apart):
        x = x_for(plain).requires_grad_()
        loss = model(x).square().sum()
        compiler = torch.compile(backend="eager")
        with torch._dynamo.compiled_autograd._enable(compiler):
            loss.backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


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
        (_stale, lambda: test_a_pass_that_fails_leaves_nothing_behind("k")),
        (_stale, test_a_pass_inside_a_pass_keeps_its_own_sum),
        (_unasked, test_a_retained_graph_gives_the_same_again),
        (_unasked, lambda: test_a_part_of_the_gradients("A")),
    ],
)
def test_a_planted_mistake_is_noticed(
    mistake: Any, test: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_dx, "add", mistake)
    with pytest.raises(AssertionError):
        test()
