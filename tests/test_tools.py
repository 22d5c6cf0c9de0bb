"""What PyTorch's tools see of a call: FLOP counters, checkpoint policies, exporters, compilers."""

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_models import K, fp32, pair, x_for
from peft_models import one_thread as one_thread
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import LoRALinear, lora_linear
from lora_kernels.ops.lora_linear import Problem
from lora_kernels.peft import from_peft
from lora_kernels.testing import Case, bf16, make_inputs

FORWARD = torch.ops.lora_kernels.lora_linear.default
BACKWARD = torch.ops.lora_kernels.lora_linear_backward.default
M, N, R = 6, 24, 3


# --- FlopCounterMode -----------------------------------------------------------------------------


def flops(run: Callable[..., Any], *arguments: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*arguments)
    return counter.get_total_flops()


def train(layer: nn.Module, x: Tensor) -> None:
    layer(x).sum().backward()


@pytest.mark.parametrize(
    "needs", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)]
)
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"r": 7}], ids=str)
def test_flops_are_those_of_peft(needs: tuple[int, int, int], options: dict[str, Any]) -> None:
    """A counter sets global hooks, under which a fused layer runs PEFT's code; ours has none."""
    fused, plain = (model.base_model.model.up for model in pair(**options))
    ours = from_peft(plain)
    counts = []
    for layer in (plain, fused, ours):
        for name, parameter in layer.named_parameters():
            for part, need in zip(("lora_A", "lora_B"), needs[1:], strict=True):
                if part in name:
                    parameter.requires_grad = bool(need)
        x = torch.randn(15, K, requires_grad=bool(needs[0]))
        with torch.no_grad():
            inference = flops(layer, x)
        counts.append([inference, flops(layer, x), flops(train, layer, x)])
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][0] > 0


def test_flops_are_those_of_the_problem() -> None:
    case = Case(M, N, K, R, bias=True)
    x, weight, a, b, bias, *_ = make_inputs(case)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    problem = Problem(M, N, K, R)
    forward = flops(lambda: lora_linear(x, weight, a, b, 0.5, bias))
    both = flops(lambda: torch.autograd.grad(lora_linear(x, weight, a, b, 0.5, bias).sum(), leaves))
    assert forward == problem.flops()
    assert both - forward == problem.flops(backward=True)


# --- Selective activation checkpointing ----------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts the operators that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_checkpointing_policy_names_the_operator(save: bool, dropout: float) -> None:
    """Saved by its name it runs once, else twice; the gradients are the same bits."""

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = save and operator is FORWARD
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    model = pair(lora_dropout=dropout)[0]
    x = x_for(model).requires_grad_()

    def gradients(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(2)
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        return [*torch.autograd.grad(forward(x).square().sum(), wanted)]

    expected = gradients(model)
    with Operators() as operators:
        got = gradients(
            lambda x: checkpoint(
                model,
                x,
                use_reentrant=False,
                context_fn=lambda: create_selective_checkpoint_contexts(policy),
            )
        )
    assert operators.seen[FORWARD] == (2 if save else 4)
    assert operators.seen[BACKWARD] == 2
    for left, right in zip(got, expected, strict=True):
        assert torch.equal(left, right)


# --- Export --------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = LoRALinear(K, N, r=R, init_lora_weights=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def targets(program: Any) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_an_exported_program_consists_of_pytorchs_operators(strict: bool, fused: bool) -> None:
    model = (pair()[0].base_model.model if fused else Net()).eval()
    shapes = {"x": {0: torch.export.Dim("m", min=2, max=64)}}
    program = torch.export.export(model, (torch.ones(4, K),), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    lowered = loaded.run_decompositions()
    assert not any("lora_kernels" in name for name in targets(loaded) | targets(lowered))
    assert {"aten.addmm.default", "aten.mm.default"} & targets(lowered)
    x = torch.randn(9, K)
    for exported in (program, lowered):
        torch.testing.assert_close(exported.module()(x), model(x))


def test_an_exported_training_graph_drops_and_has_gradients() -> None:
    model = Net(lora_dropout=0.5).train()
    program = torch.export.export(model, (torch.ones(4, K),))
    assert any("dropout" in name for name in targets(program))
    module = program.module()
    x = torch.randn(4, K)
    assert not torch.equal(module(x), module(x))
    module(x).sum().backward()
    assert all(p.grad.any() for name, p in module.named_parameters() if "lora" in name)


@pytest.mark.parametrize("fused", [False, True])
def test_onnx(fused: bool) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = (pair()[0] if fused else Net()).eval()
    x = torch.randn(9, K)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    kinds = {node.op_type for node in program.model.graph}
    assert kinds & {"Gemm", "MatMul"}
    assert {node.domain for node in program.model.graph} <= {"", "pkg.onnxscript.torch_lib"}
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), atol=1e-5, rtol=1e-5)


# --- torch.compile: what changes between calls ---------------------------------------------------


def rescale(model: nn.Module, i: int) -> None:
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.scaling = 0.3 * (i + 1)
        elif hasattr(layer, "lora_A"):
            layer.scaling["default"] = 0.3 * (i + 1)


def flip(model: nn.Module, i: int) -> None:
    model.train(i % 2 == 0)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("change", [rescale, flip])
@pytest.mark.parametrize("of", ["fused", "fused beside bf16", "LoRALinear"])
def test_a_change_recompiles_no_more_than_peft(change: Any, of: str) -> None:
    """PEFT's layer compiles twice: for the first value, and for all others."""
    if of == "LoRALinear":
        model: nn.Module = Net()
    else:
        model = pair(**({"dtype": bf16} if "bf16" in of else {}))[0].base_model.model.up
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    dtype = next(model.parameters()).dtype
    x = torch.randn(M, K).to(dtype)
    for i in range(12):
        change(model, i)
        results = []
        for run in (compiled, model):
            leaf = x.clone().requires_grad_()
            model.zero_grad()
            y = run(leaf)
            y.square().sum().backward()
            trained = [p.grad.clone() for p in model.parameters() if p.requires_grad]
            results.append([y, leaf.grad, *trained])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_changing_scaling_is_no_longer_in_the_graph() -> None:
    """Nor is a tensor there before it changes, which would keep a model out of CUDA graphs."""
    scales: list[list[Any]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
        scales.append([n.target for n in nodes if n.target is torch.ones or n.target is FORWARD])
        return graph

    x, weight, a, b = make_inputs(Case(M, N, K, R, fp32))[:4]
    compiled = torch.compile(lora_linear, backend=backend, fullgraph=True)
    for scaling in (0.5, 0.25, 0.75):
        compiled(x, weight, a, b, scaling)
    assert scales == [[FORWARD], [torch.ones, FORWARD]]
