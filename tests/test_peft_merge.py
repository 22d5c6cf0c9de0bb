"""Merging fused models through PEFT's API: its own bits merged, the frozen ones back after."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import PeftModel
from peft.tuners.lora import config as lora_config
from peft_models import (
    Gpt2Block,
    WithBiases,
    add_other,
    bf16,
    fp16,
    fp32,
    fp64,
    peft_model,
    x_for,
)
from peft_models import one_thread as one_thread

from lora_kernels.peft import fuse, merge_loss, unfuse
from lora_kernels.peft.merging import _fingerprint
from lora_kernels.peft.parts import without_ours

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Already unmerged")


def two_active(**options: Any) -> PeftModel:
    model = peft_model(**options)
    add_other(model)
    model.base_model.set_adapter(["default", "other"])
    return model


KINDS: dict[str, Callable[..., PeftModel]] = {
    "plain": peft_model,
    "two active": two_active,
    "lora_bias": lambda **o: peft_model(WithBiases(), lora_bias=True, **o),
    "Conv1D": lambda **o: peft_model(Gpt2Block(), fan_in_fan_out=True, **o),
    "dora": lambda **o: peft_model(use_dora=True, **o),
    "kasa": lambda **o: peft_model(kasa_config=lora_config.KasaConfig(), **o),
}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in got)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_cycles_restore_every_bit(kind: str, dtype: torch.dtype, safe: bool) -> None:
    plain = KINDS[kind](dtype=dtype)
    fused = copy.deepcopy(plain)
    fuse(fused)
    frozen = bits(fused)
    pointers = {n: p.data_ptr() for n, p in fused.named_parameters()}
    plain.merge_adapter(safe_merge=safe)
    merged = bits(plain)
    for _ in range(1000 if (kind, dtype, safe) == ("plain", bf16, False) else 3):
        fused.merge_adapter(safe_merge=safe)
        assert same(bits(fused), merged)
        fused.unmerge_adapter()
        assert same(bits(fused), frozen)
    if kind in ("plain", "two active", "lora_bias", "Conv1D") and not safe:
        assert {n: p.data_ptr() for n, p in fused.named_parameters()} == pointers
    assert [without_ours(m.__dict__).keys() for m in fused.modules()] == [
        m.__dict__.keys() for m in plain.modules()
    ]


def test_peft_s_own_unmerge_does_not() -> None:
    """Else this file tests nothing."""
    plain = peft_model(dtype=bf16)
    frozen = bits(plain)
    plain.merge_adapter()
    plain.unmerge_adapter()
    assert not same(bits(plain), frozen)


def test_adapters_merged_one_after_another() -> None:
    model = two_active(dtype=bf16)
    fuse(model)
    frozen = bits(model)
    for name in ("default", "other"):
        model.merge_adapter(adapter_names=[name])
    model.unmerge_adapter()
    assert same(bits(model), frozen)


def test_disabling_adapters_unmerges_exactly() -> None:
    model = peft_model(dtype=bf16)
    fuse(model)
    frozen, expected = bits(model), None
    with model.disable_adapter():
        expected = model(x_for(model))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x_for(model)), expected)
    assert same(bits(model), frozen)


def test_merge_and_unload_is_peft_s() -> None:
    plain = peft_model(dtype=bf16)
    fused = copy.deepcopy(plain)
    fuse(fused)
    got, expected = fused.merge_and_unload(), plain.merge_and_unload()
    assert same(dict(got.named_parameters()), dict(expected.named_parameters()))


def test_a_copy_of_a_merged_model_unmerges_itself_alone() -> None:
    model = peft_model(dtype=bf16)
    fuse(model)
    frozen = bits(model)
    model.merge_adapter()
    merged = bits(model)
    twin = copy.deepcopy(model)
    model.unmerge_adapter()
    assert same(bits(model), frozen)
    assert same(bits(twin), merged)
    twin.unmerge_adapter()
    assert same(bits(twin), frozen)


def test_a_pickle_of_a_merged_model_is_pefts_and_holds_no_second_copy() -> None:
    fused, plain = peft_model(dtype=bf16), peft_model(dtype=bf16)
    fuse(fused)
    for model in (fused, plain):
        model.merge_adapter()
    fused, plain = (pickle.loads(pickle.dumps(model)) for model in (fused, plain))
    assert [m.__dict__.keys() for m in fused.modules()] == [
        m.__dict__.keys() for m in plain.modules()
    ]
    for model in (fused, plain):
        model.unmerge_adapter()
    assert same(bits(fused), bits(plain))


CHANGES: dict[str, Callable[[PeftModel], Any]] = {
    "loaded": lambda m: m.load_state_dict({n: t + 1 for n, t in m.state_dict().items()}),
    "converted": lambda m: m.to(fp64),
    "unfused": unfuse,
    "written to": lambda m: m.base_model.model.up.base_layer.weight.data[3].add_(1),
    "replaced": lambda m: setattr(
        m.base_model.model.up.base_layer,
        "weight",
        nn.Parameter(m.base_model.model.up.base_layer.weight + 1, requires_grad=False),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_weight_changed_while_merged_is_unmerged_as_peft_does(
    change: Callable[[PeftModel], Any],
) -> None:
    plain = peft_model()
    fused = copy.deepcopy(plain)
    fuse(fused)
    for model in (fused, plain):
        model.merge_adapter()
        change(model)
        model.unmerge_adapter()
    name = "base_model.model.up.base_layer.weight"
    assert torch.equal(bits(fused)[name], bits(plain)[name])


def test_unfuse_leaves_nothing_behind() -> None:
    plain = peft_model()
    fused = copy.deepcopy(plain)
    fuse(fused)
    for model in (fused, plain):
        model.merge_adapter()
    unfuse(fused)
    assert [without_ours(m.__dict__).keys() for m in fused.modules()] == [
        m.__dict__.keys() for m in plain.modules()
    ]


def test_a_failed_merge_leaves_everything_as_it_was() -> None:
    model = peft_model()
    fuse(model)
    frozen = bits(model)
    layer = model.base_model.model.up
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert same(bits(model), frozen)
    assert merge_loss(model) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_merge_loss(kind: str) -> None:
    """In float64 nothing is lost; in bf16 a small update is, for the most part."""
    for dtype, size, low, high in (
        (fp64, 1.0, 0.0, 1e-12),
        (bf16, 1.0, 1e-4, 0.2),
        (bf16, 1e-4, 0.3, 1e3),
    ):
        torch.manual_seed(0)
        model = KINDS[kind](dtype=dtype)
        for name, parameter in model.named_parameters():
            if "lora_" in name and dtype == fp64:
                parameter.data = parameter.data.double()
            if "lora_B" in name:
                parameter.data *= size
        if kind == "dora":  # its update is more than lora_B's
            for layer in (model.base_model.model.up, model.base_model.model.down):
                weight = layer.base_layer.weight.data.double()
                change = layer.get_delta_weight("default").double()
                magnitude = layer.lora_magnitude_vector["default"].weight
                magnitude.data = (weight + change).norm(dim=1).to(magnitude)
        fuse(model)
        assert merge_loss(model) == {}
        model.merge_adapter()
        losses = merge_loss(model)
        assert losses.keys() == {"base_model.model.up", "base_model.model.down"}
        assert all(low <= loss <= high for loss in losses.values()), (dtype, size, losses)
        model.unmerge_adapter()
        assert merge_loss(model) == {}


@pytest.mark.parametrize("numel", [0, 1, 3, 37, (1 << 17) * 8 + 5])
@pytest.mark.parametrize("dtype", [torch.uint8, bf16, fp32], ids=str)
def test_the_fingerprint_sees_every_element(numel: int, dtype: torch.dtype) -> None:
    tensor = torch.arange(numel + 1).to(dtype)[1:]  # a view that does not start at a word
    expected = _fingerprint(tensor)
    assert _fingerprint(tensor.clone()) == expected
    for i in {0, numel // 2, numel - 1} if numel else ():
        changed = tensor.clone()
        changed[i] = changed[i] == 0
        assert _fingerprint(changed) != expected
