"""`python -m bench.gpu FOLDER [--quick]`: all that a GPU machine can say, in one bounded command.

Needs no network. Stages: what is there, build the extension, the ladder that finds a broken
mechanism, the GPU tests, memcheck on a small set, the benchmarks behind the README, a
qualification, the other sanitizers. Each has a time limit, prints as it goes, and leaves the next
to run if it fails; the table at the end is printed whatever happened. FOLDER gets campaign.log, the
results file, tables, plots and the record.
"""

import argparse
import functools
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.forced import CASES, FEW_CTAS, Tile, every_tile, forced
from bench.measure import attempt
from bench.process import run
from bench.providers import problem
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import BACKENDS
from lora_kernels.testing import (
    Case,
    Inputs,
    assert_accurate,
    bf16,
    expected,
    fp32,
    fp64,
    make_inputs,
    run_backend,
)

Say = Callable[[str], None]
TOTAL_S, QUICK_S = 530, 230
REPORT_S = 30  # what a stage takes to print its own table once its budget is spent
# The CUDA backend has one tile and takes all SMs: more items than those, both ways.
MANY_ITEMS = Case(2100, 2304, 2304, 16, bf16, bias=True)
UNSAFE = "unsafe.txt"  # the ladder's note in FOLDER
INFORMS = ("racecheck", "synccheck", "initcheck")  # they may misread what TMA writes


class Stage(NamedTuple):
    """A command with a time limit, and the reason to leave it out, if any.

    In the command, `{budget}` becomes the seconds it may plan with, and `{safe}` a selection
    without the backends that hung in the ladder. `informs`: what it finds is printed, and does not
    fail the campaign.
    """

    name: str
    command: list[str]
    limit_s: int
    skip: str | None = None
    informs: bool = False


