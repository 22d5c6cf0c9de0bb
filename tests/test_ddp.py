"""DistributedDataParallel: two processes with half the batch each get the gradients of one."""

import os
import socket

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import LoRALinear


def model() -> nn.Module:
    torch.manual_seed(0)
    first = LoRALinear(12, 16, r=3, init_lora_weights=False)
    return nn.Sequential(first, nn.Tanh(), LoRALinear(16, 5, r=2, init_lora_weights=False))


def batch() -> Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    module(x).square().mean().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def train(rank: int, port: int, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    parallel = DistributedDataParallel(model())
    half = batch()[4 * rank : 4 * rank + 4]
    for _ in range(2):  # the second step goes through the rebuilt buckets
        result = gradients(parallel, half)
    torch.save(result, f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_get_the_gradients_of_one(tmp_path: os.PathLike[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, (port, str(tmp_path)), nprocs=2)
    alone = gradients(model(), batch())
    assert len(alone) == 4  # A and B of each layer, and nothing frozen
    for rank in range(2):
        together = torch.load(f"{tmp_path}/{rank}.pt")
        assert together.keys() == {f"module.{name}" for name in alone}
        for name, gradient in alone.items():
            torch.testing.assert_close(together[f"module.{name}"], gradient)
