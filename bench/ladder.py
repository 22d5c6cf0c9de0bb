"""`python -m bench.ladder`: find the mechanism that is broken, from one tile to everything.

Each rung adds one mechanism and runs in a process of its own, for 30 seconds at most, so that a
crash or a hang has a name and the next rung starts afresh. A rung says which blocks of which
result are wrong, what differs between two runs, and whether the workspace was left dirty. Read the
report from the top: the first rung that fails names the culprit, the later ones often follow.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.forced import FEW_CTAS, Tile, forced, tiles
from bench.process import JOBS, run
from bench.providers import problem
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import BACKENDS, Problem, workspace
from lora_kernels.testing import (
    Case,
    Inputs,
    bf16,
    expected,
    fp16,
    fp32,
    fp64,
    make_inputs,
    poisoned_memory,
    run_backward,
    tolerance,
)

LIMIT_S = 30
UNSAFE = ("hung", "crashed")  # a benchmark would not survive it
ROWS, COLUMNS = 128, 64  # of a block in the map of errors: a CTA's rows, a panel's columns
SHOWN = 16
WRONG, SKIPPED = 3, 4  # exit statuses of a rung
STATUSES = {f"failed with status {WRONG}": "WRONG", f"failed with status {SKIPPED}": "-"}
Sizes, Needs = tuple[int, int, int, int], tuple[bool, bool, bool]
FORWARD, ALL = (False, False, False), (True, True, True)
DX, DA, DB = (True, False, False), (False, True, False), (False, False, True)


class Rung(NamedTuple):
    """One step: a case, of whose results only the needed ones are computed.

    Forward alone where `case` needs no gradient, else backward alone on the oracle's P, or both.
    `tile`: the Triton tile by its place in the direction, largest first; `ctas`: how many CTAs.
    """

    backend: str
    name: str
    case: Case
    both: bool = False
    tile: int | None = None
    ctas: int | None = None
    tf32: bool = False

    def __str__(self) -> str:
        return f"{self.backend}: {self.name}"

    def forced(self, facts: Problem) -> Tile | None:
        """Return the tile to force on a device with `facts`."""
        if self.tile is None:
            return None
        return tiles(facts, backward=any(self.case.needs), tf32=self.tf32)[self.tile]


def _cuda(name: str, sizes: Sizes, needs: Needs = FORWARD, **more: Any) -> Rung:
    return Rung("cuda", name, Case(*sizes, bf16, needs=needs, **more))


def _triton(
    name: str, sizes: Sizes, needs: Needs = FORWARD, tile: int = 0, ctas: int | None = None,
    tf32: bool = False, **more: Any,
) -> Rung:  # fmt: skip
    case = Case(*sizes, **{"dtype": bf16, "needs": needs, **more})
    return Rung("triton", name, case, tile=tile, ctas=ctas, tf32=tf32)


CUDA = (
    _cuda("one tile, one stage, no cluster", (64, 256, 64, 64)),
    _cuda("slices of K: K=16, R=8", (64, 256, 16, 8)),
    _cuda("the ring wraps: K=640, R=72", (128, 256, 640, 72)),
    _cuda("second warpgroup ragged, bias", (127, 264, 136, 16), bias=True),
    _cuda("many tickets, no cluster", (128, 65536, 128, 16)),
    _cuda("a cluster of two", (256, 256, 64, 64)),
    _cuda("cluster, the ring wraps, R=72", (256, 512, 640, 72)),
    _cuda("cluster, its second CTA has one row", (129, 264, 136, 16)),
    _cuda("cluster, its last CTA has no row", (257, 264, 136, 16)),
    _cuda("more items than SMs", (8192, 1024, 256, 16)),
    _cuda("db, no cluster: both operands MN-major", (128, 128, 64, 64), DB),
    _cuda("dx, no cluster: W and A MN-major", (128, 128, 256, 64), DX),
    _cuda("da, no cluster: transposed store", (128, 128, 256, 64), DA),
    _cuda("db, cluster", (256, 256, 64, 64), DB),
    _cuda("da, cluster", (256, 128, 256, 64), DA),
    _cuda("dx, cluster: its second CTA's descriptors", (256, 128, 256, 64), DX),
    _cuda("all gradients, ragged", (300, 520, 200, 72), ALL),
    _cuda("all gradients, more items than SMs", (8192, 512, 1024, 16), ALL),
    _cuda("dx added to one that is there", (300, 264, 520, 72), DX, onto=True),
    _cuda("dropout, no cluster", (128, 256, 128, 16), dropout_p=0.3),
    _cuda("dropout, cluster", (300, 256, 640, 72), dropout_p=0.3),
    _cuda("dropout, all gradients", (300, 264, 520, 24), ALL, dropout_p=0.3),
    Rung("cuda", "everything, fp16", Case(2100, 1160, 1032, 136, fp16, None, True, 0.3), both=True),
)
# Sizes of 512 are aligned for TMA and vectors, 131 and 89 are not.
TRITON = (
    _triton("one item, smallest tile", (16, 64, 64, 16), tile=-1),
    _triton("smallest tile, the pipeline wraps: K=640", (16, 64, 640, 16), tile=-1),
    _triton("one tile, largest", (128, 256, 64, 64)),
    _triton("largest, the pipeline wraps: K=640, R=72", (128, 256, 640, 72)),
    _triton("largest, by pointer: odd sizes, bias", (127, 131, 89, 17), bias=True),
    _triton("largest, ragged by TMA", (300, 520, 136, 16), bias=True),
    _triton("a queue: one CTA", (300, 512, 512, 16), ctas=1),
    _triton("flags between two CTAs", (300, 512, 512, 64), ctas=FEW_CTAS),
    _triton("R=8", (300, 512, 512, 8), ctas=FEW_CTAS),
    _triton("more items than SMs", (8192, 1024, 256, 16)),
    _triton("db, largest", (128, 128, 128, 64), DB),
    _triton("dx, largest", (128, 128, 256, 64), DX),
    _triton("da, largest", (128, 128, 128, 64), DA),
    _triton("db and da, R=16: eight columns a warpgroup", (300, 512, 512, 16), (False, True, True)),
    _triton("all gradients, smallest tile", (300, 512, 512, 16), ALL, tile=-1, ctas=FEW_CTAS),
    _triton("all gradients, largest", (300, 512, 512, 16), ALL, ctas=FEW_CTAS),
    _triton("all gradients, R=8", (300, 512, 512, 8), ALL, ctas=FEW_CTAS),
    _triton("all gradients, odd sizes", (300, 131, 89, 17), ALL, ctas=FEW_CTAS),
    _triton("all gradients, more items than SMs", (8192, 512, 1024, 16), ALL),
    _triton("dx added to one that is there", (300, 131, 520, 16), DX, ctas=FEW_CTAS, onto=True),
    _triton("dropout, smallest tile", (300, 512, 512, 64), tile=-1, dropout_p=0.3),
    _triton("dropout, largest", (300, 512, 512, 64), ctas=FEW_CTAS, dropout_p=0.3),
    _triton("dropout, all gradients", (300, 512, 512, 64), ALL, ctas=FEW_CTAS, dropout_p=0.3),
    _triton("fp32 adapters", (300, 512, 512, 16), ALL, ctas=FEW_CTAS, adapter_dtype=fp32),
    _triton("fp32", (300, 512, 512, 16), ALL, ctas=FEW_CTAS, dtype=fp32),
    _triton("TF32", (300, 512, 512, 16), ctas=FEW_CTAS, dtype=fp32, tf32=True),
    _triton("TF32, all gradients", (300, 512, 512, 16), ALL, ctas=FEW_CTAS, dtype=fp32, tf32=True),
    Rung("triton", "everything, fp16", Case(2100, 1159, 1031, 136, fp16, None, True, 0.3), True),
)
# Alternating, so that a time limit cuts both short alike.
RUNGS = tuple(rung for pair in zip_longest(CUDA, TRITON) for rung in pair if rung is not None)


def examine(
    backend: Backend, case: Case, device: torch.device, *, both: bool = False
) -> Iterator[str]:
    """Run a case twice and yield a line for whatever is wrong with its results."""
    inputs = make_inputs(case, device)
    reference64 = {name: t.detach() for name, t in expected(case, make_inputs(case), fp64).items()}
    eager = expected(case, inputs, case.dtype)
    wanted = dict.fromkeys(("y", "dx"), case.dtype) | dict.fromkeys(
        ("p", "da", "db"), inputs.lora_a.dtype
    )
    p = reference64["p"].to(device, inputs.lora_a.dtype)
    with poisoned_memory():
        first, second = (_results(backend, case, inputs, p, both) for _ in range(2))
    for name, got in first.items():
        if got is None or second[name] is None:
            yield f"{name} is missing"
        elif (got.shape, got.dtype) != (eager[name].shape, wanted[name]):
            shape = tuple(eager[name].shape)
            yield f"{name} is {got.dtype} {tuple(got.shape)}, not {wanted[name]} {shape}"
        else:
            error = (got.to("cpu", fp64) - reference64[name]).abs()
            allowed = tolerance(got.dtype, reference64[name], eager[name])
            if wrong := _blocks(~(error <= allowed)):
                worst = error.max() / reference64[name].abs().max()
                yield f"{name} is wrong in {wrong}; worst error {worst:.2g} of the largest element"
            again = second[name]
            changed = (got != again) & ~(got.isnan() & again.isnan())
            if changed.any():
                yield f"{name} differs between two runs in {_blocks(changed)}"
    for words in workspace._by_stream.values():
        if words.any():
            yield f"the workspace is not zero: {words[:16].tolist()}…"


def _results(
    backend: Backend, case: Case, inputs: Inputs, p: Tensor, both: bool
) -> dict[str, Tensor | None]:
    results: dict[str, Tensor | None] = {}
    if both or not any(case.needs):
        results["y"], results["p"] = backend.forward(inputs.forward(case))
    if any(case.needs):
        call = inputs.backward(case, results.get("p", p))
        gradients = run_backward(backend, call, inputs.onto)
        named = zip(("dx", "da", "db"), gradients, case.needs, strict=True)
        results |= {name: gradient for name, gradient, needed in named if needed}
    if p.is_cuda:
        torch.cuda.synchronize()
    return results


def _blocks(wrong: Tensor) -> str:
    """Name the blocks, as (row block, panel), that hold a true element; "" if there is none."""
    if not wrong.any():
        return ""
    rows, columns = (-(-size // block) for size, block in zip(wrong.shape, (ROWS, COLUMNS)))  # noqa: B905
    found = [
        (i, j)
        for i in range(rows)
        for j in range(columns)
        if wrong[ROWS * i : ROWS * (i + 1), COLUMNS * j : COLUMNS * (j + 1)].any()
    ]
    more = " …" if len(found) > SHOWN else ""
    shown = " ".join(map(str, found[:SHOWN])) + more
    return f"{len(found)} of {rows * columns} blocks {shown}"


def climb_one(rung: Rung, device: torch.device) -> int:
    """Run a rung in this process, print what it found, and return the exit status."""
    backend = next(backend for backend in BACKENDS if backend.name == rung.backend)
    facts = problem(rung.case, device)
    if reason := backend.why_not(facts):
        print(f"skipped: {reason}")
        return SKIPPED
    with forced(rung.forced(facts), rung.ctas):
        complaints = list(examine(backend, rung.case, device, both=rung.both))
    print("\n".join(complaints))
    return WRONG if complaints else 0


def climb(
    rungs: Sequence[object],
    command: Callable[[int], list[str]],
    budget_s: float,
    jobs: int,
    limit_s: float = LIMIT_S,
) -> list[str]:
    """Run the rungs, `jobs` side by side, and print each when it ends; return their statuses.

    `command(i)` runs rung i. What has not begun within `budget_s` is not started.
    """
    deadline = time.monotonic() + budget_s
    statuses = ["not started"] * len(rungs)

    def run_one(i: int) -> tuple[int, float, list[str]]:
        lines: list[str] = []
        started = time.monotonic()
        if (left_s := deadline - started) > 0:
            outcome = run(command(i), min(limit_s, left_s), lines.append)
            statuses[i] = STATUSES.get(outcome, outcome)
            if left_s < limit_s and outcome.startswith("hung"):
                statuses[i] = "out of time"
        return i, time.monotonic() - started, lines

    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(run_one, i) for i in range(len(rungs))]):
            i, time_s, lines = future.result()
            print(f"[{i:2}] {rungs[i]}: {statuses[i]} ({time_s:.1f} s)")
            print("".join(f"       {line}\n" for line in lines if line), end="", flush=True)
    return statuses


def main(argv: list[str] | None = None) -> int:
    """Climb; the exit status is 1 if a rung was wrong, crashed or hung."""
    parser = argparse.ArgumentParser(prog="python -m bench.ladder", description=__doc__)
    parser.add_argument("-k", metavar="TEXT", default="", help="rungs whose name has this text")
    parser.add_argument("--budget", type=float, default=600, help="seconds for all (default: 600)")
    parser.add_argument("--jobs", type=int, default=JOBS, help="rungs side by side")
    parser.add_argument("--unsafe", type=Path, help="file to list the backends in that hung")
    parser.add_argument("--backend", help="run every rung on this backend instead of its own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rung", type=int, help="run this one in this process")
    options = parser.parse_args(argv)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "bench.ladder: there is no CUDA device here\n")
    rungs = [r._replace(backend=options.backend) if options.backend else r for r in RUNGS]
    if options.rung is not None:
        return climb_one(rungs[options.rung], torch.device(options.device))
    chosen = [i for i, rung in enumerate(rungs) if options.k in str(rung)]
    names = [rungs[i] for i in chosen]
    statuses = climb(names, lambda i: _command(chosen[i], options), options.budget, options.jobs)
    print("\nThe ladder, from one tile to everything:")
    for name, status in sorted(zip(map(str, names), statuses, strict=True), key=_by_backend):
        print(f"  {status:<28} {name}")
    if options.unsafe is not None:
        hung = {r.backend for r, s in zip(names, statuses, strict=True) if s.startswith(UNSAFE)}
        options.unsafe.write_text("\n".join(sorted(hung)))
    print(", ".join(f"{count} {status}" for status, count in Counter(statuses).most_common()))
    return int(any(status not in ("ok", "-") for status in statuses))


def _command(i: int, options: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-m", "bench.ladder", "--rung", str(i)]
    command += ["--device", options.device]
    return command + (["--backend", options.backend] if options.backend else [])


def _by_backend(line: tuple[str, str]) -> str:
    return line[0].partition(":")[0]


if __name__ == "__main__":
    sys.exit(main())
