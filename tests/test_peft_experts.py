"""Experts that `target_parameters` adapts, against PEFT and float64: alone and in real models."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper as PeftWrapper
from peft_models import bf16, calls_of_lora_linear, fp16, fp32, fp64, randomise
from peft_models import one_thread as one_thread
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from lora_kernels.peft import experts as fused_experts
from lora_kernels.peft import fuse, merge_loss, unfuse, why_not
from lora_kernels.peft.experts import ParamWrapper
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_every_gradient(
    kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain = pair(kind, implementation)
    got = assert_right(fused, plain, fp32, monkeypatch)
    factors = [(name, gradient) for name, gradient in got.items() if "lora_" in name]
    assert len(factors) == 4
    for name, gradient in factors:  # row e·R + r of A, column r·E + e of B
        of_each = gradient.chunk(E) if "lora_A" in name else [gradient[:, e::E] for e in range(E)]
        assert [bool(of_one.any()) for of_one in of_each] == [e != IDLE for e in range(E)], name


@pytest.mark.parametrize("only", [0, E - 1])
@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_has_every_token(kind: str, only: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_right(*pair(kind), fp32, monkeypatch, only=only)


@pytest.mark.parametrize("adapters", [fp32, None], ids=["fp32 adapters", "all of it"])
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits(
    kind: str,
    dtype: torch.dtype,
    adapters: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = peft_experts(kind, dtype=dtype)
    if adapters is None:
        plain.to(dtype)
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 2
    assert_right(fused, plain, dtype, monkeypatch)


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("parameters", [("up",), ("down_proj",)], ids=str)
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_any_rank_one_parameter_alone(
    r: int, parameters: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("gated", "transposed, biases"):
        fused, plain = pair(kind, parameters=parameters, dtype=dtype, r=r, use_rslora=True)
        assert_right(fused, plain, dtype, monkeypatch, products=1)


@pytest.mark.parametrize(
    ("dtype", "scaling"),
    [
        (d, s)
        for d in (fp32, bf16, fp16)
        for s in (0.0, -3.0, 1e3, 1e6, 1e-6)
        if (d, s) != (fp16, 1e6)
    ],
)
def test_any_scaling(scaling: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair(dtype=dtype)
    for model in (fused, plain):
        for module in model.modules():
            if isinstance(module, PeftWrapper):
                module.scaling["default"] = scaling
                if scaling > 1:  # the update stays as large as the weight is
                    module.lora_B["default"].weight.data /= scaling
    assert_right(fused, plain, dtype, monkeypatch)


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers multiplies grouped in the weights' dtype, the other ways in autocast's."""
    fused, plain = pair()
    inputs = routed()
    with torch.autocast("cpu", bf16):
        with fused_products(monkeypatch) as calls:
            got = run(fused, inputs, fp32)
        eager = run(plain, inputs, fp32)
        assert len(calls) == 2
        for name, expected in exact(plain, inputs).items():
            assert got[name].dtype == eager[name].dtype, name
            assert_accurate(name, got[name], expected, eager[name])
    left, plain = pair(implementation="eager")
    with torch.autocast("cpu", bf16):
        assert "multiplies in autocast's dtype" in str(why_not(left.base_model.model.experts))
        assert_same(outcome(left), outcome(plain))


def test_x_of_another_dtype_is_rounded_where_grouped_products_round_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused, plain = pair(dtype=bf16)
    x, index, weights = routed()
    with fused_products(monkeypatch) as calls:
        got = fused(x.float(), index, weights.float())
    assert len(calls) == 2
    assert got.dtype == fp32
    reference = exact(plain, (x.to(bf16), index, weights))["y"]
    assert_accurate("y", got.detach(), reference, plain(x.float(), index, weights.float()).detach())
    experts = fused.base_model.model.experts
    experts.get_base_layer().config._experts_implementation_internal = "eager"
    assert why_not(experts, x.float(), index, weights) == "x is float32 beside bfloat16 experts"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    fused, _ = pair("transposed, biases")
    plainly = run(fused, routed(), fp32)
    call = Block(lambda *a: checkpoint(fused, *a, use_reentrant=reentrant))  # type: ignore[arg-type]
    call.named_parameters = fused.named_parameters  # type: ignore[method-assign]
    call.zero_grad = fused.zero_grad  # type: ignore[method-assign]
    again = run(call, routed(), fp32)
    assert all(torch.equal(again[name], plainly[name]) for name in plainly)


