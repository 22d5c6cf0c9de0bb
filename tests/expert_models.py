"""Small PEFT models of experts that `target_parameters` adapts, and how they are compared."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import fp32, fp64, randomise
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from lora_kernels.peft import experts as fused_experts
from lora_kernels.peft import fuse
from lora_kernels.testing import assert_accurate

E, H, F, T, TOP = 5, 16, 24, 22, 2
IDLE = 3  # the expert that no token chooses, where the rest share them
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(hidden_size=H, intermediate_size=F, num_local_experts=E)
    return MixtralExperts(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(hidden_size=H, intermediate_size=F, num_local_experts=E)
    return GptOssExperts(config)


def nemotron() -> nn.Module:
    config = transformers.NemotronHConfig(
        hidden_size=H, moe_intermediate_size=F, n_routed_experts=E, moe_latent_size=None
    )
    return NemotronHExperts(config)


def muse_spark() -> nn.Module:
    config = transformers.MuseSparkTextConfig(
        moe_hidden_size=H, moe_intermediate_size=F, num_local_experts=E
    )
    return MuseSparkExperts(config)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "gated": mixtral,
    "transposed, biases": gpt_oss,
    "not gated": nemotron,
    "normed": muse_spark,
}


class Block(nn.Module):
    """An experts module whose tokens are routed by what it is given."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def peft_experts(
    kind: str = "gated",
    implementation: str = "grouped_mm",
    parameters: tuple[str, ...] = ("up", "down_proj"),
    dtype: torch.dtype = fp32,
    **options: Any,
) -> PeftModel:
    torch.manual_seed(0)
    experts: Any = KINDS[kind]()
    # Of its own: the implementation is set on it.
    experts.config = copy.deepcopy(experts.config)
    experts.config._experts_implementation_internal = implementation
    for name, parameter in experts.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if "norm" in name:
            nn.init.normal_(parameter, 1, 0.1)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    targets = [f"experts.{up if name == 'up' else name}" for name in parameters]
    options = {"r": 4, "lora_alpha": 6} | options
    config = LoraConfig(target_modules=[], target_parameters=targets, **options)
    model = randomise(get_peft_model(Block(experts).to(dtype), config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data *= 0.3
    return model


def pair(*arguments: Any, **options: Any) -> tuple[PeftModel, PeftModel]:
    """A fused model and its unfused twin."""
    plain = peft_experts(*arguments, **options)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert report.fused
    assert not report.not_fused
    return fused, plain


def routed(seed: int = 2, tokens: int = T, only: int | None = None) -> tuple[Tensor, ...]:
    """x and each token's experts and their weights, in float64: expert IDLE has none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=generator, dtype=fp64)
    scores = torch.randn(tokens, E, generator=generator, dtype=fp64)
    scores[:, IDLE] = -1e3
    weights, index = scores.softmax(-1).topk(TOP if only is None else 1)
    return x, index if only is None else torch.full_like(index, only), weights


def cast(dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in routed()]


def run(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return y and the gradients of x, of the routing weights and of whatever trains."""
    x, weights = (inputs[i].to(dtype).requires_grad_() for i in (0, 2))
    model.zero_grad()
    y = model(x, inputs[1], weights)
    slope = torch.linspace(-1, 1, y.numel(), dtype=fp64).reshape(y.shape)
    (y.to(fp64) * slope).sum().backward()
    results = {"y": y.detach(), "dx": x.grad, "drouting": weights.grad}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        results[name] = parameter.grad
    return results


@contextmanager
def fused_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the products of many experts that really run fused."""
    calls: list[int] = []
    with monkeypatch.context() as patch:
        product = fused_experts.grouped_lora
        patch.setattr(fused_experts, "grouped_lora", lambda *a: calls.append(1) or product(*a))
        yield calls


def exact(plain: PeftModel, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    reference = copy.deepcopy(plain).to(fp64)
    for module in reference.modules():
        if hasattr(module, "is_transposed"):  # grouped products know no float64
            module.config._experts_implementation_internal = "eager"
    return run(reference, inputs, fp64)


def assert_right(
    fused: PeftModel,
    plain: PeftModel,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    products: int = 2,
    only: int | None = None,
) -> dict[str, Tensor]:
    """Fused as near to float64 as PEFT, in everything, expert for expert; every product fused."""
    draws = [tuple(t.to(dtype).to(t.dtype) for t in routed(s, only=only)) for s in range(6)]
    with fused_products(monkeypatch) as calls:
        got = [run(fused, inputs, dtype) for inputs in draws]
    assert len(calls) == products * len(draws)
    eager = [run(plain, inputs, dtype) for inputs in draws]
    reference = [exact(plain, inputs) for inputs in draws]
    assert got[0].keys() == eager[0].keys() == reference[0].keys()
    for name in reference[0]:
        assert got[0][name].dtype == eager[0][name].dtype, name
        stacks = [torch.stack([draw[name] for draw in side]) for side in (got, reference, eager)]
        assert_accurate(name, *stacks)
    return got[0]


def assert_close(got: Tensor, expected: Tensor, name: str = "") -> None:
    """A check that something ran at all right; how right it is, `assert_right` says."""
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def outcome(model: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> dict[str, Tensor]:
    """Return y and whatever gradients there are, in fp32."""
    x, index, weights = inputs or routed()
    x, weights = x.float().requires_grad_(), weights.float().requires_grad_()
    model.zero_grad()
    y = model(x, index, weights)
    y.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, "drouting": weights.grad, **gradients}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name], name)


def outer(model: PeftModel) -> Any:
    return model.base_model.model.experts


def disable(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def add_another(model: PeftModel) -> None:
    config = LoraConfig(
        target_modules=[], target_parameters=model.peft_config["default"].target_parameters, r=3
    )
    model.add_adapter("other", config)
    randomise(model, seed=3, adapter=".other.")
