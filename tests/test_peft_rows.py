"""Adapters for some rows alone, `adapter_names` and aLoRA, against PEFT."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel
from peft_models import (
    AddsInPlace,
    K,
    assert_same_as_peft,
    bf16,
    fp32,
    fp64,
    llama,
    peft_model,
    randomise,
    run,
    runs,
    x_for,
)
from peft_models import one_thread as one_thread

from lora_kernels.peft import by_row, fuse, why_not
from lora_kernels.peft.small import compose
from lora_kernels.testing import assert_accurate

ALORA = {"alora_invocation_tokens": [3, 4]}
T = 5


@pytest.fixture(autouse=True)
def any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_row, "_COLUMNS_PER_RANK", 0)


def mixed(dtype: torch.dtype = fp32, **third: Any) -> PeftModel:
    """Adapters of three ranks and scalings; the third is in one of the two layers only."""
    model = peft_model(dtype=dtype)
    for name, options in {
        "other": {"r": 3, "lora_alpha": 11, "target_modules": ["up", "down"]},
        "third": {"r": 2, "lora_alpha": 1, "target_modules": ["down"]} | third,
    }.items():
        model.add_adapter(name, LoraConfig(**options))
    model = randomise(model).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def alora(dtype: torch.dtype = fp32, **options: Any) -> PeftModel:
    return peft_model(dtype=dtype, **ALORA, **options)


NAMES = ["other", "__base__", "default", "third", "other", "default"]
OFFSETS = [5, 3, None, 4, 9, 3]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "three adapters": (mixed, {"adapter_names": NAMES}),
    "one of two": (mixed, {"adapter_names": ["other"] * 6}),
    "one and none": (mixed, {"adapter_names": [*["default"] * 4, "__base__", "__base__"]}),
    "aLoRA": (alora, {"alora_offsets": OFFSETS}),
    "aLoRA beside LoRA": (
        lambda **options: mixed(**options, target_modules=["up", "down"], **ALORA),
        {"adapter_names": NAMES, "alora_offsets": OFFSETS},
    ),
}


def both(case: str, **options: Any) -> tuple[PeftModel, PeftModel, dict[str, Any]]:
    make, arguments = CASES[case]
    plain = make(**options)
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 2
    return fused, plain, arguments


def assert_right(fused: nn.Module, plain: nn.Module, x: Tensor, arguments: dict[str, Any]) -> None:
    before = sum(layers_fused(fused))
    draws = [x, x.flip(-1), x.roll(5, -1)]  # eager's error is then what the rule takes it for
    got, eager = runs(fused, draws, **arguments), runs(plain, draws, **arguments)
    assert sum(layers_fused(fused)) - before == 2 * len(draws)
    reference = copy.deepcopy(plain).to(fp64)
    exact = runs(reference, [x.to(fp64) for x in draws], **arguments)
    assert got.keys() == eager.keys() == exact.keys()
    for name, expected in exact.items():
        assert got[name].dtype == eager[name].dtype, name
        assert_accurate(name, got[name], expected, eager[name])


def layers_fused(model: nn.Module) -> list[int]:
    return [counts.get("fused", 0) for counts in fuse(model).calls().values()]


@pytest.fixture
def fused_in_16_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PEFT might be faster, but the results are the same."""
    monkeypatch.setattr(by_row, "_ACTING_SHARE_IN_16_BITS", by_row._ACTING_SHARE)


@pytest.mark.usefixtures("fused_in_16_bits_too")
@pytest.mark.parametrize("shape", [(6, T, K), (6, K)], ids=str)
@pytest.mark.parametrize("dtype", [fp32, bf16, "bf16 beside fp32"], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case: str, dtype: Any, shape: tuple[int, ...]) -> None:
    if dtype == bf16:
        fused, plain, arguments = both(case)
        fused, plain = fused.to(bf16), plain.to(bf16)
    else:
        fused, plain, arguments = both(case, dtype=dtype if dtype == fp32 else bf16)
    x = x_for(plain, *shape)
    assert_right(fused, plain, x, arguments)