def stages(folder: Path, *, quick: bool) -> list[Stage]:
    """List the stages, and why this machine cannot run some."""
    python = [sys.executable, "-m"]
    no_gpu = None if torch.cuda.is_available() else "there is no CUDA device"
    places = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    missing = [tool for tool in ("nvcc", "ninja") if shutil.which(tool, path=places) is None]
    no_build = f"{missing[0]} is not installed" if missing else None
    tests = [*python, "bench.watch", "--budget={budget}", "-m", "gpu", "tests"]
    ladder = [*python, "bench.ladder", "--budget={budget}", f"--unsafe={folder / UNSAFE}"]
    first = [
        Stage("info", [*python, "lora_kernels.info"], 30),
        Stage("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 100, no_build),
        Stage("ladder", ladder, 120, no_gpu),
        Stage("tests", tests, 130, no_gpu),
    ]
    if quick:
        return first
    table = ["--table", "smoke"] if no_gpu else []  # enough to show that the stage works
    bench = [*python, "bench", "--out", str(folder), "--seconds=0.3", "--budget={budget}", *table]
    # Compiling takes seconds a case.
    bench += ["-k", "(not compiled or llama8b.gate_up-m8192-r16){safe}"]
    no_sanitizer = None if shutil.which("compute-sanitizer") else "it is not installed"
    small = [*python, "bench.gpu", str(folder), "--small-set"]
    exact = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]  # every tensor is an allocation of its own

    def sanitizer(tool: str) -> Stage:
        command = [*exact, "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small]
        return Stage(tool, command, 50, no_gpu or no_sanitizer, informs=tool in INFORMS)

    # Its record is what "auto" would obey here; kept with the results, it can be sent back.
    qualify = ["env", f"LORA_KERNELS_CACHE={folder / 'records'}", *python, "lora_kernels.qualify"]
    qualify += ["--budget={budget}"]
    return [
        *first,
        sanitizer("memcheck"),
        Stage("bench", bench, 200),
        Stage("qualify", qualify, 150, no_gpu),
        *map(sanitizer, INFORMS),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run every stage; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--quick", action="store_true", help="correctness alone, in four minutes")
    parser.add_argument("--small-set", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.small_set:
        return int(not all(list(check_small_set(torch.device("cuda")))))
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNSAFE).unlink(missing_ok=True)
    total_s = QUICK_S if options.quick else TOTAL_S
    with (folder / "campaign.log").open("w", buffering=1) as log:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=log)

        return campaign(stages(folder, quick=options.quick), total_s, say, folder)


def campaign(todo: list[Stage], total_s: float, say: Say, folder: Path) -> int:
    """Run `todo` within `total_s`, print how each ended, and return 1 if one that gates failed."""
    deadline = time.monotonic() + total_s
    lines, failed = [], False
    for stage in todo:
        started = time.monotonic()
        outcome = run_stage(stage, deadline - started, say, folder)
        ended_well = outcome == "ok" or outcome.startswith("skipped")
        failed |= not ended_well and not stage.informs
        note = " (informs, does not gate)" if stage.informs and not ended_well else ""
        lines.append(f"{stage.name:<12} {time.monotonic() - started:6.1f} s  {outcome}{note}")
    say("\n" + "\n".join(lines))
    return int(failed)


def run_stage(stage: Stage, left_s: float, say: Say, folder: Path) -> str:
    """Run one stage, printing as it goes; return how it ended."""
    say(f"\n=== {stage.name}")
    if stage.skip is not None:
        say(f"skipped: {stage.skip}")
        return f"skipped: {stage.skip}"
    limit_s = min(stage.limit_s, left_s)
    if limit_s <= 0:
        return "out of time: not started"
    unsafe = folder / UNSAFE
    hung = unsafe.read_text().split() if unsafe.exists() else []
    values = {
        "budget": max(limit_s - REPORT_S, 1),
        "safe": "".join(f" and not lora_kernels.{backend}" for backend in hung),
    }
    try:
        return run([word.format(**values) for word in stage.command], limit_s, say)
    except OSError as error:
        return f"failed: {error}"


def check_small_set(device: torch.device) -> Iterator[bool]:
    """Run every kernel and tile on a few cases, with no other kernels than copies around it.

    Memory is not poisoned, which would hide from initcheck what nothing was written to.
    """
    for backend in BACKENDS:
        if backend.name == "reference":
            continue
        for case in (MANY_ITEMS, *CASES) if backend.name == "cuda" else CASES:
            facts = problem(case, device)
            if reason := backend.why_not(facts):
                print(f"{backend.name}: {case}: skipped: {reason}", flush=True)
                continue
            several = every_tile(facts) if backend.name == "triton" else [None]
            for tile in several:
                yield _right(backend, case, device, tile)


def _right(backend: Backend, case: Case, device: torch.device, tile: Tile | None) -> bool:
    if tile is not None:
        case = tile.judge(case)
    verdict = attempt(_judge, backend, case, device, tile) or "right"
    print(f"{backend.name}: {case} {tile or ''}: {verdict}", flush=True)
    return verdict == "right"


def _judge(backend: Backend, case: Case, device: torch.device, tile: Tile | None) -> None:
    inputs = make_inputs(case, device)
    with forced(tile, FEW_CTAS if tile else None):
        results = run_backend(backend, case, inputs)
    right = _right_results(case._replace(needs=(True, True, True)), tile is not None and tile.tf32)
    for name, got in results._asdict().items():
        if got is not None:
            assert_accurate(name, got, *right[name])


@functools.lru_cache(maxsize=2)
def _right_results(case: Case, tf32: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each result by the oracle in float64 and in the operands' dtype, both on the CPU."""
    inputs = make_inputs(case)
    exact = expected(case, inputs, fp64)
    if tf32:
        inputs = Inputs(*map(_as_tf32, inputs))
    eager = expected(case, inputs, case.dtype)
    return {name: (exact[name], eager[name]) for name in exact}


def _as_tf32(operand: Tensor | None) -> Tensor | None:
    """Return an fp32 operand as a tensor core reads it: without the last 13 bits, not rounded."""
    if operand is None or operand.dtype != fp32:
        return operand
    return (operand.view(torch.int32) & -(1 << 13)).view(fp32)


if __name__ == "__main__":
    sys.exit(main())
