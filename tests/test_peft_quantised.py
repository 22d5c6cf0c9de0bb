"""Fused layers over weights that bitsandbytes really quantised, against unfused PEFT."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.bnb import Linear4bit
from peft_models import (
    Block,
    K,
    assert_compiles,
    assert_nothing_dense_is_kept,
    assert_right,
    assert_same_as_peft,
    bf16,
    calls_of_lora_linear,
    fp16,
    fp32,
    fp64,
    randomise,
    run,
)
from peft_models import one_thread as one_thread
from torch.utils.checkpoint import checkpoint
from trainers import train
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_kernels.peft import fuse, unfuse, why_not
from lora_kernels.testing import assert_accurate

FORMATS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4 nested": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "fp4 nested": {"quant_type": "fp4", "compress_statistics": True},
    "int8": {},
}


def quantise(linear: nn.Linear, name: str, compute: torch.dtype | None) -> nn.Module:
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    if name == "int8":
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=compute, **FORMATS[name])
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # where it is quantised


def quantised_block(name: str, compute: torch.dtype | None = fp32) -> nn.Module:
    torch.manual_seed(0)
    block: Any = Block()
    block.up, block.down = (quantise(m, name, compute) for m in (block.up, block.down))
    setattr(block, "is_loaded_in_8bit" if name == "int8" else "is_loaded_in_4bit", True)
    return block


def model(
    name: str,
    compute: torch.dtype | None = fp32,
    adapters: torch.dtype = fp32,
    other: torch.dtype = fp32,
    **options: Any,
) -> PeftModel:
    """`other` is the dtype of what is not quantised, and so of x."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]} | options
    peft = randomise(get_peft_model(quantised_block(name, compute), LoraConfig(**options)))
    for path, parameter in peft.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(adapters if "lora_" in path else other)
    return peft.train()


def densified(peft: PeftModel, compute: torch.dtype, dtype: torch.dtype) -> PeftModel:
    """The same model in `dtype` over `nn.Linear`s with the weights that `peft` multiplies by."""
    block = Block()
    twin = get_peft_model(block, copy.deepcopy(peft.peft_config["default"]))
    state = dict(peft.named_parameters())
    for path, parameter in twin.named_parameters():
        if path.endswith("base_layer.weight"):
            parameter.data = dense(peft.get_submodule(path.removesuffix(".weight")), compute)
        else:
            parameter.data = state[path].data.clone()
    return twin.to(dtype)


def dense(base: Any, dtype: torch.dtype) -> Tensor:
    """W as bitsandbytes multiplies by it in `dtype`: its own product with the identity."""
    bias, base.bias = base.bias, None
    identity = torch.eye(base.in_features, dtype=dtype, requires_grad=True)
    product = base(identity).detach()
    base.bias = bias
    return product.t().contiguous()


def dense_weights(peft: PeftModel) -> list[Tensor]:
    return [
        dense(m.base_layer, fp32) for m in (peft.base_model.model.up, peft.base_model.model.down)
    ]


def x_for(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*(shape or (3, 5, K)), generator=generator, dtype=fp64).to(dtype)


