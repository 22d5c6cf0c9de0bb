"""FSDP2: fused before or after sharding, whatever is sharded, with the results of unfused PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import torch.distributed.checkpoint as checkpoint
from distributed import (
    LAYERS,
    Cluster,
    compare,
    counted,
    decoder_layers,
    fuse_all,
    gradients,
    llama,
    loss_of,
    shard,
)
from distributed import cluster as cluster
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from peft_models import bf16, fp32, fp64, randomise
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lora_kernels.peft import fuse, unfuse
from lora_kernels.peft.layer import Fused


def lora_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A")]


def adapters(model: nn.Module) -> list[nn.Module]:
    return [
        m
        for layer in lora_layers(model)
        for part in (layer.lora_A, layer.lora_B)
        for m in part.values()
    ]


def shard_layers(model: nn.Module, **options: Any) -> nn.Module:
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


HOOKS = "base layer has hooks, which only its own call would run"
WHAT = {
    "root": lambda model: [],
    "layers": decoder_layers,
    "lora layers": lambda model: [*lora_layers(model), *decoder_layers(model)],
    "A and B": lambda model: [*adapters(model), *decoder_layers(model)],
}


def sharded(what: str, when: str, fused: bool) -> nn.Module:
    model = llama()
    if fused and when == "before":
        fuse_all(model)
    for part in WHAT[what](model):
        fully_shard(part)
    fully_shard(model)
    if fused and when == "after":
        fuse_all(model)
    return model


def agree(rank: int, what: str, when: str) -> None:
    compare(rank, lambda fused: sharded(what, when, fused), calls=LAYERS)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", WHAT)
def test_fused_before_or_after_sharding(what: str, when: str, cluster: Cluster) -> None:
    cluster.run(agree, what, when)


# --- Precision -----------------------------------------------------------------------------------


def mixed(rank: int, policy: bool) -> None:
    """fp32 adapters beside a bf16 base; with the policy FSDP gathers them as bf16."""

    def wrapped(fused: bool, dtype: torch.dtype = bf16) -> nn.Module:
        model = llama(bf16, adapters=fp32)
        if dtype is fp64:
            return shard_layers(model.to(fp64))
        bfloat = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=fp32)
        shard_layers(model, mp_policy=bfloat if policy else MixedPrecisionPolicy())
        if fused:
            fuse_all(model)
        return model

    compare(rank, wrapped, calls=LAYERS, exact=lambda: wrapped(False, fp64))


@pytest.mark.parametrize("policy", [False, True], ids=["no policy", "bf16 policy"])
def test_fp32_adapters_beside_a_bf16_base(policy: bool, cluster: Cluster) -> None:
    cluster.run(mixed, policy)


# Packed bytes cannot be trained, so FSDP is told to leave them; packed floats are sharded.
STORAGE = {"bytes, ignored": torch.uint8, "floats, sharded": fp32}


def quantised(rank: int, storage: str, when: str) -> None:
    import bitsandbytes as bnb

    def wrapped(fused: bool) -> nn.Module:
        torch.manual_seed(0)
        base: Any = nn.Sequential()
        how: Any = {"bias": False, "compute_dtype": fp32, "quant_storage": STORAGE[storage]}
        base.up = bnb.nn.Linear4bit(64, 96, quant_type="nf4", **how)
        base.down = bnb.nn.Linear4bit(96, 64, quant_type="nf4", **how)
        base.to("cpu").is_loaded_in_4bit = True
        model = randomise(get_peft_model(base, LoraConfig(target_modules=["up", "down"], r=4)))
        if fused and when == "before":
            assert len(fuse(model).fused) == 2
        packed = {p for p in model.parameters() if isinstance(p, bnb.nn.Params4bit)}
        ignored = packed if STORAGE[storage] is torch.uint8 else set()
        for layer in lora_layers(model):
            fully_shard(layer, ignored_params=ignored)
        fully_shard(model, ignored_params=ignored)
        if fused and when == "after":
            assert len(fuse(model).fused) == 2
        return model.train()

    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(rank))
    results = []
    for fused in (True, False):
        model = wrapped(fused)
        with counted() as calls:
            model(x).square().mean().backward()
            first = gradients(model)
            model.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
        assert len(calls) == (4 if fused else 0)
        results.append(first | {"loss": loss.detach()})
    got, expected = results
    assert len(got) == len(expected) == 5
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("storage", STORAGE)
def test_a_4bit_base(storage: str, when: str, cluster: Cluster) -> None:
    pytest.importorskip("bitsandbytes")
    cluster.run(quantised, storage, when)


# --- Activation checkpointing --------------------------------------------------------------------


def checkpointed(rank: int, order: str, alone: bool) -> None:
    def wrapped(fused: bool) -> nn.Module:
        model = llama()
        if alone:
            for part in adapters(model):
                fully_shard(part)
        layers: Any = model.base_model.model.model.layers
        for i, layer in enumerate(layers):
            if order == "checkpoint inside":
                layers[i] = fully_shard(checkpoint_wrapper(layer))
            else:
                layers[i] = checkpoint_wrapper(fully_shard(layer))
        fully_shard(model)
        if fused:
            fuse_all(model)
        return model

    compare(rank, wrapped, calls=2 * LAYERS)


@pytest.mark.parametrize("alone", [False, True], ids=["layers", "A and B"])
@pytest.mark.parametrize("order", ["checkpoint inside", "checkpoint outside"])
def test_activation_checkpointing(order: str, alone: bool, cluster: Cluster) -> None:
    cluster.run(checkpointed, order, alone)


# --- Checkpoints on disk -------------------------------------------------------------------------


def resumed(rank: int, folder: str) -> None:
    def start(fused: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = shard_layers(llama())
        if fused:
            fuse_all(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-2)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            optimizer.zero_grad()
            losses.append(float(loss_of(model, shard(rank, step))))
            optimizer.step()
        return losses

    def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        parts = get_state_dict(model, optimizer)
        return dict(zip(("model", "optimizer"), parts, strict=True))

    with counted() as calls:
        model, optimizer = start(True)
        train(model, optimizer, range(2))
        checkpoint.save(state(model, optimizer), checkpoint_id=folder)
        expected = train(model, optimizer, range(2, 4))
        assert len(calls) == 4 * LAYERS
    for fused in (True, False):
        model, optimizer = start(fused)
        loaded = state(model, optimizer)
        checkpoint.load(loaded, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )
        got = train(model, optimizer, range(2, 4))
        if fused:
            assert got == expected
        else:
            assert got == pytest.approx(expected, rel=1e-12)


def test_a_checkpoint_resumes_fused_and_unfused(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run(resumed, str(tmp_path / "checkpoint"))


# --- Undoing -------------------------------------------------------------------------------------


def undone(rank: int, when: str) -> None:
    model = sharded("lora layers", when, fused=True)
    layer: Any = lora_layers(model)[0]
    assert type(layer).__name__ == "FSDPFusedLinear"
    loss_of(model, shard(rank))
    unfuse(model)
    assert not any(isinstance(m, Fused) for m in model.modules())
    assert type(layer).__name__ == "FSDPLinear"
    assert isinstance(layer, FSDPModule)
    assert isinstance(layer, Linear)
    with counted() as calls:
        loss_of(model, shard(rank))
        assert not calls
        fuse_all(model)
        loss_of(model, shard(rank))
        assert len(calls) == LAYERS


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_class_that_fsdp_makes_unfuses_and_fuses_again(when: str, cluster: Cluster) -> None:
    cluster.run(undone, when)


# --- What stays PEFT's ---------------------------------------------------------------------------


def left_alone(rank: int) -> None:
    """A base layer that only its own call gathers would have to be copied whole."""

    def wrapped(fused: bool) -> nn.Module:
        model = llama()
        for layer in lora_layers(model):
            fully_shard(layer.base_layer)
        shard_layers(model)
        if fused:
            report = fuse(model)
            assert not report.fused
            assert set(report.not_fused.values()) == {HOOKS}
        return model

    compare(rank, wrapped, calls=0, steps=1)


def test_a_base_layer_sharded_on_its_own(cluster: Cluster) -> None:
    cluster.run(left_alone)