@pytest.mark.usefixtures("fused_in_16_bits_too")
@pytest.mark.parametrize("case", CASES)
def test_autocast(case: str) -> None:
    fused, plain, arguments = both(case)
    x = x_for(plain, 6, T, K)
    exact = run(copy.deepcopy(plain).to(fp64), x.to(fp64), **arguments)
    with torch.autocast("cpu", bf16):
        got, eager = run(fused, x, **arguments), run(plain, x, **arguments)
    assert layers_fused(fused) == [1, 1]
    for name, expected in exact.items():
        assert got[name].dtype == eager[name].dtype, name
        assert_accurate(name, got[name], expected, eager[name].to(bf16))


@pytest.mark.parametrize("case", CASES)
def test_a_row_reads_its_own_adapter_alone(case: str) -> None:
    """Each batch entry on its own, and with the others, is the same to rounding."""
    fused, _, arguments = both(case)
    x = x_for(fused, 6, T, K)
    together = fused(x, **arguments)
    for i in range(6):
        own = {name: values[i : i + 1] for name, values in arguments.items()}
        torch.testing.assert_close(fused(x[i : i + 1], **own)[0], together[i])


def test_rows_of_no_adapter_are_the_frozen_layer_to_the_bit() -> None:
    fused, plain, _ = both("three adapters")
    x = x_for(plain, 6, T, K)
    with plain.disable_adapter():
        frozen = plain(x)
    got = fused(x, adapter_names=["other", "default", "third", "other", "other", "__base__"])
    assert torch.equal(got[5], frozen[5])
    assert not torch.equal(got[4], frozen[4])


def test_x_may_be_written_to_before_the_backward() -> None:
    """PEFT saves the rows that it picked out, not x."""
    fused, plain, arguments = both("aLoRA")
    gradients = []
    for model in (fused, plain):
        layer = model.base_model.model.up
        x = x_for(plain, 6, T, K).requires_grad_() + 0
        y = layer(x, **arguments)
        x += 1
        y.square().sum().backward()
        gradients.append(layer.lora_A["default"].weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_alora_model_trains_as_peft_trains_it(checkpointing: bool) -> None:
    """The model finds the invocation tokens itself and hands every layer its offsets."""
    tokens = torch.randint(5, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    for row, at in enumerate((1, 2, 1)):  # and none in the fourth
        tokens[row, at : at + 2] = torch.tensor([3, 4])
    results = []
    for fusing in (True, False):
        model = randomise(llama(**ALORA)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        report = fuse(model) if fusing else None
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        if report:
            assert report.calls().fused == 14 * (2 if checkpointing else 1)
            assert report.calls().fell_back == 0
    assert len(results[0]) == len(results[1]) == 1 + 28
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_generation_with_several_adapters() -> None:
    model = randomise(llama())
    model.add_adapter("other", LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model, seed=5, adapter=".other.").eval()
    plain = copy.deepcopy(model)
    report = fuse(model)
    inputs = {
        "input_ids": torch.arange(5, 17).reshape(3, 4),
        "adapter_names": ["default", "other", "__base__"],
        "max_new_tokens": 6,
        "do_sample": False,
    }
    assert torch.equal(model.generate(**inputs), plain.generate(**inputs))
    assert report.calls().fused == 14 * 6
    assert report.calls().fell_back == 0


def dropping(**options: Any) -> PeftModel:
    return alora(lora_dropout=0.3)


LEFT: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no offsets": (alora, {}, "without offsets"),
    "few act": (alora, {"alora_offsets": [1] * 6}, "too few of the rows"),
    "few have one": (
        mixed,
        {"adapter_names": [*["__base__"] * 4, "other", "default"]},
        "too few of the rows",
    ),
    "none": (mixed, {"adapter_names": ["__base__"] * 6}, "no active adapter"),
    "dropout": (dropping, {"alora_offsets": [5] * 6}, "dropout on some rows alone"),
    "lora_bias": (
        lambda: peft_model(lora_bias=True).eval(),
        {"adapter_names": ["default"] * 6},
        "more than LoRA",
    ),
    "other argument": (mixed, {"adapter_names": NAMES, "more": 1}, "extra arguments"),
}


@pytest.mark.parametrize(("make", "arguments", "reason"), LEFT.values(), ids=LEFT.keys())
def test_leaves_to_peft(make: Any, arguments: dict[str, Any], reason: str) -> None:
    fused = make()
    plain = copy.deepcopy(fused)
    assert len(fuse(fused).fused) == 2
    x = x_for(plain, 6, T, K)
    assert reason in str(why_not(fused.base_model.model.up, x, **arguments))
    if "more" not in arguments:
        for model in (fused, plain):
            torch.manual_seed(1)
            model.result = run(model, x, **arguments)
        for name, expected in plain.result.items():
            assert torch.equal(fused.result[name], expected), name


@pytest.mark.parametrize("autocast", [False, True])
def test_more_rows_must_act_in_16_bits(autocast: bool) -> None:
    fused, *_ = both("aLoRA")
    layer = fused.base_model.model.up
    x = x_for(fused, 6, T, K)
    if not autocast:
        layer, x = layer.to(bf16), x.to(bf16)
    with torch.autocast("cpu", bf16, enabled=autocast):
        assert "too few" in str(why_not(layer, x, alora_offsets=[4] * 4 + [3, 4]))
        assert why_not(layer, x, alora_offsets=[4] * 6) is None


def test_a_rank_that_is_not_the_one_on_record() -> None:
    """PEFT leaves it stale: a weighted sum of adapters with a `rank_pattern`, say, or OLoRA's."""
    fused, plain, arguments = both("three adapters")
    for model in (fused, plain):
        layer = model.base_model.model.down
        layer.r["other"] += 3
        del layer.r["third"]
    x = x_for(plain, 6, T, K)
    assert_right(fused, plain, x, arguments)


def test_much_rank_is_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain, arguments = both("three adapters")
    monkeypatch.setattr(by_row, "_COLUMNS_PER_RANK", 25)
    x = x_for(plain, 6, T, K)
    reason = why_not(fused.base_model.model.up, x, **arguments)
    assert reason == "a rank of 7 for every row, where PEFT's code is faster"
    assert_same_as_peft(fused, plain, x, **arguments)


def test_wrong_arguments_raise_what_peft_raises() -> None:
    fused, plain, _ = both("three adapters")
    x = x_for(plain, 6, T, K)
    for arguments in ({"adapter_names": ["other"] * 5}, {"adapter_names": ["nobody"] * 6}):
        messages = []
        for model in (fused, plain):
            with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
                model(x, **arguments)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    with pytest.raises(ValueError, match="training mode"):
        fused.train()(x, adapter_names=NAMES)


def test_an_alora_is_no_lora_among_several_or_converted() -> None:
    from lora_kernels.peft import from_peft

    model = CASES["aLoRA beside LoRA"][0]()
    model.base_model.set_adapter(["default", "third"])
    assert "variant ALora" in str(why_not(model.base_model.model.up))
    with pytest.raises(ValueError, match="variant ALora"):
        from_peft(model.base_model.model.up, "third")


@pytest.mark.parametrize("case", ["three adapters", "aLoRA"])
def test_compiles_without_a_graph_break(case: str) -> None:
    fused, plain, arguments = both(case)
    torch._dynamo.reset()
    layer = fused.base_model.model.up
    x = x_for(plain, 6, T, K)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, **arguments), layer(x, **arguments))


