"""`LoRALinear`: merging, ties to other modules, and checkpoints of merged layers."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from own_layers import K, N, R, X, layer, trained
from torch import nn

from lora_kernels import LoRALinear
from lora_kernels.testing import assert_accurate, bf16, fp16, fp32, fp64


@pytest.mark.parametrize("dtype", [fp32, fp64, bf16, fp16])
def test_merge_writes_the_sum_and_unmerge_the_exact_bits(dtype: torch.dtype) -> None:
    model, x = trained(dtype=dtype), X.to(dtype)
    weight, y = model.weight.clone(), model(x)
    model.merge()
    assert model.merged
    assert not model.weight.requires_grad
    wide = [t.detach().double() for t in (weight, model.lora_A, model.lora_B)]
    exact = wide[0] + model.scaling * wide[2] @ wide[1]
    narrow = weight + (model.lora_B @ model.lora_A).detach() * model.scaling
    assert_accurate("merged weight", model.weight, exact, narrow)
    assert not torch.equal(model.weight, weight)
    merged_y = model(x)
    assert torch.equal(merged_y, F.linear(x, model.weight, model.bias))
    torch.testing.assert_close(merged_y, y, atol=20 * torch.finfo(dtype).eps, rtol=0)
    model.unmerge()
    assert not model.merged
    assert torch.equal(model.weight, weight)
    assert torch.equal(model(x), y)


def test_merging_twice_is_merging_once() -> None:
    model = trained()
    model.unmerge()
    assert not model.merged
    model.merge()
    once = model.weight.clone()
    model.merge()
    assert torch.equal(model.weight, once)
    model.unmerge()
    model.unmerge()
    assert torch.equal(model.weight, trained().weight)


def test_a_merged_layer_ignores_dropout() -> None:
    model = trained(lora_dropout=0.5).train()
    model.merge()
    assert torch.equal(model(X), model(X))


def test_merge_leaves_a_shared_weight_alone() -> None:
    linear = nn.Linear(K, N)
    before = linear.weight.clone()
    model = LoRALinear.from_linear(linear, R, init_lora_weights=False)
    model.merge()
    assert torch.equal(linear.weight, before)
    assert not torch.equal(model.weight, before)
    model.unmerge()
    assert model.weight is linear.weight


class Tied(nn.Module):
    """A language model's two ends: the head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(N, K)
        head = nn.Linear(K, N, bias=False)
        head.weight = self.embedding.weight
        self.head = LoRALinear.from_linear(head, R, init_lora_weights=False)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: copy.deepcopy(m.bfloat16()).float(),
    ],
    ids=["half", "deepcopy", "pickle", "all"],
)
@pytest.mark.parametrize("merged", [False, True])
def test_a_tied_head_stays_tied(convert: Callable[[Tied], Tied], merged: bool) -> None:
    model = Tied()
    if merged:
        model.head.merge()
    model = convert(model)
    if merged:
        assert model.head.weight is not model.embedding.weight
        model.head.unmerge()
    assert model.head.weight is model.embedding.weight
    assert [name for name, _ in model.named_parameters()] == [
        "embedding.weight",
        "head.lora_A",
        "head.lora_B",
    ]


def test_merging_keeps_the_parameter_that_others_hold() -> None:
    model = trained()
    parameters = dict(model.named_parameters())
    model.merge()
    model.unmerge()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert dict(model.named_parameters()).keys() == parameters.keys()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("call", ["merge", "merge_and_unload"])
def test_merging_nan_or_inf_is_refused(value: float, call: str) -> None:
    model = trained()
    with torch.no_grad():
        model.lora_B[3, 1] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="merging would write NaN or Inf; nothing was changed"):
        getattr(model, call)()
    assert not model.merged
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0, equal_nan=True)


def test_merging_what_only_overflows_in_the_weights_dtype_is_refused() -> None:
    model = trained(dtype=fp16)
    with torch.no_grad():
        model.lora_A.fill_(300)
        model.lora_B.fill_(300)
    with pytest.raises(ValueError, match="NaN or Inf"):
        model.merge()


def _load_own(model: LoRALinear) -> LoRALinear:
    other = layer(seed=9)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _load_own],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_a_merged_layer_survives(through: Callable[[LoRALinear], LoRALinear]) -> None:
    model = trained()
    weight, y = model.weight.clone(), model(X)
    model.merge()
    other = through(model)
    other.unmerge()
    assert torch.equal(other.weight, weight)
    assert torch.equal(other(X), y)
    assert model.merged


def test_a_checkpoint_of_a_merged_layer_holds_the_frozen_weight() -> None:
    model = trained()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert before.keys() == {"weight", "bias", "lora_A", "lora_B"}
    model.merge()
    after = nn.Sequential(model).state_dict()
    assert after.keys() == {f"0.{name}" for name in before}
    for name, tensor in before.items():
        assert torch.equal(after[f"0.{name}"], tensor)


def test_loading_into_a_merged_layer_unmerges_it() -> None:
    source, model = trained(seed=1), trained(seed=2)
    model.merge()
    model.load_state_dict(source.state_dict())
    assert not model.merged
    assert torch.equal(model(X), source(X))


def test_moving_a_merged_layer_moves_the_frozen_weight() -> None:
    model = trained()
    frozen = model.weight.clone()
    model.merge()
    model.to(fp64)
    model.unmerge()
    assert model.weight.dtype == fp64
    assert torch.equal(model.weight, frozen.double())
    assert model(X.double()).dtype == fp64


def test_a_layer_on_meta_is_filled_by_a_checkpoint() -> None:
    source, model = trained(), LoRALinear(K, N, r=R, device="meta")
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(X), source(X))
