"""Experts that `target_parameters` adapts, against PEFT and float64: alone and in real models."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

import transformers
from expert_models import (
    IDLE,
    IMPLEMENTATIONS,
    KINDS,
    TOP,
    Block,
    E,
    F,
    H,
    assert_close,
    assert_right,
    assert_same,
    cast,
    exact,
    fused_products,
    outcome,
    pair,
    peft_experts,
    routed,
    run,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper as PeftWrapper
from peft_models import bf16, calls_of_lora_linear, fp16, fp32, fp64, randomise
from peft_models import one_thread as one_thread
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_kernels.peft import fuse, why_not
from lora_kernels.testing import assert_accurate


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


def test_a_token_may_go_without_an_expert() -> None:
    fused, plain = pair(implementation="eager")
    x, index, weights = routed()
    index[::2, 0] = E  # a dropped pair
    got, expected = (run(m, (x.clone(), index, weights.clone()), fp32) for m in (fused, plain))
    for name in expected:
        assert_close(got[name], expected[name])


def test_no_tokens_at_all() -> None:
    fused, plain = pair()
    for model in (fused, plain):
        x = torch.zeros(0, H, requires_grad=True)
        assert model(x, torch.zeros(0, TOP, dtype=torch.long), torch.zeros(0, TOP)).shape == (0, H)


def test_second_derivatives() -> None:
    x, index, weights = (t.float() if t.is_floating_point() else t for t in routed())
    x = x.requires_grad_()
    results = []
    for model in pair():
        y = model(x, index, weights).square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append(torch.autograd.grad(dx.square().sum(), [x, *trained]))
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("trained", ["lora_", "lora_A"])
@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_second_derivatives_by_both_factors_and_by_a(rank: int, trained: str) -> None:
    """The gradients that arrive at grouped products have strides which those refuse."""
    models = pair(r=rank)
    x, index, weights = (t.float() if t.is_floating_point() else t for t in routed())
    results = []
    for model in models:
        for name, p in model.named_parameters():
            p.requires_grad_(trained in name)
        factors = [p for p in model.parameters() if p.requires_grad]
        y = model(x, index, weights).square().sum()
        made = torch.autograd.grad(y, factors, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in made), factors))
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


def test_a_second_derivative_beside_a_frozen_a_raises() -> None:
    fused, _ = pair()
    for name, parameter in fused.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    x, index, weights = (t.float() if t.is_floating_point() else t for t in routed())
    y = fused(x.requires_grad_(), index, weights).square().sum()
    with pytest.raises(RuntimeError, match="double backward beside a frozen A"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.filterwarnings("ignore")  # the product of experts has no batching rule of its own
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_a_batch_of_gradients(dtype: torch.dtype) -> None:
    fused, _ = pair(dtype=dtype)
    x, index, weights = cast(dtype)
    wanted = [x.requires_grad_(), *(p for p in fused.parameters() if p.requires_grad)]
    y = fused(x, index, weights)
    dy = torch.randn(3, *y.shape).to(dtype)
    batch = torch.autograd.grad(y, wanted, dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for got, expected in zip(
            batch, torch.autograd.grad(y, wanted, dy[i], retain_graph=True), strict=True
        ):
            torch.testing.assert_close(got[i], expected)


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
