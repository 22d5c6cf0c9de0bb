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
from tensor_parallel import ROWS, dropped, parallel, same_batch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from lora_kernels.peft import fuse
from lora_kernels.testing import assert_accurate


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


def by_transformers(rank: int, folder: str, p: float) -> tuple[Tensor, dict[str, Tensor]]:
    config = DistributedConfig(tp_size=RANKS, tp_plan="auto")
    base = LlamaForCausalLM.from_pretrained(folder, dtype=fp64, distributed_config=config)
    options: Any = {"r": 4, "lora_dropout": p}
    adapters = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(base, adapters).train()
    values = llama().state_dict()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(cut_like(parameter, values[name]))
    fuse_all(model)
    torch.manual_seed(7)
    with counted() as calls:
        loss = loss_of(model, tokens())
    assert len(calls) == LAYERS
    return loss, gradients(model)


def cut_like(parameter: Any, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["plain", "dropout"])
def test_tp_plan_of_transformers(p: float, cluster: Cluster, tmp_path: Path) -> None:
    """Against one process: PEFT 0.21 raises at lora_A where transformers cuts rows."""
    llama().unload().save_pretrained(tmp_path)
    model = llama(lora_dropout=p)
    if p:  # only a fused one has these masks
        fuse_all(model)
    torch.manual_seed(7)
    expected_loss = loss_of(model, tokens())
    expected = gradients(model)
    for loss, together in cluster.run(by_transformers, str(tmp_path), p):
        assert_accurate("loss", loss, expected_loss, expected_loss)
        assert together.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_accurate(name, together[name], gradient, gradient)


# --- Collectives ---------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Records them. (`CommDebugMode` sets global hooks, under which a layer is PEFT's.)"""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = function.name().partition("::")
        moves = "wait" not in name and "wrap" not in name
        if namespace in ("c10d", "_c10d_functional") and moves:
            self.names.append(name.replace("_", ""))
        return function(*args, **kwargs or {})


def collectives(rank: int, fused: bool, name: str) -> tuple[int, int]:
    """Return how many collectives a layer of `parallel` takes, forward and backward."""
    model = parallel(llama())
    if fused:
        fuse_all(model)
    layer: Any = model.base_model.model.model.layers[0].mlp.get_submodule(name)
    x = torch.ones(40, 24 if name in ROWS else 32, dtype=fp64, requires_grad=True)
    with Collectives() as forward, counted() as calls:
        y = layer(x)
    assert len(calls) == fused
    with Collectives() as backward:
        y.sum().backward()
    assert {*forward.names, *backward.names} == {"allreduce"}
    return len(forward.names), len(backward.names)


@pytest.mark.parametrize(("name", "expected"), [("down_proj", (1, 1)), ("up_proj", (0, 2))])
def test_a_layer_reduces_as_often_as_unfused(
    name: str, expected: tuple[int, int], cluster: Cluster
) -> None:
    """Rows: y once, and B's gradient. Columns: the gradients of x and of A."""
    for fused in cluster.run(collectives, True, name):
        assert fused == expected
    for unfused in cluster.run(collectives, False, name):
        assert sum(unfused) == sum(expected)


# --- Dropout -------------------------------------------------------------------------------------

P = 0.4


def dropping(checkpointed: bool) -> Any:
    model = llama(lora_dropout=P)
    layers = model.base_model.model.model.layers
    for i, layer in enumerate(layers) if checkpointed else ():
        layers[i] = checkpoint_wrapper(layer)
    return model


def masked(rank: int, checkpointed: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    model = parallel(dropping(checkpointed))
    fuse_all(model)
    with counted() as calls:
        found = dropped(model, lambda model: loss_of(model, tokens()))
    assert len(calls) == LAYERS * (2 if checkpointed else 1)
    return found


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpoint"])
def test_processes_draw_the_mask_of_one(checkpointed: bool, cluster: Cluster) -> None:
    """Those that share columns of W all of it, those that share rows theirs."""
    together = cluster.run(masked, checkpointed)
    model = dropping(checkpointed)
    fuse_all(model)
    masks, expected = dropped(model, lambda model: loss_of(model, tokens()))
    assert len(masks) == LAYERS * (3 if checkpointed else 2)  # the backward draws them again
    same = cut = 0
    for whole, *parts in zip(masks, *(found for found, _ in together), strict=True):
        if parts[0].shape == whole.shape:
            same += 1
            assert all(torch.equal(part, whole) for part in parts)
        else:
            cut += 1
            assert torch.equal(torch.cat(parts, dim=1), whole)
    assert (same / len(masks), cut / len(masks)) == (5 / 7, 2 / 7)
    for _, found in together:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_accurate(name, found[name], value, value)


WIDTH = 21  # cut unevenly, and within a group of columns that share a counter


def uneven(rank: int | None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A row-wise layer as one of the processes, or, for None, as a single one."""
    model = peft_model(nn.ModuleDict({"down": nn.Linear(WIDTH, 9)}), dtype=fp64, lora_dropout=P)
    layer: Any = model.base_model.model["down"]
    x = torch.randn(40, WIDTH, dtype=fp64, generator=torch.Generator().manual_seed(1))
    if rank is not None:
        plan = {"base_layer": RowwiseParallel(), "lora_A.default": RowwiseParallel()}
        parallelize_module(layer, init_device_mesh("cpu", (RANKS,)), plan)
        x = x.chunk(RANKS, dim=1)[rank]
    assert fuse(layer).fused
    x.requires_grad_()
    with counted() as calls:
        masks, found = dropped(layer, lambda layer: layer(x).square().sum().backward())
    assert len(calls) == 1
    assert x.grad is not None
    return masks, found | {"dx": x.grad}


def test_uneven_slices_that_start_anywhere(cluster: Cluster) -> None:
    (first, second), (masks, expected) = cluster.run(uneven), uneven(None)
    for whole, *parts in zip(masks, first[0], second[0], strict=True):
        assert [part.shape[1] for part in parts] == [11, 10]
        assert torch.equal(torch.cat(parts, dim=1), whole)
    shards = [found for _, found in (first, second)]
    dx = torch.cat([found["dx"] for found in shards], dim=1)
    for found in shards:
        found["dx"] = dx
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_accurate(name, found[name], value, value)


# --- What stays PEFT's ---------------------------------------------------------------------------


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
