"""What an item of each kind costs, as compiled: instructions, products, bytes, bank conflicts.

    PYTHONPATH=tests python -m ptx_machine.profile [--record]

Prints the operator README's table of items, counted anew. `--record` keeps the counts in
bench/items.json and refreshes the README; `test_ptx_profile.py` fails where an item has come to do
more. Nothing is timed.

An item is a difference: of launches of which one has an item more of that kind. Its step is a
difference again: of items of which one has more to contract.
"""

import functools
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench import items, schedule
from bench.items import Counts, Item
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear.config import TileConfig, pick
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.testing import Case, make_inputs
from ptx_machine import cuda_backend
from ptx_machine.launch import Run
from ptx_machine.machine import Machine
from ptx_machine.parse import Kernel

FIELDS = {
    "tensor": ("wgmma.mma_async", "mma.sync"),
    "copy": ("cp.async",),
    "shared": ("ld.shared", "st.shared", "ldmatrix", "stmatrix"),
    "global_": ("ld.global", "st.global", "st.relaxed", "atom", "red"),
    "waits": ("mbarrier.try_wait", "bar.sync", "barrier.sync", "barrier.cluster.wait"),
    # How often one polls depends on who is faster; moves and parameters cost nothing in SASS.
    "": ("ld.relaxed", "ld.param", "bra", "setp", "mov"),
}


def field(opcode: str) -> str:
    """Return the field of `Counts` that an opcode belongs to, or "" if it does not count."""
    return next((name for name, begins in FIELDS.items() if opcode.startswith(begins)), "other")


def count(run: Run) -> Counts:
    """Return what all CTAs of `run` did together."""
    total: Counter[str] = Counter()
    for statement, counted in zip(run.kernel.statements, run.counts, strict=True):
        executed, _, sectors, moved, wavefronts, fewest = counted
        name = field(statement.opcode)
        if not name:
            continue
        total[name] += executed
        if name == "tensor":
            m, n, k = re.search(r"m(\d+)n(\d+)k(\d+)", statement.opcode).groups()  # type: ignore[union-attr]
            # A warp issues its quarter of a warpgroup's product.
            warps = 4 if statement.opcode.startswith("wgmma") else 1
            total["products"] += executed * int(m) * int(n) * int(k) // warps
        total.update(bytes=moved, sectors=sectors)
        total.update(wavefronts=wavefronts, conflicts=wavefronts - fewest)
    return Counts(*(total[name] for name in Counts._fields))


def _combined(a: Counts, b: Counts, factor: float) -> Counts:
    """Return a + factor·b."""
    return Counts(*(x + factor * y for x, y in zip(a, b, strict=True)))


class Tiles(NamedTuple):
    """The items of a CTA: rows and columns of a tile, columns of a db or da item; and how much
    of K or N, and of M, a step contracts."""

    rows: int
    columns: int
    narrow: int
    stage: int
    deep_stage: int


class Subject(NamedTuple):
    """A backend on one architecture, and what is asked of it: ranks, with or without dropout."""

    on: Callable[[Machine, Problem, bool], Backend]
    tiles: Callable[[Problem, bool], Tiles]
    cluster: int
    sets: tuple[tuple[int, bool], ...]


def _triton(arch: int, *sets: tuple[int, bool]) -> Subject:
    """Return the Triton backend with the tile that it would take for a large layer."""
    from ptx_machine import triton_backend

    def config(problem: Problem, backward: bool) -> TileConfig:
        return pick(problem._replace(arch=arch), backward=backward)

    def tiles(problem: Problem, backward: bool) -> Tiles:
        c = config(problem, backward)
        return Tiles(c.bm, c.bn, c.bk, c.bk, c.bm)

    return Subject(
        lambda machine, *call: triton_backend.on(machine, arch, config(*call)), tiles, 1, sets
    )


ALL = (16, False), (16, True), (64, False)
SUBJECTS = {
    "cuda": Subject(
        lambda machine, *_: cuda_backend.on(machine),
        lambda *_: Tiles(128, 256, 128, 64, 64),
        2,
        ALL,
    )
}
if importlib.util.find_spec("triton"):
    SUBJECTS["triton sm_80"] = _triton(80, *ALL[:2])
    SUBJECTS["triton sm_90"] = _triton(90, *ALL)


