"""One dx for layers that read one x, under checkpointing, DDP, autocast, transforms and tools."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft_models import K, bf16, fp32, fp64, one_thread, run, x_for
from sharing_models import Readers, inner, judge, models, onto, small_x
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels.testing import assert_accurate

__all__ = ["one_thread", "onto", "small_x"]  # fixtures


class Checkpointed(Readers):
    """Recomputed in the backward: the whole of it, or one of its readers."""

    what, reentrant = "all", False

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "all":
            return checkpoint(super().forward, x, use_reentrant=self.reentrant)
        h = x * 1.5
        made = [
            checkpoint(layer, h, use_reentrant=self.reentrant) if name == self.what else layer(h)
            for name, layer in ((name, getattr(self, name)) for name in ("k", "q", "v"))
        ]
        return torch.cat([*made, torch.tanh(h)], -1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("what", ["all", "k", "q", "v"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing(what: str, reentrant: bool, dropout: float) -> None:
    trio = models(Checkpointed(), lora_dropout=dropout)
    for model in trio:
        inner(model).what, inner(model).reentrant = what, reentrant
        model.train()
    if not dropout:
        judge(*trio)
        return
    steps = []  # PEFT draws other masks
    for model in trio[:2]:
        torch.manual_seed(3)
        steps.append(run(model, x_for(model)))
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[1][name])


def test_distributed_data_parallel(tmp_path: Path, onto: list[bool]) -> None:
    sharing, _, plain = models()
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        wrapped = DistributedDataParallel(sharing, find_unused_parameters=True)
        got = run(wrapped, x_for(plain))
    finally:
        dist.destroy_process_group()
    assert onto == [False, True, True]
    expected = run(sharing, x_for(plain))
    for name in got:
        assert torch.equal(got[name], expected[name.removeprefix("module.")]), name


@pytest.mark.parametrize("adapters", [fp32, bf16], ids=str)
def test_under_autocast_x_is_converted_and_kept_once(
    adapters: torch.dtype, onto: list[bool]
) -> None:
    trio = models()
    kept = []
    for model in trio:
        for name, p in model.named_parameters():
            p.data = p.data.to(adapters) if "lora_" in name else p.data
        saved: set[int] = set()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (t.shape[-1] == K and saved.add(t.data_ptr())) or t, lambda t: t
        )
        with torch.autocast("cpu", bf16), hooks:
            y = model(x_for(plain := trio[2]).to(fp32).requires_grad_())
        kept.append(len(saved))
        del y
    assert kept[0] == kept[1] - 2
    sharing, apart, plain = trio
    x = x_for(plain).to(fp32)
    exact = run(copy.deepcopy(plain).to(fp64), x.to(fp64))
    with torch.autocast("cpu", bf16):
        got, other = run(sharing, x), run(apart, x)
    assert onto == [False, True, True]
    for name, expected in exact.items():
        assert got[name].dtype == other[name].dtype
        assert_accurate(name, got[name], expected, other[name].to(bf16))


def test_batched_gradients_and_second_derivatives_are_as_ever() -> None:
    sharing, apart, plain = models()
    results = []
    for model in (sharing, apart, plain):
        x = x_for(plain).requires_grad_()
        y = model(x)
        dy = torch.randn(4, *y.shape, generator=torch.Generator().manual_seed(0))
        batched = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)[0]
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append((batched, dx, *torch.autograd.grad(dx.square().sum(), [x, *trained])))
    for got, *others in zip(*results, strict=True):
        for expected in others:
            assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_transforms_and_tools_see_what_they_saw() -> None:
    sharing, apart, plain = models()
    x = x_for(plain)
    results = []
    for model in (sharing, apart):
        gradient = torch.func.grad(lambda x, model=model: model(x).square().sum())(x)
        with FlopCounterMode(display=False) as flops:
            run(model, x)
        results.append((gradient, flops.get_total_flops()))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_compiles_without_a_graph_break(onto: list[bool]) -> None:
    sharing, apart, plain = models()
    torch._dynamo.reset()
    compiled = torch.compile(inner(sharing), backend="aot_eager", fullgraph=True)
    got, expected = run(compiled, x_for(plain)), run(apart, x_for(plain))
    torch.testing.assert_close(got["dx"], expected["dx"])
    assert onto == []


def test_compiled_autograd_sums_as_ever() -> None:
    sharing, apart, plain = models()
    results = []
    for model in (sharing, apart):
        x = x_for(plain).requires_grad_()
        loss = model(x).square().sum()
        compiler = torch.compile(backend="eager")
        with torch._dynamo.compiled_autograd._enable(compiler):
            loss.backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)
