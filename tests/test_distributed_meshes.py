"""Two dimensions of processes: HSDP, and FSDP over tensor parallelism, each of them one wide."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from distributed import (
    LAYERS,
    Cluster,
    compare,
    counted,
    decoder_layers,
    fuse_all,
    llama,
    loss_of,
    tokens,
)
from distributed import cluster as cluster
from tensor_parallel import dropped, parallel, same_batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_kernels.testing import assert_accurate

Shape = tuple[int, int]
SHAPES = ((2, 1), (1, 2))
P = 0.4


def hsdp(model: Any, shape: Shape) -> nn.Module:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    for part in (*decoder_layers(model), model):
        fully_shard(part, mesh=mesh)
    return model


def hsdp1(model: Any, shape: Shape) -> nn.Module:
    """The same by FSDP1."""
    layers = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}
    )
    return FullyShardedDataParallel(
        model,
        device_mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        auto_wrap_policy=layers,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def over_tensor_parallel(model: Any, shape: Shape) -> nn.Module:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    parallel(model, mesh["tensor"])
    for part in (*decoder_layers(model), model):
        fully_shard(part, mesh=mesh["data"])
    return model


WAYS = {"hsdp": hsdp, "hsdp1": hsdp1, "over tp": over_tensor_parallel}


def agree(rank: int, way: str, shape: Shape, when: str) -> None:
    def wrapped(fused: bool) -> nn.Module:
        model = llama()
        if fused and when == "before":
            fuse_all(model)
        model = WAYS[way](model, shape)
        if fused:  # the report after wrapping; where they were fused before, it changes nothing
            fuse_all(model)
        return model

    shares_batch = way != "over tp" or shape == (2, 1)
    compare(rank, wrapped, calls=LAYERS, run=loss_of if shares_batch else same_batch)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients(way: str, shape: Shape, when: str, cluster: Cluster) -> None:
    cluster.run(agree, way, shape, when)


def masked(rank: int, way: str, shape: Shape) -> tuple[list[Tensor], dict[str, Tensor]]:
    model = WAYS[way](llama(lora_dropout=P), shape)
    fuse_all(model)
    with counted() as calls:
        found = dropped(model, lambda model: loss_of(model, tokens()))
    assert len(calls) == LAYERS
    return found


def test_processes_that_share_a_layer_draw_the_mask_of_one(cluster: Cluster) -> None:
    model = llama(lora_dropout=P)
    fuse_all(model)
    _, expected = dropped(model, lambda model: loss_of(model, tokens()))
    for _, found in cluster.run(masked, "over tp", (1, 2)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_accurate(name, found[name], value, value)


@pytest.mark.parametrize(
    ("way", "shape"), [("over tp", (2, 1)), *((w, s) for w in ("hsdp", "hsdp1") for s in SHAPES)]
)
def test_processes_that_share_the_batch_draw_different_masks(
    way: str, shape: Shape, cluster: Cluster
) -> None:
    (first, _), (second, _) = cluster.run(masked, way, shape)
    assert len(first) == len(second) == 2 * LAYERS  # the backward draws them again
    assert not any(torch.equal(*pair) for pair in zip(first, second, strict=True))
