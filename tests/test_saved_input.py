"""What a layer keeps for its backward pass: no more than PEFT does, and x safe from its caller."""

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from peft_models import (
    AddsInPlace,
    H,
    K,
    add_other,
    bf16,
    calls_of_lora_linear,
    fp16,
    fp32,
    fp64,
    pair,
    peft_model,
    run,
    x_for,
)
from peft_models import one_thread as one_thread
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear
from lora_kernels.peft import by_row, fuse
from lora_kernels.saved_input import WRITTEN, _has_rows
from lora_kernels.testing import assert_accurate

DTYPES = [(fp32, fp32), (bf16, fp32), (bf16, bf16), (fp16, fp32), (fp64, fp64)]


def saved_bytes(model: nn.Module, x: Tensor, autocast: bool) -> int:
    """What autograd keeps for the backward pass, the parameters not counted."""
    saved: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", bf16, enabled=autocast),
    ):
        model(x)
    own = {p.data_ptr() for p in model.parameters()}
    return sum(t.nbytes for t in saved if t.data_ptr() not in own)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("base", "adapters"), DTYPES, ids=str)
def test_a_fused_layer_saves_no_more_than_peft(
    base: torch.dtype, adapters: torch.dtype, dropout: float, autocast: bool
) -> None:
    for needs in itertools.product((False, True), repeat=3):
        if not any(needs):
            continue
        model = peft_model(dtype=base, lora_dropout=dropout).train()
        layer = model.base_model.model.up
        for part, need in (("lora_A", needs[1]), ("lora_B", needs[2])):
            weight = getattr(layer, part)["default"].weight
            weight.data, weight.requires_grad = weight.data.to(adapters), need
        x = torch.randn(64, K).to(base).requires_grad_(needs[0])
        expected = saved_bytes(layer, x, autocast)
        assert len(fuse(model).fused) == 2
        assert saved_bytes(layer, x, autocast) <= expected, needs  # the first call copies x
        layer.__dict__[WRITTEN] = False
        assert saved_bytes(layer, x, autocast) <= expected, needs


# --- A caller that writes to x before the backward pass ------------------------------------------


