"""The ladder, on a CPU: it maps planted mistakes exactly, and climbs on past whatever happens."""

import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product

import pytest
import torch
from mutants import returned
from scripts import CRASHES, HANGS, RIGHT, WRONG, script
from torch import Tensor

from bench import forced, ladder, process
from lora_kernels.ops.lora_linear import reference, triton, workspace
from lora_kernels.ops.lora_linear.config import TileConfig
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.testing import Case, bf16, fp32

CPU = torch.device("cpu")


def test_the_ladder_climbs_on_past_what_hangs_crashes_or_is_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes = [HANGS, CRASHES, WRONG, "1 / 0", RIGHT]
    names = ["a hang", "a crash", "a wrong one", "a broken one", "a right one"]
    start = time.monotonic()
    statuses = ladder.climb(names, lambda i: script(codes[i]), budget_s=60, jobs=2, limit_s=2)
    assert time.monotonic() - start < 30
    assert statuses == [
        "hung: stopped after 2 s", "crashed: SIGABRT", "WRONG", "failed with status 1", "ok",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "a hang: hung: stopped after 2 s" in printed
    assert "       y is wrong" in printed
    assert "ZeroDivisionError" in printed


def test_the_ladder_ends_with_its_budget_where_everything_hangs() -> None:
    start = time.monotonic()
    statuses = ladder.climb(range(20), lambda i: script(HANGS), budget_s=3, jobs=2, limit_s=2)
    assert time.monotonic() - start < 30
    assert statuses[:2] == ["hung: stopped after 2 s"] * 2
    assert set(statuses[2:4]) == {"out of time"}
    assert set(statuses[4:]) == {"not started"}


def test_without_a_gpu_the_ladder_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        ladder.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "bench.ladder: there is no CUDA device here\n"


def odd_row_blocks(*columns: slice) -> Callable[[Tensor, object], Tensor]:
    """Spoil the odd blocks of 128 rows, in some columns."""

    def change(tensor: Tensor, call: object) -> Tensor:
        tensor = tensor.clone()
        for start in range(128, len(tensor), 256):
            for columns_ in columns:
                tensor[start : start + 128, columns_] *= 1.5
        return tensor

    return change


def examine(change: Callable, case: Case, both: bool = True) -> list[str]:
    return list(ladder.examine(change(reference.BACKEND), case, CPU, both=both))


def test_a_right_backend_draws_no_complaint() -> None:
    for rung in ladder.RUNGS:
        if rung.case.m * rung.case.n * rung.case.k < 2e7:
            assert not list(ladder.examine(reference.BACKEND, rung.case, CPU, both=rung.both))


def test_the_map_names_exactly_the_wrong_blocks() -> None:
    case = Case(600, 200, 256, 64, bf16, needs=ladder.ALL)
    # As the CUDA backend was: the wrong descriptor of the second CTA in a cluster.
    assert [
        line.partition(";")[0]
        for line in examine(returned("dx", odd_row_blocks(slice(64, 256))), case)
    ] == ["dx is wrong in 6 of 20 blocks (1, 1) (1, 2) (1, 3) (3, 1) (3, 2) (3, 3)"]
    (line,) = examine(returned("da", lambda da, call: da.index_fill(1, torch.tensor(70), 0)), case)
    assert line.startswith("da is wrong in 1 of 4 blocks (0, 1); worst error ")
    (line,) = examine(returned("y", lambda y, call: y.index_fill(0, torch.tensor(599), 9)), case)
    assert line.startswith("y is wrong in 4 of 20 blocks (4, 0) (4, 1) (4, 2) (4, 3); ")


@pytest.mark.parametrize(
    ("output", "change", "complaint"),
    [
        (
            "y",
            lambda t, call: torch.full_like(t, torch.nan),
            "y is wrong in 20 of 20 blocks (0, 0)",
        ),
        ("dx", lambda t, call: t[:-1], "dx is torch.bfloat16 (599, 256), not torch.bfloat16 (600,"),
        ("db", lambda t, call: t.float(), "db is torch.float32 (200, 64), not torch.bfloat16 "),
        ("dx", lambda t, call: None, "dx is missing"),
    ],
)
def test_other_mistakes_are_named(output: str, change: Callable, complaint: str) -> None:
    case = Case(600, 200, 256, 64, bf16, needs=ladder.ALL)
    (line,) = examine(returned(output, change), case)
    assert line.startswith(complaint), line


def test_memory_is_poisoned_for_what_a_kernel_does_not_write() -> None:
    case = Case(8, 8, 8, 8, bf16, needs=ladder.FORWARD)
    poisoned = returned("y", lambda y, call: y if torch.empty(9).isnan().all() else y * 2)
    assert examine(poisoned, case) == []


def test_a_backward_rung_does_not_suffer_from_a_wrong_p() -> None:
    case = Case(300, 200, 256, 64, bf16, needs=ladder.ALL)
    broken = returned("p", lambda p, call: p * 2)
    assert examine(broken, case, both=False) == []
    assert [line.split()[0] for line in examine(broken, case)] == ["p", "db"]


def test_what_differs_between_two_runs_is_named() -> None:
    calls: list[int] = []

    def change(y: Tensor, call: object) -> Tensor:
        calls.append(1)
        # A bit that no tolerance would notice.
        return y if len(calls) == 1 else y.index_put((torch.tensor(130), torch.tensor(70)), y[0, 0])

    case = Case(300, 200, 64, 8, bf16, needs=ladder.FORWARD)
    assert "y differs between two runs in 1 of 12 blocks (1, 1)" in examine(
        returned("y", change), case
    )


def test_a_workspace_that_is_not_zero_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    dirty = torch.zeros(64, dtype=torch.int32)
    dirty[2] = 7
    monkeypatch.setattr(workspace, "_by_stream", {(CPU, 0): dirty})
    (line,) = examine(lambda backend: backend, Case(8, 8, 8, 8, fp32))
    assert line.startswith("the workspace is not zero: [0, 0, 7, 0")


def test_the_command_runs_rungs_in_processes_and_fails_for_a_wrong_one() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bench.ladder", "--device", "cpu", "--jobs", "1", *arguments],
            cwd=process.ROOT, capture_output=True, text=True,
        )  # fmt: skip

    right = run("--backend", "reference", "-k", "one tile")
    assert right.returncode == 0, right.stdout + right.stderr
    assert "  ok                           reference: one tile, largest" in right.stdout
    absent = run("-k", "cuda: one tile")
    assert absent.returncode == 0
    assert "skipped: it needs a CUDA device, not cpu" in absent.stdout
    assert "  -                            cuda: one tile, one stage" in absent.stdout
    broken = run("--backend", "nobody", "-k", "one tile, largest")
    assert broken.returncode == 1
    assert "failed with status 1         nobody: one tile, largest" in broken.stdout


