"""Tensor parallelism by PyTorch's and by transformers' own plans, on local shards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from distributed import (
    LAYERS,
    RANKS,
    Cluster,
    compare,
    counted,
    fuse_all,
    gradients,
    llama,
    loss_of,
    tokens,
)
from distributed import cluster as cluster
from peft import LoraConfig, get_peft_model
from peft_models import fp64, peft_model, x_for
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from lora_kernels.peft import fuse
from lora_kernels.testing import assert_accurate

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


def parallel(model: Any) -> Any:
    """Share out every linear layer as PyTorch's documentation does, adapters included."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.base_model.model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            plan: dict[str, Any] = {}
            for name in [n for n in COLUMNS if hasattr(block, n)]:
                plan[f"{name}.base_layer"] = ColwiseParallel()
                plan[f"{name}.lora_B.default"] = ColwiseParallel()
            for name in [n for n in ROWS if hasattr(block, n)]:
                plan[f"{name}.base_layer"] = RowwiseParallel()
                plan[f"{name}.lora_A.default"] = RowwiseParallel()
            parallelize_module(block, mesh, plan)
    return model


def same_batch(model: nn.Module, batch: Tensor) -> Tensor:
    return loss_of(model, tokens())


def by_torch(rank: int, when: str, bias: bool) -> dict[str, Tensor]:
    def wrapped(fused: bool) -> nn.Module:
        model = biased(bias)
        if fused and when == "before":
            fuse_all(model)
        parallel(model)
        if fused and when == "after":
            fuse_all(model)
        return model

    compare(rank, wrapped, calls=LAYERS, run=same_batch)
    model = wrapped(True)
    loss_of(model, tokens())
    return gradients(model)


def biased(bias: bool) -> Any:
    """The same model with or without biases, none of them zero."""
    model = llama(bias=bias)
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.bias"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model


def alone(bias: bool) -> dict[str, Tensor]:
    """What one process computes, unfused."""
    model = biased(bias)
    loss_of(model, tokens())
    return gradients(model)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_parallelize_module(when: str, bias: bool, cluster: Cluster) -> None:
    expected = alone(bias)
    for together in cluster.run(by_torch, when, bias):
        assert together.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_accurate(name, together[name], gradient, gradient)


# --- transformers' tp_plan -----------------------------------------------------------------------


def by_transformers(rank: int, folder: str) -> tuple[Tensor, dict[str, Tensor]]:
    config = DistributedConfig(tp_size=RANKS, tp_plan="auto")
    base = LlamaForCausalLM.from_pretrained(folder, dtype=fp64, distributed_config=config)
    adapters = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4)
    model = get_peft_model(base, adapters).train()
    values = llama().state_dict()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(cut_like(parameter, values[name]))
    fuse_all(model)
    with counted() as calls:
        loss = loss_of(model, tokens())
    assert len(calls) == LAYERS
    return loss, gradients(model)


def cut_like(parameter: Any, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def test_tp_plan_of_transformers(cluster: Cluster, tmp_path: Path) -> None:
    """Against one process: PEFT 0.21 raises at lora_A where transformers cuts rows."""
    llama().unload().save_pretrained(tmp_path)
    model = llama()
    expected_loss = loss_of(model, tokens())
    expected = gradients(model)
    for loss, together in cluster.run(by_transformers, str(tmp_path)):
        assert_accurate("loss", loss, expected_loss, expected_loss)
        assert together.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_accurate(name, together[name], gradient, gradient)


# --- Dropout, and what stays PEFT's --------------------------------------------------------------


def masked(rank: int) -> dict[str, Tensor]:
    """The columns' processes drop what one process would; the rows' leave it to PEFT."""
    model = parallel(llama(lora_dropout=0.4))
    report = fuse(model)
    assert len(report.fused) == LAYERS * len(COLUMNS) // 7
    assert {reason.split(" the mask")[0] for reason in report.not_fused.values()} == {
        "under row-wise tensor parallelism"
    }
    with counted() as calls:
        loss_of(model, tokens())
    assert len(calls) == len(report.fused)
    layer: Any = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(40, 32, dtype=fp64, generator=torch.Generator().manual_seed(1))
    return result(layer, x)


def result(layer: Any, x: Tensor) -> dict[str, Tensor]:
    x.requires_grad_()
    layer.zero_grad()
    torch.manual_seed(7)
    y = layer(x)
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad} | gradients(layer)


def test_processes_that_share_columns_draw_the_mask_of_one(cluster: Cluster) -> None:
    together = cluster.run(masked)
    model = llama(lora_dropout=0.4)
    fuse_all(model)
    x = torch.randn(40, 32, dtype=fp64, generator=torch.Generator().manual_seed(1))
    expected = result(model.base_model.model.model.layers[0].mlp.up_proj, x)
    y = torch.cat([found.pop("y") for found in together], dim=-1)
    assert_accurate("y", y, expected["y"], expected.pop("y"))
    for found in together:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_accurate(name, found[name], value, value)


def left_alone(rank: int, how: str) -> None:
    """Layouts for which a product of shards is not the layer's: a reason, and PEFT's own result."""
    plan, reason = {
        "y gathered": (
            {
                "base_layer": ColwiseParallel(output_layouts=Replicate()),
                "lora_B.default": ColwiseParallel(output_layouts=Replicate()),
            },
            "lora_B has hooks, which only its own call would run",
        ),
        "the base alone": (
            {"base_layer": ColwiseParallel()},
            "tensor parallelism shares out the base weight and the adapter in different ways",
        ),
        "a hook of one's own": (
            {"base_layer": ColwiseParallel(), "lora_B.default": ColwiseParallel()},
            "base layer has hooks, which only its own call would run",
        ),
    }[how]
    model = peft_model(dtype=fp64)
    layer: Any = model.base_model.model.up
    parallelize_module(layer, init_device_mesh("cpu", (RANKS,)), plan)
    if how == "a hook of one's own":
        layer.base_layer.register_forward_hook(lambda module, x, y: y + 1)
    assert fuse(layer).not_fused == {"": reason}
    if how != "the base alone":  # which PEFT cannot add up
        with counted() as calls:
            layer(x_for(model)).sum().backward()
        assert not calls


@pytest.mark.parametrize("how", ["y gathered", "the base alone", "a hook of one's own"])
def test_other_layouts_are_left_alone(how: str, cluster: Cluster) -> None:
    cluster.run(left_alone, how)
