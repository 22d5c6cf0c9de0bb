"""Fused layers over weights that torchao and HQQ really quantised, against unfused PEFT."""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import (
    Block,
    K,
    assert_compiles,
    assert_nothing_dense_is_kept,
    assert_right,
    assert_same_as_peft,
    bf16,
    fp32,
    fp64,
    randomise,
    run,
)
from peft_models import one_thread as one_thread

from lora_kernels.peft import fuse, unfuse, why_not

TORCHAO, HQQ = (importlib.util.find_spec(name) is not None for name in ("torchao", "hqq"))


def torchao(name: str) -> Any:
    from torchao import quantization as q

    return {
        "torchao int8": lambda: q.Int8WeightOnlyConfig(),
        "torchao int8 groups": lambda: q.Int8WeightOnlyConfig(granularity=q.PerGroup(4)),
        "torchao int4": lambda: q.IntxWeightOnlyConfig(torch.int4, q.PerGroup(4)),
        "torchao int4 asymmetric": lambda: q.IntxWeightOnlyConfig(
            torch.int4, q.PerGroup(4), q.MappingType.ASYMMETRIC
        ),
        "torchao int8 axis": lambda: q.IntxWeightOnlyConfig(torch.int8),
        "torchao dynamic": lambda: q.Int8DynamicActivationInt8WeightConfig(),
        "torchao dynamic int4": lambda: q.Int8DynamicActivationIntxWeightConfig(
            torch.int4, q.PerGroup(4)
        ),
        "torchao float8": lambda: q.Float8WeightOnlyConfig(),
    }[name]()


FORMATS = [
    "torchao int8",
    "torchao int8 groups",
    "torchao int4",
    "torchao int4 asymmetric",
    "torchao int8 axis",
    "hqq 4",
    "hqq 3",
    "hqq 8",
]
FEW_FORMATS = ["torchao int8", "torchao int4", "hqq 4"]


@pytest.fixture(autouse=True)
def a_few_rows_run_fused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if HQQ:
        monkeypatch.setattr("lora_kernels.peft.hqq.FEW_ROWS", 0)


def quantised(name: str, dtype: torch.dtype) -> nn.Module:
    library, _, bits = name.partition(" ")
    if not {"torchao": TORCHAO, "hqq": HQQ}[library]:
        pytest.skip(f"{library} is not installed")
    torch.manual_seed(0)
    block: Any = Block().to(dtype).requires_grad_(False)
    if library == "torchao":
        from torchao.quantization import quantize_

        quantize_(block, torchao(name), lambda module, path: path in ("up", "down"))
        return block
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for path in ("up", "down"):
        how = BaseQuantizeConfig(nbits=int(bits), group_size=8)
        layer = HQQLinear(getattr(block, path), how, compute_dtype=dtype, device="cpu")
        setattr(block, path, layer)
    return block


def model(name: str, dtype: torch.dtype = fp32, adapters: Any = None, **options: Any) -> PeftModel:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]} | options
    peft = get_peft_model(quantised(name, dtype), LoraConfig(**options))
    for path, parameter in randomise(peft).named_parameters():
        if "lora_" in path:
            parameter.data = parameter.data.to(adapters or dtype)
    if name.startswith("torchao"):
        for layer in layers(peft):  # which transformers' configuration says otherwise
            layer.get_apply_tensor_subclass = lambda: torchao(name)
    return peft.train()


def layers(peft: Any) -> list[Any]:
    return [peft.base_model.model.up, peft.base_model.model.down]


def true_weight(base: Any) -> Tensor:
    """W in float64, as the library's own product means it."""
    weight = getattr(base, "weight", None)
    if type(weight).__name__ == "Int8Tensor" and weight.scale.shape[1] == 1:
        return weight.qdata.to(fp64) * weight.scale  # torchao scales the product
    return (base.weight if hasattr(base, "weight") else base).dequantize().to(fp64)


def densified(peft: PeftModel, dtype: torch.dtype = fp64) -> PeftModel:
    """The same model in `dtype` over `nn.Linear`s."""
    twin = get_peft_model(Block(), copy.deepcopy(peft.peft_config["default"])).to(dtype)
    state = dict(peft.named_parameters())
    for path, parameter in twin.named_parameters():
        base = peft.get_submodule(path.rpartition(".")[0])
        if path.endswith("base_layer.weight"):
            parameter.data = true_weight(base).to(dtype)
        elif path.endswith("base_layer.bias"):
            parameter.data = base.bias.detach().to(dtype)
        else:
            parameter.data = state[path].data.to(dtype)
    return twin.train(peft.training)


def x_for(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*(shape or (4, 6, K)), generator=generator, dtype=fp64).to(dtype)


