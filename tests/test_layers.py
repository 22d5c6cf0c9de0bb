"""`LoRALinear`: initialisation, training and conversion."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_layers import K, N, R, X, layer, step, trained
from torch import Tensor, nn

from lora_kernels import LoRALinear
from lora_kernels.ops.lora_linear.reference import oracle
from lora_kernels.testing import assert_accurate, bf16, fp16, fp32, fp64

# --- Initialisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, "gaussian"])
@pytest.mark.parametrize("dtype", [fp32, fp64, bf16, fp16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_at_step_0_the_layer_is_the_frozen_layer_bit_for_bit(
    init: Any, dtype: torch.dtype, dropout: float
) -> None:
    model = layer(init_lora_weights=init, dtype=dtype, lora_dropout=dropout)
    x = X.to(dtype)
    assert torch.equal(model(x), F.linear(x, model.weight, model.bias))
    assert model.lora_A.any()
    assert not model.lora_B.any()


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_the_first_step_moves_b_and_not_a(init: Any) -> None:
    model = layer(init_lora_weights=init)
    step(model)
    assert model.lora_A.grad is not None
    assert not model.lora_A.grad.any()
    assert model.lora_B.grad.all()
    step(model)
    assert model.lora_A.grad.any()


def test_both_zero_never_learns() -> None:
    model = layer()
    nn.init.zeros_(model.lora_A)
    losses = [step(model, lr=10.0) for _ in range(5)]
    assert len(set(losses)) == 1
    assert not model.lora_A.any()
    assert not model.lora_B.any()


def test_a_zero_and_b_random_learns_too() -> None:
    model = layer()
    nn.init.zeros_(model.lora_A)
    nn.init.normal_(model.lora_B)
    assert torch.equal(model(X), F.linear(X, model.weight, model.bias))
    step(model)
    assert not model.lora_B.grad.any()
    assert model.lora_A.grad.any()


def test_both_random_shifts_the_output_before_training() -> None:
    model = trained()
    assert model.lora_A.all()
    assert model.lora_B.all()
    shift = model(X) - F.linear(X, model.weight, model.bias)
    assert shift.abs().mean() > 0.05


def test_the_default_start_learns() -> None:
    model = layer()
    losses = [step(model) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_two_draws_have_their_distributions() -> None:
    torch.manual_seed(0)
    uniform = LoRALinear(1000, 4, r=64).lora_A
    assert uniform.abs().max() <= 1000**-0.5
    assert uniform.abs().max() > 0.99 * 1000**-0.5
    normal = LoRALinear(1000, 4, r=64, init_lora_weights="gaussian").lora_A
    assert abs(float(normal.std()) * 64 - 1) < 0.02
    assert normal.abs().max() > 3 / 64


def test_manual_seed_reproduces_the_draw() -> None:
    for first, second in zip(layer(3).parameters(), layer(3).parameters(), strict=True):
        assert torch.equal(first, second)


def test_reset_draws_anew() -> None:
    model = trained()
    before = model.lora_A.clone()
    model.reset_lora_parameters()
    assert not torch.equal(model.lora_A, before)
    assert not model.lora_B.any()


# --- What it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_equation(rslora: bool, scaling: float, bias: bool) -> None:
    model = trained(lora_alpha=6, use_rslora=rslora, bias=bias)
    assert model.scaling == scaling
    y = model(X)
    arguments = [t if t is None else t.detach() for t in (
        X, model.weight, model.lora_A, model.lora_B, model.bias)]  # fmt: skip

    def eager(dtype: torch.dtype) -> Tensor:
        x, w, a, b, c = (t if t is None else t.to(dtype) for t in arguments)
        return oracle(x, w, a, b, scaling, c)

    assert_accurate("y", y, eager(fp64), eager(fp32))


def test_only_the_adapter_trains() -> None:
    model = trained()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B"}
    assert {name for name, _ in model.named_parameters()} == names | {"weight", "bias"}
    before = model.weight.clone()
    step(model)
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_dropout_only_while_training() -> None:
    model = trained(lora_dropout=0.5)
    assert not torch.equal(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), model(X))
    assert torch.equal(model(X), trained().eval()(X))
    expectation = torch.stack([model.train()(X) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(expectation, model.eval()(X), atol=0.05, rtol=0)


def test_dropout_leaves_the_frozen_path_alone() -> None:
    model = layer(lora_dropout=0.9)
    assert torch.equal(model(X), F.linear(X, model.weight, model.bias))


def test_extra_repr() -> None:
    model = trained(lora_dropout=0.25, lora_alpha=6, bias=False)
    text = "in_features=33, out_features=20, bias=False, r=4, scaling=1.5, lora_dropout=0.25"
    assert repr(model) == f"LoRALinear({text})"
    model.merge()
    assert repr(model) == f"LoRALinear({text}, merged)"


@pytest.mark.parametrize("r", [0, -1, 1.5, "4", True, None])
def test_a_bad_rank_is_refused(r: Any) -> None:
    with pytest.raises(ValueError, match=r"r must be an integer of at least 1, got") as raised:
        LoRALinear(K, N, r=r)
    assert repr(r) in str(raised.value)


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, math.nan])
def test_a_bad_dropout_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"lora_dropout must be in \[0, 1\), got"):
        layer(lora_dropout=dropout)


@pytest.mark.parametrize("init", ["normal", None, "zeros"])
def test_a_bad_initialisation_is_refused(init: Any) -> None:
    with pytest.raises(ValueError, match="init_lora_weights must be True, False or 'gaussian'"):
        layer(init_lora_weights=init)


# --- From a linear layer and back ----------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_from_linear_takes_the_very_parameters_and_freezes_them(
    bias: bool, training: bool, dtype: torch.dtype
) -> None:
    linear = nn.Linear(K, N, bias, dtype=dtype).train(training)
    x = X.to(dtype)
    y = linear(x)
    model = LoRALinear.from_linear(linear, r=R, lora_alpha=2, lora_dropout=0.1)
    assert model.weight is linear.weight
    assert model.bias is linear.bias
    assert not any(p.requires_grad for p in linear.parameters())
    assert model.training == training
    assert (model.scaling, model.lora_dropout) == (0.5, 0.1)
    assert model.lora_A.dtype == model.lora_B.dtype == dtype
    assert model.lora_A.requires_grad
    assert model.lora_B.requires_grad
    assert model.lora_A.any()
    assert not model.lora_B.any()
    assert torch.equal(model(x), y)
    assert torch.equal(linear(x), y)


@pytest.mark.parametrize("option", ["bias", "device", "dtype"])
def test_from_linear_refuses_what_the_linear_layer_decides(option: str) -> None:
    with pytest.raises(TypeError, match=f"from_linear takes {option} from the linear layer"):
        LoRALinear.from_linear(nn.Linear(K, N), R, **{option: None})


def test_from_linear_passes_options_on() -> None:
    linear = nn.Linear(K, N)
    gaussian = LoRALinear.from_linear(linear, R, init_lora_weights=False, use_rslora=True)
    assert gaussian.lora_B.any()
    assert gaussian.scaling == 8 / 2
    with pytest.raises(ValueError, match="r must be an integer"):
        LoRALinear.from_linear(linear, 0)


@pytest.mark.parametrize("bias", [False, True])
def test_merge_and_unload_is_a_linear_layer_of_its_own(bias: bool) -> None:
    model = trained(bias=bias).eval()
    before = copy.deepcopy(model.state_dict())
    linear = model.merge_and_unload()
    assert type(linear) is nn.Linear
    assert not linear.training
    assert (linear.in_features, linear.out_features) == (K, N)
    torch.testing.assert_close(linear(X), model(X))
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.zero_()
    assert not model.merged
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_merge_and_unload_of_a_merged_layer() -> None:
    model = trained()
    apart = model.merge_and_unload()
    model.merge()
    together = model.merge_and_unload()
    assert torch.equal(apart.weight, together.weight)
    assert together.weight.data_ptr() != model.weight.data_ptr()
