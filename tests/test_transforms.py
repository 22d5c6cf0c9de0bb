"""Transforms around a call, or around its backward pass alone: the values of plain PyTorch."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft_models import K, fp32, fp64, pair, x_for
from peft_models import one_thread as one_thread
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import BackendUnavailable, LoRALinear, lora_linear
from lora_kernels.ops.lora_linear import op, reference
from lora_kernels.ops.lora_linear.reference import oracle
from lora_kernels.testing import Case, assert_accurate, bf16, make_inputs

M, N, R = 6, 24, 3
Operands = tuple[Tensor, ...]
Run = Callable[..., Tensor]


def ours(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return lora_linear(x, weight, a, b, 0.75, **options)


def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    seed = options.pop("seed", None)
    return oracle(
        x, weight, a, b, 0.75, seed=None if seed is None else torch.tensor([seed]), **options
    )


def grads(run: Run, operands: Operands, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return y, and x, A and B as leaves that it depends on."""
    x, weight, a, b = operands
    leaves = tuple(t.detach().clone().requires_grad_() for t in (x, a, b))
    return run(leaves[0], weight, *leaves[1:], **options), leaves


def dual(run: Run, operands: Operands, **options: Any) -> Any:
    """y and its tangent, at the tangents cos(x), sin(A) and cos(B)."""
    x, weight, a, b = operands
    with forward_ad.dual_level():
        tangents = (x, x.cos()), (a, a.sin()), (b, b.cos())
        x, a, b = (forward_ad.make_dual(*pair) for pair in tangents)
        return tuple(forward_ad.unpack_dual(run(x, weight, a, b, **options)))


def dual_with_grad(run: Run, operands: Operands, **options: Any) -> Any:
    """Forward over reverse: the gradient of the tangent."""
    x, weight, a, b = (t.detach().clone() for t in operands)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    with forward_ad.dual_level():
        y = run(forward_ad.make_dual(x, x.detach().cos()), weight, a, b, **options)
        return torch.autograd.grad(forward_ad.unpack_dual(y).tangent.square().sum(), leaves[1:])


def dual_dy(run: Run, operands: Operands, **options: Any) -> Any:
    """The level begins after the call: only dy has a tangent."""
    y, leaves = grads(run, operands, **options)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), y.detach().cos())
        return [tuple(forward_ad.unpack_dual(g)) for g in torch.autograd.grad(y, leaves, dy)]


def batched(run: Run, operands: Operands, **options: Any) -> Any:
    y, leaves = grads(run, operands, **options)
    directions = torch.linspace(-1, 1, 3 * y.numel(), dtype=y.dtype).view(3, *y.shape)
    return torch.autograd.grad(y, leaves, directions, is_grads_batched=True)


def vmapped_backward(run: Run, operands: Operands, **options: Any) -> Any:
    y, leaves = grads(run, operands, **options)
    directions = torch.linspace(-1, 1, 3 * y.numel(), dtype=y.dtype).view(3, *y.shape)
    return torch.vmap(lambda v: torch.autograd.grad(y, leaves, v))(directions)


def jacobian(run: Run, operands: Operands, strategy: str = "reverse-mode", **options: Any) -> Any:
    x, weight, a, b = operands
    return torch.autograd.functional.jacobian(
        lambda x, a, b: run(x, weight, a, b, **options).sum(0),
        (x, a, b),
        vectorize=True,
        strategy=strategy,
    )


def func(name: str) -> Callable[..., Any]:
    def transform(run: Run, operands: Operands, **options: Any) -> Any:
        x, weight, a, b = operands

        def loss(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return run(x, weight, a, b, **options).square().sum(0)

        scalar = lambda *t: loss(*t).sum()
        if name == "vmap":
            batch = [torch.stack([t, t.flip(0)]) for t in (x, a, b)]
            return torch.vmap(loss)(*batch)
        if name == "jvp":
            return torch.func.jvp(loss, (x, a, b), (x.cos(), a.sin(), b.cos()))
        if name == "per-sample":
            one = torch.func.grad(lambda a, b, x: loss(x[None], a, b).sum(), argnums=(0, 1))
            return torch.vmap(one, in_dims=(None, None, 0))(a, b, x)
        if name in ("grad", "hessian"):
            return getattr(torch.func, name)(scalar, argnums=(0, 1, 2))(x, a, b)
        return getattr(torch.func, name)(loss, argnums=(0, 1, 2))(x, a, b)

    return transform


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "dual_level": dual,
    "forward over reverse": dual_with_grad,
    "dual dy": dual_dy,
    "is_grads_batched": batched,
    "vmap of autograd.grad": vmapped_backward,
    "jacobian": jacobian,
    "jacobian forward-mode": lambda *a, **o: jacobian(*a, strategy="forward-mode", **o),
    **{
        f"torch.func.{name}": func(name)
        for name in ("vmap", "jvp", "per-sample", "grad", "jacrev", "jacfwd", "hessian")
    },
}


