"""`python -m bench.schedule [--write]`: predict the one-launch kernels' times by list scheduling.

The items of a launch, in the order of `lora_linear/schedule.py`, go one after another to whichever
worker is free first, an SM or a cluster of two; what waits for a flag waits. How long an item takes
comes from the constants below, none of them measured on these kernels. `--write` refreshes the
tables in the operator's README.
"""

import argparse
import heapq
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

from bench.cases import SHAPES
from bench.report import markdown, marked
from lora_kernels.ops.lora_linear import schedule
from lora_kernels.ops.lora_linear.config import TileConfig, pick
from lora_kernels.ops.lora_linear.problem import Problem

README = Path(__file__).parents[1] / "lora_kernels/ops/lora_linear/README.md"
MARKER = "schedule"

# An H100 SXM under load.
SMS, CLOCK_MHZ = 132, 1600
CUBLAS_TFLOPS = 798  # what cuBLAS reaches on 8192 x 8192 x 8192 in bf16: the floor's rate
L2_BYTES = 64  # per clock and SM: what bounds the skinny items
# About 100 instructions for eight elements, four warps of 32 issuing one a clock each.
MASK_CLOCKS = 100 / 8 / 32 / 4  # per element

M, RANKS = 8192, (16, 64)
MODELS = ("llama8b", "llama70b")
BACKENDS = {"triton": "Triton", "cuda": "CUDA"}
EARLIER = (1.0, 1.5, 2.0, 3.0)  # waves before the end of dx that da items may begin


class Item(NamedTuple):
    """`before_us`, then a wait for the flags of `rows` (all if `all_rows`), then `after_us`."""

    before_us: float
    after_us: float
    row: int | None = None  # waits for this row block's P or Q; or publishes it
    publishes: bool = False
    all_rows: bool = False


@dataclass(frozen=True)
class Triton:
    """Items of the Triton backend: a CTA an SM, at the rate of cuBLAS, 4 µs around each item.

    The 4 µs are for ticket, pipeline fill, flag and store.
    """

    config: TileConfig
    OVERHEAD_US = 4.0
    CTAS = 1  # of a worker

    @property
    def workers(self) -> int:
        return SMS * self.config.ctas

    def tile_us(self, depth: int) -> float:
        """Return the time of a main or dx tile's contraction over `depth`."""
        flops = 2 * self.config.bm * self.config.bn * depth
        return flops / (CUBLAS_TFLOPS * 1e6 / self.workers)

    rank_us = tile_us

    def early_waves(self, problem: Problem) -> int:
        """Return how many waves of dx tiles come after the da items: none."""
        return 0

    def skinny_us(self, height: int, depth: int, masked: bool) -> float:
        """Return the time of a P, Q, da or db item: its loads, or the mask that it makes."""
        clocks = (height + self.config.br) * 2 * depth / L2_BYTES
        if masked:
            clocks = max(clocks, MASK_CLOCKS * height * depth)
        return clocks / CLOCK_MHZ * self.config.ctas

    @property
    def mask_us(self) -> float:
        """Return the time to mask the accumulators of a dx tile."""
        return MASK_CLOCKS * self.config.bm * self.config.bn / CLOCK_MHZ * self.config.ctas


