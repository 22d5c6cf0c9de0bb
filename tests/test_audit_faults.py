"""The audit of a whole model: each planted fault is named at the layer where it sits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("peft")

import peft.tuners.lora.layer
from audit_models import (
    DOWN,
    UP,
    WIDTH,
    Forward,
    double,
    lora,
    low_rank,
    parts,
    plant,
    run,
    stack,
    statuses,
    step,
    tokens,
)
from audit_models import reentrant as reentrant
from peft_models import bf16, fp32
from peft_models import one_thread as one_thread

import lora_kernels.ops.lora_linear.op
from lora_kernels.ops.lora_linear import reference
from lora_kernels.peft import fuse


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx * ctx.factor, None


def unscaled(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, s: float) -> Tensor:
    return lora(x, w, a, b, bias, 1.0)


# Each with the status and the reason that name it.
FAULTS: dict[str, tuple[Forward, str, str]] = {
    "scaling doubled": (double, "twice", "counts 2 times: applied or scaled twice"),
    "applied twice": (
        lambda x, w, a, b, bias, s: lora(x, w, a, b, bias, s) + (low_rank(x, a, b) * s).to(x.dtype),
        "twice",
        "counts 2 times: applied or scaled twice",
    ),
    "scaling dropped": (unscaled, "wrong", "scaling 1.5 dropped"),
    "scaling squared": (
        lambda x, w, a, b, bias, s: lora(x, w, a, b, bias, s * s),
        "wrong",
        "scaling 1.5 squared",
    ),
    "half": (
        lambda x, w, a, b, bias, s: lora(x, w, a, b, bias, s / 2),
        "wrong",
        "the adapter counts 0.5 times",
    ),
    "not applied": (
        lambda x, w, a, b, bias, s: F.linear(x, w, bias) + 0 * lora(x, w, a, b, bias, s),
        "wrong",
        "counts 0 times: not applied",
    ),
    "merged and applied": (
        lambda x, w, a, b, bias, s: lora(x, w + s * (b @ a).to(w.dtype), a, b, bias, s),
        "twice",
        "counts 2 times: applied or scaled twice",
    ),
    "rows of W in another order": (
        lambda x, w, *rest: lora(x, w.roll(1, 0), *rest),
        "wrong",
        "y, dx beyond the tolerance",
    ),
    "truncated rank": (
        lambda x, w, a, b, bias, s: lora(x, w, a[:-1], b[:, :-1], bias, s),
        "wrong",
        "y, dx, da, db beyond the tolerance",
    ),
    "no da": (
        lambda x, w, a, *rest: lora(x, w, a.detach(), *rest),
        "wrong",
        "A requires a gradient and gets none",
    ),
    "adapter detached": (
        lambda x, w, a, b, bias, s: (
            F.linear(x, w, bias) + (low_rank(x, a, b) * s).detach().to(x.dtype)
        ),
        "dead",
        "A requires a gradient and gets none; B requires a gradient and gets none",
    ),
    "no dx": (lambda x, *rest: lora(x.detach(), *rest), "wrong", "dx beyond the tolerance"),
    "no dx of the adapter": (
        lambda x, w, a, b, bias, s: (
            F.linear(x, w, bias) + (low_rank(x.detach(), a, b) * s).to(x.dtype)
        ),
        "wrong",
        "dx beyond the tolerance",
    ),
    "dx scaled": (
        lambda x, *rest: lora(Scaled.apply(x, 1.25), *rest),
        "wrong",
        "dx beyond the tolerance",
    ),
    "db doubled": (
        lambda x, w, a, b, *rest: lora(x, w, a, Scaled.apply(b, 2.0), *rest),
        "twice",
        "counts 2 times: applied or scaled twice",
    ),
    "da scaled": (
        lambda x, w, a, *rest: lora(x, w, Scaled.apply(a, 1.2), *rest),
        "wrong",
        "counts 1.2 times",
    ),
    "zero rows without bias": (
        lambda x, *rest: lora(x, *rest) * x.any(-1, keepdim=True),
        "wrong",
        "y, dx beyond the tolerance",
    ),
    "zero rows off by little": (
        lambda x, *rest: lora(x, *rest) + (~x.any(-1, keepdim=True)).to(x.dtype) / 64,
        "wrong",
        "y beyond the tolerance",
    ),
    "zero rows NaN": (
        lambda x, *rest: lora(x, *rest) + 0 * (x / x.detach().norm(dim=-1, keepdim=True))[..., :1],
        "wrong",
        "y is not finite",
    ),
}


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_where_it_sits(
    fault: str, dtype: torch.dtype, reentrant: bool | None
) -> None:
    model = stack(reentrant, dtype=dtype)
    fuse(model)  # the other layers
    forward, status, reason = FAULTS[fault]
    with torch.no_grad():
        x = tokens(model)
        x[0, 3] = 0
    where = UP[0] if "zero rows" in fault else UP[1]  # only the first layer sees those
    plant(model.get_submodule(where), forward)
    report = run(model, x)
    found = statuses(report)
    if "NaN" in fault:  # which spreads, and is no verdict on the others
        assert set(found.values()) == {"wrong", "unjudged"}
        found = {name: s for name, s in found.items() if s != "unjudged"}
    assert found == {where: status}, str(report)
    assert reason in report.layers[where].reason
    assert not report


def test_scaling_that_the_layer_itself_holds_wrongly() -> None:
    for factor, status in ((2, "twice"), (3, "wrong")):
        model = stack()
        model.get_submodule(UP[2]).scaling["default"] *= factor
        report = run(model)
        assert statuses(report) == {UP[2]: status}
        assert "where alpha and r give 1.5" in report.layers[UP[2]].reason


def test_a_scaling_of_zero_is_dead() -> None:
    model = stack(lora_alpha=0)
    report = run(model)
    assert {(v.status, v.reason) for v in report.layers.values()} == {
        ("dead", "its scaling is zero")
    }


def test_an_adapter_in_the_base_layer_too() -> None:
    """Applied twice, without the layer's own forward being touched."""
    model = stack()
    layer = model.get_submodule(DOWN[0])
    layer.base_layer.forward = lambda x: lora(x, *parts(layer))
    assert statuses(run(model)) == {DOWN[0]: "twice"}


