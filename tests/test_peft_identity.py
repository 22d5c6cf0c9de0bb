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
from peft_models import (
    K,
    assert_close_to_peft,
    assert_same_as_peft,
    bf16,
    calls_of_lora_linear,
    pair,
    peft_model,
    x_for,
)
from peft_models import one_thread as one_thread
from torch import nn

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


def test_a_patch_that_was_there_before_us_is_honoured() -> None:
    script = """
import functools, torch, peft
from peft.tuners.lora.layer import Linear
for own in (torch.nn.Linear, Linear):
    own.forward = functools.wraps(own.forward)(lambda *a, f=own.forward: f(*a))
from lora_kernels.peft import fuse
from peft import LoraConfig, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
print(*fuse(model).not_fused.values())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "Linear.forward was patched", done.stderr


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
