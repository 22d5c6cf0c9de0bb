"""`python -m bench.report [FILE]`: tables and plots of a results file, and the README's figures.

Every figure of the README stands between `<!-- bench:cpu -->` or `<!-- bench:gpu -->` and
`<!-- /bench -->`, and is written here from the newest results file of that kind of device.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.plots import plot
from bench.results import RESULTS, Results, load, newest, too_slow

ROOT = Path(__file__).parent.parent
OURS = "lora_kernels"
DEVICES = {"cpu": "cpu", "gpu": "cuda"}
_WORDS = (
    "case",
    "layer",
    "provider",
    "reason",
    "backend",
    "N × K",
    "item",
    "bound by",
    "kind",
    "left to PEFT because",
)  # columns that are not numbers
_DIRECTIONS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Report one results file, or refresh everything from the newest ones."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="default: the newest of each device")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the file's own)")
    options = parser.parse_args(argv)
    if options.file is not None:
        print(write(load(options.file), options.out or options.file.parent))
        return 0
    for device_type in DEVICES.values():
        if (results := newest(device_type)) is not None:
            write(results, results.path.parent)
    refresh(ROOT / "README.md")
    return 0


def write(results: Results, folder: Path) -> str:
    """Write tables.md and the plots into `folder`; return the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    images = plot(results, folder)
    blocks = [f"# {results.machine['device']}", summary(results)]
    blocks += [f"![{image.stem}]({image.name})" for image in images]
    blocks += list(_details(results))
    (folder / "tables.md").write_text("\n\n".join(blocks) + "\n")
    return summary(results)


def refresh(readme: Path, results: Path = RESULTS) -> None:
    """Rewrite what stands between the markers of `readme`, from the newest results files."""
    if not readme.exists():
        return
    text = readme.read_text()
    for marker, device_type in DEVICES.items():
        found = newest(device_type, results)
        block = "Not measured yet."
        if found is not None:
            link = found.path.parent.relative_to(results.parent.parent).as_posix()
            block = f"{summary(found)}\n\nEvery row, with plots: [{link}]({link}/tables.md)."
        text = marked(text, f"bench:{marker}", block)
    readme.write_text(text)