@pytest.mark.parametrize("case", ["adapter_names", "aLoRA"])
def test_rows_that_are_composed_may_be_written_to(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows that an adapter acts on PEFT keeps copies, be it all of them."""
    monkeypatch.setattr("lora_kernels.peft.small.FEW_ROWS", 64)

    options, arguments = {}, {"adapter_names": ["default"] * 6}
    if case == "aLoRA":
        options, arguments = ALORA, {"alora_offsets": [T] * 6}
    plain = peft_model(AddsInPlace(), dtype=fp64, target_modules=["down"], **options)
    plain.train(case == "aLoRA")  # in training PEFT takes no adapter_names
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    x = torch.randn(6, T, K, dtype=fp64, generator=torch.Generator().manual_seed(0))
    composed = []
    monkeypatch.setattr(
        "lora_kernels.peft.layer.compose", lambda *a, **k: composed.append(1) or compose(*a, **k)
    )
    got, expected = ([], [])
    for model, gradients in ((fused, got), (plain, expected)):
        # Under the first no version is compared: a write would go unnoticed.
        for hooks in (torch.autograd.graph.save_on_cpu, contextlib.nullcontext):
            model.zero_grad()
            with hooks():
                y = model(x, **arguments)
            y.square().sum().backward()
            gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert report.calls().fused == len(composed) == 2
    assert len(got) == 4
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
