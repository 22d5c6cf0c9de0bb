"""The kinds of frozen layer and of adapter beyond `nn.Linear` and plain LoRA, against PEFT."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_config
from peft_models import (
    Block,
    Gpt2Block,
    H,
    K,
    N,
    WithBiases,
    add_other,
    assert_right,
    assert_same_as_peft,
    assert_saves_as_peft,
    bf16,
    calls_of_lora_linear,
    fp32,
    fp64,
    peft_model,
    randomise,
    run,
    x_for,
)
from peft_models import one_thread as one_thread
from torch.utils.checkpoint import checkpoint
from transformers import FalconConfig, FalconForCausalLM

from lora_kernels.peft import from_peft, fuse, why_not
from lora_kernels.testing import assert_accurate

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


class Alike(nn.Linear):
    """Keeps the forward of `nn.Linear`."""

    extra = 1


class AlikeBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Alike(K, H), Alike(H, K, bias=False)


def several(**options: Any) -> Callable[..., PeftModel]:
    both_of_them = {k: v for k, v in options.items() if k == "kasa_config"}

    def make(**more: Any) -> PeftModel:
        model = peft_model(**both_of_them, **more)
        add_other(model, **({"lora_alpha": 11} | options))
        randomise_diagonals(model)
        if more.get("dtype"):
            model.to(more["dtype"])
        model.base_model.set_adapter(["default", "other"])
        return model

    return make


def of(base: Callable[[], nn.Module] = Block, **options: Any) -> Callable[..., PeftModel]:
    def make(**more: Any) -> PeftModel:
        torch.manual_seed(0)
        model = peft_model(base(), **options, **more)
        randomise_diagonals(model)
        return model

    return make


def randomise_diagonals(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_diag" in name:
            parameter.data = torch.linspace(-1, 2, parameter.numel()).to(parameter)


KINDS: dict[str, Callable[..., PeftModel]] = {
    "two active": several(),
    "two active, one scaling": several(r=4, lora_alpha=6),
    "two active with lora_bias": several(lora_bias=True),
    "two active, KaSA": several(kasa_config=lora_config.KasaConfig()),
    "lora_bias": of(WithBiases, lora_bias=True),
    "lora_bias and base bias train": of(WithBiases, lora_bias=True, bias="all"),
    "base biases train": of(WithBiases, bias="lora_only"),
    "Conv1D": of(Gpt2Block, fan_in_fan_out=True),
    "Conv1D, bias trains": of(Gpt2Block, fan_in_fan_out=True, bias="all"),
    "subclass": of(AlikeBlock),
    "kasa": of(kasa_config=lora_config.KasaConfig()),
    "mica": of(init_lora_weights="mica"),
    "dora": of(use_dora=True),
    "dora, biases train": of(use_dora=True, bias="all"),
    "dora over Conv1D": of(Gpt2Block, use_dora=True, fan_in_fan_out=True),
    "bdlora": of(use_bdlora=lora_config.BdLoraConfig(["up"], ["down"], nblocks=2)),
}


def both(make: Callable[..., PeftModel], **options: Any) -> tuple[PeftModel, PeftModel]:
    plain = make(**options)
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 2
    return fused, plain


@pytest.mark.parametrize("shape", [(3, 5, K), (7, K)], ids=str)
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients(
    kind: str, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain = both(KINDS[kind], dtype=dtype)
    assert_right(fused, plain, copy.deepcopy(plain).to(fp64), x_for(plain, *shape), monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_all_bf16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = KINDS[kind]().to(bf16)
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 2
    assert_right(fused, plain, copy.deepcopy(plain).to(fp64), x_for(plain), monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = both(KINDS[kind])
    x = x_for(plain)
    exact = run(copy.deepcopy(plain).to(fp64), x.to(fp64))
    with torch.autocast("cpu", bf16):
        with calls_of_lora_linear(monkeypatch) as calls:
            got = run(fused, x)
        eager = run(plain, x)
    assert len(calls) == 2
    for name, expected in exact.items():
        assert got[name].dtype == eager[name].dtype, name
        assert_accurate(name, got[name], expected, eager[name].to(bf16))


@pytest.mark.filterwarnings("ignore:Already unmerged")
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "two active with lora_bias"])
def test_merge_unmerge_save_and_load(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain = both(KINDS[kind])
    assert_saves_as_peft(fused, plain, tmp_path)
    x = x_for(plain)
    before = run(fused, x)
    merged = copy.deepcopy(plain)
    for model in (fused, merged):
        model.merge_adapter()
    assert_same_as_peft(fused, merged, x)
    fused.unmerge_adapter()
    after = run(fused, x)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert_right(fused, plain, copy.deepcopy(plain).to(fp64), x, monkeypatch)


SINGLE = [kind for kind in KINDS if not kind.startswith("two")]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [*SINGLE, "two active"])
def test_checkpointing_with_dropout(kind: str, reentrant: bool) -> None:
    model, _ = both(KINDS[kind], lora_dropout=0.4)
    # Its first step works on a copy of x, so that autograd adds the parts of dx in another order.
    model(x_for(model).requires_grad_()).sum().backward()
    results = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        model.zero_grad()
        x = x_for(model).requires_grad_()
        y = call(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    (y, dx, *gradients), (again_y, again_dx, *again) = results
    assert torch.equal(y, again_y)
    assert all(map(torch.equal, gradients, again))
    if kind == "two active":  # the second forward works on a copy, too: see above
        torch.testing.assert_close(dx, again_dx)
    else:
        assert torch.equal(dx, again_dx)


@pytest.mark.parametrize("kind", SINGLE)
def test_dropout_is_on_the_adapters_input_alone(kind: str) -> None:
    """On average y is PEFT's without dropout: one layer, five standard errors."""
    fused, plain = both(KINDS[kind], lora_dropout=0.5)
    x = x_for(plain, 1, K).expand(4096, K)
    drawn = fused.base_model.model.up(x).detach()
    mean, deviation = drawn.mean(0), drawn.std(0) / len(x) ** 0.5
    expected = plain.eval().base_model.model.up(x[:1])[0]
    assert ((mean - expected).abs() <= 5 * deviation + 1e-5).all()
    assert (deviation > 0).any()