@pytest.mark.parametrize("dtypes", [(fp32, fp32), (bf16, bf16), (bf16, fp32)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_forward_and_gradients(name: str, dtypes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = (model(name, *dtypes) for _ in range(2))
    assert len(fuse(fused).fused) == 2
    assert_right(fused, plain, densified(plain), x_for(dtypes[0]), monkeypatch)
    assert_right(fused, plain, densified(plain), x_for(dtypes[0], 40, K), monkeypatch)


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_autocast(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("hqq") and dtype == fp32:
        pytest.skip("HQQ's own backward fails there")
    fused, plain = (model(name, dtype, fp32) for _ in range(2))
    assert len(fuse(fused).fused) == 2
    assert_right(fused, plain, densified(plain), x_for(dtype), monkeypatch, within=bf16)


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_y_has_the_dtype_that_it_has_in_peft(name: str, dtype: torch.dtype) -> None:
    fused, plain = (layers(model(name, dtype))[0] for _ in range(2))
    fuse(fused)
    for autocast in (False, True):
        with torch.autocast("cpu", bf16, autocast):
            assert why_not(fused, x_for(dtype)) is None
            assert fused(x_for(dtype)).dtype == plain(x_for(dtype)).dtype


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_bits_are_those_of_the_dense_layer(name: str, dropout: float) -> None:
    """So dropout, too, is what the dense kind's own tests say it is."""
    fused = model(name, lora_dropout=dropout)
    dense = densified(fused, fp32)
    assert len(fuse(fused).fused) == len(fuse(dense).fused) == 2
    results = []
    for peft in (fused, dense):
        torch.manual_seed(4)
        results.append(run(peft, x_for(fp32)))
    for key in results[1]:
        assert torch.equal(results[0][key], results[1][key]), key


@pytest.mark.parametrize("name", FEW_FORMATS)
def test_nothing_dense_lives_between_forward_and_backward(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layers(model(name))[0]
    fuse(layer)
    assert_nothing_dense_is_kept(layer, x_for(fp32, 20, K), monkeypatch)


@pytest.mark.filterwarnings("ignore:.*erge lora module|.*instantiated without")
@pytest.mark.parametrize("name", FEW_FORMATS)
def test_lifecycle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies stay fused, the state is PEFT's, merging is PEFT's and can be undone."""
    original, plain = model(name), model(name)
    fuse(original)
    fused = copy.deepcopy(original)
    keys = [key for key in plain.state_dict() if "lora_" in key]
    assert [*fused.state_dict()] == [*plain.state_dict()]
    assert all(torch.equal(fused.state_dict()[key], plain.state_dict()[key]) for key in keys)

    x = x_for(fp32)
    before = run(fused, x)
    frozen = [true_weight(layer.base_layer) for layer in layers(fused)]
    for _ in range(2):
        merged = model(name)
        for peft in (fused, merged):
            peft.merge_adapter()
        assert torch.equal(fused(x), merged(x))
        fused.unmerge_adapter()
        assert all(
            torch.equal(true_weight(layer.base_layer), weight)
            for layer, weight in zip(layers(fused), frozen, strict=True)
        )
    fused.train()
    after = run(fused, x)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert_right(fused, plain, densified(plain), x, monkeypatch)

    unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    assert_same_as_peft(fused, plain, x)


@pytest.mark.parametrize("name", FEW_FORMATS)
def test_compiles_without_a_graph_break(name: str) -> None:
    peft = model(name)
    fuse(peft)
    assert_compiles(peft, x_for(fp32))


def hooked(layer: Any) -> None:
    layer.base_layer.register_forward_hook(print)


LEFT: dict[str, tuple[str, Callable[[Any], Any] | None, tuple[int, ...], str]] = {
    "dynamic": ("torchao dynamic", None, (24, K), "torchao quantises x, too"),
    "dynamic int4": ("torchao dynamic int4", None, (24, K), "torchao quantises x, too"),
    "float8": ("torchao float8", None, (24, K), "Float8Tensor, not an integer one"),
    "few rows": ("torchao int8", None, (5, K), "x has fewer than 6 rows"),
    "few rows, int4": ("torchao int4", None, (11, K), "x has fewer than 12 rows"),
    "torchao hook": ("torchao int8", hooked, (24, K), "has hooks"),
    "hqq hook": ("hqq 4", hooked, (24, K), "has hooks"),
}


@pytest.mark.parametrize(("name", "change", "shape", "reason"), LEFT.values(), ids=LEFT.keys())
def test_leaves_to_peft(name: str, change: Any, shape: tuple[int, ...], reason: str) -> None:
    layer = layers(model(name))[0]
    if change:
        change(layer)
    assert reason in str(why_not(layer, x_for(fp32, *shape)))


@pytest.mark.parametrize("name", FEW_FORMATS)
def test_inference_takes_any_number_of_rows(name: str) -> None:
    layer = layers(model(name))[0].eval()
    with torch.no_grad():
        assert why_not(layer, x_for(fp32, 1, K)) is None


@pytest.mark.parametrize("name", ["torchao int4", "hqq 4"])
def test_x_narrower_than_the_weight_raises_as_in_peft(name: str) -> None:
    fused, plain = model(name), model(name)
    fuse(fused)
    for peft in (fused, plain):
        with pytest.raises(RuntimeError, match="dtype"):
            layers(peft)[0](x_for(bf16))


def test_another_backend_of_hqq_is_left_to_peft() -> None:
    layer = layers(model("hqq 4"))[0]
    own = type(layer.base_layer)
    try:
        own.set_backend(own.backend.__class__.ATEN_FORWARD_INT8)
        own.forward = own.forward_aten_int8  # HQQ itself refuses without its extension
        assert "not by plain PyTorch" in str(why_not(layer))
    finally:
        own.set_backend(own.backend.__class__.PYTORCH)
    assert why_not(layer) is None
