"""Experts whose wrappers come and go: what PEFT's own code runs, and what stays as it was."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

from expert_models import (
    E,
    T,
    add_another,
    assert_near,
    assert_same,
    cast,
    disable,
    fused_products,
    outcome,
    outer,
    pair,
    peft_experts,
    routed,
)
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper as PeftWrapper
from peft_models import assert_saves_as_peft, bf16, fp32, fp64
from peft_models import one_thread as one_thread
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lora_kernels.peft import fuse, merge_loss, unfuse, why_not
from lora_kernels.peft.experts import ParamWrapper

# --- what PEFT's own code runs ---------------------------------------------------------------


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
    "sharded": (
        shard,
        f"base weight is a {__name__}.Sharded, not a plain tensor",
        False,
    ),
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
    monkeypatch.setattr("expert_models.F", 6)
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
    assert_saves_as_peft(fused, plain, tmp_path)
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
