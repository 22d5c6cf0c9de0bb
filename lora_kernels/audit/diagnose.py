"""What a wrong result would be right for: another factor, or rows and columns of other adapters.

Least squares propose an explanation from some rows of x; the tolerance rule accepts it or not.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.audit.expected import Expected, error_ratio, worst_ratio
from lora_kernels.audit.layer import Operands, Part
from lora_kernels.ops.lora_linear.philox import keep_mask
from lora_kernels.testing import fp64

_ROWS = 256  # of x, or four times the rank: enough to recognise an adapter by


class Diagnosis(NamedTuple):
    """A status and reason as in `Verdict`, and the parts that explain the output, if those do."""

    status: str
    reason: str
    parts: tuple[Part, ...] | None = None


def explain_output(
    call: Expected,
    name: str,
    x: Tensor,
    y: Tensor,
    others: Mapping[str, Operands],
    dtype: torch.dtype,
) -> Diagnosis | None:
    """Return what would make the wrong output y[..., N] of layer `name` right, or None.

    `others` are all layers of the model, this one included; `dtype` is that of the eager rule.
    """
    operands = call.operands

    def explains(parts: Iterable[Part]) -> bool:
        trial = call._replace(operands=operands._replace(parts=tuple(parts)))
        return worst_ratio(y, trial.output(x, fp64), trial.output(x, dtype), x) <= 1

    if y.shape != (*x.shape[:-1], operands.weight.shape[0]):
        return Diagnosis("wrong", f"y has shape {tuple(y.shape)}")
    if not y.isfinite().all():
        return Diagnosis("wrong", "y is not finite")
    if not operands.parts:
        return None
    rows = max(_ROWS, 4 * sum(part.lora_a.shape[0] for part in operands.parts))
    x2, y2 = x.reshape(-1, x.shape[-1])[:rows], y.detach().reshape(-1, y.shape[-1])[:rows]
    frozen = Expected(operands._replace(parts=()))
    low_rank = (y2.to(fp64) - frozen.output(x2, fp64)).cpu()
    wanted = (call.output(x2, fp64) - frozen.output(x2, fp64)).cpu()
    factor = _factor(low_rank, wanted, operands.parts)
    scaled = (part._replace(scaling=part.scaling * factor) for part in operands.parts)
    if factor != 1 and explains(scaled):
        return _counted(factor, operands.parts)

    pool = _Pool(name, others, x2, y2, call)
    for what, parts in pool.proposals(low_rank):
        if explains(parts):
            return Diagnosis("mispaired", what, tuple(parts))
    return None


def explain_gradient(
    got: Tensor, exact: Tensor, eager: Tensor, parts: tuple[Part, ...]
) -> Diagnosis | None:
    """Return the factor that would make a wrong gradient of A or B right, or None."""
    if got.shape != exact.shape:
        return None
    factor = _factor(got.to("cpu", fp64), exact.cpu(), parts)
    if factor == 1 or error_ratio(got, factor * exact, factor * eager) > 1:
        return None
    return _counted(factor, parts)


def explain_sharing(layers: Mapping[str, Operands]) -> Iterable[tuple[str, Diagnosis]]:
    """Yield the layers whose A or B is also that of a layer with another W."""
    held: dict[tuple[str, int], dict[str, int]] = {}
    for name, (weight, _, parts, *_) in layers.items():
        for part in parts:
            for letter, matrix in (("A", part.lora_a), ("B", part.lora_b)):
                if matrix.data_ptr():
                    held.setdefault((letter, matrix.data_ptr()), {})[name] = weight.data_ptr()
    for (letter, _), holders in held.items():
        for name, address in holders.items():
            others = [other for other, its in holders.items() if its != address]
            if others:
                what = f"its {letter} is the very tensor of {' and '.join(others)}"
                yield name, Diagnosis("mispaired", what)


def _factor(got: Tensor, wanted: Tensor, parts: tuple[Part, ...]) -> float:
    """Return how many times `got` holds `wanted`; a number that has a meaning where one is near."""
    norm = float((wanted * wanted).sum())
    raw = float((got * wanted).sum()) / norm if norm > 0 else 1.0
    known = [value for value, _ in _meanings(parts) if abs(value - raw) < 0.05 * max(abs(value), 1)]
    return min(known, key=lambda value: abs(value - raw), default=raw)


def _meanings(parts: tuple[Part, ...]) -> list[tuple[float, str]]:
    found = [(0.0, "not applied"), (2.0, "applied or scaled twice")]
    if len(parts) == 1 and parts[0].scaling not in (0.0, 1.0):
        scaling = parts[0].scaling
        found += [
            (1 / scaling, f"scaling {scaling:g} dropped"),
            (scaling, f"scaling {scaling:g} squared"),
        ]
    return found


def _counted(factor: float, parts: tuple[Part, ...]) -> Diagnosis:
    meanings = ", or ".join(text for value, text in _meanings(parts) if value == factor)
    status = "twice" if factor == 2 else "wrong"
    return Diagnosis(
        status, f"the adapter counts {factor:.3g} times" + f": {meanings}" * bool(meanings)
    )


class _Pool:
    """The rows of every A and the columns of every B that would fit a layer, its own ones first."""

    def __init__(
        self, name: str, others: Mapping[str, Operands], x: Tensor, y: Tensor, call: Expected
    ) -> None:
        self.name, (n, k) = name, (y.shape[-1], x.shape[-1])
        self.own = _rank_one(call.operands.parts)
        layers = {name: call.operands} | {o: v for o, v in others.items() if o != name}
        self.terms = {o: _rank_one(v.parts) for o, v in layers.items()}
        self.rows = [
            (owner, term) for owner, terms in self.terms.items() for term in terms
            if term.lora_a.shape[1] == k
        ]  # fmt: skip
        self.columns = [
            (owner, term) for owner, terms in self.terms.items() for term in terms
            if term.lora_b.shape[0] == n
        ]  # fmt: skip
        dropped = x.detach().to("cpu", fp64)
        if call.seed is not None:
            keep = keep_mask(call.seed, call.dropout_p, range(len(x)), range(k), dropped.device)
            dropped = dropped * keep / (1 - call.dropout_p)
        a = torch.cat([t.lora_a.detach()[t.rows].to("cpu", fp64) for _, t in self.rows])
        b = torch.cat([t.lora_b.detach()[:, t.columns].to("cpu", fp64) for _, t in self.columns], 1)
        self.p, self.b = dropped @ a.t(), b.t()  # [M,ΣR] and [ΣR,N]

    def proposals(self, low_rank: Tensor) -> Iterable[tuple[str, list[Part]]]:
        """Yield what could explain low_rank[M,N], in words and as parts."""
        rank = len(self.own)
        scale = torch.tensor([term.scaling for term in self.own], dtype=fp64)
        p, b = self.p[:, :rank] * scale, self.b[:rank]
        if rank <= len(p):  # p·B' = low_rank
            picked = self._nearest(torch.linalg.lstsq(p, low_rank).solution, self.b, self.columns)
            parts = [
                mine._replace(lora_b=other.lora_b, columns=other.columns)
                for mine, (_, other) in zip(self.own, picked, strict=True)
            ]
            yield self._words("B", "columns", [o for o, _ in picked]), _grouped(parts)
        if rank <= b.shape[1]:  # P'·B = low_rank
            found = low_rank @ torch.linalg.pinv(scale[:, None] * b)
            picked = self._nearest(found.t(), self.p.t(), self.rows)
            parts = [
                mine._replace(lora_a=other.lora_a, rows=other.rows)
                for mine, (_, other) in zip(self.own, picked, strict=True)
            ]
            yield self._words("A", "rows", [o for o, _ in picked]), _grouped(parts)
        best = min(self._pairs(low_rank), default=None)
        if best is not None:
            yield f"its A and B are those of {best[1]}", _grouped(self.terms[best[1]])

    def _pairs(self, low_rank: Tensor) -> Iterable[tuple[float, str]]:
        for owner, terms in self.terms.items():
            rows = [i for i, (o, _) in enumerate(self.rows) if o == owner]
            columns = [j for j, (o, _) in enumerate(self.columns) if o == owner]
            if owner != self.name and terms and len(rows) == len(columns) == len(terms):
                scale = torch.tensor([term.scaling for term in terms], dtype=fp64)
                yield float((self.p[:, rows] * scale @ self.b[columns] - low_rank).norm()), owner

    @staticmethod
    def _nearest(
        found: Tensor, pool: Tensor, terms: list[tuple[str, Part]]
    ) -> list[tuple[str, Part]]:
        return [terms[i] for i in torch.cdist(found, pool).argmin(1).tolist()]

    def _words(self, matrix: str, lines: str, owners: list[str]) -> str:
        foreign = sorted({owner for owner in owners if owner != self.name})
        if not foreign:
            return f"the {lines} of its {matrix} are in another order"
        which = [i for i, owner in enumerate(owners) if owner != self.name]
        if len(which) == len(owners):
            return f"its {matrix} is that of {' and '.join(foreign)}"
        noun = lines if len(which) > 1 else lines.removesuffix("s")
        numbers = ", ".join(map(str, which))
        return f"{noun} {numbers} of its {matrix} belong to {' and '.join(foreign)}"


def _rank_one(parts: Iterable[Part]) -> list[Part]:
    """Cut parts into terms of rank one."""
    return [
        part._replace(rows=[i], columns=[i]) for part in parts for i in range(part.lora_a.shape[0])
    ]


def _grouped(terms: Iterable[Part]) -> list[Part]:
    """Join terms that take from the same two matrices."""
    groups: dict[tuple[int, int, float], Part] = {}
    for term in terms:
        key = id(term.lora_a), id(term.lora_b), term.scaling
        if key in groups:
            kept = groups[key]
            groups[key] = kept._replace(
                rows=[*kept.rows, *term.rows],  # type: ignore[misc]
                columns=[*kept.columns, *term.columns],  # type: ignore[misc]
            )
        else:
            groups[key] = term
    return list(groups.values())
