"""A model whose layers could be mistaken for one another, one step of it, and ways to spoil it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

from peft_models import fp64, peft_model

from lora_kernels.audit import Report
from lora_kernels.testing import audit

WIDTH, HIDDEN, TOKENS = 12, 20, 40
Forward = Callable[..., Tensor]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Three blocks whose layers have equal shapes, so that their adapters could be mistaken."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


UP, DOWN = ([f"base_model.model.blocks.{i}.{name}" for i in range(3)] for name in ("up", "down"))


def stack(reentrant: bool | None = None, **options: Any) -> Any:
    return peft_model(Stack(reentrant), **options)


def tokens(model: nn.Module, rows: int = TOKENS) -> Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, rows // 2, WIDTH, generator=generator, dtype=fp64).to(dtype)
    return x.requires_grad_()


def step(model: nn.Module, x: Tensor | None = None) -> None:
    x = tokens(model) if x is None else x
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))


def run(model: nn.Module, x: Tensor | None = None) -> Report:
    return audit(model, lambda: step(model, x))


def statuses(report: Report) -> dict[str, str]:
    """The layers that are not right."""
    return {name: v.status for name, v in report.layers.items() if v.status != "right"}


def parts(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    base = layer.base_layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return base.weight, a, b, base.bias, layer.scaling["default"]


def plant(layer: nn.Module, forward: Forward) -> None:
    """Make `layer` compute `forward(x, W, A, B, bias, s)`."""
    layer.forward = lambda x: forward(x, *parts(layer))


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.linear(x.to(a.dtype), a), b)


def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, s: float) -> Tensor:
    """What PEFT computes."""
    y = F.linear(x, w, bias)
    return (y + low_rank(x, a, b) * s).to(y.dtype)


def double(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, s: float) -> Tensor:
    return lora(x, w, a, b, bias, 2 * s)


@pytest.fixture(params=[None, False, True], ids=["direct", "checkpoint", "reentrant"])
def reentrant(request: pytest.FixtureRequest) -> bool | None:
    return request.param
