"""The benchmark suite catches what it must: slow, wrong and broken providers, and regressions."""

import functools
import json
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import one_thread as one_thread
from torch import Tensor

from bench import __main__ as suite
from bench import compare, report, results, timing
from bench.cases import DIRECTIONS, SHAPES, TABLES
from bench.measure import Row, measure, work
from bench.providers import AGAIN, FROZEN, PROVIDERS, Layer, Provider
from lora_kernels.testing import Case, Inputs, fp32

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMOKE, SMOKE_DROPOUT = TABLES["smoke"]
BY_NAME = {provider.name: provider for provider in PROVIDERS}
OURS = "lora_kernels.reference"
DELAY_S = 0.02


def planted(change: Callable[[Layer], Callable[[], Tensor]]) -> Provider:
    """Return this project's reference backend with one defect."""

    def build(inputs: Inputs, case: Case) -> Layer:
        layer = BY_NAME[OURS].build(inputs, case)
        return layer._replace(forward=change(layer))

    return Provider("planted", build, own_mask=False)


def slow(layer: Layer) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        time.sleep(DELAY_S)
        return layer.forward()

    return forward


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is 2 % too large."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * 1.02


def unwritten(layer: Layer) -> Callable[[], Tensor]:
    """Return memory that nothing was written to, with a gradient."""

    def forward() -> Tensor:
        y = layer.forward()
        return torch.empty_like(y) + 0 * y

    return forward


def fails(layer: Layer) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        raise RuntimeError("no such\nkernel")

    return forward


def rows_of(provider: Provider, direction: str = "forward") -> dict[str, Row]:
    providers = [BY_NAME[FROZEN], BY_NAME[AGAIN], BY_NAME[OURS], provider]
    measured = measure(SMOKE, providers, [direction], CPU, 0.02)
    return {name: row for (_, name), row in measured.items()}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_slow_provider_is_slow_where_it_is(direction: str) -> None:
    rows = rows_of(planted(slow), direction)
    assert rows["planted"].reason is None
    slow_us, ours_us = (rows[name].info["median_us"] for name in ("planted", OURS))
    if direction == "backward":  # the planted delay is in the forward pass
        assert slow_us < 1e6 * DELAY_S
    else:
        assert slow_us > 1e6 * DELAY_S
        assert rows["planted"].info["x_frozen"] > rows[OURS].info["x_frozen"]
        assert ours_us < slow_us


@pytest.mark.parametrize(
    ("defect", "reason"),
    [
        (lambda layer: lambda: layer.forward() * 1.001, "wrong: y: error"),
        (lambda layer: lambda: ScaledGradient.apply(layer.forward()), "wrong: dx: error"),
        (lambda layer: lambda: layer.forward()[:-1], "wrong: y: shape"),
        (unwritten, "wrong: y"),
        (fails, "broken: RuntimeError: no such kernel"),
    ],
)
def test_a_wrong_provider_gets_no_time(defect: Callable, reason: str) -> None:
    rows = rows_of(planted(defect))
    assert rows["planted"].reason is not None
    assert rows["planted"].reason.startswith(reason)
    assert rows["planted"].seconds == []
    assert "median_us" not in rows["planted"].info
    assert rows[OURS].reason is None


def test_an_absent_provider_says_why() -> None:
    absent = Provider("planted", lambda inputs, case: None, lambda case, device: "not installed")
    assert rows_of(absent)["planted"].reason == "absent: not installed"


def test_every_provider_of_this_machine_is_right_with_dropout_and_bias() -> None:
    local = [provider for provider in PROVIDERS if provider.package is None]
    rows = measure(SMOKE_DROPOUT, local, ["both"], CPU, 0.01)
    reasons = {name: row.reason for (_, name), row in rows.items()}
    assert not [r for r in reasons.values() if r and not r.startswith("absent")]
    assert {name for name, reason in reasons.items() if reason is None} >= {
        FROZEN, AGAIN, OURS, "addmm", "eager", "peft", "peft.default",
    }  # fmt: skip


