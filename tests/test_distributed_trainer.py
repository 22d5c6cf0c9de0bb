"""`transformers.Trainer` and accelerate's `prepare` in two processes: DDP, and FSDP as they do it.

On a CPU accelerate sets up DDP where FSDP is asked for. `sharding` has it do what it does on a GPU.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from distributed import LAYERS, RANKS, Cluster, clean, counted, fuse_all
from distributed import cluster as cluster
from peft_models import bf16, llama
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trainers import STEPS, losses, trainer
from transformers import TrainerCallback

accelerate = pytest.importorskip("accelerate")

FSDP2, FSDP1 = (
    {
        "version": version,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        # On a CPU the loading of FSDP1 finds no device.
        "cpu_ram_efficient_loading": version == 2,
        "sync_module_states": False,
    }
    for version in (2, 1)
)
WAYS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddp": (DistributedDataParallel, {}),
    "fsdp2": (FSDPModule, {"fsdp_config": FSDP2}),
    "fsdp2, bf16": (FSDPModule, {"fsdp_config": FSDP2, "bf16": True}),
    "fsdp2, checkpointing": (
        FSDPModule,
        {"fsdp_config": FSDP2 | {"activation_checkpointing": True}},
    ),
    "fsdp1": (FullyShardedDataParallel, {"fsdp_config": FSDP1 | {"use_orig_params": True}}),
    "fsdp1, flat": (FullyShardedDataParallel, {"fsdp_config": FSDP1 | {"use_orig_params": False}}),
}


@contextlib.contextmanager
def sharding(rank: int) -> Iterator[None]:
    """Let accelerate find the processes of the test, and shard on a CPU, too."""
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    start = accelerate.Accelerator.__init__

    def started(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        plugin = options.get("fsdp_plugin")
        if plugin is not None:
            self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, plugin
            self.state.device = torch.device("cpu")  # FSDP1 takes "cpu:0" for another one
            if self.state._mixed_precision != "no":
                plugin.set_mixed_precision(self.state._mixed_precision)

    environment = dict(os.environ)
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in named.items()}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accelerate.Accelerator, "__init__", started)
            yield
    finally:
        os.environ.clear()
        os.environ |= environment
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)


class FuseWrapped(TrainerCallback):
    """Fuses what accelerate has wrapped."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        fuse_all(found["model"])


def trained(
    rank: int, folder: str, way: str, when: str | None
) -> tuple[list[float], dict[str, Tensor]]:
    wrapper, options = WAYS[way]
    if "fsdp_config" in options:
        options = options | {"fsdp": True}
    with sharding(rank):
        run = trainer(llama(), Path(folder), **options)
        if when == "before":
            fuse_all(run.model)
        if when == "after":
            run.add_callback(FuseWrapped())
        with counted() as calls:
            run.train()
        again = 2 if "checkpointing" in way else 1
        assert len(calls) == (0 if when is None else LAYERS * STEPS * again)
        model: Any = run.model_wrapped
        assert isinstance(model, wrapper)
        if isinstance(model, FullyShardedDataParallel):
            assert model._use_orig_params == ("flat" not in way)
        if "bf16" in way:
            assert run.accelerator.state.fsdp_plugin.mixed_precision_policy.param_dtype == bf16
        if when is not None:
            fuse_all(model)  # the report after wrapping
        return losses(run), trained_parameters(model)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    whole = contextlib.nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    with whole:
        return {
            clean(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
            if "lora_" in name
        }


def agree(rank: int, folder: str, way: str, when: str) -> None:
    got, state = trained(rank, folder, way, when)
    expected, plain = trained(rank, folder, way, None)
    assert len(got) == STEPS
    rel = 1e-3 if "bf16" in way else 1e-5
    assert got == pytest.approx(expected, rel=rel)
    assert len(state) == 2 * LAYERS
    if "bf16" not in way:  # Adam divides by |gradient|: see `test_trainers.assert_same`
        torch.testing.assert_close(state, plain, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_trainer(way: str, when: str, cluster: Cluster, tmp_path: Path) -> None:
    cluster.run(agree, str(tmp_path), way, when)
