"""`python -m bench.tune --budget SECONDS`: time the Triton backend's candidates, print the best.

What it prints is a table for `lora_kernels/ops/lora_linear/config.py`; nothing is tuned at run
time. Wrong candidates are named and left out.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.cases import TABLES, BenchCase
from bench.forced import FEW_CTAS, Tile, every_tile, forced
from bench.measure import attempt, call_of, operand_sets, time_calls
from bench.providers import AGAIN, FROZEN, PROVIDERS, problem
from bench.timing import Call
from lora_kernels.ops.lora_linear import triton
from lora_kernels.ops.lora_linear.config import pick
from lora_kernels.testing import check_backend

# Several tiles, one of them ragged, for every CTA; rows of x and W stay aligned for TMA.
GATE_ROWS, GATE_FEATURES = 300, 512


def main(argv: list[str] | None = None) -> int:
    """Print the table as it is measured; return 0, or 1 if there is nothing in it."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--budget", type=float, default=300, help="seconds (default: 300)")
    parser.add_argument("--seconds", type=float, default=0.3, help="timing per direction")
    parser.add_argument("--table", choices=sorted(TABLES), default="gpu")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline, timed = time.monotonic() + options.budget, 0
    print("TUNED = {  # (arch, M, N, K, R, itemsize, backward, TF32): × frozen, and the rule's")
    for bench_case in TABLES[options.table]:
        if time.monotonic() > deadline:
            print(f"    # no time left from {bench_case.name} on")
            break
        for line in tune(bench_case, device, options.seconds):
            print(f"    {line}", flush=True)
            timed += not line.startswith("#")
    print("}")
    if not timed:
        print("bench.tune: error: no candidate could be timed here", file=sys.stderr)
    return int(not timed)


def tune(bench_case: BenchCase, device: torch.device, seconds: float) -> Iterator[str]:
    """Yield the table's lines for both directions of a case, and a comment for what fails."""
    case = bench_case.case
    facts = problem(case, device)
    if reason := triton.BACKEND.why_not(facts):
        yield f"# {bench_case.name}: {reason}"
        return
    sizes = {"m": GATE_ROWS, "n": GATE_FEATURES, "k": GATE_FEATURES}
    gated = case._replace(**{name: min(getattr(case, name), most) for name, most in sizes.items()})
    right: dict[tuple[bool, bool], list[Tile]] = {}
    for tile in every_tile(facts):
        with forced(tile, FEW_CTAS):
            verdict = attempt(check_backend, triton.BACKEND, tile.judge(gated), device)
        if isinstance(verdict, str):
            yield f"# {tile} {verdict}"
        else:
            right.setdefault((tile.backward, tile.tf32), []).append(tile)
    sets = operand_sets(case, device)
    frozen, ours = (
        [provider.build(operands, case) for operands in sets]
        for provider in PROVIDERS
        if provider.name in (FROZEN, f"lora_kernels.{triton.BACKEND.name}")
    )
    for (backward, tf32), several in right.items():
        direction = "backward" if backward else "forward"
        yardstick, call = (call_of(direction, layers, sets) for layers in (frozen, ours))
        calls = {FROZEN: yardstick, AGAIN: yardstick}
        calls |= {str(tile): _forced(tile, call) for tile in several}
        with forced(several[0]):  # for its precision, which the yardstick shares
            rows = time_calls(calls, device, seconds)
        timed = {tile.config: rows[str(tile)].info["x_frozen"] for tile in several}
        best, ruled = min(timed, key=timed.__getitem__), pick(facts, backward=backward, tf32=tf32)
        key = facts.arch, *case[:4], case.dtype.itemsize, backward, tf32
        yield f"{key}: {best},  # {timed[best]:.3f}, rule {timed.get(ruled, float('nan')):.3f}"


def _forced(tile: Tile, call: Call) -> Call:
    def run(state: Any) -> object:
        with forced(tile):
            return call.run(state)

    return Call(call.prepare, run)


if __name__ == "__main__":
    sys.exit(main())
