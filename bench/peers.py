"""Optional peers, called as their own modules call them. None is a dependency of this project.

Each is imported only in the process that measures it: importing some of them changes torch and
transformers globally.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.testing import Case, Inputs


class Peer(NamedTuple):
    """A package, and a function that makes `(x, A, B) -> y` out of it."""

    name: str
    package: str
    bind: Callable[[Inputs, Case], Callable[[Tensor, Tensor, Tensor], Tensor]]
    bias: bool = True
    cpu: bool = False

    def why_not(self, case: Case, device: torch.device) -> str | None:
        """Return why this peer cannot be measured."""
        if find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if device.type != "cuda" and not self.cpu:
            return "it needs a CUDA device"
        if case.adapter_dtype not in (None, case.dtype):
            return "it needs adapters in x's dtype"
        if case.bias and not self.bias:
            return "it has no bias on the frozen layer"
        return None


def _unsloth(inputs: Inputs, case: Case) -> Callable[..., Tensor]:
    function = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    dropout = (case.dropout_p,) if case.dropout_p else ()
    return lambda x, a, b: function.apply(
        x[None], inputs.weight, None, a, b, case.scaling, *dropout
    )[0]


def _axolotl(inputs: Inputs, case: Case) -> Callable[..., Tensor]:
    function = importlib.import_module("axolotl.kernels.lora").LoRA_O

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = x[None]
        dropped = F.dropout(x, case.dropout_p) if case.dropout_p else None
        return function.apply(
            x, dropped, inputs.weight, inputs.bias, None, a, b, case.scaling, None, None
        )[0]

    return call


def _automodel(inputs: Inputs, case: Case) -> Callable[..., Tensor]:
    module = importlib.import_module("nemo_automodel.components._peft.lora")

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        dropped = F.dropout(x, case.dropout_p)
        low_rank = module.LoRATritonFunction.apply(dropped, a, b, case.scaling, x.dtype)
        return F.linear(x, inputs.weight, inputs.bias) + low_rank

    return call


def _lorafusion(inputs: Inputs, case: Case) -> Callable[..., Tensor]:
    # Its own autograd function imports a descriptor API that newer Tritons lack, so its three
    # kernels are composed here in the same order.
    name = "lorafusion.ops.triton_ops."
    forward_kernel = importlib.import_module(name + "fused_lora_xw_sb").fused_lora_xw_sb
    db_ds_kernel = importlib.import_module(name + "fused_lora_dys_dyb").fused_lora_dys_dyb
    dx_kernel = importlib.import_module(name + "fused_lora_dyw_dsa").fused_lora_dyw_dsa
    dropout = importlib.import_module(name + "dropout").seeded_dropout
    weight, s, p = inputs.weight, case.scaling, case.dropout_p

    class LoRAFusion(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            if p:
                dropped, mask = dropout(x, p, seed=0, store_mask=True)
            else:  # its wrapper asks for the mask's shape even where it reads none
                dropped, mask = x, torch.ones((), dtype=torch.bool, device=x.device).expand_as(x)
            low_rank = dropped @ a.t()
            ctx.save_for_backward(dropped, a, b, mask, low_rank)
            return forward_kernel(x, weight, low_rank, b, s, inputs.bias)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dropped, a, b, mask, low_rank = ctx.saved_tensors
            db, ds = db_ds_kernel(dy, b, low_rank, s)
            return dx_kernel(dy, weight, ds, a, p, mask), ds.t() @ dropped, db

    return LoRAFusion.apply


PEERS = (
    Peer("unsloth", "unsloth", _unsloth, bias=False, cpu=True),
    Peer("axolotl", "axolotl", _axolotl, cpu=True),
    Peer("automodel", "nemo_automodel", _automodel),
    Peer("lorafusion", "lorafusion", _lorafusion),
)
