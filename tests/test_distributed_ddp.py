"""Data parallelism: accumulation, and the masks that processes draw from one seed."""

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from distributed import (
    LAYERS,
    RANKS,
    Cluster,
    clean,
    compare,
    counted,
    fuse_all,
    gradients,
    llama,
    loss_of,
    shard,
    tokens,
)
from distributed import cluster as cluster
from peft_models import Checkpointed, add_other, fp64, peft_model, run, x_for
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import LoRALinear
from lora_kernels.distributed import _STEP, dropout, dropout_seed
from lora_kernels.ops.lora_linear import reference
from lora_kernels.ops.lora_linear.philox import drop, keep_mask, seed_tensor
from lora_kernels.peft import fuse
from lora_kernels.testing import assert_accurate, audit

P = 0.4


def ddp(fused: bool, **options: Any) -> nn.Module:
    model = llama()
    if fused:
        fuse_all(model)
    return DistributedDataParallel(model, **options)


def accumulated(model: Any, batch: Tensor) -> Tensor:
    """One step in two parts, gradients exchanged in the second alone."""
    first, second = batch.split([1, len(batch) - 1])
    with model.no_sync():
        loss = loss_of(model, first)
    return loss + loss_of(model, second)


def accumulation(rank: int) -> None:
    compare(rank, ddp, calls=2 * LAYERS, run=accumulated)


def static_graph(rank: int) -> None:
    options = {"static_graph": True, "gradient_as_bucket_view": True}
    compare(rank, lambda fused: ddp(fused, **options), calls=LAYERS)


@pytest.mark.parametrize("case", [accumulation, static_graph])
def test_distributed_data_parallel(case: Any, cluster: Cluster) -> None:
    cluster.run(case)


def halves(rank: int) -> dict[str, Tensor]:
    """Two processes with half the batch each get the gradients of one with all of it."""
    model = ddp(True)
    loss_of(model, shard(rank))
    return gradients(model)


def test_two_processes_get_the_gradients_of_one(cluster: Cluster) -> None:
    alone = llama()
    fuse_all(alone)
    loss_of(alone, tokens())
    expected = gradients(alone)
    assert len(expected) == 2 * LAYERS
    for together in cluster.run(halves):
        assert together.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_accurate(name, together[name], gradient, gradient)


def test_a_hang_is_a_failure_with_a_name() -> None:
    silent = Cluster("")
    pipes = [multiprocessing.Pipe() for _ in range(RANKS)]
    silent.pipes = [mine for mine, _ in pipes]
    silent.processes = [multiprocessing.Process()]  # not started, but not none
    with pytest.raises(pytest.fail.Exception, match=r"halves\(\): no answer within 0.01"):
        silent.run(halves, limit_s=0.01)


# --- The mask ------------------------------------------------------------------------------------


def layer() -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear(16, 8, r=4, lora_dropout=P, init_lora_weights=False, dtype=fp64, bias=False)


def x_for_masks() -> Tensor:
    return torch.ones(32, 16, dtype=fp64)


WRAPPERS: dict[str, Any] = {
    "alone": lambda m: m,
    "ddp": DistributedDataParallel,
    "fsdp2": lambda m: fully_shard(m),
    "fsdp1": lambda m: FullyShardedDataParallel(
        m, use_orig_params=True, device_id=torch.device("cpu")
    ),
}