def flat(results: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda t: found.append(t.detach()), results)
    return found


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4, "seed": 5}], ids=["", "dropout"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("dtype", [fp32, fp64], ids=str)
@pytest.mark.parametrize("m", [1, M])
def test_a_transform_gets_the_values_of_plain_pytorch(
    transform: Callable[..., Any], options: dict[str, Any], dtype: torch.dtype, m: int
) -> None:
    operands = make_inputs(Case(m, N, K, R, dtype))[:4]
    got, eager = (flat(transform(run, operands, **options)) for run in (ours, plain))
    reference = flat(transform(plain, tuple(t.to(fp64) for t in operands), **options))
    assert len(got) == len(reference)
    for name, values in enumerate(zip(got, reference, eager, strict=True)):
        assert_accurate(str(name), *values)


@pytest.mark.parametrize("transform", [dual, batched, dual_dy, func("vmap")])
def test_wider_adapters_keep_their_dtype(transform: Callable[..., Any]) -> None:
    def mixed(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low_rank = torch.nn.functional.linear(x.to(a.dtype) @ a.t(), b) * 0.75
        return (torch.nn.functional.linear(x, weight) + low_rank).to(x.dtype)

    operands = make_inputs(Case(M, N, K, R, bf16, fp32))[:4]
    got, eager = (flat(transform(run, operands)) for run in (ours, mixed))
    reference = flat(transform(mixed, tuple(t.to(fp64) for t in operands)))
    for name, (value, exact, same_dtype) in enumerate(zip(got, reference, eager, strict=True)):
        assert value.dtype == same_dtype.dtype
        assert_accurate(str(name), value, exact, same_dtype)


def test_dropout_under_vmap_heeds_the_randomness_that_was_asked_for() -> None:
    x, weight, a, b = make_inputs(Case(M, N, K, R))[:4]
    rows = x[:1].expand(4, 1, K)

    def dropped(randomness: str) -> Tensor:
        call = lambda x: lora_linear(x, weight, a, b, 1.0, dropout_p=0.5)
        return torch.vmap(call, randomness=randomness)(rows)

    same, different = dropped("same"), dropped("different")
    assert all(torch.equal(row, same[0]) for row in same)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        dropped("error")


def test_a_kernel_by_name_refuses_a_transform() -> None:
    operands = make_inputs(Case(M, N, K, R))[:4]
    with (
        forward_ad.dual_level(),
        pytest.raises(BackendUnavailable, match="'triton' cannot run inside forward-mode"),
    ):
        ours(*operands, backend="triton")
    dual(ours, operands, backend="reference")


def test_a_second_derivative_of_a_batch() -> None:
    results = []
    for run in (ours, plain):
        y, leaves = grads(run, make_inputs(Case(M, N, K, R, fp64))[:4])
        directions = torch.linspace(-1, 1, 3 * y.numel(), dtype=fp64).view(3, *y.shape)
        firsts = torch.autograd.grad(
            y, leaves, directions, is_grads_batched=True, create_graph=True
        )
        value = torch.stack([first.square().sum() for first in firsts]).sum()
        results.append(torch.autograd.grad(value, leaves))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


# --- Through a fused model -----------------------------------------------------------------------


def tangent_of(model: Any, x: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        return [*forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos())))]


def jacobian_of(model: Any, x: Tensor) -> list[Tensor]:
    return [torch.autograd.functional.jacobian(model, x, vectorize=True)]


def batched_of(model: Any, x: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    directions = torch.linspace(-1, 1, 2 * y.numel(), dtype=y.dtype).view(2, *y.shape)
    return [*torch.autograd.grad(y, trained, directions, is_grads_batched=True)]


def jvp_of(model: Any, x: Tensor) -> list[Tensor]:
    return [*torch.func.jvp(model, (x,), (x.cos(),))]


@pytest.mark.parametrize("of", [tangent_of, jacobian_of, batched_of, jvp_of])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "r": 2}, {"use_dora": True}], ids=str)
def test_a_fused_model_gets_the_values_of_peft(of: Any, options: dict[str, Any]) -> None:
    model, unfused = pair(dtype=fp64, **options)
    x = x_for(model, 2, 3, K)
    for got, expected in zip(of(model, x), of(unfused, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_per_sample_gradients_of_a_layer() -> None:
    layer = LoRALinear(K, N, r=R, init_lora_weights=False).double()
    x = torch.randn(M, K, dtype=fp64)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    adapter = {n: p for n, p in parameters.items() if n.startswith("lora")}

    def loss(adapter: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters | adapter, (row,)).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(adapter, x)
    for i, row in enumerate(x):
        layer.zero_grad()
        layer(row).square().sum().backward()
        torch.testing.assert_close(got["lora_A"][i], layer.lora_A.grad)
        torch.testing.assert_close(got["lora_B"][i], layer.lora_B.grad)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"dtype": bf16}], ids=str)
