"""The answer of `fuse`, and how it prints."""

import re
from dataclasses import dataclass, field

import torch

from lora_kernels.ops.lora_linear import BACKENDS
from lora_kernels.peft.calls import FUSED
from lora_kernels.qualify import choose


@dataclass(frozen=True)
class Report:
    """What `fuse` did: the names of the layers that now run `lora_linear`, and why the rest do not.

    Printed, it is a table with one row for each group of layers whose names differ only in numbers
    and which share one outcome.
    """

    fused: list[str]
    not_fused: dict[str, str]
    # Groups of fused layers that add up their dx wherever they are seen to read one x.
    may_share: list[list[str]] = field(default_factory=list)
    # The living counts of the fused layers.
    _counts: dict[str, dict[str, int]] = field(default_factory=dict, repr=False, compare=False)

    def calls(self) -> "Calls":
        """Return how many calls of each fused layer ran fused, and why the others did not.

        They are counted from the first `fuse` on, in every thread of this process; what runs
        compiled code is not counted, for no Python runs there.
        """
        return Calls({name: dict(counts) for name, counts in self._counts.items()})

    def __str__(self) -> str:
        total = len(self.fused) + len(self.not_fused)
        if not total:
            return "no PEFT layer found, nothing is fused"
        outcomes = dict.fromkeys(self.fused, FUSED) | self.not_fused
        # Which backend then runs is this machine's own verdict.
        trust = choose.trust(BACKENDS, "cuda") if torch.cuda.is_available() else ()
        fused = f"{len(self.fused)} of {total} PEFT layers fused"
        return "\n".join([*_table(outcomes), fused, *trust])


class Calls(dict[str, dict[str, int]]):
    """The calls of each fused layer, by outcome: "fused", or why PEFT's code ran."""

    @property
    def fused(self) -> int:
        """The calls that ran fused, of all layers together."""
        return sum(counts.get(FUSED, 0) for counts in self.values())

    @property
    def fell_back(self) -> int:
        """The calls that ran PEFT's code, of all layers together."""
        return sum(sum(counts.values()) for counts in self.values()) - self.fused

    def __str__(self) -> str:
        if not self:
            return "no layer is fused, no call was counted"
        outcomes = {
            name: ", ".join(f"{count} × {outcome}" for outcome, count in counts.items())
            or "never called"
            for name, counts in self.items()
        }
        total = self.fused + self.fell_back
        return "\n".join([*_table(outcomes), f"{self.fused} of {total} calls ran fused"])


def _table(outcomes: dict[str, str]) -> list[str]:
    """Return a row for each group of layers that differ in numbers only and share an outcome."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, outcome in outcomes.items():
        groups.setdefault((re.sub(r"\d+", "*", name), outcome), []).append(name)
    rows = [
        (str(len(names)), names[0] if len(names) == 1 else pattern, outcome)
        for (pattern, outcome), names in groups.items()
    ]
    width = max(len(name) for _, name, _ in rows)
    lines = [f"{count:>5}  {name:<{width}}  {outcome}" for count, name, outcome in rows]
    return [f"{'count':>5}  {'module':<{width}}  outcome", *lines]
