"""What a fused model still does like PEFT: adapters, files, copies, and the way back."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from peft_models import (
    Block,
    add_other,
    assert_close_to_peft,
    assert_same_as_peft,
    assert_saves_as_peft,
    calls_of_lora_linear,
    fp64,
    llama,
    pair,
    peft_model,
    run,
    x_for,
)
from peft_models import one_thread as one_thread

from lora_kernels import LoRALinear
from lora_kernels.peft import FusedLinear, Report, from_peft, fuse, to_peft, unfuse, why_not
from lora_kernels.testing import assert_accurate


def test_merge_and_unmerge(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair()
    x = x_for(plain)
    for model in (fused, plain):
        model.merge_adapter()
    assert_same_as_peft(fused, plain, x)
    for model in (fused, plain):
        model.unmerge_adapter()
    with calls_of_lora_linear(monkeypatch) as calls:
        assert_close_to_peft(fused, plain, x)
    assert len(calls) == 2


def test_add_set_and_delete_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair()
    x = x_for(plain)
    first = run(fused, x)["y"]
    for model in (fused, plain):
        add_other(model, lora_alpha=11)
    with calls_of_lora_linear(monkeypatch) as calls:
        assert_close_to_peft(fused, plain, x)  # the new adapter, with its own rank and scaling
        assert not torch.allclose(first, run(fused, x)["y"])
        fused.set_adapter("default")
        assert torch.equal(first, run(fused, x)["y"])
        for model in (fused, plain):
            model.delete_adapter("default")
        assert_close_to_peft(fused, plain, x)
    assert len(calls) == 8


def test_an_adapter_that_targets_more_layers_needs_another_fuse() -> None:
    fused, plain = pair()
    for model in (fused, plain):
        add_other(model, target_modules=["up", "down", "head"])
    assert type(fused.base_model.model.head) is Linear
    assert len(fuse(fused).fused) == 3
    assert_close_to_peft(fused, plain, x_for(plain))


def test_one_of_two_active_adapters_in_a_layer_is_enough() -> None:
    fused, plain = pair()
    for model in (fused, plain):
        add_other(model, target_modules=["head"])
        model.base_model.set_adapter(["default", "other"])
    assert len(fuse(fused).fused) == 3
    assert_close_to_peft(fused, plain, x_for(plain))


def test_disable_adapter_context() -> None:
    fused, plain = pair()
    x = x_for(plain)
    with fused.disable_adapter(), plain.disable_adapter():
        assert why_not(fused.base_model.model.up) == "adapters are disabled"
        assert_same_as_peft(fused, plain, x)
    assert_close_to_peft(fused, plain, x)


def test_scaling_changes_are_followed() -> None:
    fused, plain = pair()
    for model in (fused, plain):
        model.base_model.model.up.scale_layer(3.0)
        model.base_model.model.down.set_scale("default", 0.25)
    assert_close_to_peft(fused, plain, x_for(plain))


def test_merge_and_unload() -> None:
    fused, plain = pair()
    got, expected = fused.merge_and_unload(), plain.merge_and_unload()
    assert type(got.up) is nn.Linear
    assert torch.equal(got(x_for(plain)), expected(x_for(plain)))


# --- What fusing leaves as it was ----------------------------------------------------------------


def test_fuse_twice_and_unfuse_restore_every_bit() -> None:
    model = peft_model()
    before = copy.deepcopy(model)
    tensors = {n: t.data_ptr() for n, t in model.state_dict(keep_vars=True).items()}
    assert fuse(model) == fuse(model)
    assert type(model.base_model.model.up) is FusedLinear
    assert isinstance(model.base_model.model.up, Linear)
    assert {n: t.data_ptr() for n, t in model.state_dict(keep_vars=True).items()} == tensors
    unfuse(model)
    unfuse(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [m.__dict__.keys() for m in model.modules()] == [
        m.__dict__.keys() for m in before.modules()
    ]
    assert_same_as_peft(model, before, x_for(model))


def test_a_forward_kept_from_a_fused_layer_outlives_unfuse() -> None:
    model = peft_model()
    layer = model.base_model.model.up
    x = x_for(model)
    expected = layer(x)
    fuse(model)
    kept = layer.forward
    unfuse(model)
    assert torch.equal(kept(x), expected)


def test_a_hook_of_accelerate_on_a_fused_layer_keeps_it_fused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused, plain = pair()
    add_hook_to_module(fused.base_model.model.up, ModelHook())
    with calls_of_lora_linear(monkeypatch) as calls:
        assert_close_to_peft(fused, plain, x_for(plain))
    assert len(calls) == 2


def test_a_deepcopy_stays_fused_and_a_pickle_is_fused_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused, plain = pair()
    unpickled = pickle.loads(pickle.dumps(fused))
    assert len(fuse(unpickled).fused) == 2
    for twin in (copy.deepcopy(fused), unpickled):
        assert type(twin.base_model.model.up) is FusedLinear
        with calls_of_lora_linear(monkeypatch) as calls:
            assert_close_to_peft(twin, plain, x_for(plain))
        assert len(calls) == 2


def test_a_copy_of_a_compiled_layer_computes_with_its_own_weights() -> None:
    """`nn.Module` leaves what `compile()` bound to the original out of copies and pickles."""
    fused, plain = pair()
    fused.base_model.model.up.compile(backend="aot_eager", fullgraph=True)
    x = x_for(plain)
    fused(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for model in (twin, changed := copy.deepcopy(plain)):
            model.base_model.model.up.lora_A["default"].weight.data.mul_(2)
        assert_close_to_peft(twin, changed, x)


def test_saved_files_are_those_of_peft(tmp_path: Path) -> None:
    fused, plain = pair(modules_to_save=["head"], use_rslora=True)
    assert_saves_as_peft(fused, plain, tmp_path)
    torch.manual_seed(0)  # the same base as pair()'s
    loaded = PeftModel.from_pretrained(Block(), tmp_path / "fused", is_trainable=True)
    again = copy.deepcopy(loaded)
    assert len(fuse(again).fused) == 2
    assert_close_to_peft(again, plain, x_for(plain))


def test_optimizer_state_survives() -> None:
    model, untouched = peft_model(), peft_model()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        run(model, x_for(model))
        optimizer.step()

    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, untouched)]
    for change in (fuse, unfuse):
        change(model)
        step(model, optimizers[0])
        step(untouched, optimizers[1])
    got, expected = (dict(m.named_parameters()) for m in (model, untouched))
    trained = [name for name in expected if expected[name].requires_grad]
    assert len(trained) == 4
    for name in trained:
        torch.testing.assert_close(got[name], expected[name])
        assert len(optimizers[0].state[got[name]]) == 3


# --- The report and the conversions --------------------------------------------------------------


def test_report_groups_layers_that_differ_only_in_numbers() -> None:
    model = llama()
    model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.requires_grad_()
    report = fuse(model)
    assert len(report.fused) == 13
    text = str(report)
    lines = text.splitlines()
    assert len(lines) == 1 + 8 + 1
    stem = "base_model.model.model.layers"
    assert [line.split(maxsplit=2) for line in lines if "up_proj" in line] == [
        ["1", f"{stem}.0.mlp.up_proj", "fused"],
        ["1", f"{stem}.1.mlp.up_proj", "base weight is trainable"],
    ]
    assert ["2", f"{stem}.*.self_attn.q_proj", "fused"] in [line.split() for line in lines]
    assert lines[-1] == "13 of 14 PEFT layers fused"


def test_report_says_when_there_is_nothing_to_fuse() -> None:
    report = fuse(nn.Linear(2, 2))
    assert report == Report([], {})
    assert str(report) == "no PEFT layer found, nothing is fused"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["up", "down"])
def test_converts_both_ways_without_a_copy(name: str, rslora: bool) -> None:
    layer = getattr(peft_model(use_rslora=rslora, lora_dropout=0.2).base_model.model, name)
    layer.eval().scale_layer(1.5)
    state = torch.get_rng_state()
    ours = from_peft(layer)
    back = to_peft(ours, "renamed")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(ours) is LoRALinear
    assert type(back) is Linear
    assert (ours.r, ours.use_rslora, ours.lora_dropout, ours.training) == (4, rslora, 0.2, False)
    assert ours.weight.data_ptr() == layer.weight.data_ptr() == back.weight.data_ptr()
    for twin in (ours, back):
        parameters = {id(p) for p in twin.parameters() if p.requires_grad}
        assert parameters == {id(p) for p in layer.parameters() if p.requires_grad}
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(4))
    assert torch.equal(back(x), layer(x))
    reference = copy.deepcopy(layer).to(fp64)(x.to(fp64))
    assert_accurate("y", ours(x), reference, layer(x))
    assert back.active_adapters == ["renamed"]
    assert back.scaling["renamed"] == layer.scaling["default"]


@pytest.mark.parametrize(
    ("options", "adapter", "reason"),
    [
        ({"use_dora": True}, "default", "it is DoRA"),
        ({}, "absent", "there is no adapter 'absent' in this layer"),
    ],
)
def test_from_peft_refuses(options: dict[str, Any], adapter: str, reason: str) -> None:
    layer = peft_model(**options).base_model.model.up
    with pytest.raises(ValueError, match=reason):
        from_peft(layer, adapter)


def test_from_peft_refuses_another_layer() -> None:
    with pytest.raises(TypeError, match=r"takes a PEFT lora\.Linear, got .*Linear"):
        from_peft(nn.Linear(2, 2))


def test_conversions_refuse_merged_layers() -> None:
    layer = peft_model().base_model.model.up
    ours = from_peft(layer)
    layer.merge()
    with pytest.raises(ValueError, match="adapters are merged"):
        from_peft(layer)
    layer.unmerge()
    ours.merge()
    with pytest.raises(ValueError, match="is merged"):
        to_peft(ours)