def test_a_layer_that_keeps_x_from_its_caller(options: dict[str, Any]) -> None:
    """Alone it would work on a copy of x, which no transform lets it watch."""
    layer = LoRALinear(K, N, r=R, init_lora_weights=False, adapter_dtype=fp32, **options)
    x = torch.randn(M, K).to(layer.weight.dtype)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return layer(x).float().square().sum()

    gradient = torch.func.grad(loss)(x)
    _, slope = torch.func.jvp(loss, (x,), (x.cos(),))
    tolerance = 0.02 if x.dtype == bf16 else 1e-4
    torch.testing.assert_close(
        (gradient.float() * x.cos().float()).sum(), slope.float(), rtol=tolerance, atol=0
    )


def left_by_grad(*operands: Tensor) -> list[Tensor]:
    """The operands as two nested gradients leave them behind, all of them differentiated by."""
    left: list[Tensor] = []
    every = tuple(i for i, t in enumerate(operands) if t.is_floating_point())

    def remember(*wrapped: Tensor) -> Tensor:
        left[:] = wrapped
        return sum(t.sum() for t in wrapped)

    def inner(*wrapped: Tensor) -> Tensor:
        return sum(t.sum() for t in torch.func.grad(remember, every)(*wrapped))

    torch.func.grad(inner, every)(*operands)
    return left


def left_by_functionalize(*operands: Tensor) -> list[Tensor]:
    left: list[Tensor] = []
    torch.func.functionalize(lambda *wrapped: left.extend(wrapped))(*operands)
    return left


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What a backend that reads addresses, as a kernel does, has read in each of its calls."""
    read: list[list[int]] = []

    def reading(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def direction(call: Any, *rest: Any) -> Any:
            found = [t.data_ptr() for t in call if isinstance(t, Tensor)]
            assert all(found)
            read.append(found)
            return run(call, *rest)

        return direction

    backend = reference.BACKEND._replace(
        forward=reading(reference.BACKEND.forward), backward=reading(reference.BACKEND.backward)
    )
    monkeypatch.setattr(op, "BACKENDS", (backend,))
    return read


watched = functools.partial(FlopCounterMode, display=False)


@pytest.mark.parametrize("under", [contextlib.nullcontext, watched])
@pytest.mark.parametrize("by", [left_by_grad, left_by_functionalize])
def test_what_a_transform_left_behind_is_as_before_it(
    by: Callable[..., Sequence[Tensor]], under: Callable[[], Any], addresses: list[list[int]]
) -> None:
    """A kernel reads addresses, and what a transform wraps a tensor in has none."""
    x, weight, a, b, bias, dy, *_ = make_inputs(Case(M, N, K, R, bias=True))
    seed = torch.tensor([7])
    results = []
    for wrap in (lambda *t: t, by):
        x1, weight1, bias1, seed1, dy1 = wrap(x, weight, bias, seed, dy)
        (weight2,) = wrap(weight)
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        options = {"bias": bias1, "dropout_p": 0.5, "seed": seed1}
        moved = torch.zeros_like(x, requires_grad=True)
        addresses.clear()
        for given in (x1, x1 + moved):
            with under():
                y = ours(given, weight1, *leaves, **options, rebuild=lambda w=weight2: w)
            asked = [*leaves, moved] if given is not x1 else leaves
            results.append([y.detach(), *torch.autograd.grad(y, asked, dy1)])
        if under is not watched:  # what functionalize left is composed
            ran = [x.data_ptr(), weight.data_ptr()] in [found[:2] for found in addresses]
            assert ran == (by is left_by_grad or wrap is not by)
    half = len(results) // 2
    for before, after in zip(results[:half], results[half:], strict=True):
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other)
    left, _ = by(seed, dy)  # beside plain operands
    results = [ours(x, weight, a, b, dropout_p=0.5, seed=given) for given in (left, seed)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("grad", [False, True])
def test_what_nested_transforms_left_behind_has_data(
    grad: bool, addresses: list[list[int]]
) -> None:
    operands = make_inputs(Case(M, N, K, R))[:4]
    x, weight, a, b = left_by_grad(*operands)
    extra = torch.zeros(R, K).requires_grad_(grad)
    assert torch.equal(ours(x, weight, a, b), ours(*operands))
    ours(x, weight, extra, b)
    assert addresses == [[t.data_ptr() for t in operands]] * 2 + [
        [t.data_ptr() for t in (operands[0], operands[1], extra, operands[3])]
    ]


@pytest.mark.parametrize("under", [contextlib.nullcontext, watched])
def test_what_a_transform_left_behind_gets_its_gradient(under: Callable[[], Any]) -> None:
    operands = make_inputs(Case(M, N, K, R))[:4]
    leaves = [operands[i].requires_grad_() for i in (0, 2, 3)]
    with under():
        y = ours(*left_by_grad(*operands))
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), leaves),
        torch.autograd.grad(ours(*operands).square().sum(), leaves),
    )