def test_gradients_that_nobody_needs() -> None:
    fused, plain = pair()
    x, index, weights = cast(fp32)
    with torch.inference_mode():
        assert_close(fused(x, index, weights), plain(x, index, weights))
    for needed in ("base_layer.lora_A", "experts.lora_B"):
        for model in (fused, plain):
            model.zero_grad()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(needed in name)
            model(x, index, weights).square().sum().backward()
        for (name, got), expected in zip(fused.named_parameters(), plain.parameters(), strict=True):
            assert (got.grad is None) == (expected.grad is None), name
            if expected.grad is not None:
                assert_close(got.grad, expected.grad)


def test_no_tokens_at_all() -> None:
    fused, plain = pair()
    for model in (fused, plain):
        x = torch.zeros(0, H, requires_grad=True)
        assert model(x, torch.zeros(0, TOP, dtype=torch.long), torch.zeros(0, TOP)).shape == (0, H)


def test_a_second_derivative_raises() -> None:
    fused, _ = pair()
    x, index, weights = routed()
    x = x.float().requires_grad_()
    y = fused(x, index, weights.float()).square().sum()
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_graph_break() -> None:
    """PEFT's own wrapper breaks the graph at every call."""
    fused, plain = pair(dtype=bf16, r=8)
    x, index, weights = routed()
    x, weights = x.to(bf16), weights.to(bf16)
    torch._dynamo.reset()
    compiled = torch.compile(fused.base_model.model, backend="aot_eager", fullgraph=True)
    got = compiled(x.requires_grad_(), index, weights)
    got.float().square().sum().backward()
    assert_accurate(
        "y",
        got.detach(),
        exact(plain, (x, index, weights))["y"],
        plain(x, index, weights).detach(),
    )
    assert fused.base_model.model.experts.lora_A["default"].weight.grad.any()


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        new = getattr(func, "_schema", None) is None or not func.is_view
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if new and isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
def test_nothing_of_the_size_of_the_experts_is_made(implementation: str) -> None:
    fused, plain = pair(implementation=implementation)
    inputs = routed(tokens=4)
    largest = []
    for model in (fused, plain):
        with Largest() as watch:
            run(model, inputs, fp32)
        largest.append(watch.elements)
    gate_up = E * 2 * F * H
    assert largest[1] >= gate_up  # so the watch would have seen it
    assert largest[0] < gate_up // 2


def models() -> dict[str, tuple[type, type, dict[str, Any]]]:
    latent = dict.fromkeys(
        ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8
    )
    deepseek = {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_key_value_heads": 4,
    } | latent
    shared = {"shared_expert_intermediate_size": 16}
    t = transformers
    return {
        "Mixtral": (t.MixtralConfig, t.MixtralForCausalLM, {"num_local_experts": 4}),
        "Qwen2-MoE": (t.Qwen2MoeConfig, t.Qwen2MoeForCausalLM, {"num_experts": 6} | shared),
        "Qwen3-MoE": (t.Qwen3MoeConfig, t.Qwen3MoeForCausalLM, {"num_experts": 6, "head_dim": 8}),
        "DeepSeek-V2": (
            t.DeepseekV2Config,
            t.DeepseekV2ForCausalLM,
            {"topk_method": "group_limited_greedy"} | deepseek,
        ),
        "DeepSeek-V3": (t.DeepseekV3Config, t.DeepseekV3ForCausalLM, deepseek),
        "GPT-OSS": (t.GptOssConfig, t.GptOssForCausalLM, {"num_local_experts": 4, "head_dim": 8}),
        "OLMoE": (t.OlmoeConfig, t.OlmoeForCausalLM, {"num_experts": 6}),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", models())
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and experts adapted together: logits and all gradients as near as PEFT's."""
    torch.manual_seed(0)
    config_class, model_class, options = models()[name]
    config = config_class(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 24,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts_per_tok": 2,
            "pad_token_id": 0,
        }
        | options
    )
    adapters = LoraConfig(
        target_modules=["o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        r=4,
        task_type="CAUSAL_LM",
    )
    plain = randomise(get_peft_model(model_class(config), adapters))
    assert config._experts_implementation == "grouped_mm"
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert len(report.fused) == 3 * 2
    assert not report.not_fused
    reference = copy.deepcopy(plain).to(fp64)
    reference.set_experts_implementation("eager")
    tokens = torch.arange(18).reshape(2, 9) * 3 + 1
    with calls_of_lora_linear(monkeypatch) as linear, fused_products(monkeypatch) as products:
        got = logits_and_gradients(fused, tokens)
    assert len(linear) == 2
    assert len(products) == 2 * 2
    eager, expected = (logits_and_gradients(model, tokens) for model in (plain, reference))
    assert got.keys() == eager.keys() == expected.keys()
    assert len(got) == 1 + 3 * 2 * 2
    for key in expected:
        assert_accurate(key, got[key], expected[key], eager[key])


def logits_and_gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), **gradients}


