"""A whole decoder layer (`transformers`' own Llama, random weights): one training step.

The adapters sit on all seven projections. A step is forward, backward and AdamW; the frozen row is
forward and backward without adapters, from which a step differs by what training LoRA costs.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench.cases import short
from bench.measure import OUT_OF_TIME, Row, attempt, time_calls
from bench.providers import AGAIN, FROZEN
from bench.timing import Call
from lora_kernels.testing import assert_accurate, bf16, fp32, fp64

R, SCALING = 16, 2.0


class LayerCase(NamedTuple):
    """The layer of a Llama model and the tokens of a step."""

    model: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    batch: int
    sequence: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The key of this case in every results file."""
        return f"{self.model}.layer-m{self.batch * self.sequence}-r{R}-{short(self.dtype)}"


CASES = {
    "gpu": LayerCase("llama8b", 4096, 14336, 32, 8, 4, 2048, bf16),
    "cpu": LayerCase("smollm135m", 576, 1536, 9, 3, 4, 256, fp32),
    "smoke": LayerCase("smoke", 32, 48, 4, 2, 2, 8, bf16),
}
CASES["full"] = CASES["gpu"]
APART = "lora_kernels.apart"  # layers that read one x do not share its gradient
PROVIDERS = (FROZEN, AGAIN, "lora_kernels", APART, "peft", "lora_kernels.default", "peft.default")


class Trainee(NamedTuple):
    """One decoder layer, fused or not; `.default` has fp32 adapters and runs under autocast."""

    model: nn.Module
    adapters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    autocast: torch.dtype | None

    def backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """Run forward and backward; return y. Gradients accumulate in x and the adapters."""
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            y = self.model(inputs_embeds=x).last_hidden_state
        y.backward(dy.to(y.dtype))
        return y

    def step(self, x: Tensor, dy: Tensor) -> None:
        """Train one step."""
        x.grad = None
        self.backward(x, dy)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def trainees(case: LayerCase, device: torch.device) -> dict[str, Trainee]:
    """Build every provider's layer on the same weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaModel

    from lora_kernels.peft import fuse

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        num_hidden_layers=1,
        vocab_size=32,
        use_cache=False,
    )
    frozen = LlamaModel(config).to(device, case.dtype).requires_grad_(False).train()
    lora = LoraConfig(
        r=R, lora_alpha=int(SCALING * R), target_modules="all-linear", init_lora_weights=False
    )
    adapted = get_peft_model(copy.deepcopy(frozen), lora, autocast_adapter_dtype=False)
    built = dict.fromkeys((FROZEN, AGAIN), Trainee(frozen, [], None, None))
    for name in PROVIDERS[2:]:
        if name.endswith("default") and case.dtype == fp32:
            continue
        model = copy.deepcopy(adapted)
        adapters = [p for p in model.parameters() if p.requires_grad]
        autocast = None
        if name.endswith("default"):
            autocast = case.dtype
            for p in adapters:
                p.data = p.data.float()
        if name.startswith("lora_kernels"):
            fuse(model, share_inputs=name != APART)
        built[name] = Trainee(model, adapters, torch.optim.AdamW(adapters, lr=1e-5), autocast)
    return built


def gate(case: LayerCase, fused: Trainee, plain: Trainee, x: Tensor, dy: Tensor) -> float:
    """Judge y, dx and the adapters' gradients of the fused layer by PEFT's in float64."""
    exact_model = copy.deepcopy(plain.model).double()
    adapters = [p for p in exact_model.parameters() if p.requires_grad]
    exact = Trainee(exact_model, adapters, None, None)
    results = []
    for trainee in (fused, exact, plain):
        dtype = fp64 if trainee is exact else case.dtype
        operand = x.detach().to(dtype).requires_grad_()
        y = trainee.backward(operand, dy.to(dtype))
        results.append([y.detach(), operand.grad, *(p.grad for p in trainee.adapters)])
        for p in trainee.adapters:
            p.grad = None
    error = 0.0
    for i, (got, want, same_dtype) in enumerate(zip(*results, strict=True)):
        assert_accurate(f"result {i}", got, want.cpu(), same_dtype.to(case.dtype))
        error = max(error, ((got.to(fp64) - want).abs().max() / want.abs().max()).item())
    return error


def measure_layer(case: LayerCase, device: torch.device, seconds: float) -> dict[str, Row]:
    """Return a row for every provider."""
    built = trainees(case, device)
    shape = case.batch, case.sequence, case.hidden
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(shape, generator=generator).to(device, case.dtype) for _ in range(2))
    x.requires_grad_()
    verdicts = {
        name: attempt(gate, case, trainee, built[peer(name)], x, dy)
        for name, trainee in built.items()
        if name.startswith("lora_kernels")
    }
    failed = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, str)}
    calls = {
        name: Call(lambda i: None, lambda _, trainee=trainee: trainee.step(x, dy))
        for name, trainee in built.items()
        if name not in failed
    }
    rows = {
        name: Row(facts(case, name) | {"error": verdicts.get(name)} | row.info, row.seconds)
        for name, row in time_calls(calls, device, seconds).items()
    }
    missing = dict.fromkeys(PROVIDERS, "absent: the adapters are fp32 in any case") | failed
    return {name: Row(facts(case, name), [], why) for name, why in missing.items()} | rows


def peer(name: str) -> str:
    """Return PEFT's counterpart of one of this project's providers."""
    return "peft" if name == APART else name.replace("lora_kernels", "peft")


def facts(case: LayerCase, provider: str) -> dict[str, Any]:
    """Return what names a row."""
    return {
        "case": case.name,
        "shape": f"{case.model}.layer",
        "M": case.batch * case.sequence,
        "R": R,
        "dtype": short(case.dtype),
        "direction": "step",
        "provider": provider,
    }


@pytest.fixture(scope="module")
def rows(
    request: pytest.FixtureRequest,
    device: torch.device,
    seconds: float,
    out_of_time: Callable[[], bool],
) -> dict[str, Row]:
    """Measure once for all tests."""
    case = CASES[request.config.getoption("--table")]
    outcome: dict[str, Row] | str = OUT_OF_TIME
    if not out_of_time():
        outcome = attempt(measure_layer, case, device, seconds)
    if isinstance(outcome, str):
        return {name: Row(facts(case, name), [], outcome) for name in PROVIDERS}
    return outcome


@pytest.mark.parametrize("provider", PROVIDERS)
def test_training_step(
    provider: str, rows: dict[str, Row], record: Callable[[str, Row, bool], None]
) -> None:
    """Report one row."""
    row = rows[provider]
    record(f"{row.info['case']} step", row, provider.startswith("lora_kernels"))