def masked(rank: int, how: str, reentrant: bool | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, dx and the seed that the layer obeyed, every process seeded alike."""
    inner = layer()
    whole = inner if reentrant is None else Checkpointed(inner, reentrant)
    model = WRAPPERS[how](nn.Sequential(whole))
    x = x_for_masks().requires_grad_()
    torch.manual_seed(7)
    y = model(x)
    y.sum().backward()
    torch.manual_seed(7)
    drawn = dropout_seed(inner, x)
    return y.detach(), x.grad, seed_tensor(None, x) if drawn is None else drawn


def by_hand(seed: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx under the mask of a seed."""
    inner, x = layer(), x_for_masks().requires_grad_()
    keep = keep_mask(seed, P, range(len(x)), range(x.shape[1])).double() / (1 - P)
    y = x @ inner.weight.t() + (x * keep) @ inner.lora_A.t() @ inner.lora_B.t() * inner.scaling
    y.sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("how", WRAPPERS)
def test_ranks_seeded_alike_draw_different_masks(
    how: str, reentrant: bool | None, cluster: Cluster
) -> None:
    results = cluster.run(masked, how, reentrant)
    for y, dx, seed in results:  # also in the forward that a checkpoint repeats
        expected_y, expected_dx = by_hand(seed)
        assert_accurate("y", y, expected_y, expected_y)
        assert_accurate("dx", dx, expected_dx, expected_dx)
    torch.manual_seed(7)
    assert results[0][2] == seed_tensor(None, x_for_masks())  # what one process would draw
    assert (results[0][2] == results[1][2]) == (how == "alone")
    same = [a == b for a, b in zip(*(by_hand(seed)[1] for *_, seed in results), strict=True)]
    assert torch.stack(same).all() == (how == "alone")


def independent(rank: int) -> Tensor:
    parallel = DistributedDataParallel(layer())
    torch.manual_seed(3)
    with torch.no_grad():
        parallel(x_for_masks())
        seed = dropout_seed(parallel.module, x_for_masks())
    seed = seed_tensor(None, x_for_masks()) if seed is None else seed
    return keep_mask(seed, P, range(4096), range(64)).double()


def test_masks_of_two_ranks_are_uncorrelated(cluster: Cluster) -> None:
    first, second = cluster.run(independent)
    n = first.numel()
    for keep in (first, second):
        assert abs(keep.mean() - (1 - P)) < 5 * (P * (1 - P) / n) ** 0.5  # five sigma
    covariance = ((first - (1 - P)) * (second - (1 - P))).mean()
    assert abs(covariance) < 5 * P * (1 - P) / n**0.5


# --- What is dropped outside of the operator -----------------------------------------------------

KINDS: tuple[dict[str, Any], ...] = ({"use_dora": True}, {})


def fused_kind(options: dict[str, Any]) -> Any:
    """A DoRA adapter, or two of LoRA, of which one is added outside, and drops."""
    model = peft_model(dtype=fp64, lora_dropout=P if options else 0.0, **options)
    if not options:
        add_other(model, lora_dropout=P)
        model.base_model.set_adapter(["default", "other"])
    assert len(fuse(model).fused) == 2
    return model


def seeded(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return run(model, x)


def dropped_outside(
    rank: int, how: str, options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return what a rank computes, whole and under both kinds of checkpoint; all are seeded alike.

    A checkpoint's gradients are right only if its second forward drops what the first did.
    """
    model = fused_kind(options)
    x = x_for(model)
    with counted() as calls:
        found = []
        for reentrant in (None, False, True):
            whole = model if reentrant is None else Checkpointed(model, reentrant)
            found.append(seeded(WRAPPERS[how](whole), x))
    assert len(calls) == 2 * 5
    names = [clean(name).replace("inner.", "") for name in found[0]]
    return tuple(dict(zip(names, each.values(), strict=True)) for each in found)


@pytest.mark.parametrize("options", KINDS, ids=["DoRA", "two adapters"])
@pytest.mark.parametrize("how", ["alone", "ddp"])
def test_what_is_dropped_outside_differs_by_rank(
    how: str, options: dict[str, Any], cluster: Cluster
) -> None:
    ranks = cluster.run(dropped_outside, how, options)
    model = fused_kind(options)
    expected = seeded(model, x_for(model))  # as ever, for one process
    assert_accurate("y", ranks[0][0]["y"], expected["y"], expected["y"])
    assert torch.equal(ranks[0][0]["y"], ranks[1][0]["y"]) == (how == "alone")
    for plain, *checkpointed in ranks:
        for again in checkpointed:
            assert again.keys() == plain.keys()
            for name, value in plain.items():
                assert_accurate(name, again[name], value, value)


def outside_alone(rank: int, compile: bool) -> Tensor:
    """What `dropout` keeps of ones."""
    inner = layer()
    with torch.no_grad():
        DistributedDataParallel(inner)(x_for_masks())  # where the layer learns its place
    call = lambda x: dropout(inner, x, P)
    if compile:
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.manual_seed(7)
    return call(torch.ones(2048, 64, dtype=fp64))


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_masks_outside_are_dropout_and_uncorrelated(compile: bool, cluster: Cluster) -> None:
    kept = cluster.run(outside_alone, compile)
    for each in kept:
        torch.testing.assert_close(each[each > 0], torch.full_like(each[each > 0], 1 / (1 - P)))
    first, second = ((each > 0).double() - (1 - P) for each in kept)
    n = first.numel()
    for each in (first, second):
        assert abs(each.mean()) < 5 * (P * (1 - P) / n) ** 0.5
    assert abs((first * second).mean()) < 5 * P * (1 - P) / n**0.5


def compiled(rank: int) -> None:
    """Each rank of a compiled model draws the mask that it draws eagerly."""
    inner = layer()
    parallel = DistributedDataParallel(inner)
    x = x_for_masks().requires_grad_()
    torch.manual_seed(7)
    parallel(x)
    seed = dropout_seed(inner, x)
    assert (seed is None) == (rank == 0)
    torch._dynamo.reset()
    seeds: list[Any] = []
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(reference, "drop", lambda s, *a: seeds.append(s) or drop(s, *a))
        torch.manual_seed(7)
        torch.compile(inner, backend="aot_eager", fullgraph=True)(x).sum().backward()
    torch.manual_seed(7)
    drawn = torch.randint(2**63 - 1, (1,))
    expected = drawn if rank == 0 else drawn + _STEP % 2**63 & 2**63 - 1
    assert seeds
    assert all(torch.equal(seed, expected) for seed in seeds)


def test_a_compiled_layer_draws_the_mask_of_its_rank(cluster: Cluster) -> None:
    cluster.run(compiled)


def audited(rank: int) -> str:
    """An audit foresees the mask of its rank; float64, for it is about masks, not rounding."""
    model = llama(torch.float64, lora_dropout=P)
    fuse_all(model)
    parallel = DistributedDataParallel(model)
    torch.manual_seed(7)
    loss_of(parallel, shard(rank))  # where the layers learn their place
    return str(audit(parallel, lambda: loss_of(parallel, shard(rank))))


def test_an_audit_foresees_the_mask_of_its_rank(cluster: Cluster) -> None:
    for report in cluster.run(audited):
        assert "dropout was off" not in report
        assert report.count("right") >= LAYERS // 2, report
        assert "wrong" not in report