def marked(text: str, marker: str, block: str) -> str:
    """Return `text` with `block` for what stands between `<!-- a:b -->`, the marker, and `/a`."""
    end = f"<!-- /{marker.partition(':')[0]} -->"
    pattern = re.compile(f"(<!-- {re.escape(marker)} -->\n).*?({re.escape(end)})", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{block}\n{match[2]}", text)


def summary(results: Results) -> str:
    """Return the headline tables: time over the frozen layer's, and what it was measured on."""
    blocks = []
    for direction, words in _DIRECTIONS.items():
        if direction != "backward" and (table := _ratios(results, direction)):
            blocks += [f"**{words.capitalize()}**, time over the bare frozen layer's:", table]
    if steps := [row for row in results.rows if row["direction"] == "step"]:
        blocks += [
            "**One training step** of a decoder layer, forward, backward and AdamW:",
            markdown(
                ["layer", "provider", "ms", "× frozen", "peak MiB"],
                (
                    (
                        row["case"],
                        row["provider"],
                        _number(row["median_us"] / 1e3),
                        _ratio(row["x_frozen"]),
                        _number(row["peak_mib"]),
                    )
                    for row in steps
                ),
            ),
        ]
    if results.pairs:
        blocks += ["**Every kind of PEFT layer**, fused, time over PEFT's own:", _pairs(results)]
    return "\n\n".join([*blocks, _provenance(results)])


def _pairs(results: Results) -> str:
    """Return a table of fused over PEFT: a line for each kind of layer."""
    cells: dict[str, dict[str, str]] = {}
    for row in results.pairs:
        line = cells.setdefault(row["case"].removeprefix("peft."), {})
        spread = f"{row['x_peft_p20']:.2f}–{row['x_peft_p80']:.2f}"
        mark = "" if too_slow(row) is None else " **slower**"
        line[row["direction"]] = f"{row['x_peft']:.2f} ({spread}){mark}"
        line["left to PEFT"] = row["left"] or ""
    columns = ["forward", "both", "left to PEFT"]
    return markdown(
        ["kind", "forward", "forward + backward", "left to PEFT because"],
        ([name, *(line.get(column, "–") for column in columns)] for name, line in cells.items()),
    )


def _ratios(results: Results, direction: str) -> str:
    """Return a table of × frozen: a line for each case, a column for each provider."""
    rows = [row for row in results.rows if row["direction"] == direction]
    names = list(dict.fromkeys(_column(row) for row in rows if _column(row)))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        line = cells.setdefault(row["case"], {"floor": _ratio(row["floor_us"] / row["frozen_us"])})
        if _column(row):
            line[_column(row)] = _ratio(row["x_frozen"])
    for row in results.untimed:
        if row["case"] in cells and row["direction"] == direction and _column(row):
            line = cells[row["case"]]
            line.setdefault(_column(row), row["reason"].partition(":")[0].replace("absent", "–"))
            if _column(row) not in names and not row["reason"].startswith("absent"):
                names.append(_column(row))
    columns = ["floor", *names]
    lines = ([case, *(line.get(c, "–") for c in columns)] for case, line in cells.items())
    return markdown(["case", *columns], lines) if cells else ""


def _column(row: Row) -> str:
    """Return the summary's column of a row; this project's is the backend that "auto" runs."""
    name = row["provider"]
    if name.startswith("frozen"):
        return ""
    if name.startswith(OURS):
        return OURS if row["auto"] else ""
    return name


def _provenance(results: Results) -> str:
    machine = results.machine
    chip = machine["device"]
    if machine["device_type"] == "cpu":
        chip = f"{machine['cpu'].get('brand_raw', 'CPU')}, {machine['threads']} threads"
    rows = results.rows or results.pairs
    noise = statistics.median(row["noise"] for row in rows) if rows else 0.0
    versions = [f"{name} {version}" for name, version in machine["packages"].items() if version]
    if machine["driver"]:
        versions.insert(0, f"driver {machine['driver']}")
    return (
        f"{chip} · {' · '.join(versions)} · Python {machine['python_version']} · commit "
        f"{results.commit} · {results.datetime[:10]} · same against same differs by {noise:.1%}"
    )


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "provider": lambda row: f"{row['provider']}{' (auto)' if row.get('auto') else ''}",
    "median µs": lambda row: _number(row["median_us"]),
    "p20–p80": lambda row: f"{_number(row['p20_us'])}–{_number(row['p80_us'])}",
    "× frozen": lambda row: _ratio(row["x_frozen"]),
    "× floor": lambda row: _ratio(row.get("x_floor")),
    "TFLOP/s": lambda row: _number(row.get("tflops")),
    "GB/s": lambda row: _number(row.get("gbs")),
    "launches": lambda row: _number(row["launches"]),
    "peak MiB": lambda row: _number(row["peak_mib"]),
    "host µs": lambda row: _number(row["host_us"]),
    "error": lambda row: "–" if row["error"] is None else f"{row['error']:.1e}",
}


def _details(results: Results) -> Iterable[str]:
    """Yield a table for each case and direction, wrong and broken providers included."""
    untimed = [row for row in results.untimed if not row["reason"].startswith("absent")]
    groups = dict.fromkeys((row["case"], row["direction"]) for row in [*results.rows, *untimed])
    for case, direction in groups:
        here = [row for row in results.rows if (row["case"], row["direction"]) == (case, direction)]
        lines = [[show(row) for show in _COLUMNS.values()] for row in here]
        lines += [
            [row["provider"], row["reason"], *[""] * (len(_COLUMNS) - 2)]
            for row in untimed
            if (row["case"], row["direction"]) == (case, direction)
        ]
        noise = f"; same against same differs by {here[0]['noise']:.1%}" if here else ""
        yield f"## {case}, {_DIRECTIONS.get(direction, direction)}{noise}"
        yield markdown(list(_COLUMNS), lines)
    reasons = dict.fromkeys(
        (row["provider"], row["reason"])
        for row in results.untimed
        if row["reason"].startswith("absent")
    )
    if reasons:
        yield "## Not measured"
        yield markdown(["provider", "reason"], reasons)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; columns of numbers are aligned to the right."""
    rule = ["---" if name in _WORDS else "---:" for name in header]
    rows = [list(header), rule, *map(list, lines)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 2 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
