"""`python -m bench`: measure a table of cases, keep the results and report them."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import report
from bench.cases import TABLES
from bench.providers import PROVIDERS
from bench.results import RESULTS, device_folder, load, machine

ROOT = Path(__file__).parent.parent
LAYER, STEP = "bench/bench_lora_linear.py", "bench/bench_decoder_layer.py"
PAIRS = "bench/bench_peft.py"
NOTHING_SELECTED = 5  # pytest's exit status


def main(argv: list[str] | None = None) -> int:
    """Run the suite; the exit status is 1 if this project was wrong, or slower than PEFT."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("-k", metavar="EXPRESSION", help="select rows, as pytest does")
    parser.add_argument("--table", choices=sorted(TABLES), help="cases (default: this device's)")
    parser.add_argument("--seconds", type=float, help="timing per case and direction (default: 1)")
    parser.add_argument("--budget", type=float, help="seconds for the whole run")
    parser.add_argument("--out", type=Path, help="folder for the results file, tables and plots")
    options = parser.parse_args(argv)

    facts = machine()
    kept = RESULTS / device_folder(facts["device"])
    complete = not (options.k or options.table or options.out)  # the README cites no selection
    folder = options.out or (kept if complete else ROOT / "runs" / "bench")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        raw_path = Path(scratch) / "raw.json"
        status = _pytest([STEP, PAIRS, LAYER], raw_path, options, started)
        if not raw_path.exists():
            print("no row was timed")
            return status
        raw = json.loads(raw_path.read_text())
        for peer in (p.name for p in PROVIDERS if p.package and p.installed):
            path = Path(scratch) / f"{peer}.json"
            ended = _pytest([LAYER, f"--isolated={peer}"], path, options, started)
            if ended != NOTHING_SELECTED:
                _merge(raw, peer, path, ended)
    unnamed = folder / "results.json"
    unnamed.write_text(json.dumps(raw))
    path = unnamed.rename(folder / f"{load(unnamed).commit}.json")
    print(report.write(load(path), folder))
    if complete:
        report.refresh(ROOT / "README.md")
    print(f"results: {path}")
    return status


def _pytest(what: list[str], path: Path, options: argparse.Namespace, started: float) -> int:
    command = [sys.executable, "-m", "pytest", *what, "-q", "-rfx", "-p", "no:cacheprovider"]
    command += [f"--benchmark-json={path}", "--benchmark-quiet"]
    for name in ("k", "table", "seconds"):
        if (value := getattr(options, name)) is not None:
            command += ["-k", value] if name == "k" else [f"--{name}={value}"]
    if options.budget is not None:
        command += [f"--budget={options.budget - (time.monotonic() - started)}"]
    # A pytest around this one must not turn its benchmarks off.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def _merge(raw: dict[str, Any], peer: str, path: Path, ended: int) -> None:
    """Add the rows of a peer, measured beside the frozen layer in a process of its own."""
    if not path.exists():
        everywhere = {"case": "every case", "direction": "any", "provider": peer}
        raw["untimed"].append(
            everywhere | {"reason": f"broken: nothing was timed (exit status {ended})"}
        )
        return
    found = json.loads(path.read_text())
    raw["benchmarks"] += [
        row for row in found["benchmarks"] if row["extra_info"]["provider"] == peer
    ]
    raw["untimed"] += [row for row in found["untimed"] if row["provider"] == peer]


if __name__ == "__main__":
    sys.exit(main())
