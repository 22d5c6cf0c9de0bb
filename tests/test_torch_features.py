"""`lora_linear` inside PyTorch: compile, fake tensors, checkpointing, autocast and the rest."""

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, lora_linear
from lora_kernels.ops.lora_linear.reference import oracle
from lora_kernels.testing import Case, bf16, fp16, fp32, fp64, make_inputs

COMPILER = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
N, K, R = 24, 40, 3


def layer(**options: Any) -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear(K, N, r=R, init_lora_weights=False, **options)


def gradients(function: Callable[[Tensor], Tensor], model: LoRALinear, x: Tensor) -> list[Tensor]:
    """Return y, dx, da and db."""
    leaves = [x.detach().clone().requires_grad_(), model.lora_A, model.lora_B]
    y = function(leaves[0])
    # Reentrant checkpointing wants .backward(), not torch.autograd.grad.
    model.zero_grad()
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y, *(leaf.grad.clone() for leaf in leaves)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


# --- torch.compile and tracing -------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_fullgraph_with_dynamic_m() -> None:
    model, counter = layer(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for m in (7, 9, 16, 33, 64):
        x = torch.randn(m, K, generator=torch.Generator().manual_seed(m))
        assert_close(gradients(compiled, model, x), gradients(model, model, x))
    assert counter.frame_count <= 2  # static once, then dynamic for ever


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_marked_dynamic_compiles_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer(), backend=counter, fullgraph=True)
    for m in (5, 8, 31):
        x = torch.ones(m, K)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("dtypes", "first"), [((fp32, fp32), None), ((bf16, fp32), 13)], ids=str)