@dataclass(frozen=True)
class Cuda:
    """Items of the CUDA backend, per cluster of two CTAs; the tensor cores run at their peak.

    A stage is 64 deep. The epilogue of a tile overlaps with nothing of its own CTA.
    """

    config = TileConfig(bm=256, bn=256, bk=256, warps=12, stages=4, br=64, group=8)
    workers = SMS // 2
    STAGE_CLOCKS = 1024  # 128 x 256 x 64 of a CTA at 2048 products a clock
    SKINNY_CLOCKS = 384  # 128 + 64 rows of 128 bytes from L2
    MASKED_CLOCKS = 1000  # the same where the mask of 128 x 64 elements is drawn
    SLICE_CLOCKS = 256  # a k16 slice of the rank
    AROUND_CLOCKS = 2400  # an item: ticket, pipeline fill, epilogue
    OVERHEAD_US = AROUND_CLOCKS / CLOCK_MHZ

    def tile_us(self, depth: int) -> float:
        """Return the time of a main or dx tile's contraction over `depth`."""
        return schedule.blocks(depth, 64) * self.STAGE_CLOCKS / CLOCK_MHZ

    def rank_us(self, rank: int) -> float:
        """Return the time of a tile's contraction over the rank."""
        return schedule.blocks(rank, 16) * self.SLICE_CLOCKS / CLOCK_MHZ

    def skinny_us(self, height: int, depth: int, masked: bool) -> float:
        """Return the time of a P, Q, da or db item: its loads, or the mask that it makes."""
        stage = self.MASKED_CLOCKS if masked else self.SKINNY_CLOCKS
        return schedule.blocks(depth, 64) * stage / CLOCK_MHZ

    def early_waves(self, problem: Problem) -> int:
        """Return how many waves of dx tiles come after the da items: `tiles_after_da` in csrc."""
        da_us = self.skinny_us(self.config.bk, problem.m, problem.dropout)
        dx_us = self.tile_us(problem.n) + self.rank_us(problem.r)
        if da_us <= dx_us:
            return 0
        return int((da_us + self.OVERHEAD_US) // (dx_us + self.OVERHEAD_US)) + 1

    @property
    def mask_us(self) -> float:
        """Return the time to mask the accumulators of a dx tile."""
        return MASK_CLOCKS * 128 * 256 / CLOCK_MHZ


Model = Triton | Cuda


def forward(model: Model, problem: Problem) -> list[Item]:
    """Return the items of a forward launch, in the order of their tickets."""
    (m, n, k, r), c = problem[:4], model.config
    p_end, end = schedule.forward_ends(m, n, r, c.bm, c.bn, c.br)
    skinny_us = model.skinny_us(c.bm, k, problem.dropout)
    items = []
    for ticket in range(end):
        if ticket < p_end:
            row, _ = schedule.skinny(ticket, schedule.blocks(r, c.br))
            items.append(Item(skinny_us, model.OVERHEAD_US, row, publishes=True))
        else:
            row, _ = _tile(model, ticket - p_end, m, n)
            items.append(Item(model.tile_us(k), model.rank_us(r) + model.OVERHEAD_US, row))
    return items


def backward(model: Model, problem: Problem, waves: float = 0.0) -> list[Item]:
    """Return the items of a backward launch; da begins `waves` of dx tiles before their end."""
    (m, n, k, r), c = problem[:4], model.config
    sizes = m, n, k, r, c.bm, c.bn, c.bk, c.br
    q_end, db_end, dx_end, end = schedule.backward_ends(*sizes, True, True, True)
    overhead_us = model.OVERHEAD_US
    # Dropout masks Q·A alone: the rank comes first, and nothing of a dx tile precedes the wait.
    main_us, rank_us = model.tile_us(n), model.rank_us(r) + overhead_us
    before_us, after_us = main_us, rank_us
    if problem.dropout:
        before_us, after_us = 0.0, main_us + rank_us + model.mask_us
    da = Item(0.0, model.skinny_us(c.bk, m, problem.dropout) + overhead_us, all_rows=True)
    q, db, dx = [], [], []
    for ticket in range(dx_end):
        if ticket < q_end:
            row, _ = schedule.skinny(ticket, schedule.blocks(r, c.br))
            q.append(Item(model.skinny_us(c.bm, n, False), overhead_us, row, publishes=True))
        elif ticket < db_end:
            db.append(Item(model.skinny_us(c.bk, m, False), overhead_us))
        else:
            row, _ = _tile(model, ticket - db_end, m, k)
            dx.append(Item(before_us, after_us, row))
    late = min(round(waves * model.workers), len(dx))
    return [*q, *db, *dx[: len(dx) - late], *[da] * (end - dx_end), *dx[len(dx) - late :]]


def _tile(model: Model, item: int, m: int, columns: int) -> tuple[int, int]:
    c = model.config
    return schedule.tile(item, schedule.blocks(m, c.bm), schedule.blocks(columns, c.bn), c.group)


def makespan_us(items: list[Item], workers: int) -> float:
    """Return when the last item ends: each begins, in order, on the worker that is free first."""
    free = [0.0] * workers
    ready: dict[int, float] = {}
    for item in items:
        at = heapq.heappop(free) + item.before_us
        if item.all_rows:
            at = max(at, *ready.values())
        elif item.row is not None and not item.publishes:
            at = max(at, ready[item.row])
        at += item.after_us
        if item.publishes and item.row is not None:
            ready[item.row] = max(ready.get(item.row, 0.0), at)
        heapq.heappush(free, at)
    return max(free)


@dataclass(frozen=True)
class Prediction:
    """The times of both directions of `problem`, in µs."""

    problem: Problem
    backend: str

    def model(self, *, backward: bool = False) -> Model:
        """Return the backend's model, with the tile that it would take."""
        return Cuda() if self.backend == "cuda" else Triton(pick(self.problem, backward=backward))

    @cached_property
    def forward_us(self) -> float:
        """Return the time of the forward launch."""
        model = self.model()
        return makespan_us(forward(model, self.problem), model.workers)

    def backward_us(self, waves: float | None = None) -> float:
        """Return the time of the backward launch; `waves` moves da from where the kernel has it."""
        model = self.model(backward=True)
        waves = model.early_waves(self.problem) if waves is None else waves
        return makespan_us(backward(model, self.problem, waves), model.workers)

    def floor_us(self, share: float) -> float:
        """Return the frozen GEMM's time with `share`·(R/K + R/N) on top."""
        m, n, k, r = self.problem[:4]
        return 2 * m * n * k / (CUBLAS_TFLOPS * 1e6) * (1 + share * (r / k + r / n))


def problems(models: tuple[str, ...], *ranks: int, dropout: bool = False) -> Iterator[Problem]:
    """Yield the projections of the models."""
    for (name, shape), r in product(SHAPES.items(), ranks):
        if name.startswith(models):
            yield Problem(M, shape.n, shape.k, r, dropout=dropout)


def tables() -> str:
    """Return what the README shows of both backends."""
    blocks = []
    for backend, name in BACKENDS.items():
        rows = [_times(Prediction(problem, backend)) for problem in problems(MODELS, *RANKS)]
        where = "last" if backend == "triton" else "before the last ⌈da/dx⌉ waves where da > dx"
        blocks += [f"**{name}**, da items {where}:", markdown(TIMES, rows)]
    rows = [
        _orders(Prediction(problem, backend), name)
        for backend, name in BACKENDS.items()
        for dropout in (False, True)
        for problem in problems(MODELS[:1], 16, dropout=dropout)
    ]
    head = [*ORDERS, *(f"{waves:g}" for waves in EARLIER), "before dx"]
    blocks += ["**Backward, da items earlier** by so many waves of dx tiles, R = 16:"]
    blocks += [markdown(head, rows)]
    return "\n\n".join(blocks)


TIMES = (
    *("N × K", "R", "P item", "main tile", "forward", "floor", "ratio"),
    *("Q item", "da, db item", "dx tile", "backward", "fwd+bwd ratio"),
)
ORDERS = ("backend", "N × K", "dropout", "da item", "dx tile", "as it is", "last")


def _times(this: Prediction) -> list[str]:
    m, n, k, r = this.problem[:4]
    one, two = this.model(), this.model(backward=True)
    backward_us = this.backward_us()
    both = (this.forward_us + backward_us) / (2 * this.floor_us(1.5))
    times = (
        one.skinny_us(one.config.bm, k, False) + one.OVERHEAD_US,
        one.tile_us(k) + one.rank_us(r) + one.OVERHEAD_US,
        this.forward_us,
        this.floor_us(1.0),
        two.skinny_us(two.config.bm, n, False) + two.OVERHEAD_US,
        two.skinny_us(two.config.bk, m, False) + two.OVERHEAD_US,
        two.tile_us(n) + two.rank_us(r) + two.OVERHEAD_US,
        backward_us,
    )
    cells = [f"{time_us:.0f}" for time_us in times]
    ratio = f"{this.forward_us / this.floor_us(1.0):.2f}"
    return [f"{n} × {k}", str(r), *cells[:4], ratio, *cells[4:], f"{both:.2f}"]


def _orders(this: Prediction, name: str) -> list[str]:
    m, n, k, r = this.problem[:4]
    dropout, model = this.problem.dropout, this.model(backward=True)
    tile_us = model.tile_us(n) + model.rank_us(r) + model.OVERHEAD_US + dropout * model.mask_us
    item_us = model.skinny_us(model.config.bk, m, dropout) + model.OVERHEAD_US
    times = item_us, tile_us, *map(this.backward_us, (None, 0.0, *EARLIER, float(M)))
    cells = [f"{time_us:.0f}" for time_us in times]
    return [name, f"{n} × {k}", "yes" if dropout else "no", *cells]


def main(argv: list[str] | None = None) -> int:
    """Print the tables, or write them into the operator's README."""
    parser = argparse.ArgumentParser(prog="python -m bench.schedule", description=__doc__)
    parser.add_argument("--write", action="store_true", help="refresh the operator's README")
    if parser.parse_args(argv).write:
        README.write_text(marked(README.read_text(), MARKER, tables()))
    else:
        print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
