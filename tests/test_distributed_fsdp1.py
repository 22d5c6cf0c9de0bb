"""FSDP1 as accelerate and transformers set it up, with and without PEFT's wrapping policy."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from distributed import LAYERS, Cluster, compare, fuse_all, llama
from distributed import cluster as cluster
from peft.utils.other import fsdp_auto_wrap_policy
from peft_models import bf16, fp32, fp64
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_kernels.peft import fuse


def policies(model: nn.Module) -> dict[str, Any]:
    layers = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}
    )
    return {"root": None, "layers": layers, "PEFT's": fsdp_auto_wrap_policy(model)}


def sharded(model: nn.Module, policy: str, **options: Any) -> nn.Module:
    options = {"use_orig_params": True, "device_id": torch.device("cpu")} | options
    return FullyShardedDataParallel(model, auto_wrap_policy=policies(model)[policy], **options)


def agree(rank: int, policy: str, when: str) -> None:
    def wrapped(fused: bool) -> nn.Module:
        model = llama()
        if fused and when == "before":
            fuse_all(model)
        model = sharded(model, policy)
        if fused and when == "after":
            fuse_all(model)
        return model

    compare(rank, wrapped, calls=LAYERS)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("policy", ["root", "layers", "PEFT's"])
def test_fused_before_or_after_sharding(policy: str, when: str, cluster: Cluster) -> None:
    cluster.run(agree, policy, when)


def autocast(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", bf16):
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.detach()


def mixed(rank: int) -> None:
    """As accelerate sets up bf16: fp32 parameters, gathered as bf16, under autocast."""

    def wrapped(fused: bool) -> nn.Module:
        policy = MixedPrecision(param_dtype=bf16, reduce_dtype=fp32)
        model = sharded(llama(fp32), "PEFT's", mixed_precision=policy)
        if fused:
            fuse_all(model)
        return model

    exact = lambda: sharded(llama(fp32).to(fp64), "PEFT's")
    compare(rank, wrapped, calls=LAYERS, exact=exact, run=autocast)


def test_mixed_precision(cluster: Cluster) -> None:
    cluster.run(mixed)


def trained(rank: int, policy: str) -> None:
    """One frozen weight after all trains: it alone is left to PEFT."""

    def wrapped(fused: bool) -> nn.Module:
        model = llama()
        model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_()
        if fused:
            assert list(fuse(model).not_fused.values()) == ["base weight is trainable"]
        model = sharded(model, policy)
        if fused:
            assert list(fuse(model).not_fused.values()) == ["base weight is trainable"]
        return model

    compare(rank, wrapped, calls=LAYERS - 1)


def thawed(rank: int) -> None:
    """The weight trains only since it was fused: nothing recorded may hide that."""

    def wrapped(fused: bool) -> nn.Module:
        model = llama()
        if fused:
            fuse_all(model)
        model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_()
        return sharded(model, "layers")

    compare(rank, wrapped, calls=LAYERS - 1)


@pytest.mark.parametrize("policy", ["root", "layers"])
def test_a_base_weight_that_trains(policy: str, cluster: Cluster) -> None:
    cluster.run(trained, policy)


def test_a_base_weight_that_trains_since_it_was_fused(cluster: Cluster) -> None:
    cluster.run(thawed)
