"""`python -m bench.schedule [--write]`: predict the one-launch kernels' times by list scheduling.

The items of a launch, in the order of `lora_linear/schedule.py`, go one after another to whichever
worker is free first, an SM or a cluster of two; what waits for a flag waits. How long an item takes
comes from what the PTX machine has counted of it (`items.py`) and from the constants below, none of
them measured on these kernels. `--write` refreshes the tables in the operator's README.
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
from bench.items import RATES, Item, Rates, recorded, table, title
from bench.report import markdown, marked
from lora_kernels.ops.lora_linear import schedule
from lora_kernels.ops.lora_linear.config import TileConfig, pick
from lora_kernels.ops.lora_linear.problem import Problem

README = Path(__file__).parents[1] / "lora_kernels/ops/lora_linear/README.md"

# An H100 SXM under load.
SMS, CLOCK_MHZ = 132, RATES[90].mhz
CUBLAS_TFLOPS = 798  # what cuBLAS reaches on 8192 x 8192 x 8192 in bf16: the floor's rate
ACHIEVED = RATES[90]._replace(products=CUBLAS_TFLOPS * 1e6 / (2 * SMS * CLOCK_MHZ))

M, RANKS = 8192, (16, 64)
MODELS = ("llama8b", "llama70b")
BACKENDS = {"triton": "Triton", "cuda": "CUDA"}
EARLIER = (1.0, 1.5, 2.0, 3.0)  # waves before the end of dx that da items may begin


class Ticket(NamedTuple):
    """`before_us`, then a wait for the flags of `rows` (all if `all_rows`), then `after_us`."""

    before_us: float
    after_us: float
    row: int | None = None  # waits for this row block's P or Q; or publishes it
    publishes: bool = False
    all_rows: bool = False


@dataclass(frozen=True)
class Model:
    """Items of a backend at a problem's rank, with the tile it takes, as the PTX machine counts.

    Nothing of an item overlaps with what surrounds it: ticket, pipeline fill, flag and epilogue,
    for which `overhead_us` is assumed; but for a tile's store, `held_us` of it, which overlaps with
    the next tile's products, and of a launch only the last one's does not.
    """

    backend: str
    config: TileConfig
    ctas: int  # of a worker
    rates: Rates
    overhead_us: float
    held_us: float
    problem: Problem

    @property
    def workers(self) -> int:
        """Return how many items run at a time."""
        return SMS // self.ctas * self.config.ctas

    def _set(self, dropout: bool) -> tuple[int, dict[str, Item]]:
        """Return the rank on record that stands for the problem's, and the items there.

        Drawing the mask costs the same at every rank: with dropout that of 16 is on record.
        """
        sets = recorded()[self.backend]["sets"]
        r = 16 if dropout or self.problem.r <= 16 else 64
        return r, sets[title(r, dropout)]

    def _us(self, clocks: float) -> float:
        return clocks / CLOCK_MHZ * self.config.ctas

    def steps_us(self, kind: str, depth: int) -> float:
        """Return the time of an item's contraction over `depth`, by its critical resource."""
        item = self._set(self.problem.dropout)[1][kind]
        return self._us(schedule.blocks(depth, item.stage) * item.critical(self.rates)[1])

    def rank_us(self, kind: str) -> float:
        """Return the time of a tile's contraction over the rank."""
        r, items = self._set(dropout=False)
        return self._us(items[kind].around.products / self.rates.products * self.problem.r / r)

    @property
    def mask_us(self) -> float:
        """Return the time to mask the accumulators of a dx tile: what dropout adds around it."""
        plain, masked = (self._set(d)[1]["dx"].around.instructions for d in (False, True))
        return self._us((masked - plain) / self.rates.instructions) * self.problem.dropout

    def item_us(self, kind: str, depth: int) -> float:
        """Return the time of a whole item that has not to wait."""
        tile = self.rank_us(kind) - self.held_us if kind in ("main", "dx") else 0.0
        mask = self.mask_us if kind == "dx" else 0.0
        return self.steps_us(kind, depth) + tile + mask + self.overhead_us

    def early_waves(self) -> int:
        """Return how many waves of dx tiles come after the da items.

        None in Triton; in CUDA by the clocks that `tiles_after_da` in csrc reckons with.
        """
        if self.backend != "cuda":
            return 0
        m, n, _, r = self.problem[:4]
        around, around_tile, deep = 2400, 1000, 1000 if self.problem.dropout else 384
        da = schedule.blocks(m, 64) * deep
        dx = schedule.blocks(n, 64) * 1024 + schedule.blocks(r, 16) * 256
        return 0 if da <= dx else (da + around) // (dx + around_tile) + 1


def model(backend: str, problem: Problem, *, backward: bool) -> Model:
    """Return the model of a backend on an H100.

    Triton's products go at the rate of cuBLAS, with 4 µs around an item; CUDA's at the peak, with
    2400 clocks, of which a tile's store takes 1400.
    """
    if backend == "cuda":
        config = TileConfig(bm=256, bn=256, bk=256, warps=12, stages=4, br=64, group=8)
        around_us, held_us = 2400 / CLOCK_MHZ, 1400 / CLOCK_MHZ
        return Model("cuda", config, 2, RATES[90], around_us, held_us, problem)
    config = pick(problem, backward=backward)
    return Model("triton sm_90", config, 1, ACHIEVED, 4.0, 0.0, problem)


