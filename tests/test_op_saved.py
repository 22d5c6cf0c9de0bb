"""What `lora_linear` computes, saves and rebuilds for a backward pass, and what it does not."""

from typing import Any

import pytest
import torch
from op_calls import call_on, with_grad
from torch import Tensor

from lora_kernels.ops.lora_linear import op, reference
from lora_kernels.ops.lora_linear.operands import Backward
from lora_kernels.testing import Case, Inputs, bf16, expected, fp32, make_inputs, run_backend


class Spy:
    """The reference backend, remembering each backward call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Backward] = []
        monkeypatch.setattr(op, "BACKENDS", (reference.BACKEND._replace(backward=self._backward),))

    def _backward(self, call: Backward) -> Any:
        self.calls.append(call)
        return reference.backward(call)


@pytest.mark.parametrize("need_dx", [False, True])
@pytest.mark.parametrize("need_da", [False, True])
@pytest.mark.parametrize("need_db", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_only_needed_gradients_are_computed(
    need_dx: bool, need_da: bool, need_db: bool, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    case = Case(20, 30, 40, 4, dropout_p=dropout_p)
    inputs = make_inputs(case)._replace(seed=torch.tensor([1]) if dropout_p else None)
    detached = Inputs(*(None if t is None else t.detach() for t in inputs))
    needs = (need_dx, need_da, need_db)
    leaves = [
        t.requires_grad_(need)
        for t, need in zip((inputs.x, inputs.lora_a, inputs.lora_b), needs, strict=True)
    ]
    y = call_on(inputs, dropout_p=dropout_p, seed=1)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    y.backward(inputs.dy)
    assert [leaf.grad is not None for leaf in leaves] == list(needs)
    (call,) = spy.calls
    assert call.needs == needs
    # Nothing is handed on, or kept until then, that no needed gradient reads.
    assert [t is not None for t in (call.lora_a, call.lora_b, call.seed)] == [
        need_dx, need_dx or need_da, (need_dx or need_da) and dropout_p > 0
    ]  # fmt: skip

    everything = run_backend(reference.BACKEND, case, detached)
    for leaf, full in zip(leaves, everything[2:], strict=True):
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, full)


@pytest.mark.parametrize("needs", [(0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_what_no_needed_gradient_reads_may_be_frozen_in_inference_mode(
    needs: tuple[int, int, int],
) -> None:
    case = Case(20, 30, 40, 4, bias=True)
    with torch.inference_mode():
        frozen = make_inputs(case)  # a base model loaded under inference mode
    inputs = make_inputs(case)._replace(weight=frozen.weight, bias=frozen.bias)
    leaves = inputs.x, inputs.lora_a, inputs.lora_b
    wanted = [t.requires_grad_() for t, need in zip(leaves, needs, strict=True) if need]
    gradients = torch.autograd.grad(call_on(inputs), wanted, inputs.dy)
    plain = expected(case, make_inputs(case), fp32)
    names = [name for name, need in zip(("dx", "da", "db"), needs, strict=True) if need]
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, plain[name])


@pytest.mark.parametrize(
    ("needs", "written"),
    [
        ((0, 1, 1), ("weight", "lora_a")),
        ((0, 0, 1), ("weight", "lora_a", "lora_b", "x")),
        ((1, 0, 0), ("x",)),
    ],
)
def test_what_no_needed_gradient_reads_may_be_written_to(
    needs: tuple[int, int, int], written: tuple[str, ...]
) -> None:
    inputs = make_inputs(Case(20, 30, 40, 4))
    leaves = inputs.x, inputs.lora_a, inputs.lora_b
    wanted = [t.requires_grad_() for t, need in zip(leaves, needs, strict=True) if need]
    kept = torch.autograd.grad(call_on(inputs), wanted, inputs.dy)
    y = call_on(inputs)
    with torch.no_grad():
        for name in written:
            getattr(inputs, name).zero_()
    for gradient, right in zip(torch.autograd.grad(y, wanted, inputs.dy), kept, strict=True):
        assert torch.equal(gradient, right)


def _saved(inputs: Inputs, **options: Any) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call_on(inputs, **options)
    return saved


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_training_saves_the_operands_p_and_a_callers_seed(dropout_p: float) -> None:
    inputs = with_grad(make_inputs(Case(20, 30, 40, 4, bias=True)))
    saved = _saved(inputs, dropout_p=dropout_p, seed=torch.tensor([1]))
    operands = {t.data_ptr() for t in (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)}
    extra = sorted(tuple(t.shape) for t in saved if t.data_ptr() not in operands)
    assert extra == ([(1,), (20, 4)] if dropout_p else [(20, 4)])
    assert operands <= {t.data_ptr() for t in saved}


def test_x_and_p_are_saved_only_for_their_gradients() -> None:
    inputs = make_inputs(Case(20, 30, 40, 4))
    shapes = {tuple(t.shape) for t in _saved(with_grad(inputs, x=True, a=False, b=False))}
    assert (20, 40) not in shapes
    assert (20, 4) not in shapes
    shapes = {tuple(t.shape) for t in _saved(with_grad(inputs, x=False, a=False, b=True))}
    assert (20, 40) not in shapes
    assert (20, 4) in shapes


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_transient_weight_is_rebuilt_instead_of_saved(dropout_p: float, autocast: bool) -> None:
    inputs = with_grad(make_inputs(Case(20, 30, 40, 4, bias=True)))
    rebuilt: list[int] = []
    rebuild = lambda: rebuilt.append(1) or inputs.weight.clone()
    with torch.autocast("cpu", bf16, enabled=autocast):
        shapes = {tuple(t.shape) for t in _saved(inputs, dropout_p=dropout_p, rebuild=rebuild)}
        assert (30, 40) not in shapes
        leaves = [inputs.x, inputs.lora_a, inputs.lora_b]
        kept, transient = (
            call_on(inputs, dropout_p=dropout_p, seed=1, rebuild=way) for way in (None, rebuild)
        )
    assert torch.equal(kept, transient)
    assert not rebuilt
    gradients = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (kept, transient)]
    assert len(rebuilt) == 1
    assert all(map(torch.equal, *gradients))


def test_a_transient_weight_is_not_saved_for_one_token_either() -> None:
    inputs = with_grad(make_inputs(Case(1, 30, 40, 4)))
    shapes = [set(t.shape) for t in _saved(inputs, rebuild=inputs.weight.clone)]
    assert {30, 40} not in shapes


def test_a_transient_weight_is_rebuilt_only_for_dx() -> None:
    inputs = with_grad(make_inputs(Case(20, 30, 40, 4)), x=False)
    call_on(inputs, rebuild=lambda: pytest.fail("not needed")).sum().backward()
    assert inputs.lora_a.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_grad(mode: Any) -> None:
    inputs = with_grad(make_inputs(Case(20, 30, 40, 4)))
    with mode():
        assert _saved(inputs) == []
        y = call_on(inputs)
    assert not y.requires_grad
    assert torch.equal(y, call_on(inputs).detach())


def test_nothing_is_saved_when_nothing_trains() -> None:
    assert _saved(make_inputs(Case(20, 30, 40, 4))) == []