def test_doubled_scaling_at_initialisation_shows_in_db() -> None:
    model = stack()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    plant(model.get_submodule(UP[1]), double)
    report = run(model)
    assert statuses(report) == {UP[1]: "twice"}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_dead_adapters(fused: bool, reentrant: bool | None) -> None:
    model = stack(reentrant)
    if fused:
        fuse(model)
    zero = model.get_submodule(UP[0])
    for matrix in (zero.lora_A, zero.lora_B):
        matrix["default"].weight.data.zero_()
    cut = model.get_submodule("base_model.model.blocks.1")
    cut.forward = lambda x: x + cut.down(torch.tanh(cut.up(x))).detach()
    skipped = model.get_submodule("base_model.model.blocks.2")
    skipped.forward = lambda x: x * 1
    report = run(model)
    dead = [UP[0], UP[1], DOWN[1], UP[2], DOWN[2]]
    assert statuses(report) == dict.fromkeys(dead, "dead"), str(report)
    reasons = {report.layers[name].reason for name in dead}
    assert reasons == {
        "A and B are both zero",
        "no gradient reaches its output",
        "it was not called, but skipped or computed past it",
    }


def test_a_gradient_of_zero_is_dead() -> None:
    model = stack()
    block = model.get_submodule("base_model.model.blocks.2")
    block.forward = lambda x: x + 0 * block.down(torch.tanh(block.up(x)))
    report = run(model)
    assert statuses(report) == {UP[2]: "dead", DOWN[2]: "dead"}
    assert report.layers[UP[2]].reason == "the gradient of its output is zero"


def test_one_module_in_two_places_is_judged_over_both() -> None:
    model = stack()
    blocks = model.get_submodule("base_model.model").blocks
    blocks[2].up = blocks[0].up
    assert run(model).ok
    plant(blocks[0].up, double)
    assert statuses(run(model)) == {UP[0]: "twice"}


def test_a_gradient_that_a_hook_doubles() -> None:
    model = stack()
    parts(model.get_submodule(UP[1]))[2].register_hook(lambda db: 2 * db)
    assert statuses(run(model)) == {UP[1]: "twice"}


def test_frozen_matrices_are_no_fault() -> None:
    model = stack()
    layer = model.get_submodule(UP[1])
    layer.lora_A["default"].weight.requires_grad_(False)
    report = run(model)
    assert report.ok
    assert report.layers[UP[1]].reason == "A is frozen"
    assert "da" not in report.layers[UP[1]].ratios
    model.requires_grad_(False)
    assert run(model).layers[UP[1]].reason == "A is frozen; B is frozen"


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_bypassed_modules_cannot_be_judged(fused: bool, reentrant: bool | None) -> None:
    model = stack(reentrant)
    if fused:
        fuse(model)
    block = model.get_submodule("base_model.model.blocks.1")
    block.forward = lambda x: x + block.down(torch.tanh(lora(x, *parts(block.up))))
    report = run(model)
    assert statuses(report) == {UP[1]: "bypassed"}
    assert report.layers[UP[1]].reason == (
        "its adapter got gradients, but not through a call of it"
    )
    assert UP[1] in report.faults


