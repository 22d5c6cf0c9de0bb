"""`python -m bench.gpu FOLDER [--quick]`: all that a GPU machine can say, in one bounded command.

Needs no network. Stages: what is there, build the extension, the GPU tests, the benchmarks behind
the README, the sanitizers on a small set. Each has a time limit, prints as it goes, and leaves the
next to run if it fails. FOLDER gets campaign.log, the results file, tables and plots.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from bench.providers import problem
from lora_kernels.ops.lora_linear import BACKENDS
from lora_kernels.testing import (
    Case,
    assert_accurate,
    bf16,
    expected,
    fp32,
    fp64,
    make_inputs,
    run_backend,
)

ROOT = Path(__file__).parent.parent
TOTAL_S, QUICK_S = 520, 110
REPORT_S = 30  # what the last case and the tables take once the budget of the benchmarks is spent
# Ragged against every tile, and with more than one row block.
SMALL_SET = (
    Case(130, 70, 96, 17, bf16, bias=True),
    Case(67, 131, 89, 5, bf16, dropout_p=0.3),
    Case(130, 136, 64, 16, bf16, fp32),
    Case(300, 264, 136, 24, bf16, bias=True, dropout_p=0.3),  # what the CUDA backend takes
)


class Stage(NamedTuple):
    """A command with a time limit, and the reason to leave it out, if any."""

    name: str
    command: list[str]
    limit_s: int
    skip: str | None = None


def stages(folder: Path, *, quick: bool) -> list[Stage]:
    """List the stages, and why this machine cannot run some."""
    python = [sys.executable, "-m"]
    no_gpu = None if torch.cuda.is_available() else "there is no CUDA device"
    no_build = None if (ROOT / "csrc").exists() else "this version has no csrc"
    if no_build is None and shutil.which("nvcc") is None:
        no_build = "nvcc is not installed"
    tests = ["pytest", "-q", "-m", "gpu", "-p", "no:benchmark", "-p", "no:cacheprovider", "tests"]
    tests += ["-n", "4"] if find_spec("xdist") else []
    first = [
        Stage("info", [*python, "lora_kernels.info"], 40),
        Stage("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 80, no_build),
        Stage("tests", [*python, *tests], 120, no_gpu),
    ]
    if quick:
        return first
    table = ["--table", "smoke"] if no_gpu else []  # enough to show that the stage works
    bench = [*python, "bench", "--out", str(folder), "--seconds=0.3", "--budget={budget}", *table]
    bench += ["-k", "not compiled or llama8b.gate_up-m8192-r16"]  # compiling takes seconds a case
    no_sanitizer = None if shutil.which("compute-sanitizer") else "it is not installed"
    small = [*python, "bench.gpu", str(folder), "--small-set"]
    exact = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]  # every tensor is an allocation of its own
    sanitizers = [
        Stage(
            f"sanitizer {tool}",
            [*exact, "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small],
            60,
            no_gpu or no_sanitizer,
        )
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    ]
    return [*first, Stage("bench", bench, 230), *sanitizers]


def main(argv: list[str] | None = None) -> int:
    """Run every stage; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--quick", action="store_true", help="correctness alone, in two minutes")
    parser.add_argument("--small-set", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.small_set:
        check_small_set()
        return 0
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + (QUICK_S if options.quick else TOTAL_S)
    lines = []
    with (folder / "campaign.log").open("w", buffering=1) as log:
        for stage in stages(folder, quick=options.quick):
            started = time.monotonic()
            outcome = run(stage, deadline - started, log)
            lines.append(f"{stage.name:<20} {time.monotonic() - started:6.1f} s  {outcome}")
        say("\n" + "\n".join(lines), log)
    return int(any("failed" in line or "out of time" in line for line in lines))


def run(stage: Stage, left_s: float, log: TextIO) -> str:
    """Run one stage, printing as it goes; return how it ended."""
    say(f"\n=== {stage.name}", log)
    if stage.skip is not None:
        say(f"skipped: {stage.skip}", log)
        return f"skipped: {stage.skip}"
    limit_s = min(stage.limit_s, left_s)
    if limit_s <= 0:
        return "out of time: not started"
    command = [word.format(budget=max(limit_s - REPORT_S, 1)) for word in stage.command]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that the time limit also ends what it started
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        say(line.rstrip("\n"), log)
    status = process.wait()
    timer.cancel()
    if status == -signal.SIGKILL:
        return f"out of time: stopped after {limit_s:.0f} s"
    return "ok" if status == 0 else f"failed with status {status}"


def say(text: str, log: TextIO) -> None:
    """Print and log."""
    print(text, flush=True)
    print(text, file=log)


def check_small_set() -> None:
    """Run every kernel on a few ragged cases, with no other kernels than copies around it."""
    device = torch.device("cuda")
    for backend in BACKENDS:
        for case in SMALL_SET:
            if backend.name == "reference" or backend.why_not(problem(case, device)):
                continue
            results = run_backend(backend, case, make_inputs(case, device))
            on_cpu = make_inputs(case)
            exact, eager = (expected(case, on_cpu, dtype) for dtype in (fp64, case.dtype))
            for name, got in results._asdict().items():
                assert_accurate(name, got, exact[name], eager[name])
            print(f"{backend.name}: {case}: right", flush=True)


if __name__ == "__main__":
    sys.exit(main())
