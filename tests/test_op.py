"""`lora_linear` against the float64 oracle, and what it promises."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from op_calls import call_on, with_grad
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import op, reference
from lora_kernels.testing import (
    Case,
    Inputs,
    assert_accurate,
    bf16,
    expected,
    fp16,
    fp32,
    fp64,
    make_inputs,
)

LAYOUTS = ("contiguous", "transposed", "every second", "offset", "expanded", "overlapping")
DTYPES = ((fp64, fp64), (fp32, fp32), (bf16, bf16), (fp16, fp16), (bf16, fp32), (fp16, fp32))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Return a tensor like `values` with other strides; the last two layouts repeat values."""
    shape = values.shape
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second":
        return torch.stack((values, values + 1), -1).flatten(-2)[..., ::2]
    if layout == "offset":
        return F.pad(values, (3, 2))[..., 3 : 3 + shape[-1]]
    if layout == "expanded":
        return values[:1].clone().expand(shape)
    if layout == "overlapping":
        memory = torch.cat((values.reshape(-1), values.new_ones(sum(shape) + 1)))
        return memory.as_strided(shape, (1,) * len(shape))
    return values


def check(*draws: Inputs, scaling: float = 0.75, dropout_p: float = 0.0, seed: int = 7) -> None:
    """Assert that y, dx, da and db of `lora_linear` are right, over all `draws` together.

    Eager PyTorch may happen to be exact in the one element of a tiny result; over several draws of
    the operands its error is what the tolerance rule takes it for.
    """
    trials = []
    for inputs in draws:
        x, weight, lora_a, lora_b, bias, dy, *_ = inputs
        leaves = [t.detach().requires_grad_() for t in (x, lora_a, lora_b)]
        y = lora_linear(
            leaves[0], weight, *leaves[1:], scaling, bias, dropout_p=dropout_p, seed=seed
        )
        results = (y, *torch.autograd.grad(y, leaves, dy))
        case = Case(0, 0, 0, lora_a.shape[0], dropout_p=dropout_p, scaling=scaling)
        inputs = inputs._replace(seed=torch.tensor([seed]))
        trials.append((results, expected(case, inputs, fp64), expected(case, inputs, x.dtype)))
        for got, like in zip(results, (x, *leaves), strict=True):
            assert got.dtype == like.dtype
    for i, name in enumerate(("y", "dx", "da", "db")):
        assert_accurate(
            name,
            torch.stack([results[i] for results, _, _ in trials]),
            torch.stack([reference64[name] for _, reference64, _ in trials]),
            torch.stack([eager[name] for _, _, eager in trials]),
        )