def test_a_layer_whose_weight_alone_is_used_is_dead() -> None:
    model = stack()
    fuse(model)
    block = model.get_submodule("base_model.model.blocks.1")
    block.forward = lambda x: x + block.down(F.linear(x, block.up.weight, block.up.bias))
    report = run(model)
    assert statuses(report) == {UP[1]: "dead"}
    assert "computed past it" in report.layers[UP[1]].reason


def test_a_layer_that_is_bypassed_beside_its_calls_has_wrong_gradients() -> None:
    model = stack()
    block = model.get_submodule("base_model.model.blocks.1")
    block.forward = lambda x: block.up(x)[..., :WIDTH] + lora(x, *parts(block.up))[..., :WIDTH]
    report = run(model)
    assert report.layers[UP[1]].status in ("wrong", "twice")
    assert report.layers[DOWN[1]].status == "dead"


def test_a_class_that_drops_the_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack()
    forward = lambda self, x: unscaled(x, *parts(self))
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "forward", forward)
    report = run(model)
    assert statuses(report) == dict.fromkeys(report.layers, "wrong")
    assert {v.reason for v in report.layers.values()} == {
        "the adapter counts 0.667 times: scaling 1.5 dropped"
    }


KERNEL_FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "mask shifted backward": (
        {"backward": lambda call, other: call._replace(seed=call.seed + 1)},
        "wrong",
        "dx, da beyond the tolerance",
    ),
    "scaling doubled": (
        {
            "forward": lambda call, other: call._replace(scaling=2 * call.scaling),
            "backward": lambda call, other: call._replace(scaling=2 * call.scaling),
        },
        "twice",
        "counts 2 times: applied or scaled twice",
    ),
    "B of another layer": (
        {"forward": lambda call, other: call._replace(lora_b=other)},
        "mispaired",
        "its B is that of",
    ),
}


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_a_faulty_kernel_under_dropout(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused layer keeps its dropout, so that even its mask is judged."""
    changes, status, reason = KERNEL_FAULTS[fault]
    model = stack(lora_dropout=0.3).train()
    fuse(model)
    op = lora_kernels.ops.lora_linear.op
    own, other = (parts(model.get_submodule(name)) for name in UP[:2])

    def faulty(direction: str) -> Callable[[Any], Any]:
        right = getattr(reference.BACKEND, direction)
        change = changes.get(direction, lambda call, other: call)
        mine = lambda call: call.weight is not None and torch.equal(call.weight, own[0])
        return lambda call: right(change(call, other[2]) if mine(call) else call)

    patched = reference.BACKEND._replace(forward=faulty("forward"), backward=faulty("backward"))
    monkeypatch.setattr(op, "BACKENDS", (patched,))
    report = run(model)
    assert statuses(report) == {UP[0]: status}, str(report)
    assert reason in report.layers[UP[0]].reason


def test_gradients_of_earlier_steps_hide_nothing() -> None:
    model = stack()
    step(model)
    plant(model.get_submodule(UP[1]), FAULTS["no da"][0])
    cut = model.get_submodule("base_model.model.blocks.2")
    cut.forward = lambda x: x + cut.down(torch.tanh(cut.up(x))).detach()
    report = run(model)
    assert statuses(report) == {UP[1]: "wrong", UP[2]: "dead", DOWN[2]: "dead"}, str(report)


def test_hooks_of_others_are_no_fault() -> None:
    """They may change what a layer is given and what it returned: it is judged between them."""
    model = stack()
    layer = model.get_submodule(UP[1])
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, y: y * 3)
    report = run(model)
    assert report.ok, str(report)


def test_gradients_written_behind_autograd() -> None:
    """Someone accumulates into `.grad` himself."""
    model = stack()
    layer = model.get_submodule(UP[1])

    class Writes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, b: Tensor, parameter: nn.Parameter) -> Tensor:
            ctx.parameter = parameter
            return b.clone()

        @staticmethod
        def backward(ctx: Any, db: Tensor) -> tuple[None, None]:
            ctx.parameter.grad = db.clone()
            return None, None

    weight = layer.lora_B["default"].weight
    plant(layer, lambda x, w, a, b, *rest: lora(x, w, a, Writes.apply(b, weight), *rest))
    report = run(model)
    assert report.ok, str(report)
    assert weight.grad is None
