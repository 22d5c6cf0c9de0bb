"""What an item of each kind costs: counted on the PTX machine, kept in items.json, never timed.

`PYTHONPATH=tests python -m ptx_machine.profile --record` counts anew.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import markdown

RECORD = Path(__file__).with_name("items.json")
KINDS = ("P", "main", "Q", "db", "dx", "da")


class Counts(NamedTuple):
    """Warp instructions of a CTA by kind, and what they multiply and move."""

    tensor: float
    copy: float
    shared: float
    global_: float
    other: float
    waits: float  # each once, however often a loop asks
    products: float  # multiply-adds on the tensor cores
    bytes: float  # of global memory, as they reach or leave the SM
    sectors: float  # of 32 bytes, by loads and stores of lanes
    wavefronts: float  # of shared memory, by loads and stores of lanes
    conflicts: float  # wavefronts beyond the fewest

    @property
    def instructions(self) -> float:
        """Return the sum over the kinds."""
        return sum(self[:6])


class Rates(NamedTuple):
    """What an SM does in a clock."""

    products: float  # dense, 16-bit
    bytes: float  # from L2
    mhz: float
    instructions: float = 4
    wavefronts: float = 1


# An A100's L2 gives 5120 bytes a clock, 47 to each of its 108 SMs; an H100's SM can take 64.
# An A100 at its boost clock, an H100 SXM under load.
RATES = {80: Rates(1024, 47, 1410), 90: Rates(2048, 64, 1600)}
RESOURCES = {
    "tensor cores": "products",
    "L2": "bytes",
    "issue": "instructions",
    "shared memory": "wavefronts",
}


class Item(NamedTuple):
    """What one CTA does for an item: `step` for `stage` of the contraction, `around` once.

    `needed` are the products that the mathematics asks of a step. A tile's rank loop is in
    `around`, as are ticket, flag and epilogue.
    """

    stage: int
    needed: int
    step: Counts
    around: Counts

    def beyond(self, record: "Item") -> list[str]:
        """Return in what it does more than `record`."""
        return [
            f"{part} {name}: {now:g}, recorded {then:g}"
            for part in ("step", "around")
            for name, now, then in zip(
                Counts._fields, getattr(self, part), getattr(record, part), strict=True
            )
            if now > then
        ]

    def clocks(self, rates: Rates) -> dict[str, float]:
        """Return how long a step takes each resource."""
        return {
            name: getattr(self.step, what) / getattr(rates, what)
            for name, what in RESOURCES.items()
        }

    def us(self, rates: Rates, depth: int) -> float:
        """Return the time of its contraction over `depth`, the rank loop of a tile included."""
        clocks = -(-depth // self.stage) * self.critical(rates)[1]
        return (clocks + self.around.products / rates.products) / rates.mhz

    def critical(self, rates: Rates) -> tuple[str, float]:
        """Return what a step is bound by, and its clocks."""
        return max(self.clocks(rates).items(), key=lambda pair: pair[1])


# By backend: `compiler`, and `sets` of items by kind.
Record = dict[str, dict[str, Any]]


def title(r: int, dropout: bool) -> str:
    """Return the name of a set of items."""
    return f"R = {r}, dropout" if dropout else f"R = {r}"


@cache
def recorded() -> Record:
    """Return, for each backend on record, its `compiler` and its `sets` of items by title."""
    record = json.loads(RECORD.read_text())
    for backend in record.values():
        for items in backend["sets"].values():
            for kind, (stage, needed, step, around) in items.items():
                items[kind] = Item(stage, needed, Counts(*step), Counts(*around))
    return record


def write(record: Record) -> None:
    """Keep `record`, an item a line."""
    RECORD.write_text(_json(record) + "\n")
    recorded.cache_clear()


def _json(value: Any, indent: int = 0) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    space = " " * indent
    lines = (f'{space} "{key}": {_json(each, indent + 1)}' for key, each in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{space}}}"


HEAD = (
    *("item", "a step is", "tensor", "copy", "shared", "global", "other", "waits", "÷ needed"),
    *("bytes", "sectors", "conflicts", "bound by", "clocks", "around", "µs"),
)


def table(record: Record, *sets: str) -> str:
    """Return a table for each backend in `record`, of these sets or all."""
    blocks = []
    for backend, found in record.items():
        rates = RATES[80 if backend.endswith("80") else 90]
        rows = [
            [f"{kind}, {name}", *_cells(item, rates)]
            for name, items in found["sets"].items()
            if name in sets or not sets
            for kind, item in items.items()
        ]
        blocks += [f"**{backend}**, {found['compiler']}:", markdown(HEAD, rows)]
    return "\n\n".join(blocks)


def _cells(item: Item, rates: Rates) -> list[str]:
    step, (bound, clocks) = item.step, item.critical(rates)
    counts = item.stage, *step[:6], step.products / item.needed, *step[7:9], step.conflicts
    return [
        *(f"{value:.1f}".removesuffix(".0") for value in counts),
        bound,
        f"{clocks:.0f}",
        f"{item.around.instructions:.0f}",
        f"{item.us(rates, 4096):.1f}",
    ]
