"""`fuse` against unfused PEFT: what it takes, and what it leaves to PEFT and why."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from accelerate.hooks import ModelHook, add_hook_to_module
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import config as lora_config
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from peft_models import (
    Block,
    H,
    K,
    add_other,
    assert_close_to_peft,
    assert_same_as_peft,
    bf16,
    calls_of_lora_linear,
    fp16,
    fp32,
    fp64,
    peft_model,
    randomise,
    x_for,
)
from peft_models import one_thread as one_thread
from torch.nn.utils.parametrize import register_parametrization

from lora_kernels.peft import fuse, unfuse, why_not

TAKEN: dict[str, dict[str, Any]] = {
    "default": {},
    "r=1": {"r": 1},
    "r=19": {"r": 19},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up": 7}, "alpha_pattern": {"down": 31}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "fp64": {"dtype": fp64},
    "bf16 base, fp32 adapters": {"dtype": bf16},
    "fp16 base, fp32 adapters": {"dtype": fp16},
}


@pytest.mark.parametrize("options", TAKEN.values(), ids=TAKEN.keys())
@pytest.mark.parametrize("shape", [(3, 5, K), (7, K), (K,), (0, K)], ids=str)
def test_takes(
    options: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = peft_model(**options)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert len(report.fused) == 2
    assert not report.not_fused
    with calls_of_lora_linear(monkeypatch) as calls:
        assert_close_to_peft(fused, plain, x_for(plain, *shape))
    assert len(calls) == 2


def test_takes_low_precision_adapters_as_well() -> None:
    plain = peft_model().to(bf16)
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 2
    assert_close_to_peft(fused, plain, x_for(plain))


def test_takes_a_strided_x_and_frozen_adapters() -> None:
    plain = peft_model()
    plain.base_model.model.up.lora_A["default"].weight.requires_grad_(False)
    plain.base_model.model.down.lora_B["default"].weight.requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse(fused)
    x = x_for(plain, 5, 3, 2 * K)[:, :, ::2].transpose(0, 1)
    assert_close_to_peft(fused, plain, x)


def test_fan_in_fan_out_does_not_matter_over_a_linear() -> None:
    # PEFT's forward does not read the flag; only the merge of a Conv1D does.
    torch.manual_seed(0)
    base = nn.Linear(K, H).requires_grad_(False)
    plain = randomise(Linear(base, "default", LoraConfig(fan_in_fan_out=True), r=3, lora_alpha=2))
    fused = copy.deepcopy(plain)
    assert fuse(fused).fused == [""]
    assert_close_to_peft(fused, plain, x_for(plain))


# --- What it does not take: each entry changes a model; the pattern is the reported reason --------


class Tagged(Tensor):
    """A stand-in for DTensor and torchao's tensors."""


