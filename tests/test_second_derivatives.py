"""Gradients of gradients (`create_graph=True`) are PyTorch's own, as they are in PEFT."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_models import K, bf16, fp32, fp64, llama, pair, randomise, x_for
from peft_models import one_thread as one_thread
from torch import Tensor, nn

from lora_kernels import lora_linear
from lora_kernels.ops.lora_linear import op, reference
from lora_kernels.peft import fuse
from lora_kernels.testing import Case, assert_accurate, make_inputs

NAMES = ("x", "lora_a", "lora_b")
CALL = Case(5, 6, 4, 3, fp64, bias=True)


def leaves(trained: str) -> dict[str, Tensor]:
    """The operands of a call; those named by a letter of `trained` require a gradient."""
    inputs = make_inputs(CALL)
    return {
        name: getattr(inputs, name).detach().requires_grad_(name[-1] in trained)
        for name in (*NAMES, "weight", "bias")
    }


def penalty(y: Tensor, wanted: list[Tensor]) -> Tensor:
    """A number made of the gradients of a number made of y."""
    made = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    return torch.stack([g.double().sin().square().sum() for g in made]).sum()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("trained", ["xab", "xa", "ab", "a", "b", "x"])
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)], ids=str)
def test_against_finite_differences(shape: tuple[int, ...], trained: str, dropout: float) -> None:
    operands = leaves(trained)
    if shape != (5, 4):
        x = torch.linspace(-1, 1, 24, dtype=fp64).view(shape)
        operands["x"] = x.requires_grad_("x" in trained)
    # A slice of a wider x, so that each step of the way must draw the same part of the mask.
    options = {"dropout_p": dropout, "seed": 3 if dropout else None, "first_column": 3}

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, operands["weight"], a, b, 0.75, operands["bias"], **options)

    assert torch.autograd.gradgradcheck(run, tuple(operands[name] for name in NAMES))


def test_lora_a_may_be_written_to_before_the_first_derivative_alone() -> None:
    operands = leaves("ab")
    y = lora_linear(**operands, scaling=0.75)
    with torch.no_grad():
        operands["lora_a"].add_(1)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="lora_a was modified by an inplace operation"):
        y.sum().backward(create_graph=True)


def test_beside_a_frozen_lora_a_it_raises_where_db_would_need_x() -> None:
    operands = leaves("xb")
    y = lora_linear(**operands, scaling=0.75)
    dx, db = torch.autograd.grad(
        y.square().sum(), (operands["x"], operands["lora_b"]), create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        (dx.sum() + db.sum()).backward()


def test_a_kernel_by_name_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    own = reference.BACKEND._replace(
        name="mine", backward=lambda call: ran.append("mine") or reference.backward(call)
    )
    monkeypatch.setattr(op, "BACKENDS", (own,))
    monkeypatch.setattr(op, "_NAMES", ("mine",))
    operands = leaves("xab")
    y = lora_linear(**operands, scaling=0.75, backend="mine")
    (dx,) = torch.autograd.grad(y.square().sum(), operands["x"], create_graph=True)
    assert ran == ["mine"]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()


# --- Through a fused model ------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora_bias": {"lora_bias": True},
    "biases": {"bias": "all"},
    "dora": {"use_dora": True},
    "dora, biases": {"use_dora": True, "bias": "all"},
    "bf16": {"dtype": bf16},
}


def gradient_penalty(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What training against the gradient of x gives x and every parameter."""
    x = x.detach().requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    (dx,) = torch.autograd.grad(y.double().square().sum(), x, create_graph=True)
    loss = dx.double().square().sum() + y.double().sum()
    made = torch.autograd.grad(loss, [x, *trained.values()])
    return dict(zip(["x", *trained], made, strict=True))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_a_gradient_penalty_is_pefts(options: dict[str, Any]) -> None:
    fused, plain = pair(**options)
    x = x_for(plain)
    got, eager = gradient_penalty(fused, x), gradient_penalty(plain, x)
    exact = gradient_penalty(copy.deepcopy(plain).to(fp64), x.to(fp64))
    for name, expected in exact.items():
        assert got[name].dtype == eager[name].dtype
        assert_accurate(name, got[name], expected, eager[name])


def hessian(model: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.hessian(lambda x: model(x).square().sum(), x)


def batched_hessian(model: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.hessian(lambda x: model(x).square().sum(), x, vectorize=True)


def tangent(model: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.jvp(model, x, x.cos())[1]


def product_with_the_hessian(model: nn.Module, x: Tensor) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    made = torch.autograd.grad(model(x).square().sum(), trained, create_graph=True)
    return torch.cat([g.flatten() for g in torch.autograd.grad(made, trained, made)])


def third(model: nn.Module, x: Tensor) -> Any:
    x = x.requires_grad_()
    value = model(x)
    for _ in range(3):
        (value,) = torch.autograd.grad(value.tanh().sum(), x, create_graph=True)
    return value


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("of", [hessian, batched_hessian, tangent, product_with_the_hessian, third])
def test_what_is_made_of_second_derivatives(
    of: Callable[[nn.Module, Tensor], Any], options: dict[str, Any]
) -> None:
    fused, plain = pair(dtype=fp64, **options)
    got, expected = (of(model, x_for(plain, 2, K)) for model in (fused, plain))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_language_model(checkpointing: bool) -> None:
    plain = randomise(llama())
    plain.set_attn_implementation("eager")  # no other has a second derivative
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 14
    results = []
    for model in (fused, plain):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        embedded = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
        y = model(inputs_embeds=embedded.requires_grad_()).logits
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append(torch.autograd.grad(penalty(y, [embedded, *trained]), trained))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm()
    assert got.dtype == fp32