def test_the_compiler_agrees_with_eager(
    dtypes: tuple[torch.dtype, torch.dtype], first: int | None
) -> None:
    x, weight, lora_a, lora_b, bias, dy, *_ = make_inputs(Case(18, N, K, R, *dtypes, bias=True))
    leaves = [t.requires_grad_() for t in (x, lora_a, lora_b)]

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        dropout: Any = {"dropout_p": 0.4, "seed": 11, "first_column": first}
        return lora_linear(x.view(2, 9, K), weight, a, b, 0.5, bias, **dropout) * 2

    compiled = torch.compile(run, backend=COMPILER, fullgraph=True)
    dy = dy.view(2, 9, N)
    results = []
    for function in (run, compiled):
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert_close(results[1], results[0])


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_dropout_draws_anew_and_follows_manual_seed() -> None:
    model = layer(lora_dropout=0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.ones(6, K)

    def seeded() -> list[Tensor]:
        torch.manual_seed(3)
        return [compiled(x), compiled(x)]

    first, second = seeded(), seeded()
    assert_same(first, second)
    assert not torch.equal(*first)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_gradients_see_the_mask_of_their_forward() -> None:
    """With W = 0 and A, B of ones, dx/(dy·B) is the mask and so is y for x = e_k."""
    x, weight = torch.eye(K).requires_grad_(), torch.zeros(N, K)
    lora_a, lora_b = torch.ones(1, K), torch.ones(N, 1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return lora_linear(x, weight, lora_a, lora_b, 1.0, dropout_p=0.5)

    y = run(x)
    y.sum().backward()
    assert torch.equal(y[:, 0], x.grad.diagonal() / N)
    assert 0 < (y[:, 0] > 0).sum() < K


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_bad_call_still_raises() -> None:
    compiled = torch.compile(layer(), backend="aot_eager")
    with pytest.raises((ValueError, RuntimeError), match="x must be"):
        compiled(torch.ones(3, K + 1))


OPCHECK_CASES = [
    Case(5, 6, 7, 2, fp32, bias=True),
    Case(5, 6, 7, 2, fp64, dropout_p=0.5),
    Case(5, 6, 7, 2, bf16, fp32, dropout_p=0.5, bias=True),
    Case(5, 6, 7, 20, fp16, strided=True),
    Case(0, 6, 7, 2, fp32),
    Case(5, 6, 7, 2, fp32, needs=(True, False, False)),
    Case(5, 6, 7, 2, fp32, needs=(False, False, True)),
]


@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck(case: Case) -> None:
    inputs, ops = make_inputs(case), torch.ops.lora_kernels
    torch.library.opcheck(ops.lora_linear.default, (*inputs.forward(case), "auto"))
    p = torch.ones(case.m, case.r, dtype=inputs.lora_a.dtype)
    backward = inputs.backward(case, p)
    torch.library.opcheck(ops.lora_linear_backward.default, (*backward, "reference"))
    if case.dropout_p:
        sliced = inputs.forward(case)._replace(first_column=8)
        torch.library.opcheck(ops.lora_linear.default, (*sliced, "auto"))


@pytest.mark.parametrize("shape", [(5, K), (2, 3, K), (K,), (0, K)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_fake_tensors(shape: tuple[int, ...], dropout_p: float) -> None:
    with FakeTensorMode():
        model = LoRALinear(K, N, r=R, lora_dropout=dropout_p)
        x = torch.empty(shape, requires_grad=True)
        y = model(x)
        assert y.shape == (*shape[:-1], N)
        y.sum().backward()
        assert x.grad.shape == shape
        assert model.lora_A.grad.shape == (R, K)
        assert model.lora_B.grad.shape == (N, R)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_meta_tensors(dropout_p: float) -> None:
    model = LoRALinear(K, N, r=R, lora_dropout=dropout_p, device="meta")
    y = model(torch.empty(2, 3, K, device="meta"))
    assert y.shape == (2, 3, N)
    assert y.is_meta
    y.sum().backward()
    assert model.lora_A.grad.shape == (R, K)


def test_make_fx_sees_one_operator_each_way() -> None:
    x, weight, lora_a, lora_b, bias, dy, *_ = make_inputs(Case(6, N, K, R, bias=True))

    def run(x: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, a, b)]
        y = lora_linear(leaves[0], weight, *leaves[1:], 0.5, bias)
        return y, *torch.autograd.grad(y, leaves, dy)

    graph = make_fx(run)(x, lora_a, lora_b, dy)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count("lora_kernels.lora_linear.default") == 1
    assert targets.count("lora_kernels.lora_linear_backward.default") == 1
    assert_same(graph(x, lora_a, lora_b, dy), run(x, lora_a, lora_b, dy))


def test_export() -> None:
    model = layer().eval()
    m = torch.export.Dim("m", min=2, max=64)
    program = torch.export.export(model, (torch.ones(4, K),), dynamic_shapes={"x": {0: m}})
    x = torch.randn(9, K)
    torch.testing.assert_close(program.module()(x), model(x))


# --- Randomness and recomputation ----------------------------------------------------------------


def test_manual_seed_reproduces_dropout() -> None:
    model, x = layer(lora_dropout=0.5), torch.ones(6, K)
    torch.manual_seed(3)
    first, second = model(x), model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    assert torch.equal(model(x), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("as_tensor", [lambda s: torch.tensor(s), lambda s: torch.tensor([[s]])])
def test_a_seed_may_be_a_tensor(as_tensor: Callable[[int], Tensor]) -> None:
    x, weight, lora_a, lora_b, *_ = make_inputs(Case(6, N, K, R))

    def run(seed: Any) -> Tensor:
        return lora_linear(x, weight, lora_a, lora_b, 1.0, dropout_p=0.5, seed=seed)

    assert torch.equal(run(as_tensor(2**40 + 1)), run(2**40 + 1))
    assert not torch.equal(run(1), run(2**40 + 1))


def test_a_seed_leaves_the_generator_alone() -> None:
    x, weight, lora_a, lora_b, *_ = make_inputs(Case(6, N, K, R))
    state = torch.get_rng_state()
    lora_linear(x, weight, lora_a, lora_b, 1.0, dropout_p=0.5, seed=1)
    lora_linear(x, weight, lora_a, lora_b, 1.0)
    assert torch.equal(state, torch.get_rng_state())
    lora_linear(x, weight, lora_a, lora_b, 1.0, dropout_p=0.5)
    assert not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
def test_checkpointing_gives_identical_gradients(use_reentrant: bool, lora_dropout: float) -> None:
    model, x = layer(lora_dropout=lora_dropout), torch.randn(6, K)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=use_reentrant)

    results = []
    for function in (model, checkpointed):
        torch.manual_seed(3)
        results.append(gradients(function, model, x))
    assert_same(results[1], results[0])


def test_saved_tensors_may_be_moved() -> None:
    model, x = layer(), torch.randn(6, K)

    def offloaded(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    assert_same(gradients(offloaded, model, x), gradients(model, model, x))


# --- Autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_autocast(dtype: torch.dtype) -> None:
    model, x = layer(), torch.randn(6, K)
    x = x.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = model(x)
        frozen = F.linear(x, model.weight, model.bias)
    assert y.dtype == frozen.dtype == dtype
    y.float().square().sum().backward()
    assert {t.grad.dtype for t in (x, model.lora_A, model.lora_B)} == {fp32}


def test_autocast_gradients_equal_those_of_operands_cast_by_hand() -> None:
    model, x = layer(), torch.randn(6, K)

    def cast(x: Tensor) -> Tensor:
        operands = (x, model.weight, model.lora_A, model.lora_B)
        return lora_linear(*(t.to(bf16) for t in operands), model.scaling, model.bias.to(bf16))

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", bf16):
            return model(x)

    assert_same(gradients(autocast, model, x), gradients(cast, model, x))


def test_autocast_around_backward_changes_nothing() -> None:
    model, x = layer(), torch.randn(6, K, requires_grad=True)
    plain = torch.autograd.grad(model(x).sum(), (x, model.lora_A, model.lora_B))
    y = model(x)
    with torch.autocast("cpu", bf16):
        inside = torch.autograd.grad(y.sum(), (x, model.lora_A, model.lora_B))
    assert_same(list(inside), list(plain))


def test_autocast_disabled_within_autocast() -> None:
    model, x = layer(), torch.randn(6, K)
    with torch.autocast("cpu", bf16), torch.autocast("cpu", enabled=False):
        assert_same([model(x)], [layer()(x)])


def test_autocast_leaves_float64_alone() -> None:
    model, x = layer(dtype=fp64), torch.randn(6, K, dtype=fp64)
    with torch.autocast("cpu", bf16):
        assert_same([model(x)], [layer(dtype=fp64)(x)])


# --- Modules and function transforms -------------------------------------------------------------


def test_functional_call() -> None:
    model, other, x = layer(), layer(), torch.randn(6, K)
    with torch.no_grad():
        other.lora_A.mul_(2), other.lora_B.neg_()
    state = {name: t.detach() for name, t in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, state, (x,)), other(x))


@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: _through_a_file(model),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_computes_the_same_on_its_own(clone: Callable[[LoRALinear], LoRALinear]) -> None:
    model, x = layer(), torch.randn(6, K)
    y, copied = model(x), clone(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), y)
    assert [p.requires_grad for p in copied.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def _through_a_file(model: LoRALinear) -> LoRALinear:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_inference_mode() -> None:
    model, x = layer(), torch.randn(6, K)
    with torch.inference_mode():
        y = model(x)
    assert y.is_inference()
    assert torch.equal(y, model(x).detach())


def test_parameter_subclasses_and_buffers_are_plain_operands() -> None:
    x, weight, lora_a, lora_b, *_ = make_inputs(Case(6, N, K, R))
    y = lora_linear(x, weight, lora_a, lora_b, 1.0)
    parameters = [torch.nn.Parameter(t, requires_grad=False) for t in (weight, lora_a, lora_b)]
    buffers = [torch.nn.Buffer(t) for t in (weight, lora_a, lora_b)]
    assert torch.equal(lora_linear(x, *parameters, 1.0), y)
    assert torch.equal(lora_linear(x, *buffers, 1.0), y)


def test_a_tensor_subclass_goes_through_the_operator() -> None:
    """A subclass that logs operators sees ours by name, and its results stay of its type."""
    seen: list[str] = []

    class Logged(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    x, weight, lora_a, lora_b, *_ = make_inputs(Case(6, N, K, R))
    y = lora_linear(x.as_subclass(Logged), weight, lora_a, lora_b, 1.0)
    assert torch.equal(y.as_subclass(Tensor), lora_linear(x, weight, lora_a, lora_b, 1.0))
    assert any("lora_linear" in name for name in seen)


def test_gradients_accumulate() -> None:
    model, x = layer(), torch.randn(6, K)
    y, _, da, db = gradients(model, model, x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    model.zero_grad()
    for _ in range(2):
        (model(x) * weights).sum().backward()
    assert_same([model.lora_A.grad, model.lora_B.grad], [2 * da, 2 * db])


def test_two_uses_in_one_graph() -> None:
    """Weight sharing: the gradient is the sum over both uses."""
    model = LoRALinear(K, K, r=R, init_lora_weights=False)
    x = torch.randn(6, K)
    twice = gradients(lambda x: model(model(x)), model, x)
    frozen = (model.weight, model.lora_A, model.lora_B, model.scaling, model.bias)
    assert_close(twice, gradients(lambda x: oracle(oracle(x, *frozen), *frozen), model, x))


def test_schemas_are_registered_once() -> None:
    for operator in (
        torch.ops.lora_kernels.lora_linear,
        torch.ops.lora_kernels.lora_linear_backward,
    ):
        assert operator.overloads() == ["default"]
