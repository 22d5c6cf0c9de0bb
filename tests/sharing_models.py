"""Three layers that read one x, sharing their dx and not, and how the two are judged."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_models import H, K, N, fp64, peft_model, run, x_for
from torch import Tensor, nn

from lora_kernels.ops.lora_linear import shared_dx
from lora_kernels.peft import fuse
from lora_kernels.testing import assert_accurate

MEMBERS = ("q", "k", "v")


@pytest.fixture(autouse=True)
def small_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the small x of these tests be shared."""
    monkeypatch.setattr(shared_dx, "FEW_BYTES", 1)


@pytest.fixture
def onto(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note for each shared backward whether it added to the dx of another."""
    seen: list[bool] = []
    add = shared_dx.add

    def spy(node: Any, call: Any, backward: Callable[..., Any]) -> Any:
        def noted(call: Any, onto: Tensor | None = None) -> Any:
            seen.append(onto is not None)
            return backward(call, onto)

        return add(node, call, noted)

    monkeypatch.setattr(shared_dx, "add", spy)
    return seen


class Readers(nn.Module):
    """Three layers that read one h, and a residual that reads it, too."""

    order = MEMBERS
    between: Callable[[Tensor], Tensor] = staticmethod(lambda h: h)
    watch: Callable[[str, Tensor], Tensor] = staticmethod(lambda name, t: t)

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, H), nn.Linear(K, N), nn.Linear(K, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.watch("h", x * 1.5)
        made = []
        for name in self.order:
            made.append(self.watch(name, getattr(self, name)(h)))
            h = self.between(h)
        return torch.cat([*made, torch.tanh(h)], -1)


def models(base: nn.Module | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """The same adapters three times: sharing, fused without sharing, and PEFT's own."""
    targets = {"target_modules": [*MEMBERS]}
    plain = peft_model(base or Readers(), **(targets | options))
    sharing, apart = copy.deepcopy(plain), copy.deepcopy(plain)
    assert [len(group) for group in fuse(sharing).may_share] == [3]
    assert fuse(apart, share_inputs=False).may_share == []
    return sharing, apart, plain


def inner(model: Any) -> Any:
    return model.base_model.model


def assert_right(
    got: dict[str, Tensor], apart: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Judge every result by float64; those that no sum enters are the unshared ones bit for bit."""
    assert got.keys() == apart.keys() == exact.keys()
    for name, expected in exact.items():
        assert got[name].dtype == apart[name].dtype
        assert_accurate(name, got[name], expected, apart[name])
        if name != "dx":
            assert torch.equal(got[name], apart[name]), name


def judge(sharing: Any, apart: Any, plain: Any, **inputs: Any) -> None:
    x = x_for(plain)
    exact = copy.deepcopy(plain).to(fp64)
    assert_right(run(sharing, x, **inputs), run(apart, x, **inputs), run(exact, x.to(fp64)))
