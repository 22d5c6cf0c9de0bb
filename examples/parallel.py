"""One process or several: what an example does differently under torchrun."""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process; let the first process alone print."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process runs)
    if device.type == "cuda" and dist.is_torchelastic_launched():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def leave() -> None:
    """Leave the other processes; without them it does nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, fsdp: bool) -> nn.Module:
    """Join the other processes; return what trains `model` with them.

    That is the model itself if there are none, a DDP module around it, or itself sharded by FSDP2,
    each decoder layer and the rest: then a parameter is whole only while it is used.
    """
    if not dist.is_torchelastic_launched():
        return model
    # Not before the model is there: in a process group, transformers saves in the first alone.
    dist.init_process_group("nccl" if model.device.type == "cuda" else "gloo")
    if not fsdp:
        return DistributedDataParallel(model)
    base = model.get_base_model()  # whose forward runs in training and generation alike
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(base)
    return model


def own_share(batches: Tensor) -> Tensor:
    """Return this process's rows of global batches [steps, batch, length]."""
    return batches.chunk(SIZE, dim=1)[RANK]


def average(loss: Tensor) -> float:
    """Return the mean of every process's `loss`, a scalar."""
    if not dist.is_initialized():
        return loss.item()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / SIZE


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return every trained parameter of `model`, whole and on the CPU, in the first process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)