SEVERAL = ["two active", "two active with lora_bias", "two active, KaSA"]


def dropping(kind: str, other: float) -> Any:
    """A fused layer in float64 whose two adapters drop, the second one at a rate of its own."""
    model = KINDS[kind](lora_dropout=0.5).to(fp64)
    layer = model.base_model.model.up
    layer.lora_dropout["other"] = nn.Dropout(other)
    assert len(fuse(model.train()).fused) == 2
    return layer


@pytest.mark.parametrize("other", [0.0, 0.25])
@pytest.mark.parametrize("kind", SEVERAL)
def test_several_adapters_under_dropout(
    kind: str, other: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one draw of the masks y is linear in x and in each factor, so gradients are exact."""
    layer = dropping(kind, other)
    x = x_for(layer, 7, K).requires_grad_()
    dy = torch.linspace(-1, 1, 7 * H, dtype=fp64).reshape(7, H)
    tensors = {n: p for n, p in layer.named_parameters() if "lora_" in n and p.requires_grad}
    tensors["x"] = x
    assert len(tensors) >= 5

    def y() -> Tensor:
        torch.manual_seed(5)
        return layer(x)

    with calls_of_lora_linear(monkeypatch) as calls:
        start = y()
    assert len(calls) == 1
    gradients = torch.autograd.grad(start, list(tensors.values()), dy)
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        step = torch.linspace(-2, 1, tensor.numel(), dtype=fp64).reshape(tensor.shape)
        with torch.no_grad():
            tensor += step
            change = ((y() - start) * dy).sum()
            tensor -= step
        torch.testing.assert_close(change, (gradient * step).sum(), msg=name)


def test_each_of_several_adapters_drops_elements_of_its_own() -> None:
    layer = dropping("two active, one scaling", 0.5)
    for factor in (layer.lora_A, layer.lora_B):
        factor["other"].weight = factor["default"].weight
    x = x_for(layer, 7, K)
    added = []
    for active in (["default"], ["default", "other"]):
        layer.set_adapter(active)
        torch.manual_seed(5)
        added.append(layer(x) - layer.base_layer(x))
    assert not torch.allclose(added[1], 2 * added[0])
    layer.lora_dropout["default"] = nn.Identity()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_adapters_under_dropout_have_the_right_mean(kind: str) -> None:
    """As above: five standard errors."""
    layer = dropping(kind, 0.25)
    x = x_for(layer, 1, K).expand(4096, K)
    drawn = layer(x).detach()
    deviation = drawn.std(0) / len(x) ** 0.5
    expected = layer.eval()(x[:1])[0]
    assert ((drawn.mean(0) - expected).abs() <= 5 * deviation + 1e-5).all()
    assert (deviation > 0).any()


@pytest.mark.parametrize("base", [bf16, fp32], ids=str)
def test_several_adapters_under_dropout_keep_the_dtype(base: torch.dtype) -> None:
    plain = several()(dtype=base, lora_dropout=0.5)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(fp32)
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 2
    x = x_for(plain)
    for autocast in (False, True):
        with torch.autocast("cpu", bf16, autocast):
            got, expected = run(fused, x), run(plain, x)
            assert fused.base_model.model.up(x).dtype == plain.base_model.model.up(x).dtype
        assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in expected.items()}


@pytest.mark.parametrize("kind", ["two active", "lora_bias", "kasa", "bdlora", "mica", "dora"])
def test_a_few_rows_are_left_to_peft(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kernels.peft.small.FEW_ROWS", 64)
    fused, plain = both(KINDS[kind])
    layer, few = fused.base_model.model.up, x_for(plain, 7, 9, K)
    assert "fewer than 64 rows, for which PEFT's code is faster on a CPU" in why_not(layer, few)
    enough = -(-(1 << 21) // (4 * (K + H)))  # for 2 MiB of x and y, which DoRA does not need
    for rows in (64, enough - 1, enough):
        reason = why_not(layer, x_for(plain, rows, K))
        expected = f"fewer than {enough} rows, for which PEFT's code is faster on a CPU"
        composed = kind in ("mica", "dora")
        assert (reason is None) == (composed or rows == enough)
        assert composed or reason is None or expected in reason
    assert_same_as_peft(fused, plain, few)
    elsewhere = why_not(layer, few.to("meta"))
    if kind in ("mica", "dora"):
        assert elsewhere is None
    else:  # whose factors are made anew at every call
        assert "fewer than 64 rows" in str(elsewhere)


@pytest.mark.parametrize("layers", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_drawn_where_peft_draws_it(kind: str, layers: bool) -> None:
    """The Dropout modules alone may train (Monte Carlo dropout), or all but them."""
    plain = KINDS[kind](lora_dropout=0.5)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    x = x_for(plain)
    for drops in (True, False):
        for model in (fused, plain):
            for module in model.train(layers).modules():
                if isinstance(module, nn.Dropout):
                    module.train(drops)
        expected = plain(x)
        drawn = not torch.equal(plain(x), expected)
        assert (not torch.equal(fused(x), fused(x))) is drawn
        assert drawn or not (drops and layers)
        if not drawn:
            torch.testing.assert_close(fused(x), expected)
    assert all(outcomes.keys() == {"fused"} for outcomes in report.calls().values())


def test_kasa_waits_for_its_truncation() -> None:
    model = KINDS["kasa"]()
    layer = model.base_model.model.up
    layer._lora_kasa_truncation_deferred.add("default")
    assert why_not(layer) == "KaSA has not truncated the base weight yet"


def test_falcon(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True
    )
    base = FalconForCausalLM(config)
    plain = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(plain).eval()
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 8
    tokens = torch.arange(12).reshape(2, 6)
    losses = []
    with calls_of_lora_linear(monkeypatch) as calls:
        for model in (fused, plain):
            losses.append(model(input_ids=tokens, labels=tokens).loss)
            losses[-1].backward()
    assert len(calls) == 8
    torch.testing.assert_close(*losses)
    for got, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-6)
    # Its bias is added outside its product, where autocast does not convert it.
    layer = fused.base_model.model.transformer.h[0].self_attention.dense
    x = torch.ones(3, 32)
    for now, reason in ((bf16, "base layer adds a float32 bias to a bfloat16 product"), (None, "")):
        with torch.autocast("cpu", now or bf16, now is not None):
            assert (why_not(layer, x) or "") == reason
            expected = plain.base_model.model.transformer.h[0].self_attention.dense(x)
            assert layer(x).dtype == expected.dtype
    layer.base_layer.bias.data = layer.base_layer.bias.data.to(bf16)
    with torch.autocast("cpu", bf16):
        assert why_not(layer, x) is None
        assert layer(x).dtype == bf16


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("lora_bias", "derived, or it has a bias"),
        ("base biases train", "base bias is trainable"),
        ("kasa", "derived, or it has a bias"),
        ("Conv1D", "base layer is a .*Conv1D"),
    ],
)
def test_from_peft_refuses_more_than_a_lora_linear(kind: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_peft(KINDS[kind]().base_model.model.up)


@pytest.mark.parametrize("kind", ["two active", "lora_bias and base bias train", "kasa", "bdlora"])
def test_compiles_without_a_graph_break(kind: str) -> None:
    fused, plain = both(KINDS[kind])
    torch._dynamo.reset()
    compiled = torch.compile(fused.base_model.model, backend="aot_eager", fullgraph=True)
    x = x_for(plain, 4, K)
    assert compiled(x).shape == (4, N)
    reference, eager = copy.deepcopy(plain).to(fp64)(x.to(fp64)), plain(x)
    assert_accurate("y", compiled(x).detach(), reference.detach(), eager.detach())
