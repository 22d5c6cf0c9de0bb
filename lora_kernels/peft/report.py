"""The answer of `fuse`, and how it prints."""

import re
from dataclasses import dataclass

import torch

from lora_kernels.ops.lora_linear import BACKENDS
from lora_kernels.qualify import choose


@dataclass(frozen=True)
class Report:
    """What `fuse` did: the names of the layers that now run `lora_linear`, and why the rest do not.

    Printed, it is a table with one row for each group of layers whose names differ only in numbers
    and which share one outcome.
    """

    fused: list[str]
    not_fused: dict[str, str]

    def __str__(self) -> str:
        total = len(self.fused) + len(self.not_fused)
        if not total:
            return "no PEFT layer found, nothing is fused"
        outcomes = dict.fromkeys(self.fused, "fused") | self.not_fused
        groups: dict[tuple[str, str], list[str]] = {}
        for name, outcome in outcomes.items():
            groups.setdefault((re.sub(r"\d+", "*", name), outcome), []).append(name)
        rows = [
            (str(len(names)), names[0] if len(names) == 1 else pattern, outcome)
            for (pattern, outcome), names in groups.items()
        ]
        width = max(len(name) for _, name, _ in rows)
        lines = [f"{count:>5}  {name:<{width}}  {outcome}" for count, name, outcome in rows]
        header = f"{'count':>5}  {'module':<{width}}  outcome"
        # Which backend then runs is this machine's own verdict.
        trust = choose.trust(BACKENDS, "cuda") if torch.cuda.is_available() else ()
        fused = f"{len(self.fused)} of {total} PEFT layers fused"
        return "\n".join([header, *lines, fused, *trust])
