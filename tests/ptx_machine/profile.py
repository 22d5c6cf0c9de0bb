"""What the compiled kernels do for each step of a main loop: `python -m ptx_machine.profile`.

The counts are differences: of the same problem with one stage more to contract, so that what is
left is one turn of the main loop of each tile. Nothing is timed. Run it with tests/ in PYTHONPATH.
"""

import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from lora_kernels.dispatch import Backend
from lora_kernels.testing import Case, make_inputs, run_backend
from ptx_machine import cuda_backend
from ptx_machine.launch import Run
from ptx_machine.machine import Machine

KINDS = {
    "tensor": ("wgmma.mma_async", "mma.sync"),
    "copy": ("cp.async",),
    "shared": ("ld.shared", "st.shared", "ldmatrix", "stmatrix"),
    "global": ("ld.global", "st.global", "ld.relaxed", "st.relaxed", "atom", "red"),
    # How often one waits depends on who is faster; the rest does not.
    "waiting": ("mbarrier.try_wait", "bra", "setp", "bar", "barrier", "ld.param"),
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


def measure() -> dict[str, Profile]:
    """Return a main-loop step of every backend, with and without dropout."""
    from lora_kernels.ops.lora_linear.config import TileConfig
    from ptx_machine import triton_backend

    wide = TileConfig(128, 256, 64, warps=8, stages=3)
    backends: dict[str, Callable[[Machine], Backend]] = {
        "cuda sm_90a": cuda_backend.on,
        "triton sm_80": lambda machine: triton_backend.on(machine, 80, wide),
        "triton sm_90": lambda machine: triton_backend.on(machine, 90, wide),
    }
    found = {}
    for name, on in backends.items():
        for dropout_p in (0.0, 0.5):
            only_dx = (True, False, False)
            case = Case(128, 256, 256, 16, torch.bfloat16, dropout_p=dropout_p, needs=only_dx)
            suffix = " dropout" if dropout_p else ""
            found[f"{name} forward{suffix}"], found[f"{name} dx{suffix}"] = step(on, case)
    return found


if __name__ == "__main__":
    sys.stdout.write(table(measure()) + "\n")
