"""What DoRA asks of a fused layer beyond what `test_peft_kinds.py` asks of every kind."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from peft_models import (
    H,
    K,
    add_other,
    assert_close_to_peft,
    assert_same_as_peft,
    bf16,
    calls_of_lora_linear,
    fp32,
    fp64,
    pair,
    peft_model,
    run,
    x_for,
)
from peft_models import one_thread as one_thread
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels.peft import fuse, why_not
from lora_kernels.peft.rows import row_norms
from lora_kernels.testing import assert_accurate


@pytest.mark.parametrize(("base", "adapters"), [(fp32, fp32), (bf16, fp32), (bf16, bf16)], ids=str)
def test_training_starts_at_the_frozen_model_bit_for_bit(
    base: torch.dtype, adapters: torch.dtype
) -> None:
    torch.manual_seed(0)
    frozen = nn.Linear(300, 500).to(base)
    model = nn.Sequential(frozen)
    x = torch.randn(7, 300).to(base)
    expected = frozen(x)
    dora = get_peft_model(model, LoraConfig(target_modules=["0"], use_dora=True))
    for name, parameter in dora.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    if base == bf16 and adapters == fp32:  # PEFT's own m is rounded to bf16 there, and its n is not
        layer = dora.base_model.model[0]
        norm = layer.base_layer.weight.float().norm(dim=1)
        layer.lora_magnitude_vector["default"].weight.data = norm
    assert len(fuse(dora).fused) == 1
    assert torch.equal(dora(x), expected)


@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3, 1e-4])
def test_norms_of_rows_that_nearly_cancel(left: float) -> None:
    torch.manual_seed(0)
    n, k, r, scaling = 700, 512, 4, 2.0
    lora_b, lora_a = torch.randn(n, r), torch.randn(r, k)
    weight = torch.randn(n, k, dtype=fp64) * left - scaling * lora_b.double() @ lora_a.double()
    weight = weight.to(fp32)
    exact = weight.double() + scaling * (lora_b.double() @ lora_a.double())
    eager = (weight + scaling * (lora_b @ lora_a)).norm(dim=1)
    assert_accurate("n", row_norms(weight, lora_a, lora_b, scaling), exact.norm(dim=1), eager)


def test_one_row_without_a_batch_becomes_a_batch_of_one_as_in_peft() -> None:
    plain = peft_model(use_dora=True)
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 2
    up, expected = (model.base_model.model.up(x_for(plain, K)) for model in (fused, plain))
    assert up.shape == expected.shape
    torch.testing.assert_close(up, expected)


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_dropout_is_peft_s_own_draw_for_draw(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = peft_model(use_dora=True, lora_dropout=0.4).to(dtype).train()
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 2
    x = x_for(plain, 64, K)
    results = []
    with calls_of_lora_linear(monkeypatch) as calls:
        for model, x_ in ((fused, x), (plain, x), (copy.deepcopy(plain).to(fp64), x.to(fp64))):
            torch.manual_seed(7)
            results.append(run(model, x_))
    assert len(calls) == 2
    got, eager, exact = results
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        assert got[name].dtype == eager[name].dtype
        assert_accurate(name, got[name], expected, eager[name])


def test_dropout_with_fp32_adapters_beside_bf16_is_left_to_peft() -> None:
    plain = peft_model(use_dora=True, lora_dropout=0.4, dtype=bf16)
    fused = copy.deepcopy(plain)
    reason = "DoRA drops from an x of float32, the base reads bfloat16"
    assert set(fuse(fused).not_fused.values()) == {reason}
    fused.eval(), plain.eval()
    assert len(fuse(fused).fused) == 2


def test_two_dora_adapters_are_left_to_peft() -> None:
    plain = peft_model(use_dora=True)
    add_other(plain, use_dora=True)
    fused = copy.deepcopy(plain)
    fuse(fused)
    for model in (plain, fused):
        model.base_model.set_adapter(["default", "other"])
    assert "more than LoRA (DoRA)" in str(why_not(fused.base_model.model.up))
    assert_same_as_peft(fused, plain, x_for(plain))


def test_a_change_of_the_base_weight_is_followed() -> None:
    """Nothing of W is cached: PEFT's merge and `.data` write to it without a trace."""
    plain = peft_model(use_dora=True)
    fused = copy.deepcopy(plain)
    fuse(fused)
    x = x_for(plain)
    run(fused, x)
    for model in (fused, plain):
        model.base_model.model.up.base_layer.weight.data += 1
    got, eager = run(fused, x), run(plain, x)
    exact = run(copy.deepcopy(plain).to(fp64), x.to(fp64))
    for name, expected in exact.items():
        assert_accurate(name, got[name], expected, eager[name])


def test_nothing_of_the_size_of_w_is_kept() -> None:
    torch.manual_seed(0)
    m, n, k, r = 8, 96, 80, 4
    config = LoraConfig(target_modules=["0"], use_dora=True, r=r)
    layer = get_peft_model(nn.Sequential(nn.Linear(k, n)), config).base_model.model[0]
    fuse(layer)
    x = torch.randn(m, k, requires_grad=True)
    parameters = {p.data_ptr() for p in layer.parameters()}
    saved: dict[int, int] = {}
    pack = lambda t: saved.update({t.data_ptr(): t.numel()}) or t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    extra = sum(size for pointer, size in saved.items() if pointer not in parameters)
    assert extra <= m * k + m * r + m * n + 3 * n  # x, P, z, and m/n and its factors


def test_a_language_model_learns_as_peft_s_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(fusing: bool) -> list[float]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
        lora: Any = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
        model = get_peft_model(LlamaForCausalLM(config), lora)
        if fusing:
            assert len(fuse(model).fused) == 7
        tokens = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        losses = []
        for _ in range(6):
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    with calls_of_lora_linear(monkeypatch) as calls:
        got = train(True)
    assert len(calls) == 7 * 6
    assert got[-1] < got[0] - 0.05
    assert got == pytest.approx(train(False), rel=1e-4)


def test_norms_that_peft_keeps_are_its_own_until_a_call_without() -> None:
    fused, plain = pair(use_dora=True)
    x = x_for(plain)
    for scale in (1.0, 3.0):
        for model in (fused, plain):
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.data *= scale
            model.eval()(x)
        with DoraCaching():
            assert "DoraCaching" in str(why_not(fused.base_model.model.up, x))
            assert_same_as_peft(fused, plain, x)
            assert fused.base_model.model.up.lora_magnitude_vector["default"]._dora_cache


def test_a_bias_of_b_is_left_to_peft() -> None:
    """PEFT's configuration forbids it, and its layers add it all the same."""
    fused, plain = pair(use_dora=True)
    for model in (fused, plain):
        lora_b = model.base_model.model.up.lora_B["default"]
        lora_b.register_parameter("bias", nn.Parameter(torch.ones(H)))
    assert why_not(fused.base_model.model.up) == "DoRA beside a bias of lora_B"
    assert_close_to_peft(fused, plain, x_for(plain))