def forward(model: Model) -> list[Ticket]:
    """Return the items of a forward launch, in the order of their tickets."""
    (m, n, k, r), c = model.problem[:4], model.config
    p_end, end = schedule.forward_ends(m, n, r, c.bm, c.bn, c.br)
    skinny_us, main_us = model.steps_us("P", k), model.steps_us("main", k)
    after_us = model.rank_us("main") + model.overhead_us - model.held_us
    items = []
    for ticket in range(end):
        if ticket < p_end:
            row, _ = schedule.skinny(ticket, schedule.blocks(r, c.br))
            items.append(Ticket(skinny_us, model.overhead_us, row, publishes=True))
        else:
            row, _ = _tile(model, ticket - p_end, m, n)
            items.append(Ticket(main_us, after_us, row))
    return items


def backward(model: Model, waves: float = 0.0) -> list[Ticket]:
    """Return the items of a backward launch; da begins `waves` of dx tiles before their end."""
    (m, n, k, r), c = model.problem[:4], model.config
    sizes = m, n, k, r, c.bm, c.bn, c.bk, c.br
    q_end, db_end, dx_end, end = schedule.backward_ends(*sizes, True, True, True)
    overhead_us = model.overhead_us
    # Dropout masks Q·A alone: the rank comes first, and nothing of a dx tile precedes the wait.
    main_us, rank_us = model.steps_us("dx", n), model.rank_us("dx") + overhead_us - model.held_us
    before_us, after_us = main_us, rank_us
    if model.problem.dropout:
        before_us, after_us = 0.0, main_us + rank_us + model.mask_us
    q_us, db_us, da_us = (model.steps_us(*each) for each in (("Q", n), ("db", m), ("da", m)))
    da = Ticket(0.0, da_us + overhead_us, all_rows=True)
    q, db, dx = [], [], []
    for ticket in range(dx_end):
        if ticket < q_end:
            row, _ = schedule.skinny(ticket, schedule.blocks(r, c.br))
            q.append(Ticket(q_us, overhead_us, row, publishes=True))
        elif ticket < db_end:
            db.append(Ticket(db_us, overhead_us))
        else:
            row, _ = _tile(model, ticket - db_end, m, k)
            dx.append(Ticket(before_us, after_us, row))
    late = min(round(waves * model.workers), len(dx))
    return [*q, *db, *dx[: len(dx) - late], *[da] * (end - dx_end), *dx[len(dx) - late :]]


def _tile(model: Model, item: int, m: int, columns: int) -> tuple[int, int]:
    c = model.config
    return schedule.tile(item, schedule.blocks(m, c.bm), schedule.blocks(columns, c.bn), c.group)


def makespan_us(items: list[Ticket], workers: int) -> float:
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
        return model(self.backend, self.problem, backward=backward)

    @cached_property
    def forward_us(self) -> float:
        """Return the time of the forward launch."""
        model = self.model()
        return makespan_us(forward(model), model.workers) + model.held_us

    def backward_us(self, waves: float | None = None) -> float:
        """Return the time of the backward launch; `waves` moves da from where the kernel has it."""
        model = self.model(backward=True)
        waves = model.early_waves() if waves is None else waves
        return makespan_us(backward(model, waves), model.workers) + model.held_us

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
        one.item_us("P", k),
        one.item_us("main", k),
        this.forward_us,
        this.floor_us(1.0),
        two.item_us("Q", n),
        two.item_us("da", m),
        two.item_us("dx", n),
        backward_us,
    )
    cells = [f"{time_us:.0f}" for time_us in times]
    ratio = f"{this.forward_us / this.floor_us(1.0):.2f}"
    return [f"{n} × {k}", str(r), *cells[:4], ratio, *cells[4:], f"{both:.2f}"]


def _orders(this: Prediction, name: str) -> list[str]:
    m, n, k, _ = this.problem[:4]
    model = this.model(backward=True)
    times = (
        model.item_us("da", m),
        model.item_us("dx", n),
        *map(this.backward_us, (None, 0.0, *EARLIER, float(M))),
    )
    cells = [f"{time_us:.0f}" for time_us in times]
    return [name, f"{n} × {k}", "yes" if this.problem.dropout else "no", *cells]


def blocks() -> dict[str, str]:
    """Return what stands in the README between the markers of these names."""
    return {"items": table(recorded(), title(16, False), title(16, True)), "schedule": tables()}


def main(argv: list[str] | None = None) -> int:
    """Print the tables, or write them into the operator's README."""
    parser = argparse.ArgumentParser(prog="python -m bench.schedule", description=__doc__)
    parser.add_argument("--write", action="store_true", help="refresh the operator's README")
    if parser.parse_args(argv).write:
        text = README.read_text()
        for marker, block in blocks().items():
            text = marked(text, marker, block)
        README.write_text(text)
    else:
        print(*blocks().values(), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
