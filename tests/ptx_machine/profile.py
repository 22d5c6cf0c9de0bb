"""What the compiled kernels do for each step of a main loop.

    PYTHONPATH=tests python -m ptx_machine.profile [--record]

The counts are differences: of the same problem with some stages more to contract, so that what is
left is a turn of the main loop of each tile. Nothing is timed. `--record` keeps them in
profile.json; `test_ptx_kernels.py` fails where a kernel has come to do more.
"""

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear.config import TileConfig
from lora_kernels.testing import Case, make_inputs, run_backend
from ptx_machine import cuda_backend
from ptx_machine.launch import Run
from ptx_machine.machine import Machine

KINDS = {
    "tensor": ("wgmma.mma_async", "mma.sync"),
    "copy": ("cp.async",),
    "shared": ("ld.shared", "st.shared", "ldmatrix", "stmatrix"),
    "global": ("ld.global", "st.global", "ld.relaxed", "st.relaxed", "atom", "red"),
    # How often one waits depends on who is faster; moves are gone once registers are assigned.
    "uncounted": ("mbarrier.try_wait", "bra", "setp", "bar", "barrier", "ld.param", "mov"),
}


class Profile(NamedTuple):
    """What a run executed: warp instructions by kind, and what they moved."""

    tensor: int
    copy: int
    shared: int
    global_: int
    other: int
    bytes: int  # of global memory
    sectors: int  # of 32 bytes, by loads and stores of lanes
    wavefronts: int  # of shared memory, by loads and stores of lanes
    conflicts: int  # wavefronts beyond the fewest

    def minus(self, other: "Profile", steps: int) -> "Profile":
        """Return the difference for each of `steps`."""
        return Profile(*((a - b) // steps for a, b in zip(self, other, strict=True)))


def kind(opcode: str) -> str:
    """Return the kind of an opcode, or "other"."""
    return next((k for k, begins in KINDS.items() if opcode.startswith(begins)), "other")


def profile(run: Run) -> Profile:
    """Return what `run` counted."""
    kinds: Counter[str] = Counter()
    sums = [0, 0, 0, 0]
    for statement, count in zip(run.kernel.statements, run.counts, strict=True):
        executed, _, sectors, moved, wavefronts, fewest = count
        kinds[kind(statement.opcode)] += executed
        for i, value in enumerate((moved, sectors, wavefronts, wavefronts - fewest)):
            sums[i] += value
    counted = (kinds[k] for k in ("tensor", "copy", "shared", "global", "other"))
    return Profile(*counted, *sums)


def profiles(on: Callable[[Machine], Backend], case: Case) -> tuple[Profile, Profile]:
    """Return what both directions execute for `case`, on one multiprocessor."""
    machine = Machine(multiprocessors=2, resident=1, races=False)
    run_backend(on(machine), case, make_inputs(case))
    forward, backward = map(profile, machine.runs)
    return forward, backward


def step(on: Callable[[Machine], Backend], case: Case, steps: int = 4) -> tuple[Profile, Profile]:
    """Return what one more stage of 64 of the contraction costs one tile, in each direction.

    The forward contracts over K, the dx tiles of the backward over N; `case` has one main tile.
    """
    deep = steps * 64
    base = profiles(on, case)
    longer = profiles(on, case._replace(k=case.k + deep))[0]
    wider = profiles(on, case._replace(n=case.n + deep))[1]
    return longer.minus(base[0], steps), wider.minus(base[1], steps)


def table(rows: dict[str, Profile]) -> str:
    """Return the profiles as a Markdown table."""
    lines = ["| | " + " | ".join(Profile._fields) + " |", "|---" * (len(Profile._fields) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in rows.items()]
    return "\n".join(lines)


WIDE = TileConfig(128, 256, 64, warps=8, stages=3)
BACKENDS: dict[str, Callable[[Machine], Backend]] = {"cuda": cuda_backend.on}
if importlib.util.find_spec("triton"):
    from ptx_machine import triton_backend

    BACKENDS["triton sm_80"] = lambda machine: triton_backend.on(machine, 80, WIDE)
    BACKENDS["triton sm_90"] = lambda machine: triton_backend.on(machine, 90, WIDE)


def measure(name: str) -> dict[str, Profile]:
    """Return a main-loop step of a backend, with and without dropout."""
    found = {}
    for dropout_p in (0.0, 0.5):
        only_dx = (True, False, False)
        case = Case(128, 256, 256, 16, torch.bfloat16, dropout_p=dropout_p, needs=only_dx)
        suffix = " dropout" if dropout_p else ""
        found[f"forward{suffix}"], found[f"dx{suffix}"] = step(BACKENDS[name], case)
    return found


def compiler(name: str) -> str:
    """Return the version of what compiles a backend: another may well emit other code."""
    if name == "cuda":
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            return "no nvcc"
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
        return f"nvcc {re.search(r'release ([0-9.]+)', text.stdout)[1]}"  # type: ignore[index]
    return f"triton {importlib.metadata.version('triton')}"


RECORD = Path(__file__).with_suffix(".json")


def recorded(name: str) -> dict[str, Profile] | None:
    """Return what is on record for a backend as compiled here, or None."""
    record = json.loads(RECORD.read_text()).get(name, {})
    if record.get("compiler") != compiler(name):
        return None
    return {item: Profile(**values) for item, values in record["steps"].items()}


def grown(found: Profile, record: Profile) -> list[str]:
    """Return in what a step does more than recorded; of the rest 5 % are allowed."""
    slack = {"other": 1.05}
    return [
        f"{name}: {now}, recorded {then}"
        for name, now, then in zip(Profile._fields, found, record, strict=True)
        if now > then * slack.get(name, 1.0)
    ]


def main() -> None:
    record = {}
    for name in BACKENDS:
        steps = measure(name)
        sys.stdout.write(f"\n{name}, {compiler(name)}\n\n{table(steps)}\n")
        steps_ = {item: step._asdict() for item, step in steps.items()}
        record[name] = {"compiler": compiler(name), "steps": steps_}
    if "--record" in sys.argv:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
