"""A small `LoRALinear`, with an input and a step of training."""

from typing import Any

import torch

from lora_kernels import LoRALinear

K, N, R = 33, 20, 4
X = torch.randn(7, K, generator=torch.Generator().manual_seed(5))


def layer(seed: int = 0, **options: Any) -> LoRALinear:
    torch.manual_seed(seed)
    return LoRALinear(K, N, **{"r": R} | options)


def trained(**options: Any) -> LoRALinear:
    """A layer whose adapter does something."""
    return layer(**{"init_lora_weights": False} | options)


def step(model: LoRALinear, lr: float = 0.1) -> float:
    loss = (model(X) - 1).square().mean()
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in (model.lora_A, model.lora_B):
            parameter -= lr * parameter.grad
    return loss.item()