def test_the_floor_is_the_design_s() -> None:
    case = Case(512, 1536, 576, 16, fp32)
    growth = {
        d: work(case, d, adapter=True)[0] / work(case, d, adapter=False)[0] for d in DIRECTIONS
    }
    assert math.isclose(growth["forward"], 1 + 16 / 576 + 16 / 1536)
    assert math.isclose(growth["both"], 1 + 1.5 * 16 * (576 + 1536) / (576 * 1536))
    for direction, tensors in {"forward": 1, "backward": 1, "both": 2}.items():
        bare = 512 * 576 + 576 * 1536 + 512 * 1536
        assert work(case, direction, adapter=False) == (
            tensors * 2 * 512 * 576 * 1536, tensors * bare * 4,
        )  # fmt: skip


def test_cases_are_named_once_and_cover_every_projection() -> None:
    for table in TABLES.values():
        names = [case.name for case in table]
        assert len(set(names)) == len(names)
    full = TABLES["full"]
    assert {case.shape for case in full} == {s for s in SHAPES if s.startswith(("llama", "qwen"))}
    assert {case.case.m for case in full} == {1, 16, 512, 2048, 8192, 16384}
    assert {case.case.r for case in full} == {8, 16, 64, 128, 256}


def test_launches_are_interleaved_and_rotate_the_operands() -> None:
    launches: list[tuple[str, int]] = []
    calls = [
        timing.Call(lambda i: i, lambda i, name=name: launches.append((name, i))) for name in "abc"
    ]
    samples = timing.interleave(calls, CPU, 0.001)
    assert [i for _, i in launches] == list(range(len(launches)))
    rounds = [[name for name, _ in launches[i : i + 3]] for i in range(0, len(launches), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert len({len(sample.device) for sample in samples}) == 1
    assert timing.MIN_ROUNDS <= len(samples[0].device) <= timing.MAX_ROUNDS["cpu"]


def test_a_cuda_round_whose_backlog_ran_dry_is_thrown_away(monkeypatch: Any) -> None:
    clock, slept, dry = [0.0], [], [True, False]

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.at = -1.0

        def record(self) -> None:
            self.at = clock[0]

        def query(self) -> bool:
            return dry.pop(0)

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    took = {"x": 3.0, "y": 5.0}  # ms

    def run(name: str) -> None:
        clock[0] += took[name]

    calls = [timing.Call(lambda i, name=name: name, run) for name in took]
    times = timing._CudaRound()(calls, 0)
    assert [device_s for device_s, _ in times] == pytest.approx([3e-3, 5e-3])
    assert len(slept) == 2
    assert slept[1] == 2 * slept[0]


def test_lorafusion_is_composed_as_its_kernels_are_defined(monkeypatch: Any) -> None:
    def module(**functions: Callable) -> types.SimpleNamespace:
        return types.SimpleNamespace(**functions)

    def forward(x: Tensor, w: Tensor, s: Tensor, b: Tensor, alpha: float, bias: Any) -> Tensor:
        return torch.nn.functional.linear(x, w, bias) + alpha * s @ b.t()

    def dys_dyb(dy: Tensor, b: Tensor, s: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        return alpha * dy.t() @ s, alpha * dy @ b

    def dyw_dsa(dy: Tensor, w: Tensor, ds: Tensor, a: Tensor, p: float, mask: Tensor) -> Tensor:
        assert mask.shape == (dy.shape[0], w.shape[1])
        return dy @ w + mask * (ds @ a) / (1 - p)

    kernels = {
        "fused_lora_xw_sb": module(fused_lora_xw_sb=forward),
        "fused_lora_dys_dyb": module(fused_lora_dys_dyb=dys_dyb),
        "fused_lora_dyw_dsa": module(fused_lora_dyw_dsa=dyw_dsa),
        "dropout": module(seeded_dropout=None),
    }
    for name, stub in kernels.items():
        monkeypatch.setitem(sys.modules, f"lorafusion.ops.triton_ops.{name}", stub)
    peer = BY_NAME["lorafusion"]._replace(why_not=lambda case, device: None)
    rows = measure(SMOKE, [BY_NAME[FROZEN], BY_NAME[AGAIN], peer], ["both"], CPU, 0.01)
    assert rows["both", "lorafusion"].reason is None


def test_a_peer_s_rows_are_merged_and_a_lost_peer_is_reported(tmp_path: Path) -> None:
    def row(provider: str) -> dict:
        return {"extra_info": {"provider": provider}}

    raw: dict[str, list] = {"benchmarks": [row(FROZEN)], "untimed": []}
    path = tmp_path / "peer.json"
    absent = [{"provider": name, "reason": "absent: no"} for name in ("peer", FROZEN)]
    path.write_text(json.dumps({"benchmarks": [row(FROZEN), row("peer")], "untimed": absent}))
    suite._merge(raw, "peer", path, 0)
    assert raw == {"benchmarks": [row(FROZEN), row("peer")], "untimed": absent[:1]}
    suite._merge(raw, "lost", tmp_path / "none.json", -11)
    assert raw["untimed"][-1]["provider"] == "lost"
    assert raw["untimed"][-1]["reason"] == "broken: nothing was timed (exit status -11)"


@pytest.fixture(scope="module")
def results_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of a real run on the CPU."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "bench", "--table", "smoke", "--seconds", "0.02"]
    command += ["--out", str(out), "-k", "bench_lora_linear and fp32 and both or step"]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} >= {"tables.md", "ratio.png", "roofline.png"}
    (path,) = out.glob("*.json")
    return path


def edited(path: Path, edit: Callable[[dict], None]) -> Path:
    """Return a changed copy of a results file."""
    raw = json.loads(path.read_text())
    edit(raw)
    copy = path.with_name("edited.json")
    copy.write_text(json.dumps(raw))
    return copy


def scaled(provider: str, factor: float, raw: dict) -> None:
    for row in raw["benchmarks"]:
        if row["extra_info"]["provider"] == provider:
            row["extra_info"]["x_frozen"] *= factor


def test_a_results_file_is_consistent(results_file: Path) -> None:
    raw = json.loads(results_file.read_text())
    assert "node" not in raw["machine_info"]
    assert torch.__version__.startswith(raw["machine_info"]["packages"]["torch"])
    for row in raw["benchmarks"]:
        info, stats = row["extra_info"], row["stats"]
        assert math.isclose(1e6 * stats["median"], info["median_us"], rel_tol=1e-6)
        assert len(stats["data"]) == stats["rounds"]
        assert info["p20_us"] <= info["median_us"] <= info["p80_us"]
        assert math.isclose(info["x_frozen"], info["median_us"] / info["frozen_us"])
        if info["direction"] != "step":
            assert 0 <= info["error"] < 1e-5
            assert math.isclose(info["tflops"], info["flops"] / info["median_us"] / 1e6)
            floor = 1 + 1.5 * info["R"] * (info["K"] + info["N"]) / (info["K"] * info["N"])
            assert math.isclose(info["x_floor"], info["x_frozen"] / floor)
    timed = {row["extra_info"]["provider"] for row in raw["benchmarks"]}
    untimed = {row["provider"]: row["reason"] for row in raw["untimed"]}
    assert timed >= {FROZEN, AGAIN, OURS, "addmm", "eager", "peft", "lora_kernels"}
    assert untimed["lorafusion"] == "absent: lorafusion is not installed"


@pytest.mark.parametrize(
    ("provider", "factor", "status"),
    [(OURS, 1.0, 0), (OURS, 100.0, 1), (OURS, 0.01, 0), ("peft", 100.0, 0)],
)
def test_a_planted_regression_fails_and_is_named(
    results_file: Path, capsys: Any, provider: str, factor: float, status: int
) -> None:
    new = edited(results_file, functools.partial(scaled, provider, factor))
    assert compare.main([str(results_file), str(new)]) == status
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [line.split(":")[0].split() for line in named] == (
        [[SMOKE.name, "both", OURS]] if status else []
    )


@pytest.mark.parametrize(("noise", "status"), [(0.3, 0), (0.0, 1)])
def test_noise_decides_what_a_regression_is(
    results_file: Path, monkeypatch: Any, noise: float, status: int
) -> None:
    new = edited(results_file, functools.partial(scaled, OURS, 1.5))
    monkeypatch.setattr(compare, "noise", lambda row: noise)
    assert compare.main([str(results_file), str(new)]) == status


def test_the_noise_of_a_row_is_the_larger_of_two_measures() -> None:
    row = {
        "noise": 0.1,
        "rounds": 10**6,
        "p20_us": 9,
        "p80_us": 11,
        "median_us": 10,
    }
    assert compare.noise(row) == 0.1
    quiet = row | {"noise": 0.0, "rounds": 100}
    assert compare.noise(quiet) == pytest.approx(1.253 * (2 / 1.683) / 10 / 10)


def test_a_backend_that_became_wrong_is_a_regression(results_file: Path, capsys: Any) -> None:
    def break_it(raw: dict) -> None:
        (mine,) = (r for r in raw["benchmarks"] if r["extra_info"]["provider"] == OURS)
        raw["untimed"].append(mine["extra_info"] | {"reason": "wrong: y: error 7"})
        mine["extra_info"]["case"] = "another"

    new = edited(results_file, break_it)
    assert compare.main([str(results_file), str(new)]) == 1
    assert f"{OURS}: wrong: y: error 7" in capsys.readouterr().out


def test_other_machines_and_other_files_are_not_compared(results_file: Path, capsys: Any) -> None:
    other = edited(results_file, lambda raw: raw["machine_info"].update(threads=999))
    assert compare.main([str(results_file), str(other)]) == 2
    assert "cannot be compared" in capsys.readouterr().err
    other.write_text("{}")
    assert compare.main([str(results_file), str(other)]) == 2
    assert "is not a results file" in capsys.readouterr().err


def test_the_readme_s_figures_come_from_the_newest_results(
    results_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bench" / "results"
    for name, date in (("old", "2020-01-01T00:00:00"), ("new", "2030-01-01T00:00:00")):
        raw = json.loads(results_file.read_text()) | {"datetime": date}
        raw["commit_info"] = {"id": f"{name}commit", "dirty": False}
        (folder / "cpu").mkdir(parents=True, exist_ok=True)
        (folder / "cpu" / f"{name}.json").write_text(json.dumps(raw))
    readme = tmp_path / "README.md"
    readme.write_text(
        "a\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nb\n<!-- bench:gpu -->\n<!-- /bench -->\n"
    )
    report.refresh(readme, folder)
    text = readme.read_text()
    assert text.startswith("a\n<!-- bench:cpu -->\n**Forward + backward**")
    assert "commit newcommit · 2030-01-01" in text
    assert "[bench/results/cpu](bench/results/cpu/tables.md)" in text
    assert text.endswith("b\n<!-- bench:gpu -->\nNot measured yet.\n<!-- /bench -->\n")
    report.refresh(readme, folder)
    assert readme.read_text() == text


def test_wrong_and_broken_providers_stand_in_the_tables(results_file: Path, tmp_path: Path) -> None:
    def break_it(raw: dict) -> None:
        (mine,) = (r for r in raw["benchmarks"] if r["extra_info"]["provider"] == "eager")
        raw["benchmarks"].remove(mine)
        raw["untimed"].append(mine["extra_info"] | {"reason": "wrong: y: error 7"})

    summary = report.write(results.load(edited(results_file, break_it)), tmp_path)
    header, _, line = [row for row in summary.splitlines() if row.startswith("|")][:3]
    cells = dict(zip(header.split("|"), line.split("|"), strict=True))
    assert cells[" eager "].strip() == "wrong"
    assert "| eager | wrong: y: error 7 |" in (tmp_path / "tables.md").read_text()


def test_pairs_stand_in_the_tables_and_losers_are_marked(
    results_file: Path, tmp_path: Path
) -> None:
    def row(case: str, direction: str, ratio: float, left: str | None) -> dict:
        info = {"case": f"peft.{case}", "direction": direction, "x_peft": ratio, "left": left}
        info |= {
            "peft_us": 1e3,
            "x_peft_p20": ratio - 0.01,
            "x_peft_p80": ratio + 0.01,
            "noise": 0.02,
        }
        return {"extra_info": info, "stats": {"rounds": 10}}

    def add(raw: dict) -> None:
        raw["benchmarks"] += [row("a", "forward", 0.9, None), row("a", "both", 1.03, None)]
        raw["benchmarks"] += [row("b", "forward", 1.0, "adapters are merged")]

    summary = report.write(results.load(edited(results_file, add)), tmp_path)
    assert "| a | 0.90 (0.89–0.91) | 1.03 (1.02–1.04) **slower** |  |" in summary
    assert "| b | 1.00 (0.99–1.01) | – | adapters are merged |" in summary
