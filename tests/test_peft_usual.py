"""The usual call, found by a shorter way, and what a CPU composes of PyTorch's own operators."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear
from peft_models import (
    H,
    K,
    assert_close_to_peft,
    bf16,
    calls_of_lora_linear,
    fp16,
    fp32,
    fp64,
    pair,
    peft_model,
    randomise,
    run,
    x_for,
)
from peft_models import one_thread as one_thread

from lora_kernels.peft import FusedLinear, fuse, why_not
from lora_kernels.peft import layer as fused_layer

FEW = 64


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kernels.peft.small.FEW_ROWS", FEW)


def widened(model: PeftModel) -> PeftModel:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


USUAL: dict[str, Callable[[], PeftModel]] = {
    "fp32": peft_model,
    "fp64": lambda: peft_model(dtype=fp64),
    "bf16": lambda: widened(peft_model(dtype=bf16)).to(bf16),
    "fp16": lambda: widened(peft_model(dtype=fp16)).to(fp16),
    "bf16 beside fp32": lambda: widened(peft_model(dtype=bf16)),
    "dropout": lambda: peft_model(lora_dropout=0.5),
    "dropout, bf16 beside fp32": lambda: widened(peft_model(dtype=bf16, lora_dropout=0.5)),
    "dropout, evaluated": lambda: peft_model(lora_dropout=0.5).eval(),
    "an int for a scaling": lambda: peft_model(lora_alpha=8),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", USUAL.values(), ids=USUAL.keys())
def test_the_usual_answer_is_the_answer(
    make: Callable[[], PeftModel], autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    assert len(fuse(model).fused) == 2
    with torch.autocast("cpu", bf16, autocast):
        for layer in (model.base_model.model.up, model.base_model.model.down):
            x = x_for(model, 7, layer.in_features).to(layer.base_layer.weight.dtype)
            sooner = FusedLinear.usual(layer, x)
            with monkeypatch.context() as patch:
                patch.setattr(FusedLinear, "usual", staticmethod(lambda layer, x: None))
                found = fused_layer.find(layer, FusedLinear, x, (), {})
            assert (sooner is None) == isinstance(found, str)  # fp16 under another autocast
            if sooner is None:
                continue
            assert all(a is b or a == b for a, b in zip(sooner.frozen, found.frozen, strict=True))
            assert all(a is b or a == b for a, b in zip(sooner.adapter, found.adapter, strict=True))
            assert sooner.dtype == found.dtype


UNUSUAL: dict[str, Callable[[Linear], Any]] = {
    "a parameter that is no parameter": lambda layer: (
        layer.base_layer._parameters.pop("weight"),
        setattr(layer.base_layer, "weight", torch.ones(H, K)),
    ),
    "a bias that trains": lambda layer: layer.base_layer.bias.requires_grad_(),
    "a scaling that is a tensor": lambda layer: layer.scaling.update(default=torch.tensor(2.0)),
    "an infinite scaling": lambda layer: layer.scaling.update(default=float("inf")),
    "a scaling that is a bool": lambda layer: layer.scaling.update(default=True),
    "A and B of two dtypes": lambda layer: layer.lora_A.to(fp64),
    "a bias of B": lambda layer: layer.lora_B["default"].register_parameter(
        "bias", nn.Parameter(torch.ones(H))
    ),
    "a bias of A": lambda layer: layer.lora_A["default"].register_parameter(
        "bias", nn.Parameter(torch.ones(4))
    ),
    "a sparse A": lambda layer: sparse(layer.lora_A["default"], "weight"),
    "a sparse B": lambda layer: sparse(layer.lora_B["default"], "weight"),
    "a sparse bias": lambda layer: sparse(layer.base_layer, "bias"),
}


def sparse(module: nn.Module, name: str) -> None:
    made = getattr(module, name).detach().to_sparse()
    module.register_parameter(name, nn.Parameter(made, requires_grad=False))


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_what_is_not_usual_is_asked_about_in_full(change: Callable[[Linear], Any]) -> None:
    model = peft_model()
    layer = model.base_model.model.up
    fuse(model)
    assert FusedLinear.usual(layer, x_for(model, 7, K)) is not None
    change(layer)
    assert FusedLinear.usual(layer, x_for(model, 7, K)) is None


def test_a_bias_of_a_is_left_to_peft() -> None:
    fused, plain = pair()
    for model in (fused, plain):
        UNUSUAL["a bias of A"](model.base_model.model.up)
    x = x_for(plain, 7, K)
    assert why_not(fused.base_model.model.up, x) == "lora_A has a bias"
    same_bits(fused.base_model.model.up, plain.base_model.model.up, x)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_a_nested_x_is_left_to_peft(layout: torch.layout) -> None:
    fused, plain = pair()
    x = torch.nested.nested_tensor([torch.ones(2, K), torch.ones(3, K)], layout=layout)
    layer = fused.base_model.model.up
    assert "nested" in str(why_not(layer, x)).lower()
    for got, expected in zip(layer(x), plain.base_model.model.up(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=str)
def test_a_few_rows_without_an_adapter_are_no_fallback(options: dict[str, Any]) -> None:
    """An adapter switched on that other layers have alone, or none at all."""
    plain = peft_model(**options)
    plain.add_adapter("other", LoraConfig(r=3, target_modules=["down"]))
    fused = copy.deepcopy(plain)
    report = fuse(fused, strict=True)
    for active in ("other", []):
        for model in (fused, plain):
            model.base_model.set_adapter(active)
        same_bits(fused, plain, x_for(plain, 2, K))
    assert report.calls()["base_model.model.up"] == {"no active adapter": 2}


@pytest.mark.parametrize("make", [str, list, tuple, set])
def test_the_active_adapter_may_be_named_in_any_way(make: Callable[[Any], Any]) -> None:
    fused, plain = pair()
    active = "default" if make is str else make(["default"])
    fused.base_model.model.up._active_adapter = active
    assert why_not(fused.base_model.model.up, x_for(plain, 7, K)) is None
    assert_close_to_peft(fused, plain, x_for(plain, 7, K))


def same_bits(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    results = []
    for model in (fused, plain):
        torch.manual_seed(3)
        results.append(run(model, x))
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        assert torch.equal(results[0][name], expected), name


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("shape", [(1, K), (5, 3, K), (K,), (0, K)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", USUAL.values(), ids=USUAL.keys())
def test_a_few_rows_are_computed_as_by_peft_to_the_bit(
    make: Callable[[], PeftModel],
    autocast: bool,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mask of dropout, from the same seed, and the dtypes included; and it counts as fused."""
    plain = make()
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    dtype = plain.base_model.model.up.base_layer.weight.dtype
    x = x_for(plain, *shape).to(dtype)
    with torch.autocast("cpu", bf16, autocast), calls_of_lora_linear(monkeypatch) as calls:
        same_bits(fused, plain, x)
    assert not calls
    left = autocast and dtype == fp16  # then PEFT runs, as with any number of rows
    assert (report.calls().fused, report.calls().fell_back) == ((0, 2) if left else (2, 0))


