"""A fused layer is PEFT's in every other respect: what it is saved as, patched as and scaled by."""

import functools
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft_models import (
    K,
    assert_close_to_peft,
    assert_same_as_peft,
    bf16,
    calls_of_lora_linear,
    pair,
    peft_model,
    run,
    x_for,
)
from peft_models import one_thread as one_thread
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_kernels import LoRALinear
from lora_kernels.peft import FusedLinear, fuse, why_not


def test_a_saved_model_loads_where_this_package_is_absent(tmp_path: Path) -> None:
    model = peft_model(nn.Sequential(nn.Linear(K, K), nn.Linear(K, K)), target_modules=["0", "1"])
    assert len(fuse(model).fused) == 2
    model.base_model.model[1].merge()
    x = x_for(model)
    assert type(model.base_model.model[0]) is FusedLinear
    torch.save(model, tmp_path / "model.pt")
    torch.save((x, model(x)), tmp_path / "expected.pt")
    script = f"""
import sys
sys.modules["lora_kernels"] = None
import torch
model = torch.load(r"{tmp_path}/model.pt", weights_only=False)
x, y = torch.load(r"{tmp_path}/expected.pt")
torch.testing.assert_close(model(x), y)
print(type(model.base_model.model[0]).__module__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "peft.tuners.lora.layer"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_is_of_pefts_class(protocol: int) -> None:
    fused, plain = pair()
    loaded = pickle.loads(pickle.dumps(fused, protocol))
    assert type(loaded.base_model.model.up) is Linear
    assert_same_as_peft(loaded, plain, x_for(plain))
    assert type(fused.base_model.model.up) is FusedLinear


def doubled(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def patched(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * forward(self, x, *args, **kwargs)

    return patched


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("patched", [nn.Linear, Linear, nn.Dropout])
def test_a_patched_class_is_honoured(
    patched: type[nn.Module], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"lora_dropout": 0.0 if patched is not nn.Dropout else 0.5}
    model, plain = peft_model(**options).eval(), peft_model(**options).eval()
    if when == "after":
        assert len(fuse(model).fused) == 2
    reason = f"{patched.__name__}.forward was patched"
    with monkeypatch.context() as patch:
        patch.setattr(patched, "forward", doubled(patched.forward))
        assert why_not(model.base_model.model.up) == reason
        if when == "before":
            assert set(fuse(model).not_fused.values()) == {reason}
        assert_same_as_peft(model, plain, x_for(model))
    fuse(model)
    with calls_of_lora_linear(monkeypatch) as calls:
        assert_close_to_peft(model, plain, x_for(model))
    assert len(calls) == 2


# What a plain module runs when it is called, and where it may be replaced for all of them at once.
PATCHED: dict[str, tuple[Any, str, float]] = {
    "torch.nn.functional.linear": (nn.functional, "linear", 0.0),
    "torch.nn.functional.dropout": (nn.functional, "dropout", 0.5),
    "Linear.__call__": (nn.Linear, "__call__", 0.0),
    "Dropout.__call__": (nn.Dropout, "__call__", 0.5),
    "Identity.__call__": (nn.Module, "__call__", 0.0),  # the first module that is asked
    "nn.Module._call_impl": (nn.Module, "_call_impl", 0.0),
}


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("what", PATCHED)
def test_a_patched_call_is_honoured(what: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kernels.peft.small.FEW_ROWS", few)
    owner, name, dropout_p = PATCHED[what]
    model, plain = pair(lora_dropout=dropout_p)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, doubled(getattr(owner, name)))
        x = x_for(model, 8, 8, K)
        assert why_not(model.base_model.model.up, x) == f"{what} was patched"
        results = []
        for each in (model, plain):
            torch.manual_seed(0)
            results.append(run(each, x))
        assert all(torch.equal(results[0][n], t) for n, t in results[1].items())
    assert why_not(model.base_model.model.up, x) is None


def test_a_patched_variant_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair(use_dora=True)
    own = DoraLinearVariant.forward
    patch = lambda *args, **kwargs: 2 * own(*args, **kwargs)
    monkeypatch.setattr(DoraLinearVariant, "forward", staticmethod(patch))
    assert_same_as_peft(fused, plain, x_for(plain))
    assert why_not(fused.base_model.model.up) == "DoraLinearVariant.forward was patched"


def replaced_on_the_instance(variant: Any) -> None:
    own = variant.forward
    variant.forward = lambda *args, **kwargs: 2 * own(*args, **kwargs)


def of_a_class_of_that_name(variant: Any) -> None:
    own = type(variant)
    forward = staticmethod(lambda *args, **kwargs: 2 * own.forward(*args, **kwargs))
    variant.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": __name__})


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize("change", [replaced_on_the_instance, of_a_class_of_that_name])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"alora_invocation_tokens": [1]}], ids=str)
def test_a_variant_of_ones_own_is_honoured(options: Any, change: Callable[[Any], None]) -> None:
    fused, plain = pair(**options)
    layers = [model.base_model.model.up for model in (fused, plain)]
    for layer in layers:
        change(layer.lora_variant["default"])
    name = type(layers[0].lora_variant["default"]).__name__
    assert name in fuse(fused).not_fused["base_model.model.up"]
    arguments = {"alora_offsets": [5, 5, 5]} if name.startswith("ALora") else {}
    x = x_for(plain, 3, 5, K)
    assert name in str(why_not(layers[0], x, **arguments))
    assert torch.equal(*[layer(x, **arguments) for layer in layers])


class LinearHalved(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        return result / 2 if function is nn.functional.linear else result


def test_a_mode_that_replaces_functions_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair()
    with LinearHalved(), torch.device("cpu"):
        assert_same_as_peft(fused, plain, x_for(plain))
        reason = "a LinearHalved sees the functions that PEFT's code calls"
        assert why_not(fused.base_model.model.up) == reason
    with torch.device("cpu"), calls_of_lora_linear(monkeypatch) as calls:
        assert_close_to_peft(fused, plain, x_for(plain))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("patched", "reason"),
    [
        ("own.forward", "Linear.forward was patched"),
        ("torch.nn.Module.__call__", "Identity.__call__ was patched"),
        ("torch.nn.functional.linear", "torch.nn.functional.linear was patched"),
        ("torch.nn.functional.dropout", "torch.nn.functional.dropout was patched"),
        ("torch.nn.Module._call_impl", "nn.Module._call_impl was patched"),
    ],
)
def test_a_patch_that_was_there_before_us_is_honoured(patched: str, reason: str) -> None:
    script = f"""
