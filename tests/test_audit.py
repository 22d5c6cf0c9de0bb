"""The audit of a whole model: right models pass, nothing is left behind, the report reads well."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("peft")

from audit_models import (
    DOWN,
    HIDDEN,
    TOKENS,
    UP,
    WIDTH,
    Stack,
    double,
    plant,
    run,
    stack,
    statuses,
    step,
    tokens,
)
from audit_models import reentrant as reentrant
from peft import LoraConfig
from peft_models import bf16, fp16, fp32, fp64, llama, peft_model, randomise
from peft_models import one_thread as one_thread

from lora_kernels import LoRALinear
from lora_kernels.audit import Report, Verdict
from lora_kernels.peft import fuse
from lora_kernels.testing import audit

# --- Right models --------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [fp64, fp32, bf16, fp16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("adapters", ["same", "fp32"])
def test_right_models_pass(
    fused: bool, dtype: torch.dtype, dropout: float, adapters: str, reentrant: bool | None
) -> None:
    model = stack(reentrant, dtype=dtype, lora_dropout=dropout).train()
    if adapters == "same":
        model.to(dtype)
    if fused:
        assert len(fuse(model).fused) == 6
    report = run(model)
    assert report.ok, str(report)
    assert list(report.layers) == [name for pair in zip(UP, DOWN, strict=True) for name in pair]
    for verdict in report.layers.values():
        assert verdict.ratios.keys() == {"y", "dx", "da", "db"}
        assert verdict.reason == ("dropout was off" if dropout and not fused else "")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", [fp32, bf16], ids=str)
def test_a_language_model_passes(fused: bool, checkpointing: bool, base: torch.dtype) -> None:
    """PEFT's default: adapters in fp32 beside any base, trained under autocast or not."""
    model = randomise(llama()).to(base)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(fp32)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if fused:
        assert len(fuse(model).fused) == 14
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))

    def train() -> None:
        with torch.autocast("cpu", bf16, enabled=base == fp32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    report = audit(model.train(), train)
    assert report.ok, str(report)
    assert len(report.layers) == 14


def test_freshly_initialised_layers_pass_and_say_what_they_do_not_show() -> None:
    model = peft_model(Stack(), init_lora_weights=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    report = run(model)
    assert report.ok
    assert {v.reason for v in report.layers.values()} == {
        "B is zero: y and dx show the frozen layer only"
    }


def test_several_adapters_calls_and_micro_batches() -> None:
    model = stack()
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"]))
    randomise(model, seed=3)
    model.base_model.set_adapter(["default", "other"])

    def train() -> None:
        for rows in (TOKENS, 10, 2):
            x = tokens(model, rows)
            step(model, x)
            with torch.no_grad():
                model(x)
            with model.disable_adapter():
                model(x).sum().backward()

    report = audit(model, train)
    assert report.ok, str(report)
    assert not any(v.reason for v in report.layers.values())


def test_lora_linear_layers() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(WIDTH, HIDDEN, r=3, lora_dropout=0.4, init_lora_weights=False)
    model = nn.Sequential(layer, nn.Tanh())
    assert run(model).ok
    layer.scaling *= 2
    assert statuses(run(model)) == {"0": "twice"}
    layer.merge()
    assert run(model).layers["0"].status == "unjudged"


def test_compiled_models_run_eagerly() -> None:
    model = stack()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for audited in (model, compiled):
        report = audit(audited, lambda: step(compiled, tokens(model)))
        assert report.ok, str(report)
        assert len(report.layers) == 6


def test_calls_by_keyword_on_one_token() -> None:
    model = stack()
    layer = model.get_submodule(DOWN[1])
    report = audit(layer, lambda: layer(x=torch.ones(HIDDEN, requires_grad=True)).sum().backward())
    assert report.ok, str(report)
    assert report.layers[""].ratios.keys() == {"y", "dx", "da", "db"}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("fault", [False, True])
def test_sharded_data_parallel(fault: bool) -> None:
    """Parameters are plain only while a block runs, and other ones before and after."""
    model = stack()
    x = tokens(model)
    if fault:
        plant(model.get_submodule(UP[1]), double)
    for block in model.base_model.model.blocks:
        fully_shard(block)
    report = run(fully_shard(model), x)
    assert statuses(report) == ({UP[1]: "twice"} if fault else {}), str(report)
    assert report.layers[UP[1]].ratios.keys() >= {"y", "da", "db"}


@pytest.mark.usefixtures("process_group")
def test_data_parallel_keeps_its_buckets() -> None:
    model = DistributedDataParallel(stack(), gradient_as_bucket_view=True)
    for _ in range(3):  # the buckets are laid out anew after the first steps
        step(model)
    kept = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if "lora" in n}
    report = run(model, tokens(model, 10))
    assert report.ok, str(report)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            assert parameter.grad is kept[name][0]
            assert torch.equal(parameter.grad, kept[name][1])


# --- What cannot be judged -----------------------------------------------------------------------


def test_merged_and_disabled_adapters_are_reported_as_such() -> None:
    model = stack()
    model.merge_adapter()
    report = run(model)
    assert {(v.status, v.reason) for v in report.layers.values()} == {
        ("unjudged", "adapters are merged")
    }
    model.unmerge_adapter()
    with model.disable_adapter():
        report = run(model)
    assert {v.reason for v in report.layers.values()} == {"adapters are disabled"}
    assert not report.ok
    assert not report.faults


def test_other_kinds_of_layers_say_why() -> None:
    dora = run(stack(use_dora=True))
    assert {v.status for v in dora.layers.values()} == {"unjudged"}
    assert "DoraLinearVariant" in dora.layers[UP[0]].reason
    biased = run(stack(target_modules=["up"], lora_bias=True))
    assert {v.reason for v in biased.layers.values()} == {"the adapter has a bias (lora_bias)"}

    embedding = nn.Sequential(nn.Embedding(5, WIDTH), nn.Linear(WIDTH, WIDTH))
    model = peft_model(embedding, target_modules=["0"], modules_to_save=["1"])
    report = audit(model, lambda: model(torch.arange(5)).sum().backward())
    (verdict,) = report.layers.values()
    assert verdict == Verdict("unjudged", "the layer is a peft.tuners.lora.layer.Embedding")

    def mixed() -> None:
        names = ["default", "__base__"]
        model(tokens(model), adapter_names=names).sum().backward()

    model = stack().eval()
    model.base_model.model.reentrant = None
    report = audit(model, mixed)
    assert set(statuses(report).values()) == {"unjudged"}
    assert report.layers[UP[0]].reason == "called with extra arguments: adapter_names"


def test_a_layer_of_another_library() -> None:
    """PEFT's attributes, and nothing else of PEFT."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(WIDTH, HIDDEN)
            self.lora_A = nn.ModuleDict({"own": nn.Linear(WIDTH, 3, bias=False)})
            self.lora_B = nn.ModuleDict({"own": nn.Linear(3, HIDDEN, bias=False)})
            self.scaling: Any = {"own": 2.0}
            self.r, self.factor = 3, 1.0

        def forward(self, x: Tensor) -> Tensor:
            low = self.lora_B["own"](self.lora_A["own"](x))
            return self.base_layer(x) + 2.0 * self.factor * low

    torch.manual_seed(0)
    layer = Other()
    model = nn.Sequential(layer)
    assert run(model).ok
    layer.factor = 2.0
    assert statuses(run(model)) == {"0": "twice"}
    layer.scaling = 2.0
    assert run(model).layers["0"] == Verdict(
        "unjudged", "scaling is None, not a number for each adapter"
    )


def test_values_that_are_not_finite_are_no_verdict() -> None:
    model = stack()
    x = tokens(model)
    with torch.no_grad():
        x[0, 0, 0] = float("nan")
    assert set(statuses(run(model, x)).values()) == {"unjudged"}
    report = audit(model, lambda: (model(tokens(model)).sum() * float("inf")).backward())
    assert set(statuses(report).values()) == {"unjudged"}


def test_no_layers_is_not_ok() -> None:
    report = run(nn.Linear(WIDTH, WIDTH))
    assert not report.ok
    assert str(report) == "no LoRA layer found, nothing is audited"


# --- Nothing is left behind ----------------------------------------------------------------------


def state(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for module in model.modules():
        hooks = [v for k, v in module.__dict__.items() if k.endswith("_hooks")]
        found.append((len(hooks), [len(h) for h in hooks if h is not None], module.__dict__.keys()))
        found.append(getattr(module, "p", None))
    for parameter in model.parameters():
        hooks = parameter._backward_hooks
        found.append((id(parameter.grad), len(hooks) if hooks else 0))
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails: bool) -> None:
    model = stack(lora_dropout=0.3).train()
    step(model)
    values = [copy.deepcopy(p.grad) for p in model.parameters()]
    before = state(model)

    def train() -> None:
        step(model)
        if fails:
            raise KeyError("planted")

    if fails:
        with pytest.raises(KeyError, match="planted"):
            audit(model, train)
    else:
        assert audit(model, train).ok
    assert state(model) == before
    for parameter, kept in zip(model.parameters(), values, strict=True):
        assert kept is None or torch.equal(parameter.grad, kept)


def test_results_of_the_step_are_those_without_the_audit() -> None:
    model = stack(lora_dropout=0.3).train()
    fuse(model)
    found: list[Tensor] = []

    def train() -> None:
        torch.manual_seed(7)
        x = tokens(model)
        y = model.get_submodule(UP[0])(x)
        y += 1  # a caller may modify what a layer returns
        y.sum().backward()
        found.extend((y.detach(), x.grad))

    train()
    assert audit(model, train).layers[UP[0]].status == "right"
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


# --- The report ----------------------------------------------------------------------------------


def test_the_report_reads_as_a_table() -> None:
    right = Verdict("right", "", {"y": 0.25, "dx": 0.5, "da": 0.1, "db": 0.2})
    report = Report(
        {
            "layers.0.q": right,
            "layers.1.q": Verdict("right", "", {"y": 0.75}),
            "layers.2.q": Verdict("wrong", "dx beyond the tolerance", {"dx": float("inf")}),
            "head": Verdict("unjudged", "adapters are merged"),
        }
    )
    assert str(report).splitlines() == [
        "count  module           y      dx      da      db  verdict",
        "    2  layers.*.q    0.75     0.5     0.1     0.2  right",
        "    1  layers.2.q       -     inf       -       -  wrong: dx beyond the tolerance",
        "    1  head             -       -       -       -  unjudged: adapters are merged",
        "4 LoRA layers: 2 right, 1 unjudged, 1 wrong",
    ]
    assert list(report.faults) == ["layers.2.q"]


def test_importing_testing_does_not_import_peft() -> None:
    script = "import sys, lora_kernels.testing, lora_kernels.audit; print('peft' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == "False"