def assert_close(got: Tensor, expected: Tensor, name: str = "") -> None:
    """A check that something ran at all right; how right it is, `assert_right` says."""
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max(), name


# --- what PEFT's own code runs ---------------------------------------------------------------


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


def activate_both(model: PeftModel) -> None:
    add_another(model)
    model.base_model.set_adapter(["default", "other"])


def train_base(model: PeftModel) -> None:
    outer(model).get_base_layer().down_proj.requires_grad_(True)


def implementation_of_ones_own(model: PeftModel) -> None:
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    if "mine" not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register("mine", lambda *a: grouped(*a))
    outer(model).get_base_layer().config._experts_implementation_internal = "mine"


def hook_on(which: Callable[[PeftModel], nn.Module]) -> Callable[[PeftModel], None]:
    return lambda model: which(model).register_forward_hook(lambda m, a, out: out * 2) and None


def parametrise(model: PeftModel) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    base = outer(model).get_base_layer()
    nn.utils.parametrize.register_parametrization(base, "down_proj", Twice())
    base.parametrizations.down_proj.original.requires_grad_(False)


def own_forward(model: PeftModel) -> None:
    base = outer(model).get_base_layer()
    base.__class__ = type(
        "Own", (type(base),), {"forward": lambda self, *a: MixtralExperts.forward(self, *a) * 2}
    )


def spread(model: PeftModel) -> None:
    outer(model).get_base_layer()._is_expert_parallel = True


class Sharded(Tensor):
    """Stands for a tensor of which not all is here."""


def shard(model: PeftModel) -> None:
    base = outer(model).get_base_layer()
    base.down_proj = nn.Parameter(base.down_proj.data.as_subclass(Sharded), requires_grad=False)


def twice_on_the_instance(model: PeftModel) -> None:
    base = outer(model).get_base_layer()
    forward = base.forward
    base.forward = lambda *a: forward(*a) * 2


# What changes a model, why its outer wrapper is left, and whether the inner one is, too.
LEFT = {
    "disabled": (disable, "adapters are disabled", True),
    "two active": (activate_both, "2 active adapters", True),
    "trained": (train_base, "base weight is trainable", False),
    "another implementation": (implementation_of_ones_own, "implementation 'mine'", True),
    "hook inside": (hook_on(lambda m: outer(m).base_layer), "base layer has hooks", False),
    "hook below": (hook_on(lambda m: outer(m).get_base_layer()), "base layer has hooks", True),
    "parametrised": (parametrise, "base weight is parametrised", False),
    "sharded": (shard, "base weight is a test_peft_experts.Sharded, not a plain tensor", False),
    "a forward of its own": (own_forward, "not dispatched by transformers' interface", True),
    "replaced": (twice_on_the_instance, "the forward of base layer was replaced", True),
    "expert parallel": (spread, "the experts are spread over processes", True),
}


@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization")
@pytest.mark.parametrize("late", [False, True], ids=["before fuse", "after"])
@pytest.mark.parametrize("case", LEFT)
def test_left_to_peft_with_a_reason(case: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason, both = LEFT[case]
    plain = peft_experts()
    fused = copy.deepcopy(plain)
    if late:
        assert len(fuse(fused).fused) == 2
    for model in (fused, plain):
        change(model)
    report = fuse(fused)
    assert reason in report.not_fused["base_model.model.experts"]
    assert len(report.not_fused) == 1 + both
    with fused_products(monkeypatch) as calls:
        got = outcome(fused)
    assert len(calls) == len(report.fused)  # an inner one runs fused inside PEFT's outer one
    (assert_same if both else assert_near)(got, outcome(plain))


def test_an_inner_wrapper_that_cannot_be_fused_leaves_both() -> None:
    plain = peft_experts()
    fused = copy.deepcopy(plain)
    for model in (fused, plain):
        outer(model).get_base_layer().gate_up_proj.requires_grad_(True)
    assert fuse(fused).not_fused == {
        "base_model.model.experts": "gate_up_proj: base weight is trainable",
        "base_model.model.experts.base_layer": "base weight is trainable",
    }
    assert_same(outcome(fused), outcome(plain))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": fp64, "implementation": "eager"}, "base weight is float64"),
        ({"kind": "transposed, biases", "parameters": ("gate_up_proj_bias",)}, "do not multiply"),
    ],
)
def test_weights_that_have_no_grouped_product(options: dict[str, Any], reason: str) -> None:
    assert all(reason in found for found in fuse(peft_experts(**options)).not_fused.values())


def test_sizes_that_grouped_products_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_peft_experts.F", 6)
    fused = peft_experts(implementation="eager")
    reasons = fuse(fused).not_fused
    assert reasons["base_model.model.experts"] == "6 or 16 features are no multiple of 16 bytes"
    assert "16 or 6 features" in reasons["base_model.model.experts.base_layer"]


