"""The plots of a results file: ratio to the floor, providers side by side, roofline, error."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.results import Results

Row = dict[str, Any]


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw every plot that `results` has rows for; return their files."""
    rows = [row for row in results.rows if row["direction"] != "step"]
    both = [row for row in rows if row["direction"] == "both"]
    images = []
    for name, draw, chosen in (
        ("ratio", _ratio, both),
        ("providers", _providers, both),
        ("roofline", _roofline, rows),
        ("error", _error, both),
    ):
        if chosen:
            figure = Figure(figsize=(10, 5), layout="constrained")
            draw(figure, chosen)
            figure.suptitle(f"{results.machine['device']}, commit {results.commit}", fontsize=9)
            images.append(folder / f"{name}.png")
            figure.savefig(images[-1], dpi=110, metadata={"Software": None})
    return images


def _ratio(figure: Any, rows: list[Row]) -> None:
    """Draw × floor against R, for the shape that has most ranks, and against the shape."""
    by_rank, by_shape = figure.subplots(1, 2, sharey=True)
    plain = [row for row in rows if not row["dropout"] and row["adapter_dtype"] == row["dtype"]]
    plain = plain or rows
    ranks: dict[tuple, set[int]] = {}
    for row in plain:
        ranks.setdefault((row["shape"], row["M"], row["dtype"]), set()).add(row["R"])
    (shape, m, dtype) = where = max(ranks, key=lambda key: (len(ranks[key]), key[1]))
    for name, mine in _by_provider(plain):
        points = sorted(
            (row["R"], row["x_floor"])
            for row in mine
            if (row["shape"], row["M"], row["dtype"]) == where
        )
        by_rank.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
        points = [
            (row["shape"], row["x_floor"])
            for row in mine
            if (row["R"], row["M"], row["dtype"]) == (16, m, dtype)
        ]
        by_shape.plot(*zip(*points, strict=True), marker="o", ls="", label=name) if points else None
    for axes in (by_rank, by_shape):
        axes.axhline(1, color="black", lw=0.8)
    by_rank.set(xlabel=f"R ({shape}, M={m}, {dtype})", ylabel="forward + backward, × floor")
    by_rank.set_xscale("log", base=2)
    by_shape.set(xlabel=f"shape (R=16, M={m}, {dtype})")
    by_shape.tick_params(axis="x", rotation=30)
    by_rank.legend(fontsize=7)


def _providers(figure: Any, rows: list[Row]) -> None:
    """Draw × frozen of every provider side by side, case by case."""
    axes = figure.subplots()
    cases = list(dict.fromkeys(row["case"] for row in rows))
    providers = list(_by_provider(rows))
    width = 0.8 / len(providers)
    for i, (name, mine) in enumerate(providers):
        at = [cases.index(row["case"]) + (i - len(providers) / 2) * width for row in mine]
        axes.bar(at, [row["x_frozen"] for row in mine], width, label=name)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=7)
    axes.set(ylabel="forward + backward, × frozen")
    axes.legend(fontsize=7, ncols=3)


def _roofline(figure: Any, rows: list[Row]) -> None:
    """Draw TFLOP/s against operations per byte, under the best rates any row reached."""
    axes = figure.subplots()
    for name, mine in _by_provider(rows, frozen=True):
        axes.loglog(
            [row["flops"] / row["bytes"] for row in mine],
            [row["tflops"] for row in mine],
            marker="o", ls="", ms=4, label=name,
        )  # fmt: skip
    peak = max(row["tflops"] for row in rows)
    bandwidth = max(row["gbs"] for row in rows) * 1e-3
    ends = [f(row["flops"] / row["bytes"] for row in rows) for f in (min, max)]
    knee = min(max(peak / bandwidth, ends[0]), ends[1])
    at = [ends[0], knee, ends[1]]
    axes.loglog(at, [min(peak, bandwidth * x) for x in at], color="black", lw=0.8)
    axes.set(xlabel="floating-point operations per byte", ylabel="TFLOP/s")
    axes.legend(fontsize=7, ncols=2)


def _error(figure: Any, rows: list[Row]) -> None:
    """Draw the largest error against float64 of every provider and case."""
    axes = figure.subplots()
    for name, mine in _by_provider(rows):
        label = [f"{row['case']}" for row in mine]
        axes.semilogy(label, [row["error"] for row in mine], marker="o", ls="", label=name)
    axes.tick_params(axis="x", rotation=30, labelsize=7)
    axes.set(ylabel="max |error| / max |float64|, worst of y, dx, da, db")
    axes.legend(fontsize=7, ncols=3)


def _by_provider(rows: list[Row], frozen: bool = False) -> Iterable[tuple[str, list[Row]]]:
    names = dict.fromkeys(row["provider"] for row in rows)
    for name in names:
        if frozen or not name.startswith("frozen"):
            yield name, [row for row in rows if row["provider"] == name]
