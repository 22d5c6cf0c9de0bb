"""The answer of `audit`, and how it prints."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Worst first: a layer with several faults has the verdict that comes first.
VERDICTS = ("mispaired", "twice", "wrong", "bypassed", "dead", "unjudged", "right")
RESULTS = ("y", "dx", "da", "db")


@dataclass(frozen=True)
class Verdict:
    """What `audit` found in one layer.

    Attributes:
        status: one of

            - `right`: every result that the step needed is within the tolerance;
            - `wrong`: a result is not, is missing, or the scaling is not the adapter's own;
            - `twice`: wrong, and explained by an adapter that counts two times;
            - `mispaired`: wrong, and explained by rows or columns of another A or B;
            - `bypassed`: its adapter got gradients that did not come through the layer's output,
              so that there is nothing to compare with;
            - `dead`: it cannot learn: no gradient reaches it, or A and B are both zero;
            - `unjudged`: merged, disabled, or of a kind that is not known: see the reason.
        reason: what explains the status, or what to bear in mind about a right layer; may be empty.
        ratios: the largest error of y, dx, da and db over its tolerance, where judged; a missing
            result has an infinite one. Above 1 is wrong.
    """

    status: str
    reason: str = ""
    ratios: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The verdict on every LoRA layer of a model, by name.

    Printed, it is a table with one row for each group of layers whose names differ only in numbers
    and which share status and reason; the ratios are the largest of the group.
    """

    layers: dict[str, Verdict]

    @property
    def ok(self) -> bool:
        """Whether there are LoRA layers, and every one was judged and is right."""
        return bool(self.layers) and all(v.status == "right" for v in self.layers.values())

    def __bool__(self) -> bool:
        return self.ok

    @property
    def faults(self) -> dict[str, Verdict]:
        """The layers that are neither right nor unjudged."""
        fine = ("right", "unjudged")
        return {name: v for name, v in self.layers.items() if v.status not in fine}

    def __str__(self) -> str:
        if not self.layers:
            return "no LoRA layer found, nothing is audited"
        groups: dict[tuple[str, str, str], list[str]] = {}
        for name, verdict in self.layers.items():
            key = re.sub(r"\d+", "*", name), verdict.status, verdict.reason
            groups.setdefault(key, []).append(name)
        rows: list[tuple[str, ...]] = [("count", "module", *RESULTS, "verdict")]
        for (pattern, status, reason), names in groups.items():
            verdicts = [self.layers[name] for name in names]
            ratios = (_worst(verdicts, result) for result in RESULTS)
            outcome = f"{status}: {reason}" if reason else status
            rows.append(
                (str(len(names)), names[0] if len(names) == 1 else pattern, *ratios, outcome)
            )
        width = max(len(module) for _, module, *_ in rows)
        lines = [
            f"{count:>5}  {module:<{width}}" + "".join(f"{r:>8}" for r in ratios) + f"  {outcome}"
            for count, module, *ratios, outcome in rows
        ]
        statuses = [v.status for v in self.layers.values()]
        counts = ((statuses.count(status), status) for status in reversed(VERDICTS))
        found = ", ".join(f"{count} {status}" for count, status in counts if count)
        return "\n".join([*lines, f"{len(statuses)} LoRA layers: {found}"])


def _worst(verdicts: list[Verdict], result: str) -> str:
    ratios = [v.ratios[result] for v in verdicts if result in v.ratios]
    return f"{max(ratios):.2g}" if ratios else "-"