class MyLinear(nn.Linear):
    """One that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.tanh())


def swap_linear(layer: Linear, part: str) -> None:
    getattr(layer, part)["default"].__class__ = MyLinear


def tag_weight(layer: Linear) -> None:
    weight = layer.base_layer.weight
    layer.base_layer.weight = nn.Parameter(weight.data.as_subclass(Tagged), requires_grad=False)


def narrow(layer: Linear) -> None:
    layer.lora_A.to(bf16)
    layer.lora_B.to(bf16)


def observe(module: nn.Module) -> Any:
    return module.register_forward_hook(lambda module, inputs, output: 2 * output)


def up(change: Callable[[Linear], Any]) -> Callable[[PeftModel], Any]:
    return lambda model: change(model.base_model.model.up)


LEFT_TO_PEFT: dict[str, tuple[Callable[[PeftModel], Any], str]] = {
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), "adapters are disabled"),
    "merged": (lambda m: m.merge_adapter(), "adapters are merged"),
    "two active, one not LoRA": (
        lambda m: (add_other(m, use_dora=True), m.base_model.set_adapter(["default", "other"])),
        r"2 active adapters, one of them more than LoRA \(DoRA\)",
    ),
    "two active dtypes": (
        lambda m: (
            add_other(m),
            m.base_model.model.up.lora_A["other"].to(bf16),
            m.base_model.model.up.lora_B["other"].to(bf16),
            m.base_model.set_adapter(["default", "other"]),
        ),
        "active adapters of different dtypes: bfloat16, float32",
    ),
    "none active": (lambda m: m.base_model.set_adapter([]), "no active adapter"),
    "not in this layer": (lambda m: add_other(m, target_modules=["down"]), "no active adapter"),
    "velora": (
        lambda m: add_other(m, velora_config=lora_config.VeloraConfig(num_groups=2)),
        "variant VeloraLinearVariant",
    ),
    "base weight trains": (
        up(lambda layer: layer.base_layer.weight.requires_grad_()),
        "base weight is trainable",
    ),
    "weight subclass": (up(tag_weight), r"base weight is a .*Tagged, not a plain tensor"),
    "base subclass": (
        up(lambda layer: setattr(layer.base_layer, "__class__", MyLinear)),
        r"base layer is a .*MyLinear, not a plain nn.Linear",
    ),
    "parametrized base": (
        up(lambda layer: register_parametrization(layer.base_layer, "weight", nn.Tanh())),
        r"base layer is a .*ParametrizedLinear, not a plain nn.Linear",
    ),
    "lora_A subclass": (up(lambda layer: swap_linear(layer, "lora_A")), r"lora_A is a .*MyLinear"),
    "lora_B subclass": (up(lambda layer: swap_linear(layer, "lora_B")), r"lora_B is a .*MyLinear"),
    "own dropout": (
        up(lambda layer: layer.lora_dropout.update({"default": nn.Tanh()})),
        r"lora_dropout is a .*Tanh, not a plain nn.Dropout",
    ),
    "dropout 1": (
        up(lambda layer: layer.lora_dropout.update({"default": nn.Dropout(1.0)})),
        "dropout probability is 1",
    ),
    "hook on base": (up(lambda layer: observe(layer.base_layer)), "base layer has hooks"),
    "hook on lora_A": (up(lambda layer: observe(layer.lora_A["default"])), "lora_A has hooks"),
    "pre-hook on lora_B": (
        up(lambda layer: layer.lora_B["default"].register_forward_pre_hook(lambda m, x: 3 * x[0])),
        "lora_B has hooks",
    ),
    "backward hook on lora_A": (
        up(
            lambda layer: layer.lora_A["default"].register_full_backward_hook(
                lambda module, dx, dy: (2 * dx[0],)
            )
        ),
        "lora_A has hooks",
    ),
    "backward pre-hook on lora_B": (
        up(
            lambda layer: layer.lora_B["default"].register_full_backward_pre_hook(
                lambda module, dy: (2 * dy[0],)
            )
        ),
        "lora_B has hooks",
    ),
    "hook on dropout": (
        up(lambda layer: observe(layer.lora_dropout["default"])),
        "lora_dropout has hooks",
    ),
    "offloaded by accelerate": (
        up(lambda layer: add_hook_to_module(layer.base_layer, ModelHook())),
        "forward of base layer was replaced",
    ),
    "scaling tensor": (
        lambda m: prepare_model_for_compiled_hotswap(m, target_rank=6),
        r"scaling is a torch.Tensor, not a number",
    ),
    "narrow adapter": (up(narrow), "the adapter is bfloat16 where x is float32"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("change", "reason"), LEFT_TO_PEFT.values(), ids=LEFT_TO_PEFT.keys())
def test_leaves_to_peft(change: Callable[[PeftModel], Any], reason: str, when: str) -> None:
    """A change before or after fusing is named, and forward and gradients are PEFT's bits."""
    plain, fused = peft_model(), peft_model()
    change(plain)
    if when == "after":
        assert len(fuse(fused).fused) == 2
    change(fused)
    report = fuse(fused) if when == "before" else None
    layer = fused.base_model.model.up
    assert re.search(reason, why_not(layer) or "fused")
    if report is not None:
        assert report.not_fused["base_model.model.up"] == why_not(layer)
        assert type(layer) is Linear
    unfuse(fused.base_model.model.down)  # `up` alone is on trial, to the bit
    assert_same_as_peft(fused, plain, x_for(plain))


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(K, K)
        self.conv = nn.Conv1d(K, K, 1)
        self.attention = nn.MultiheadAttention(K, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embed(torch.arange(x.shape[-2]))
        x = self.conv(x.mT).mT
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("embed", r"lora\.layer\.Embedding, not a PEFT lora\.Linear"),
        ("conv", r"lora\.layer\.Conv1d, not a PEFT lora\.Linear"),
        ("attention", r"lora\.layer\.MultiheadAttention, not a PEFT lora\.Linear"),
    ],
)
def test_leaves_other_layers_to_peft(target: str, reason: str) -> None:
    plain = peft_model(Zoo(), target_modules=[target])
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert not report.fused
    assert re.search(reason, report.not_fused[f"base_model.model.{target}"])
    assert_same_as_peft(fused, plain, x_for(plain))