def test_every_rung_of_triton_has_its_tile_on_every_gpu() -> None:
    for arch in (80, 86, 89, 90, 100, 120):
        for rung in ladder.TRITON:
            tile = rung.forced(rung.case.problem("cuda", arch))
            assert tile is None or tile.backward == any(rung.case.needs)


def test_a_forced_tile_holds_for_as_long_as_it_should() -> None:
    facts = Problem(300, 512, 512, 16, fp32, fp32)

    def choice(backward: bool, tf32: bool) -> TileConfig:
        return triton.pick(facts, backward=backward, tf32=tf32)

    def everything() -> object:
        return triton.pick, triton._ctas, triton._precision(fp32)

    free = everything()
    every = forced.every_tile(facts)
    assert {(tile.backward, tile.tf32) for tile in every} == set(product((False, True), repeat=2))
    for tile in every:
        other = choice(not tile.backward, tile.tf32)
        with forced.forced(tile, 2):
            assert choice(tile.backward, tile.tf32) == tile.config
            assert choice(not tile.backward, tile.tf32) == other
            assert triton._precision(fp32) == ("tf32" if tile.tf32 else "ieee")
            chosen = everything()
        with forced.forced(tile, 2):
            assert everything() == chosen, "a launch plan would be made anew"
            assert triton._ctas(7, tile.config, CPU) == 2
            assert triton._ctas(1, tile.config, CPU) == 1
    assert everything() == free
