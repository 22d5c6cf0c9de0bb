"""Training fused PEFT models: precision, dropout, checkpointing, compilation, a trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

from peft_models import (
    Checkpointed,
    K,
    assert_same_as_peft,
    bf16,
    calls_of_lora_linear,
    fp16,
    fp32,
    fp64,
    llama,
    pair,
    peft_model,
    run,
    x_for,
)
from peft_models import one_thread as one_thread
from torch.nn.parallel import DistributedDataParallel
from trainers import train

from lora_kernels.peft import fuse, why_not
from lora_kernels.testing import assert_accurate


@pytest.mark.parametrize("base", [fp32, bf16, fp16], ids=str)
@pytest.mark.parametrize("adapters", [fp32, bf16], ids=str)
def test_autocast(base: torch.dtype, adapters: torch.dtype) -> None:
    plain = peft_model(dtype=base)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    fused = copy.deepcopy(plain)
    x = x_for(plain).to(fp32)
    reference = run(copy.deepcopy(plain).to(fp64), x.to(fp64))
    with torch.autocast("cpu", bf16):
        assert len(fuse(fused).fused) == 2
        got, eager = run(fused, x), run(plain, x)
    assert got.keys() == eager.keys()
    for name, expected in reference.items():
        assert got[name].dtype == eager[name].dtype
        # Both round to bfloat16 inside, whatever the dtype of the result.
        assert_accurate(name, got[name], expected, eager[name].to(bf16))


def test_autocast_leaves_what_it_cannot_convert_to_peft() -> None:
    plain = peft_model(dtype=bf16).to(fp16)
    fused = copy.deepcopy(plain)
    fuse(fused)
    with torch.autocast("cpu", bf16):
        assert why_not(fused.base_model.model.up) == "the adapter is float16 where x is bfloat16"
        assert_same_as_peft(fused, plain, x_for(plain))


def test_dropout_has_the_right_distribution_and_follows_the_seed() -> None:
    p = 0.3
    model = peft_model(lora_dropout=p)
    layer = model.base_model.model.up
    assert fuse(model).fused
    x = torch.randn(4096, K, generator=torch.Generator().manual_seed(0))

    def low_rank(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return layer(x) - layer.base_layer(x)

    layer.train()
    first = low_rank(1)
    assert torch.equal(first, low_rank(1))
    assert not torch.equal(first, low_rank(2))
    layer.eval()
    full = low_rank(1)
    assert torch.equal(full, low_rank(2))

    # E[drop(x)] = x, and Var = Σₖ (s·(B·A)ₙₖ·xₖ)²·p/(1-p), each over the mask.
    ba = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    variance = (x**2) @ (ba.detach().t() ** 2) * p / (1 - p)
    noise = first - full
    standard_error = (variance.sum(0) ** 0.5) / len(x)
    assert (noise.mean(0).abs() < 5 * standard_error).all()
    torch.testing.assert_close(
        (noise**2).sum(0) / variance.sum(0), torch.ones(20), atol=0.1, rtol=0
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_redraws_the_same_dropout(reentrant: bool) -> None:
    model = peft_model(lora_dropout=0.4).train()
    fuse(model)
    torch.manual_seed(5)
    expected = run(model, x_for(model))
    torch.manual_seed(5)
    got = run(Checkpointed(model, reentrant), x_for(model))
    for name in expected:
        assert torch.equal(got[name if name in got else f"inner.{name}"], expected[name]), name


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    fused, plain = pair()
    got = run(DistributedDataParallel(fused), x_for(plain))
    expected = run(fused, x_for(plain))
    assert len(got) == len(expected)
    for name in got:
        assert torch.equal(got[name], expected[name.removeprefix("module.")]), name


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_compiles_without_a_graph_break(dropout: float) -> None:
    fused, plain = pair(lora_dropout=dropout)
    torch._dynamo.reset()
    compiled = torch.compile(fused.base_model.model, backend="aot_eager", fullgraph=True)
    x = x_for(plain)
    compiled.train()
    run(compiled, x)
    compiled.eval()
    with torch.no_grad():
        reference, eager = copy.deepcopy(plain).to(fp64).eval()(x.to(fp64)), plain.eval()(x)
        assert_accurate("y", compiled(x), reference, eager)
        fused.disable_adapter_layers()  # the reason is asked for again
        plain.disable_adapter_layers()
        torch.testing.assert_close(compiled(x), plain(x))


# --- A real trainer ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        {"bf16": True},
    ],
    ids=["plain", "checkpointing", "reentrant checkpointing", "bf16"],
)
def test_trainer(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = llama(), llama()
    assert len(fuse(fused).fused) == 14
    with calls_of_lora_linear(monkeypatch) as calls:
        got = train(fused, tmp_path, **options)
    assert len(calls) == 14 * 6 * (2 if "gradient_checkpointing" in options else 1)
    expected = train(plain, tmp_path, **options)
    assert len(got) == 6
    assert got[-1] < got[0] - 0.05
    relative = 2e-2 if "bf16" in options else 1e-4
    assert got == pytest.approx(expected, rel=relative)


def test_trainer_with_dropout_is_reproducible_and_checkpointing_changes_nothing(
    tmp_path: Path,
) -> None:
    losses = []
    for options in ({}, {}, {"gradient_checkpointing": True}):
        model = llama(lora_dropout=0.3)
        fuse(model)
        losses.append(train(model, tmp_path, **options))
    assert losses[0] == losses[1] == losses[2]
