"""`fuse(...).calls()` says what really ran, and `strict=True` forbids anything else."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft_models import (
    Block,
    K,
    calls_of_lora_linear,
    llama,
    pair,
    peft_model,
    x_for,
)
from peft_models import one_thread as one_thread
from torch import nn

from lora_kernels.peft import NotFused, fuse, unfuse

UP, DOWN = "base_model.model.up", "base_model.model.down"


def test_every_call_is_counted_with_its_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model()
    report = fuse(model)
    assert report.calls() == {UP: {}, DOWN: {}}
    x = x_for(model)
    with calls_of_lora_linear(monkeypatch) as calls:
        for _ in range(3):
            model(x)
    assert report.calls() == {UP: {"fused": 3}, DOWN: {"fused": 3}}
    assert report.calls().fused == len(calls) == 6
    with model.disable_adapter():
        model(x)
    model.merge_adapter()
    model(x)
    model.unmerge_adapter()
    model.base_model.model.up.base_layer.register_forward_hook(lambda *_: None)
    model(x)
    hooks = "base layer has hooks, which only its own call would run"
    rest = {"adapters are disabled": 1, "adapters are merged": 1}
    calls_now = report.calls()
    assert calls_now == {UP: {"fused": 3, **rest, hooks: 1}, DOWN: {"fused": 4, **rest}}
    assert (calls_now.fused, calls_now.fell_back) == (7, 5)
    text = str(calls_now)
    assert f"3 × fused, 1 × adapters are disabled, 1 × adapters are merged, 1 × {hooks}" in text
    assert text.endswith("7 of 12 calls ran fused")


def test_the_report_shows_what_a_wrapper_that_swaps_classes_leaves() -> None:
    model = peft_model()
    report = fuse(model)
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.__class__ = type(f"Sharded{type(layer).__name__}", (type(layer),), {})
    model(x_for(model))
    assert report.calls() == {UP: {"fused": 1}, DOWN: {"fused": 1}}


def test_a_forward_that_was_kept_runs_pefts_code_after_unfuse() -> None:
    model = peft_model()
    report = fuse(model)
    kept = model.base_model.model.up.forward  # by a wrapper that calls it later
    unfuse(model)
    assert torch.equal(kept(x_for(model)), peft_model().base_model.model.up(x_for(model)))
    assert report.calls().fused == 0


def test_counting_groups_layers_and_says_what_was_never_called() -> None:
    model = llama()
    report = fuse(model)
    assert str(fuse(nn.Linear(2, 2)).calls()) == "no layer is fused, no call was counted"
    assert "never called" in str(report.calls())
    model(torch.ones(1, 5, dtype=torch.long))
    rows = [line.split(maxsplit=2) for line in str(report.calls()).splitlines()]
    pattern = "base_model.model.model.layers.*.self_attn.q_proj"
    assert ["2", pattern, "1 × fused"] in rows


def test_counts_go_on_over_another_fuse_and_end_with_unfuse() -> None:
    model = peft_model()
    x = x_for(model)
    first = fuse(model)
    model(x)
    second = fuse(model)
    model(x)
    assert first.calls() == second.calls() == {UP: {"fused": 2}, DOWN: {"fused": 2}}
    unfuse(model)
    model(x)
    assert first.calls().fused == 4
    assert fuse(model).calls() == {UP: {}, DOWN: {}}


def test_a_copy_counts_for_itself_and_a_pickle_holds_no_counts() -> None:
    model = peft_model()
    report = fuse(model)
    twin = copy.deepcopy(model)
    twin(x_for(model))
    assert report.calls().fused == 0
    assert fuse(twin).calls().fused == 2
    loaded = pickle.loads(pickle.dumps(twin))
    assert not [key for key in vars(loaded.base_model.model.up) if "lora_kernels" in key]


def test_compiled_calls_are_not_counted_and_counts_do_not_recompile() -> None:
    torch._dynamo.reset()
    model = pair()[0]
    report = fuse(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = x_for(model)
    for _ in range(3):
        compiled(x)
        model(x)
    assert counter.frame_count == 1
    assert report.calls() == {UP: {"fused": 3}, DOWN: {"fused": 3}}
    torch._dynamo.reset()


# --- strict --------------------------------------------------------------------------------------


def test_strict_takes_all_or_nothing() -> None:
    model = peft_model()
    model.base_model.model.down.base_layer.register_forward_hook(lambda *_: None)
    types = [type(m) for m in model.modules()]
    with pytest.raises(NotFused, match=r"fuse\(strict=True\): .*down cannot be fused: base layer"):
        fuse(model, strict=True)
    assert [type(m) for m in model.modules()] == types
    assert len(fuse(model).fused) == 1


def test_strict_wants_something_to_fuse() -> None:
    with pytest.raises(NotFused, match="the model has no PEFT layer"):
        fuse(nn.Linear(2, 2), strict=True)
    with pytest.raises(TypeError, match=r"fuse takes an nn\.Module"):
        fuse(None)  # type: ignore[arg-type]


def test_strict_names_how_many_more() -> None:
    model = peft_model()
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.base_layer.weight.requires_grad = True
    with pytest.raises(NotFused, match=r"up cannot be fused: base weight is trainable, and 1 more"):
        fuse(model, strict=True)


def test_strict_raises_where_a_call_falls_back() -> None:
    model = peft_model()
    report = fuse(model, strict=True)
    x = x_for(model)
    model(x)
    model.base_model.model.down.lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(NotFused, match="a layer fused with strict=True cannot run fused: lora_A"):
        model(x)
    assert report.calls()[DOWN]["lora_A has hooks, which only its own call would run"] == 1
    fuse(model)  # takes it back for the layers that it fuses
    unfuse(model)
    model(x)


def test_strict_lets_a_caller_do_without_an_adapter() -> None:
    model, plain = peft_model(), peft_model()
    fuse(model, strict=True)
    x = x_for(model)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(x), plain(x))
    for m in (model, plain):
        m.merge_adapter()
    assert torch.equal(model(x), plain(x))


def test_strict_holds_in_a_deep_copy_and_under_compile() -> None:
    torch._dynamo.reset()
    model = peft_model(Block())
    fuse(model, strict=True)
    twin: Any = copy.deepcopy(model)
    twin.base_model.model.up.base_layer.register_forward_hook(lambda *_: None)
    for run in (twin, torch.compile(twin, backend="eager")):
        with pytest.raises(Exception, match="cannot run fused: base layer has hooks"):
            run(torch.randn(3, K))
    torch._dynamo.reset()