def test_dropout_and_mixed_batches_are_refused_by_peft() -> None:
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        peft_experts(lora_dropout=0.1)
    fused, _ = pair()
    with pytest.raises(ValueError, match="does not support mixed"):
        outer(fused)(*routed(), adapter_names=["default"] * T)


# --- what stays as it was --------------------------------------------------------------------


def test_unfuse_restores_everything() -> None:
    fused, plain = pair()
    keys = list(plain.state_dict())
    assert list(fused.state_dict()) == keys
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    forward = outer(fused).forward
    outcome(fused)
    unfuse(fused)
    assert type(outer(fused)) is type(outer(fused).base_layer) is PeftWrapper
    for layer, twin in zip(fused.modules(), plain.modules(), strict=True):
        assert layer.__dict__.keys() == twin.__dict__.keys()
    assert_same(outcome(fused), outcome(plain))
    x, index, weights = cast(fp32)
    assert torch.equal(forward(x, index, weights), outer(plain)(x, index, weights))


def test_copies_stay_fused_and_pickles_can_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _ = pair()
    expected = outcome(fused)
    pickled = pickle.loads(pickle.dumps(fused))
    assert type(outer(pickled)) is PeftWrapper
    fuse(pickled)
    for twin in (copy.deepcopy(fused), pickled):
        with fused_products(monkeypatch) as products:
            got = outcome(twin)
        assert len(products) == 2
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_report_counts_the_calls_of_both_wrappers() -> None:
    plain = peft_experts()
    report = fuse(plain)
    outcome(plain)
    disable(plain)
    outcome(plain)
    counts = report.calls()
    assert len(counts) == 2
    assert all(of_one == {"fused": 1, "adapters are disabled": 1} for of_one in counts.values())


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@pytest.mark.parametrize("kind", ["gated", "transposed, biases"])
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_merge_unmerge_save_and_load(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    fused, plain = pair(kind, dtype=dtype)
    fused.save_pretrained(tmp_path / "fused"), plain.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").rglob("*.safetensors"):
        twin = tmp_path / "fused" / file.relative_to(tmp_path / "plain")
        assert twin.read_bytes() == file.read_bytes()
    frozen = {n: p.detach().clone() for n, p in plain.named_parameters()}
    wrappers = {n: m for n, m in plain.named_modules() if isinstance(m, PeftWrapper)}
    before = {name: wrapper.get_param().double() for name, wrapper in wrappers.items()}
    for _ in range(20):
        fused.merge_adapter()
        fused.unmerge_adapter()
    assert all(torch.equal(p, frozen[n]) for n, p in fused.named_parameters())
    for model in (fused, plain):
        model.merge_adapter()
    assert all(map(torch.equal, fused.parameters(), plain.parameters()))
    losses = merge_loss(fused)
    assert losses.keys() == wrappers.keys()
    for name, wrapper in wrappers.items():
        if dtype == fp32:
            assert losses[name] < 1e-5
            continue
        a, b, s = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight, 6 / 4
        update = s * torch.stack([b[:, e::E].double() @ a.chunk(E)[e].double() for e in range(E)])
        if kind == "transposed, biases":
            update = update.transpose(1, 2)
        lost = wrapper.get_param().double() - before[name] - update
        assert losses[name] == pytest.approx((lost.norm() / update.norm()).item(), rel=1e-6)
    assert why_not(outer(fused)) == "adapters are merged"
    assert torch.equal(fused(*cast(dtype)), plain(*cast(dtype)))
    merged, expected = fused.merge_and_unload(), plain.merge_and_unload()
    assert all(map(torch.equal, merged.parameters(), expected.parameters()))


def test_adapters_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair()
    plain.save_pretrained(tmp_path)
    for model in (fused, plain):
        add_another(model)
        model.set_adapter("other")
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    with fused_products(monkeypatch) as calls:
        for change in (
            lambda model: None,
            lambda model: model.set_adapter("default"),
            lambda model: model.delete_adapter("other"),
            lambda model: model.load_adapter(tmp_path, "loaded") and model.set_adapter("loaded"),
        ):
            for model in (fused, plain):
                change(model)
            assert_near(outcome(fused), outcome(plain))
    assert len(calls) == 4 * 2


def test_learning_curves_are_the_same() -> None:
    losses = []
    for model in pair("transposed, biases"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x, index, weights = cast(fp32)
        curve = []
        for _ in range(8):
            loss = (model(x, index, weights) - x.flip(-1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_peft_tells_a_wrapper_by_its_name() -> None:
    assert ParamWrapper.__name__ == PeftWrapper.__name__