import functools, torch, peft
from peft.tuners.lora.layer import Linear
for own in (torch.nn.Linear, Linear):
    f = {patched}
    {patched} = functools.wraps(f)(lambda *a, f=f, **k: f(*a, **k))
from lora_kernels.peft import fuse
from peft import LoraConfig, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
print(*fuse(model).not_fused.values())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == reason, done.stderr


@pytest.mark.parametrize("scaling", [math.inf, -math.inf, math.nan, True, 1e39, 0, 2])
@pytest.mark.parametrize("train", [False, True])
def test_any_scaling_gives_pefts_result(scaling: Any, train: bool) -> None:
    fused, plain = pair()
    for model in (fused.train(train), plain.train(train)):
        model.base_model.model.up.scaling["default"] = scaling
    x = x_for(plain)
    torch.testing.assert_close(fused(x), plain(x), equal_nan=True)
    reason = why_not(fused.base_model.model.up)
    assert (reason is None) == (type(scaling) is int)
    if reason:
        assert reason.startswith("scaling is ")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, bf16], ids=str)
def test_a_model_on_meta_runs_under_autocast(
    device: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    fused, plain = (model.to("meta") for model in pair(dtype=dtype, **options))
    x = torch.empty(70, K, device="meta", dtype=dtype, requires_grad=True)
    with torch.autocast(device, bf16):
        expected, y = plain(x), fused(x)
    assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device)
    y.float().sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layer_on_meta_runs_under_autocast(device: str) -> None:
    layer = LoRALinear(K, 5, r=2, device="meta", lora_dropout=0.5)
    with torch.autocast(device, bf16):
        y = layer(torch.empty(3, K, device="meta"))
    y.sum().backward()
    assert y.shape == (3, 5)
    assert layer.lora_A.grad.shape == (2, K)


def compressed(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to_sparse_csr(), requires_grad=False)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("part", ["x", "base weight", "lora_A"])
def test_what_is_sparse_is_left_to_peft(part: str) -> None:
    fused, plain = pair()
    up, expected = fused.base_model.model.up, plain.base_model.model.up
    x = x_for(plain, 5, K)
    if part == "x":
        x = x.to_sparse_csr()
    for layer in (up, expected):
        if part == "base weight":
            layer.base_layer.weight = compressed(layer.base_layer.weight)
        if part == "lora_A":
            layer.lora_A["default"].weight = compressed(layer.lora_A["default"].weight)
    with torch.no_grad():
        assert torch.equal(up(x).to_dense(), expected(x).to_dense())
    reason = "x is nested or sparse" if part == "x" else f"{part} is torch.sparse_csr, not dense"
    assert why_not(up, x) == reason