@given(
    lead=st.lists(st.integers(0, 7), max_size=3),
    m=st.sampled_from((4, 5, 17, 67)),
    n=st.sampled_from((0, 1, 2, 13, 64, 97)),
    k=st.sampled_from((0, 1, 3, 31, 64, 101)),
    r=st.integers(1, 300),
    dtypes=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 6),
    bias=st.booleans(),
    dropout_p=st.sampled_from((0.0, 0.0, 0.1, 0.5, 0.9)),
    scaling=st.sampled_from((0.25, 1.0, 2.0)),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_shape_layout_dtype_and_rank(
    lead: list[int], m: int, n: int, k: int, r: int, dtypes: tuple[torch.dtype, torch.dtype],
    layouts: tuple[str, ...], bias: bool, dropout_p: float, scaling: float, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(r)
    dtype, adapter_dtype = dtypes

    def draw(layout: str, *shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=fp64) * scale
        return laid_out(values.to(dtype), layout)

    def inputs() -> Inputs:
        wide = max(k, 1) ** -0.5
        return Inputs(
            x=draw(layouts[0], *lead, m, k),
            weight=draw(layouts[1], n, k, scale=wide),
            lora_a=draw(layouts[2], r, k, dtype=adapter_dtype, scale=wide),
            lora_b=draw(layouts[3], n, r, dtype=adapter_dtype, scale=r**-0.5),
            bias=draw(layouts[4], n) if bias else None,
            dy=draw(layouts[5], *lead, m, n),
            seed=None,
        )

    rows = math.prod(lead) * m
    smallest = min(size for size in (rows * n, rows * k, r * k, n * r, 64) if size > 0)
    draws = [inputs() for _ in range(min(64 // smallest, 20))]
    check(*draws, scaling=scaling, dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_few_tokens(dtypes: tuple[torch.dtype, torch.dtype], m: int, dropout_p: float) -> None:
    case = Case(m, 40, 33, 17, *dtypes, bias=True)
    check(*(make_inputs(case, seed=seed) for seed in range(8)), dropout_p=dropout_p)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_x_of_one_dimension(dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float) -> None:
    inputs = make_inputs(Case(1, 40, 33, 3, *dtypes, bias=True))
    check(inputs._replace(x=inputs.x[0], dy=inputs.dy[0]), dropout_p=dropout_p)


@pytest.mark.parametrize("scaling", [0, 0.0, 3, -0.5, 1e-3])
@pytest.mark.parametrize("dropout_p", [0, 0.4])
def test_any_number_scales(scaling: float, dropout_p: float) -> None:
    check(make_inputs(Case(20, 30, 40, 4, bias=True)), scaling=scaling, dropout_p=dropout_p)


@given(row=st.integers(0, 2**20))
@example(row=0)
def test_the_mask_counts_flattened_rows(row: int) -> None:
    inputs = make_inputs(Case(24, 30, 40, 4), seed=row % 100)
    flat = call_on(inputs, seed=row, dropout_p=0.5)
    folded = call_on(inputs._replace(x=inputs.x.view(2, 3, 4, 40)), seed=row, dropout_p=0.5)
    assert torch.equal(flat, folded.view_as(flat))


@given(cut=st.integers(0, 40), seed=st.integers(0, 2**63 - 1))
@example(cut=0, seed=0)
@example(cut=16, seed=1)
@pytest.mark.parametrize("surrounded", [False, True], ids=["alone", "in a transform"])
def test_slices_of_x_have_their_part_of_its_mask(surrounded: bool, cut: int, seed: int) -> None:
    """B and W are such that y and dx are what is kept of ones, and da sums it."""
    k, p = 40, 0.4
    eye = torch.eye(k, dtype=fp64)

    def results(first: int | None, columns: range) -> tuple[Tensor, Tensor, Tensor]:
        part = slice(columns.start, columns.stop)
        x, a = torch.ones(30, len(columns), dtype=fp64), eye[:, part].clone()
        leaves = x.requires_grad_(), a.requires_grad_()
        w, options = torch.zeros_like(a), {"dropout_p": p, "seed": seed, "first_column": first}
        call = lambda *t: lora_linear(t[0], w, t[1], eye, 1 - p, **options)
        if surrounded:
            y, pull = torch.func.vjp(call, *[t.detach() for t in leaves])
            return y, *pull(torch.ones_like(y))
        y = call(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    whole = results(None, range(k))
    assert 0.3 < whole[0].mean() < 0.9
    parts = [results(part.start, part) for part in (range(cut), range(cut, k))]
    assert torch.equal(sum(y for y, _, _ in parts), whole[0])
    for i in (1, 2):
        assert torch.equal(torch.cat([part[i] for part in parts], dim=1), whole[i])


@given(columns=st.integers(0, 400), ranks=st.integers(1, 9))
@example(columns=64, ranks=8)
@example(columns=60, ranks=5)
def test_ranks_of_equal_slices_agree_on_the_backends(columns: int, ranks: int) -> None:
    """Rank 0 refuses where rank 1 does; db alone reads no mask, whatever stands for its K."""
    case = Case(5, 8, columns, 4, dropout_p=0.5)
    seen = set()
    for rank in range(ranks):
        part = case._replace(first_column=rank * columns)
        inputs = make_inputs(part)
        forward, p = inputs.forward(part), torch.zeros(5, 4)
        seen |= {forward.problem().uneven, inputs.backward(part, p).problem().uneven}
        db = inputs.backward(part._replace(needs=(False, False, True)), p)
        assert not db.problem().uneven
    assert seen == {columns % 8 != 0}


def test_a_whole_x_is_no_slice() -> None:
    case = Case(5, 7, 9, 4, dropout_p=0.5)
    assert not make_inputs(case).forward(case).problem().uneven


# --- Promises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_b_zero_is_the_frozen_layer_bit_for_bit(
    dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float, bias: bool
) -> None:
    inputs = make_inputs(Case(33, 65, 129, 6, *dtypes, bias=bias))
    y = call_on(inputs._replace(lora_b=torch.zeros_like(inputs.lora_b)), dropout_p=dropout_p)
    assert torch.equal(y, F.linear(inputs.x, inputs.weight, inputs.bias))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_same_call_gives_the_same_bits(dropout_p: float) -> None:
    inputs = with_grad(make_inputs(Case(130, 96, 128, 16, bf16, fp32)))

    def run() -> tuple[Tensor, ...]:
        y = call_on(inputs, dropout_p=dropout_p, seed=3)
        return y, *torch.autograd.grad(y, (inputs.x, inputs.lora_a, inputs.lora_b), inputs.dy)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("operand", ["x", "weight", "lora_a", "lora_b", "bias", "dy"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_nan_and_inf_propagate_as_in_eager_pytorch(
    operand: str, value: float, dropout_p: float
) -> None:
    inputs = make_inputs(Case(9, 11, 13, 3, bias=True))
    getattr(inputs, operand).view(-1)[5] = value
    inputs = inputs._replace(seed=torch.tensor([4]))
    leaves = with_grad(inputs)
    y = call_on(leaves, dropout_p=dropout_p, seed=4)
    grads = torch.autograd.grad(y, (leaves.x, leaves.lora_a, leaves.lora_b), inputs.dy)
    eager = expected(Case(9, 11, 13, 3, dropout_p=dropout_p), inputs, fp32)
    for name, got in zip(("y", "dx", "da", "db"), (y, *grads), strict=True):
        want = eager[name]
        assert torch.equal(got.isnan(), want.isnan()), name
        infinite = want.isinf()
        assert torch.equal(got.isinf(), infinite), name
        assert torch.equal(got[infinite], want[infinite]), name


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40), (40,)])
def test_dy_may_be_expanded(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(Case(6, 30, 40, 4))
    x = inputs.x.flatten()[: torch.Size(shape).numel()].view(shape).requires_grad_()
    y = call_on(inputs._replace(x=x))
    y.sum().backward()
    ones = torch.ones(*shape[:-1], 30)
    check(inputs._replace(x=x.detach(), dy=ones))
    (dense,) = torch.autograd.grad(call_on(inputs._replace(x=x)), x, ones)
    assert x.grad.shape == shape
    torch.testing.assert_close(x.grad, dense)


@pytest.mark.parametrize("operand", ["x", "weight", "lora_a", "lora_b"])
def test_an_operand_modified_before_backward_raises(operand: str) -> None:
    inputs = with_grad(make_inputs(Case(20, 30, 40, 4)))
    y = call_on(inputs)
    with torch.no_grad():
        getattr(inputs, operand).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_needs_retain_graph() -> None:
    inputs = with_grad(make_inputs(Case(20, 30, 40, 4)))
    y = call_on(inputs)
    first = torch.autograd.grad(y, inputs.lora_a, inputs.dy, retain_graph=True)[0]
    second = torch.autograd.grad(y, inputs.lora_a, inputs.dy)[0]
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, inputs.lora_a, inputs.dy)


def test_the_result_is_the_callers_to_write_to() -> None:
    inputs = with_grad(make_inputs(Case(20, 30, 40, 4)))
    (plain,) = torch.autograd.grad(call_on(inputs) * 2, inputs.x, inputs.dy)
    (in_place,) = torch.autograd.grad(call_on(inputs).mul_(2), inputs.x, inputs.dy)
    assert torch.equal(plain, in_place)


def test_a_backend_by_name_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def backend(name: str) -> Backend:
        def forward(call: Any) -> Any:
            ran.append(f"{name} forward")
            return reference.forward(call)

        def backward(call: Any) -> Any:
            ran.append(f"{name} backward")
            return reference.backward(call)

        return Backend(name, lambda problem: None, forward, backward)

    monkeypatch.setattr(op, "BACKENDS", (backend("cuda"), backend("reference")))
    inputs = with_grad(make_inputs(Case(20, 30, 40, 4)))
    call_on(inputs).sum().backward()
    call_on(inputs, backend="reference").sum().backward()
    assert ran == ["cuda forward", "cuda backward", "reference forward", "reference backward"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5}, {"dropout_p": 0.5, "first_column": 4}])
def test_a_backend_is_chosen_by_the_problem_of_its_call(
    bias: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, ran = [], []

    def why_not(problem: Any) -> None:
        chosen.append(problem)

    def forward(call: Any) -> Any:
        ran.append(call.problem())
        return reference.forward(call)

    other = reference.BACKEND._replace(why_not=why_not, forward=forward)
    monkeypatch.setattr(op, "BACKENDS", (other,))
    for dtypes in DTYPES:
        inputs = make_inputs(Case(6, 20, 12, 3, *dtypes, bias=bias))
        call_on(inputs._replace(x=inputs.x.view(2, 3, 12)), **options)
    assert chosen == ran
    assert len(ran) == len(DTYPES)


@pytest.mark.parametrize(
    ("m", "options", "name"),
    [
        (1, {}, "AddBackward0"),
        (2, {}, "_LoRALinearBackward"),
        (1, {"dropout_p": 0.5}, "_LoRALinearBackward"),
    ],
)
def test_one_token_is_left_to_autograd(m: int, options: dict[str, float], name: str) -> None:
    inputs = with_grad(make_inputs(Case(m, 30, 40, 4)))
    assert type(call_on(inputs, **options).grad_fn).__name__ == name


@pytest.mark.parametrize("scaling", [1e4, 1e-8])
@pytest.mark.parametrize("m", [1, 2])
def test_few_tokens_have_the_range_of_many(m: int, scaling: float) -> None:
    loud = 1 / scaling if scaling > 1 else 1e3
    case = Case(m, 30, 40, 4, fp16, scaling=scaling, magnitudes=(1, 1, 1, loud, 0.1))
    inputs = with_grad(make_inputs(case))
    x, weight, lora_a, lora_b, *_ = inputs
    y = lora_linear(x, weight, lora_a, lora_b, scaling)
    got = (y, *torch.autograd.grad(y, (x, lora_a, lora_b), inputs.dy))
    exact, eager = (expected(case, make_inputs(case), dtype) for dtype in (fp64, fp16))
    for name, tensor in zip(("y", "dx", "da", "db"), got, strict=True):
        assert_accurate(name, tensor, exact[name], eager[name])


def test_one_token_is_left_to_no_other_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    other = reference.BACKEND._replace(name="cuda")
    monkeypatch.setattr(op, "BACKENDS", (other, reference.BACKEND))
    inputs = with_grad(make_inputs(Case(1, 30, 40, 4)))
    assert type(call_on(inputs).grad_fn).__name__ == "_LoRALinearBackward"


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8)], ids=str)
def test_the_output_may_be_modified_in_place(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(Case(1, 6, 8, 3))
    x = torch.ones(shape, requires_grad=True)
    y = lora_linear(x, inputs.weight, inputs.lora_a, inputs.lora_b, 0.75)
    expected = torch.autograd.grad(y.relu().sum(), x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y.relu_().sum(), x)[0], expected[0])


def test_fp32_adapters_beside_a_16_bit_base_err_like_fp32() -> None:
    """Two rank terms cancel: rounding P or B to bf16 would leave an error of a hundred eps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=generator).to(bf16)
    row = torch.randn(1, 64, generator=generator)
    lora_a = torch.cat([row, -row + 1e-3 * torch.randn(1, 64, generator=generator)])
    lora_b, weight = torch.full((64, 2), 10.0), torch.zeros(64, 64, dtype=bf16)
    exact = x.double() @ lora_a.double().T @ lora_b.double().T
    eager = ((x.float() @ lora_a.T) @ lora_b.T).to(bf16)
    assert_accurate("y", lora_linear(x, weight, lora_a, lora_b, 1.0), exact, eager)


def test_a_seed_ignores_the_default_device() -> None:
    inputs = make_inputs(Case(4, 6, 8, 3))
    call = (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, 0.75)
    with torch.device("meta"):
        y = lora_linear(*call, dropout_p=0.5, seed=3)
    assert torch.equal(y, lora_linear(*call, dropout_p=0.5, seed=3))
