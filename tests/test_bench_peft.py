"""Pairs: every kind of PEFT layer beside PEFT's own code, in time and in value."""

import functools
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from peft_models import one_thread as one_thread
from torch import Tensor

from bench import bench_peft, results, timing
from bench.measure import Row, attempt
from bench.peft_cases import CASES, SIZES, PeftCase

CPU = torch.device("cpu")
DELAY_S = 0.02


LORA = CASES[0]


def pair_of(
    monkeypatch: Any, change: Callable[[Any, Tensor], Tensor], case: PeftCase = LORA
) -> Any:
    """Return the outcome of a pair whose fused layer has a defect."""
    from lora_kernels.peft import FusedLinear

    plain = FusedLinear.plain.forward
    forward = lambda layer, x: change(functools.partial(plain, layer), x)
    monkeypatch.setattr(FusedLinear, "forward", forward)
    return attempt(bench_peft.measure_pair, case, SIZES["smoke"], CPU, 0.02)


def report_row(row: Row) -> None:
    rows = dict.fromkeys(LORA.directions, row)
    bench_peft.test_never_slower_than_peft(LORA, "both", lambda case: rows, lambda *row: None)


def test_a_planted_slow_path_fails_the_run(monkeypatch: Any) -> None:
    def late(layer: Callable, x: Tensor) -> Tensor:
        time.sleep(DELAY_S)
        return layer(x)

    for row in pair_of(monkeypatch, late).values():
        assert row.info["x_peft"] > 2
        with pytest.raises(AssertionError, match=r"slower: .* of PEFT's time"):
            report_row(row)


@pytest.mark.parametrize(
    ("seen", "kept"), [([1.0, 2.0], 1.0), ([2.0, 1.0, 1.1], 1.1), ([2.0, 1.0, 3.0], 2.0)]
)
def test_the_middle_of_three_counts_where_one_is_slow(
    seen: list[float], kept: float, monkeypatch: Any
) -> None:
    left = list(seen)

    def interleave(*_: Any) -> list[timing.Sample]:
        fused = left.pop(0)
        return [timing.Sample([t] * 20, [t] * 20) for t in (1.0, 1.0, fused, fused)]

    monkeypatch.setattr(bench_peft, "interleave", interleave)
    case = LORA._replace(train=False)
    rows = bench_peft.measure_pair(case, SIZES["smoke"], CPU, 0.02)
    assert [row.info["x_peft"] for row in rows.values()] == [kept]
    assert len(left) == (1 if kept == seen[0] == 1 else 0)


def test_a_pair_that_is_wrong_gets_no_time(monkeypatch: Any) -> None:
    assert pair_of(monkeypatch, lambda layer, x: 1.001 * layer(x)).startswith("wrong: result 0")
    broken = lambda layer, x: 1.02 * (y := layer(x)) - 0.02 * y.detach()  # y, but for dy
    assert pair_of(monkeypatch, broken).startswith("wrong: result 1")


@pytest.mark.parametrize(
    ("fused", "again", "slow"),
    [(0.9, 1.0, False), (1.01, 1.0, False), (1.1, 1.0, True), (1.1, 1.3, False)],
)
def test_a_pair_is_judged_by_its_own_noise(fused: float, again: float, slow: bool) -> None:
    """Rounds drift by a factor of two: only what happens within a round counts."""
    drift = [1 + i / 20 for i in range(20)]
    ours = fused * (1 + again) / 2
    times = {"peft": 1.0, "peft.again": again, "lora_kernels": ours, "lora_kernels.again": ours}
    row = bench_peft.beside({name: [t * d for d in drift] for name, t in times.items()})
    assert row["x_peft"] == pytest.approx(fused)
    assert row["noise"] == pytest.approx(max(again - 1, 0.02))
    row |= {"left": None}
    assert (results.too_slow(row) is not None) == slow
    scatter = [t * (1.5 if i % 2 else 0.7) for i, t in enumerate(drift)]
    noisy = times | {"peft": drift, "peft.again": drift}
    noisy |= dict.fromkeys(("lora_kernels", "lora_kernels.again"), scatter)
    assert results.too_slow(bench_peft.beside(noisy) | {"left": None}) is None
    noisy |= {"lora_kernels": drift, "lora_kernels.again": [1.5 * t for t in drift]}
    assert bench_peft.beside(noisy)["noise"] == pytest.approx(0.5)


@pytest.mark.parametrize(("peft_us", "slow"), [(30.0, False), (300.0, True)])
def test_asking_may_cost_two_microseconds_where_peft_runs(peft_us: float, slow: bool) -> None:
    row = {"x_peft": 1.07, "noise": 0.02, "peft_us": peft_us, "left": "a reason"}
    assert (results.too_slow(row) is not None) == slow
    assert results.too_slow(row | {"left": None}) is not None


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_every_kind_of_layer_has_its_pair() -> None:
    """A kind that `fuse` takes and the table lacks would have no promise of speed."""
    from lora_kernels.peft.adapters import VARIANTS
    from lora_kernels.peft.kinds import KINDS
    from lora_kernels.peft.parts import kind

    assert len({case.name for case in CASES}) == len(CASES)
    kinds, variants = set(), set()
    for case in CASES:
        if case.why_not() is None:
            layer = case.layer(SIZES["smoke"], CPU)
            kinds.add(kind(layer))
            variants |= set(map(kind, layer.lora_variant.values()))
    libraries = {"bnb": "bitsandbytes", "hqq": "hqq", "torchao": "torchao"}
    here = {
        path
        for path in KINDS
        if find_spec(libraries.get(path.split(".")[-2], "peft"))  # PEFT's module is named so
    }
    assert kinds == here, "bench/peft_cases.py lacks a kind"
    # aLoRA takes some rows of x, as a batch of several adapters does.
    assert variants == {*VARIANTS, "peft.tuners.lora.variants.ALoraLinearVariant"}, (
        "bench/peft_cases.py lacks a variant"
    )