# base computes in, adapters, x and the rest
DTYPES = [
    (fp32, fp32, fp32),
    (bf16, bf16, bf16),
    (bf16, fp32, bf16),
    (fp32, fp32, bf16),  # the compute dtype that nobody set
    (fp32, bf16, bf16),
    (fp16, fp32, fp16),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_forward_and_gradients(
    name: str, dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, adapters, other = dtypes
    if name == "int8":  # it computes in x's dtype
        compute = other
    fused, plain = (model(name, compute, adapters, other) for _ in range(2))
    reference = densified(plain, compute, fp64)
    assert len(fuse(fused).fused) == 2
    assert_right(fused, plain, reference, x_for(other), monkeypatch)


@pytest.mark.parametrize("shape", [(7, K), (K,), (0, K), (2, 3, 4, K)], ids=str)
@pytest.mark.parametrize("name", ["nf4 nested", "int8"])
def test_shapes(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = model(name), model(name)
    fuse(fused)
    reference = densified(plain, fp32, fp64)
    if shape == (0, K) and name != "int8":  # where bitsandbytes' own backward fails
        plain = densified(plain, fp32, fp32)
    assert_right(fused, plain, reference, x_for(fp32, *shape), monkeypatch)


@pytest.mark.parametrize("compute", [fp32, bf16], ids=str)
@pytest.mark.parametrize("other", [fp32, bf16], ids=str)
@pytest.mark.parametrize("adapters", [fp32, bf16], ids=str)
@pytest.mark.parametrize("name", ["nf4 nested", "int8"])
def test_autocast(
    name: str,
    compute: torch.dtype,
    adapters: torch.dtype,
    other: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `Trainer(bf16=True)` runs after `prepare_model_for_kbit_training` and without it."""
    fused, plain = (model(name, compute, adapters, other) for _ in range(2))
    reference = densified(plain, bf16, fp64)
    x = x_for(other)
    exact = run(reference, x.to(fp64))
    with torch.autocast("cpu", bf16):
        assert len(fuse(fused).fused) == 2
        with calls_of_lora_linear(monkeypatch) as calls:
            got = run(fused, x)
        eager = run(plain, x)
    assert len(calls) == 2
    for key, expected in exact.items():
        assert got[key].dtype == eager[key].dtype, key
        # Both round to bfloat16 inside, whatever the dtype of the result.
        assert_accurate(key, got[key], expected, eager[key].to(bf16))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_bits_are_those_of_the_dense_layer(name: str, dropout: float) -> None:
    """So dropout, too, is what the dense kind's own tests say it is."""
    fused = model(name, lora_dropout=dropout)
    dense = densified(fused, fp32, fp32).train()
    assert len(fuse(fused).fused) == len(fuse(dense).fused) == 2
    results = []
    for peft in (fused, dense):
        torch.manual_seed(4)
        results.append(run(peft, x_for(fp32)))
    for key in results[1]:
        assert torch.equal(results[0][key], results[1][key]), key


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "int8"])
def test_nothing_dense_lives_between_forward_and_backward(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = model(name, dtype, dtype, dtype).base_model.model.up
    fuse(layer)
    assert_nothing_dense_is_kept(layer, x_for(dtype, 6, K), monkeypatch)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["nf4 nested", "int8"])
def test_checkpointing(name: str, reentrant: bool) -> None:
    peft = model(name, lora_dropout=0.4)
    fuse(peft)
    results = []
    for call in (peft, lambda x: checkpoint(peft, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        peft.zero_grad()
        x = x_for(fp32).requires_grad_()
        y = call(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in peft.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore:.*Merge lora module|.*Unmerge lora module")
@pytest.mark.parametrize("name", ["nf4 nested", "int8"])
def test_merge_unmerge_save_and_load(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain = model(name), model(name)
    fuse(fused)
    x = x_for(fp32)
    for peft in (fused, plain):
        peft.merge_adapter()
    assert_same_as_peft(fused, plain, x)
    before, y = dense_weights(model(name)), run(model(name), x)["y"]
    fused.unmerge_adapter()
    assert all(map(torch.equal, dense_weights(fused), before))  # PEFT quantises twice instead
    fused.train()
    plain = model(name)
    assert torch.equal(run(plain, x)["y"], y)
    assert_right(fused, plain, densified(plain, fp32, fp64), x, monkeypatch)

    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised_block(name), tmp_path, is_trainable=True).train()
    again = PeftModel.from_pretrained(quantised_block(name), tmp_path, is_trainable=True).train()
    assert len(fuse(again).fused) == 2
    assert_right(again, loaded, densified(loaded, fp32, fp64), x, monkeypatch)


@pytest.mark.filterwarnings("ignore:.*Merge lora module|.*Unmerge lora module")
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_weight_that_an_initialisation_sets_later_is_multiplied_by(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OLoRA takes A and B out of the base weight: here after a call, which keeps the old one."""
    fused, plain = model(name), model(name)
    fuse(fused)
    x = x_for(fp32)
    for peft in (fused, plain):
        if name == "int8":  # by bitsandbytes; 4 bits it may repack, for sizes unlike these
            peft.eval()
        peft(x)
        peft.train().add_adapter(
            "other", LoraConfig(target_modules=["up", "down"], init_lora_weights="olora")
        )
        peft.set_adapter("other")
    before = dense_weights(model(name))
    assert not any(map(torch.equal, dense_weights(copy.deepcopy(fused)), before))
    fused.merge_adapter()
    fused.unmerge_adapter()
    with calls_of_lora_linear(monkeypatch) as calls:
        got = run(fused.train(), x)
    assert len(calls) == 2
    torch.testing.assert_close(got, run(plain, x))


def test_unfuse() -> None:
    for name in ("nf4", "int8"):
        peft, untouched = model(name), model(name)
        fuse(peft)
        unfuse(peft)
        assert [type(m) for m in peft.modules()] == [type(m) for m in untouched.modules()]
        assert_same_as_peft(peft, untouched, x_for(fp32))


def repacked(layer: Any) -> None:
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True


def lose_state(base: Any) -> None:
    base.weight.quant_state = base.quant_state = None


LEFT: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "state lost": (
        "nf4",
        lambda layer: lose_state(layer.base_layer),
        "without its quantisation state",
    ),
    "repacked": ("nf4", repacked, "repacked for inference"),
    "hook": ("nf4", lambda layer: layer.base_layer.register_forward_hook(print), "has hooks"),
    "int8 eval": ("int8", lambda layer: layer.eval(), "quantises x, too"),
    "int8 hook": ("int8", lambda layer: layer.base_layer.register_forward_hook(print), "has hooks"),
    "int8 of fp16": (
        "int8",
        lambda layer: setattr(layer.base_layer.state, "has_fp16_weights", True),
        "quantised anew",
    ),
}


@pytest.mark.parametrize(("name", "change", "reason"), LEFT.values(), ids=LEFT.keys())
def test_leaves_to_peft(name: str, change: Callable[[Any], Any], reason: str) -> None:
    layer = model(name).base_model.model.up
    change(layer)
    assert reason in str(why_not(layer, x_for(fp32)))


def test_x_wider_than_the_compute_dtype_is_left_to_peft() -> None:
    """After `prepare_model_for_kbit_training`, without autocast: A's gradient reads x in full."""
    fused, plain = model("nf4", bf16), model("nf4", bf16)
    fuse(fused)
    x = x_for(fp32)
    reason = "x is float32 where the base computes in bfloat16"
    assert why_not(fused.base_model.model.up, x) == reason
    assert_same_as_peft(fused, plain, x)


def test_inference_is_left_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        base = quantise(nn.Linear(64, 64), "nf4", bf16)
        layers.append(randomise(Linear4bit(base, "default", LoraConfig(), r=3)).to(bf16).eval())
    fused, plain = layers
    fuse(fused)
    x = x_for(bf16, 3, 64)
    # Nothing else is asked: in inference that is a good part of what a call costs.
    monkeypatch.setattr("lora_kernels.peft.layer.adapter_of", None)
    with torch.no_grad():
        assert "in inference" in str(why_not(fused, x))
        assert torch.equal(fused(x), plain(x))


def test_reentrant_checkpointing_runs_one_and_the_same_code_twice() -> None:
    """Its first forward has gradients off: another dropout mask there would be a wrong gradient."""
    layer = model("nf4", lora_dropout=0.5).base_model.model.up
    with torch.no_grad():
        assert why_not(layer, x_for(fp32)) is None


@pytest.mark.parametrize("name", ["nf4 nested", "int8"])
def test_compiles_without_a_graph_break(name: str) -> None:
    peft = model(name)
    fuse(peft)
    assert_compiles(peft, x_for(fp32))


@pytest.mark.parametrize("name", ["nf4 nested", "int8"])
def test_kinds_of_adapter_combine_with_kinds_of_base(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain = (model(name, bf16, fp32, bf16, lora_bias=True) for _ in range(2))
    assert len(fuse(fused).fused) == 2
    reference = densified(plain, bf16, fp64)
    assert_right(fused, plain, reference, x_for(bf16), monkeypatch)


@pytest.mark.parametrize("eight", [False, True], ids=["4-bit", "8-bit"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_quantised_checkpoint_trains_as_users_train_it(
    prepared: bool, eight: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`BitsAndBytesConfig`, `prepare_model_for_kbit_training`, `Trainer(bf16=True)`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).to(bf16).save_pretrained(tmp_path / "base")
    how = BitsAndBytesConfig(
        load_in_8bit=eight,
        load_in_4bit=not eight,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=bf16,
    )

    def losses(fusing: bool) -> list[float]:
        base = LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=how, dtype=bf16, device_map="cpu"
        )
        if prepared:
            base = prepare_model_for_kbit_training(base)
        torch.manual_seed(0)
        lora: Any = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4)
        peft = get_peft_model(base, lora)
        if fusing:
            assert len(fuse(peft).fused) == 14
        return train(peft, tmp_path / "run", bf16=True)

    with calls_of_lora_linear(monkeypatch) as calls:
        got = losses(True)
    assert len(calls) == 14 * 6 * (2 if prepared else 1)  # preparing turns checkpointing on
    assert got[-1] < got[0] - 0.05
    assert got == pytest.approx(losses(False), rel=2e-2)