def test_leaves_other_tuners_and_wrapped_parameters_to_peft() -> None:
    ia3 = get_peft_model(Block(), IA3Config(target_modules=["up"], feedforward_modules=[]))
    assert "peft.tuners.ia3.layer.Linear" in str(fuse(ia3))
    wrapped = peft_model(target_modules=["down"], target_parameters=["up.weight"])
    report = fuse(wrapped)
    assert report.fused == ["base_model.model.down"]
    assert "not dispatched by transformers" in report.not_fused["base_model.model.up"]


class QuantisedLinear(Linear):
    """A stand-in for the layers over quantised weights: a subclass with a forward of its own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x.round(), *args, **kwargs)


def test_leaves_subclasses_of_the_lora_layer_to_peft() -> None:
    config = LoraConfig(target_modules=["up"])
    config._register_custom_module({nn.Linear: QuantisedLinear})
    fused = get_peft_model(Block(), config)
    plain = copy.deepcopy(fused)
    assert "QuantisedLinear, not a PEFT lora.Linear" in fuse(fused).not_fused["base_model.model.up"]
    assert_same_as_peft(fused, plain, x_for(plain))


def test_leaves_a_layer_with_its_own_forward_alone() -> None:
    model = peft_model()
    add_hook_to_module(model.base_model.model.up, ModelHook())
    report = fuse(model)
    assert report.not_fused == {"base_model.model.up": "its forward was replaced on the instance"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_names_an_unsupported_weight_dtype(dtype: torch.dtype) -> None:
    layer = peft_model().base_model.model.up
    weight = layer.base_layer.weight.data.to(dtype)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    reason = f"base weight is {str(dtype).removeprefix('torch.')}"
    assert why_not(layer) == reason
    with torch.autocast("cpu", bf16):  # converts what floats
        assert why_not(layer) == (reason if dtype == torch.int8 else None)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("lora_B", "lora_A is float32, lora_B bfloat16"),
        ("x", "x is bfloat16 beside a float32 base weight"),
        ("base bias", "base bias is float16 beside a float32 base weight"),
    ],
)
def test_dtypes_that_peft_refuses_get_its_own_error(part: str, reason: str) -> None:
    def error(layer: Linear) -> str:
        if part == "lora_B":
            layer.lora_B.to(bf16)
        if part == "base bias":
            layer.base_layer.bias.data = layer.base_layer.bias.data.to(fp16)
        with pytest.raises(RuntimeError) as caught:
            layer(x)
        return str(caught.value)

    x = torch.ones(2, K, dtype=bf16 if part == "x" else fp32)
    plain, fused = peft_model().base_model.model.up, peft_model().base_model.model.up
    assert fuse(fused).fused == [""]
    assert error(fused) == error(plain)
    assert why_not(fused, x) == reason


def test_leaves_disabled_input_casting_to_peft() -> None:
    plain = peft_model(dtype=bf16)
    fused = copy.deepcopy(plain)
    fuse(fused)
    with torch.autocast("cpu", bf16):
        with disable_input_dtype_casting(fused), disable_input_dtype_casting(plain):
            assert "casting x" in why_not(fused.base_model.model.up)
            assert_same_as_peft(fused, plain, x_for(plain))
        assert why_not(fused.base_model.model.up) is None


def test_leaves_global_hooks_to_peft() -> None:
    model = peft_model()
    fuse(model)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: seen.append(m))
    try:
        assert "global module hooks" in why_not(model.base_model.model.up)
        model(x_for(model))
    finally:
        handle.remove()
    assert model.base_model.model.up.lora_A["default"] in seen


def test_leaves_function_transforms_to_peft() -> None:
    plain = peft_model()
    fused = copy.deepcopy(plain)
    fuse(fused)

    def per_sample(model: nn.Module) -> dict[str, Tensor]:
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        loss = lambda p, x: torch.func.functional_call(model, p, (x,)).sum()
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x_for(model, 4, K))

    got, expected = per_sample(fused), per_sample(plain)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_leaves_tracing_to_peft() -> None:
    model = peft_model().eval()
    fuse(model)
    with torch.no_grad():
        traced = torch.jit.trace(model.base_model.model, (x_for(model, 3, K),))
        other = x_for(model, 2, 5, K)
        torch.testing.assert_close(traced(other), model(other))