class InPlace(nn.Module):
    """Layers whose input is written to after them, each in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, H), nn.Linear(H, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x + 0
        wide = self.up(h)
        h.mul_(2)
        gate = wide + 0  # nothing but `down` keeps it
        h += self.down(gate)
        gate.relu_()
        return h + gate.sum(-1, keepdim=True)


class OutOfPlace(InPlace):
    """The same function."""

    def forward(self, x: Tensor) -> Tensor:
        h = x + 0
        wide = self.up(h)
        h = h * 2
        gate = wide + 0
        h = h + self.down(gate)
        return h + gate.relu().sum(-1, keepdim=True)


def in_place(base: torch.dtype, dropout: float) -> tuple[nn.Module, nn.Module]:
    plain = peft_model(InPlace(), dtype=base, lora_dropout=dropout)
    for name, parameter in plain.named_parameters():
        if "lora_" in name and base != fp64:
            parameter.data = parameter.data.float()
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 2
    return fused, plain


@pytest.mark.parametrize("base", [bf16, fp16], ids=str)
def test_wider_adapters_bear_an_x_that_is_written_to(
    base: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain = in_place(base, 0.0)
    exact = copy.deepcopy(plain).to(fp64)
    exact.base_model.model.__class__ = OutOfPlace
    x = x_for(plain).to(base)
    eager, reference = run(plain, x), run(exact, x.to(fp64))
    for _ in range(3):
        with calls_of_lora_linear(monkeypatch) as calls:
            got = run(fused, x)
        assert len(calls) == 2
        for name, expected in reference.items():
            assert_accurate(name, got[name], expected, eager[name])


def step(model: nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [fp64, bf16], ids=str)
def test_dropout_bears_an_x_that_is_written_to(dtype: torch.dtype, autocast: bool) -> None:
    """The twin draws the same masks."""
    fused, _ = in_place(dtype, 0.5)
    twin = copy.deepcopy(fused)
    twin.base_model.model.__class__ = OutOfPlace
    x = x_for(fused).to(dtype)
    for seed in range(3):
        with torch.autocast("cpu", bf16, enabled=autocast and dtype != fp64):
            for got, expected in zip(step(fused, x, seed), step(twin, x, seed), strict=True):
                assert torch.equal(got, expected)


def saves_x_itself(layer: nn.Module, x: Tensor) -> bool:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    y.sum().backward()
    return any(t.data_ptr() == x.data_ptr() for t in saved)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("of", ["fused", "LoRALinear"])
def test_a_layer_whose_x_is_left_alone_copies_it_once(of: str, requires_grad: bool) -> None:
    if of == "fused":
        layer: nn.Module = pair(lora_dropout=0.3)[0].base_model.model.up
    else:
        layer = LoRALinear(K, H, r=2, dtype=bf16, adapter_dtype=fp32)
    dtype = next(layer.parameters()).dtype
    x = torch.randn(6, K).to(dtype).requires_grad_(requires_grad)
    assert [saves_x_itself(layer, x) for _ in range(3)] == [False, True, True]
    assert saves_x_itself(copy.deepcopy(layer), x)


def test_where_peft_saves_x_itself_so_do_we_at_once() -> None:
    for options in ({}, {"dtype": bf16}):
        layer = pair(**options)[0].base_model.model.up
        weight = layer.lora_A["default"].weight
        weight.data = weight.data.to(layer.base_layer.weight.dtype)
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.to(weight.dtype)
        x = torch.randn(6, K).to(weight.dtype)
        assert saves_x_itself(layer, x)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_once_written_to_always_copied(checkpointed: bool) -> None:
    layer = LoRALinear(K, K, r=2, lora_dropout=0.5, init_lora_weights=False)

    def forward(h: Tensor, write: bool) -> Tensor:
        def block(h: Tensor) -> Tensor:
            h = h + 0
            y = layer(h)
            return h.add_(y) if write else h + y

        if checkpointed:
            return checkpoint(block, h, use_reentrant=False)
        return block(h)

    x = torch.randn(6, K, requires_grad=True)
    gradients: dict[bool, list[Tensor]] = {True: [], False: []}
    for write in (True, False, True, True, False, True):
        torch.manual_seed(1)
        gradients[write] += torch.autograd.grad(forward(x, write).square().sum(), x)
    assert all(torch.equal(g, gradients[False][0]) for both in gradients.values() for g in both)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seen", [False, True], ids=["", "known to be left alone"])
def test_a_checkpoint_bears_what_another_call_of_the_layer_does_not_show(
    seen: bool, reentrant: bool
) -> None:
    def gradients(write: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layer = LoRALinear(K, K, r=2, lora_dropout=0.5, dtype=fp64, init_lora_weights=False)
        if seen:
            layer.__dict__[WRITTEN] = False

        def first(h: Tensor) -> Tensor:
            h = h + 0
            y = layer(h)
            return (h.add_(y) if write else h + y).sin()

        x = torch.randn(6, K, dtype=fp64, requires_grad=True)
        h = x
        for block in (first, lambda h: layer(h).sin()):
            h = checkpoint(block, h, use_reentrant=reentrant)
        h.square().sum().backward()
        return [x.grad, layer.lora_A.grad, layer.lora_B.grad]

    for got, expected in zip(gradients(write=True), gradients(write=False), strict=True):
        assert torch.equal(got, expected)


VIEWS = {  # of h[8, 6, K], in which no [M, K] lies
    "transposed": lambda h: h.transpose(0, 1),
    "sliced": lambda h: h[:, :5],
    "4-D": lambda h: h.view(2, 4, 6, -1).permute(2, 0, 1, 3),
}


def test_what_has_rows() -> None:
    """Where `view` makes them: an axis of one element may have any stride."""
    h = torch.zeros(8, 6, K)
    shapes = [h, h[:, :1], h[:1], h[..., :2], h[:1].transpose(0, 1), h[:0], h[:, ::2]]
    for x in shapes:
        assert x.view(-1, x.shape[-1]).dim() == 2
        assert _has_rows(x)
    for view in VIEWS.values():
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            view(h).view(-1, K)
        assert not _has_rows(view(h))


CHECKPOINTS = {"": None, "checkpoint": False, "reentrant": True}
DOWN = {"target_modules": ["down"]}


def assert_may_be_written_to(model: nn.Module, reentrant: bool | None, **arguments: Any) -> None:
    """The gradients are those of a sum that is not written over the layer's input, twice."""

    def gradients(write: bool) -> list[Tensor]:
        x = torch.randn(8, 6, K, dtype=fp64, generator=torch.Generator().manual_seed(0))
        x = x.to(model.base_model.model.down.weight.dtype).requires_grad_()
        call = functools.partial(model, write=write, **arguments)
        if reentrant is not None:
            call = functools.partial(checkpoint, call, use_reentrant=reentrant)
        model.zero_grad()
        call(x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    for _ in range(2):
        for got, expected in zip(gradients(write=True), gradients(write=False), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("of", ["fused", "LoRALinear"])
def test_an_x_of_which_products_read_a_copy_may_be_written_to(
    of: str, view: str, reentrant: bool | None
) -> None:
    """There PEFT keeps the copy."""
    model = peft_model(AddsInPlace(VIEWS[view]), dtype=fp64, **DOWN)
    if of == "fused":
        assert fuse(model).fused
    else:
        inner = model.base_model.model
        inner.down = LoRALinear.from_linear(inner.down.base_layer, r=2, init_lora_weights=False)
    assert_may_be_written_to(model, reentrant)


@pytest.mark.parametrize("reentrant", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("of", ["active", "rows"])
@pytest.mark.parametrize("frozen", ["default", "other"])
def test_an_adapter_trained_beside_a_frozen_one_bears_an_x_that_is_written_to(
    frozen: str, of: str, reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT keeps x in the adapters' dtype, and of a batch each adapter's rows."""
    monkeypatch.setattr(by_row, "_COLUMNS_PER_RANK", 0)
    model = peft_model(AddsInPlace(), dtype=bf16 if of == "active" else fp64, **DOWN)
    add_other(model, **DOWN)
    arguments: dict[str, Any] = {}
    if of == "active":  # the adapters are in fp32
        model.base_model.set_adapter(["default", "other"])
    else:
        model.to(fp64).eval()  # in training PEFT takes no adapter_names
        arguments = {"adapter_names": ["default", "other"] * 4}
    report = fuse(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and frozen not in name)
    assert_may_be_written_to(model, reentrant, **arguments)
    assert all(outcomes.keys() == {"fused"} for outcomes in report.calls().values())


def test_an_inference_tensor_may_be_trained_on_where_x_is_copied() -> None:
    layer = LoRALinear(K, H, r=2, lora_dropout=0.5)
    with torch.inference_mode():
        x = torch.randn(6, K)
    layer(x).sum().backward()
    assert layer.lora_B.grad.any()
