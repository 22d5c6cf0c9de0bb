"""A kind of layer, of base layer or of adapter that is new to `fuse`: one definition, one line."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, LoraVariant
from peft_models import (
    Block,
    K,
    assert_close_to_peft,
    assert_compiles,
    calls_of_lora_linear,
    peft_model,
    randomise,
    x_for,
)
from peft_models import one_thread as one_thread
from torch import Tensor, nn

from lora_kernels.peft import fuse, unfuse
from lora_kernels.peft.adapters import VARIANTS
from lora_kernels.peft.kinds import BASES, KINDS
from lora_kernels.peft.layer import Fused
from lora_kernels.peft.lora import plain as plain_adapter
from lora_kernels.peft.parts import Adapter, Frozen, kind


class DoublingLinear(nn.Linear):
    """A kind of frozen layer that this project does not know."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


class DoublingLora(Linear):
    """PEFT's layer over it."""


def doubled(layer: Any, base: Any, x: Tensor | None) -> Frozen | str:
    dense = lambda dtype: 2 * base.weight.to(dtype)
    return Frozen(base.weight, base.bias, base.weight.dtype, dense)


class FusedDoubling(Fused, DoublingLora):
    plain = DoublingLora
    frozen = staticmethod(doubled)


def make(of: type[Linear] | None = None) -> PeftModel:
    """A model whose layer "up" is such a one, under `lora.Linear` or under a class of its own."""
    torch.manual_seed(0)
    block = Block()
    block.up.__class__ = DoublingLinear
    config = LoraConfig(target_modules=["up", "down"], r=4)
    if of is not None:
        config._register_custom_module({DoublingLinear: of})
    return randomise(get_peft_model(block, config))


def assert_fused(fused: PeftModel, plain: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(fuse(fused).fused) == 2
    with calls_of_lora_linear(monkeypatch) as calls:
        assert_close_to_peft(fused, plain, x_for(plain))
    assert len(calls) == 2
    assert_compiles(fused, x_for(plain, 4, K))


def test_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = make(DoublingLora), make(DoublingLora)
    assert "DoublingLora, not a PEFT" in fuse(fused).not_fused["base_model.model.up"]
    monkeypatch.setitem(KINDS, kind(plain.base_model.model.up), f"{__name__}.FusedDoubling")
    assert_fused(fused, plain, monkeypatch)
    unfuse(fused)
    assert type(fused.base_model.model.up) is DoublingLora


def test_a_base_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = make(), make()
    assert "DoublingLinear, not a plain" in fuse(fused).not_fused["base_model.model.up"]
    monkeypatch.setitem(BASES, kind(plain.base_model.model.up.base_layer), f"{__name__}.doubled")
    assert_fused(fused, plain, monkeypatch)


class Halved(LoraVariant):
    """A kind of adapter that this project does not know."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        return result + lora_b(lora_a(x)) * module.scaling[active_adapter] / 2


def halved(layer: Any, name: str, now: bool) -> Adapter | str:
    found = plain_adapter(layer, name, now)
    return found if isinstance(found, str) else found._replace(scaling=found.scaling / 2)


def test_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = peft_model()
    for layer in (plain.base_model.model.up, plain.base_model.model.down):
        layer.lora_variant["default"] = Halved()
    fused = copy.deepcopy(plain)
    assert set(fuse(fused).not_fused.values()) == {f"variant {__name__}.Halved"}
    monkeypatch.setitem(VARIANTS, f"{__name__}.Halved", halved)
    assert_fused(fused, plain, monkeypatch)