class Kind(NamedTuple):
    """A kind of item: what it contracts over, which size makes more of it, and what comes along."""

    depth: str
    grows: str
    beside: str = ""
    needs: tuple[bool, bool, bool] | None = None  # gradients of the backward it is counted in


ONLY_DX = True, False, False
KINDS = {
    "main": Kind("k", "n"),
    "P": Kind("k", "m", beside="main"),
    "dx": Kind("n", "k", needs=ONLY_DX),
    "Q": Kind("n", "m", beside="dx", needs=ONLY_DX),
    "db": Kind("m", "n", needs=(False, False, True)),
    "da": Kind("m", "k", needs=(False, True, False)),
}


def measure(
    name: str, r: int, dropout: bool, edit: Callable[[Kernel], Kernel] = lambda kernel: kernel
) -> dict[str, Item]:
    """Return the items of a backend at rank `r`; `edit` changes its kernels first."""
    subject = SUBJECTS[name]
    problem = Problem(8192, 4096, 4096, r, dropout=dropout)

    @functools.cache
    def launch(case: Case, backward: bool) -> Counts:
        machine = Machine(multiprocessors=subject.cluster, resident=1, adversarial=False, edit=edit)
        backend, inputs = subject.on(machine, problem, backward), make_inputs(case)
        if backward:
            p = torch.zeros(case.m, case.r, dtype=case.dtype)
            backend.backward(inputs.backward(case, p))
        else:
            backend.forward(inputs.forward(case))
        return count(machine.runs[-1])

    @functools.cache
    def cost(kind: str, depth: int) -> Counts:
        over, grows, beside, needs = KINDS[kind]
        tiles = subject.tiles(problem, needs is not None)
        rows = tiles.rows * subject.cluster
        sizes = {"m": rows, "n": tiles.columns, "k": tiles.columns, over: depth}
        p = 0.5 * dropout  # s/(1-p) is the same with and without
        case = Case(**sizes, r=r, dtype=torch.bfloat16, dropout_p=p, scaling=0.75 * (1 - p))
        if needs is not None:
            case = case._replace(needs=needs)
        more = tiles.narrow * subject.cluster if over == "m" else tiles.columns
        grown = case._replace(**{grows: sizes[grows] + (rows if grows == "m" else more)})
        found = _combined(launch(grown, needs is not None), launch(case, needs is not None), -1)
        found = Counts(*(value / subject.cluster for value in found))
        return _combined(found, cost(beside, depth), -1) if beside else found

    made = {}
    for kind in items.KINDS:
        tiles = subject.tiles(problem, KINDS[kind].needs is not None)
        deep = KINDS[kind].depth == "m"
        stage = tiles.deep_stage if deep else tiles.stage
        few, many = cost(kind, 256), cost(kind, 512)
        step = Counts(*(value * stage / 256 for value in _combined(many, few, -1)))
        around = _combined(few, step, -256 / stage)
        wide = kind in ("main", "dx")
        needed = (tiles.narrow if deep else tiles.rows) * (tiles.columns if wide else r) * stage
        made[kind] = Item(stage, needed, *(Counts(*map(_short, c)) for c in (step, around)))
    return made


def _short(value: float) -> float:
    return int(value) if value == int(value) else value


def compiler(name: str) -> str:
    """Return the version of what compiles a backend: another may well emit other code."""
    if name == "cuda":
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            return "no nvcc"
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
        return f"nvcc {re.search(r'V([0-9.]+)', text.stdout)[1]}"  # type: ignore[index]
    return f"triton {importlib.metadata.version('triton')}"


def main() -> None:
    record = {
        name: {
            "compiler": compiler(name),
            "sets": {items.title(*each): measure(name, *each) for each in subject.sets},
        }
        for name, subject in SUBJECTS.items()
    }
    if "--record" in sys.argv:
        items.write({**items.recorded(), **record})
        schedule.main(["--write"])
    sys.stdout.write(items.table(record) + "\n")


if __name__ == "__main__":
    main()
