"""The variants that are LoRA of factors derived from their parameters: KaSA and BD-LoRA."""

from typing import Any

import torch
from peft.tuners.lora.variants import BlockDiagonalLinear
from torch import Tensor, nn

from lora_kernels.peft.lora import plain
from lora_kernels.peft.parts import Adapter, Factors


def kasa(layer: Any, name: str, now: bool) -> Adapter | str:
    """Return KaSA's `s·drop(x)·Aᵀ·diag(d)·Bᵀ` as LoRA of A and B·diag(d)."""
    found = plain(layer, name, now)
    if isinstance(found, str):
        return found
    if name in layer._lora_kasa_truncation_deferred:
        return "KaSA has not truncated the base weight yet"
    diagonal = layer.lora_diag[name]

    def derive() -> Factors:
        factors = found.factors()
        return factors._replace(lora_b=factors.lora_b * diagonal)

    return found._replace(derive=derive)


def bdlora(layer: Any, name: str, now: bool) -> Adapter | str:
    """Return BD-LoRA, whose A or B is stored as diagonal blocks, as LoRA of the whole matrix."""
    found = plain(layer, name, now, (BlockDiagonalLinear, nn.Linear))
    if isinstance(found, str):
        return found
    modules = [layer._modules[part]._modules[name] for part in ("lora_A", "lora_B")]

    def derive() -> Factors:
        lora_a, lora_b, bias = found.factors()
        return Factors(_unpack(modules[0], lora_a), _unpack(modules[1], lora_b), bias)

    return found._replace(derive=derive)


def _unpack(module: Any, blocks: Tensor) -> Tensor:
    if type(module) is not BlockDiagonalLinear:
        return blocks
    return torch.block_diag(*blocks.chunk(module.nblocks))