@pytest.mark.usefixtures("few_rows")
def test_a_few_rows_run_none_of_pefts_modules() -> None:
    fused, _ = pair(lora_dropout=0.5)
    ran = []
    unhook = [nn.modules.module.register_module_forward_hook(lambda m, *_: ran.append(type(m)))]
    fused.base_model.model.up(x_for(fused, 2, K))  # a global hook: PEFT's code, and its modules
    assert {nn.Linear, nn.Dropout} <= set(ran)
    unhook[0].remove()
    called = []
    for module in fused.base_model.model.up.modules():
        if type(module) in (nn.Linear, nn.Dropout):
            # Not a patch that is seen: what is called then says so.
            module.__class__ = type(type(module).__name__, (type(module),), {})
            called.append(module)
    assert why_not(fused.base_model.model.up, x_for(fused, 2, K)) is not None
    for module in called:
        module.__class__ = type(module).__bases__[0]
    assert why_not(fused.base_model.model.up, x_for(fused, 2, K)) is None


@pytest.mark.usefixtures("few_rows")
def test_a_few_rows_are_twice_differentiable() -> None:
    fused, plain = pair()
    twice = []
    for model in (fused, plain):
        x = x_for(plain, 3, K).requires_grad_()
        a = model.base_model.model.up.lora_A["default"].weight
        (dx,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        twice.append(torch.autograd.grad(dx.pow(2).sum(), (x, a)))
    for got, expected in zip(*twice, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("few_rows")
def test_a_checkpoint_draws_the_mask_of_a_few_rows_again() -> None:
    fused, plain = pair(lora_dropout=0.5)
    around = lambda model: lambda x: checkpoint(model, x, use_reentrant=False)
    results = []
    for forward in (around(fused), around(plain), plain):
        torch.manual_seed(3)
        x = x_for(plain, 3, K).requires_grad_()
        results.append(torch.autograd.grad(forward(x).pow(2).sum(), x)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("few_rows")
def test_x_may_be_written_to_where_peft_lets_it() -> None:
    """PEFT saves what it made of x under dropout and beside wider adapters, and so does this."""
    for make in (USUAL["dropout"], USUAL["bf16 beside fp32"]):
        plain = make()
        fused = copy.deepcopy(plain)
        fuse(fused)
        results = []
        for model in (fused, plain):
            torch.manual_seed(3)
            x = x_for(plain, 3, K).requires_grad_()
            h = x * 1
            h += model.base_model.model.up(h)[:, :K]
            results.append(torch.autograd.grad(h.float().pow(2).sum(), x)[0])
        assert torch.equal(*results)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_size_alone_says_where_composing_ends(
    dtype: Any, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = peft_model(dtype=dtype, lora_dropout=dropout_p)
    model = model.to(dtype)
    fuse(model)
    layer = model.base_model.model.up
    elements = 1 << 18 if dropout_p else (1 << 21) // dtype.itemsize
    most = -(-elements // (K + H))  # rows
    for m, composed in ((most - 1, True), (most, False)):
        with calls_of_lora_linear(monkeypatch) as calls, torch.no_grad():
            layer(torch.zeros(m, K, dtype=dtype))
        assert len(calls) == (not composed), m


@pytest.mark.usefixtures("few_rows", "process_group")
def test_nothing_is_composed_in_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks seeded alike would drop the same elements."""
    fused, plain = pair()
    with calls_of_lora_linear(monkeypatch) as calls:
        assert_close_to_peft(fused, plain, x_for(plain, 3, K))
    assert len(calls) == 2


@pytest.mark.usefixtures("few_rows")
def test_a_compiled_model_composes_nothing_and_guards_no_size() -> None:
    fused, plain = pair()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused.base_model.model, backend=counter, fullgraph=True, dynamic=True)
    frames = set()
    for m in (5, 70, 40000):
        torch.testing.assert_close(compiled(x_for(plain, m, K)), plain(x_for(plain, m, K)))
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_an_adapter_switched_on_later_is_found() -> None:
    fused, plain = pair()
    for model in (fused, plain):
        model.add_adapter("other", LoraConfig(r=3, target_modules=["up", "down"]))
        randomise(model, seed=3, adapter=".other.").set_adapter("other")
    x = x_for(plain, 7, K)
    layer = fused.base_model.model.up
    found = FusedLinear.usual(layer, x)
    assert found is not None
    assert found.adapter.lora_a is layer.lora_A["other"].weight
    assert_close_to_peft(fused, plain, x)
