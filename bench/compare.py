"""`python -m bench.compare BASE [NEW]`: fail, and name the rows, where NEW is slower than BASE.

What is compared is the time over that of the frozen layer in the same run: the yardstick cancels
what the machine does to both. A row regressed if it grew by more than twice the noise of both runs.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.results import RESULTS, Results, load, machine

ROOT = Path(__file__).parent.parent
LEAST = 0.02  # below this, two runs of the same code differ by luck alone


def main(argv: list[str] | None = None) -> int:
    """Return 0 without a regression, 1 with one, 2 if the two cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("base", help="a results file, or a commit (measured now if it has none)")
    parser.add_argument("new", nargs="?", type=Path, help="a results file (default: measure now)")
    parser.add_argument("-k", metavar="EXPRESSION", help="select what is measured now")
    options = parser.parse_args(argv)
    try:
        is_file = Path(options.base).is_file()
        base = load(Path(options.base)) if is_file else at_commit(options.base, options.k)
        new = measure_now(ROOT, options.k) if options.new is None else load(options.new)
        found = regressions(base, new)
    except (OSError, ValueError) as error:
        print(f"bench.compare: error: {error}", file=sys.stderr)
        return 2
    common = _timed(base).keys() & _timed(new).keys()
    print(f"{base.commit} against {new.commit}: {len(common)} rows, {len(found)} regressed")
    for line in found:
        print(f"  {line}")
    return 1 if found else 0


def regressions(base: Results, new: Results) -> list[str]:
    """Return a line for every row of this project that got slower, wrong or lost.

    Raises:
        ValueError: the results come from different devices, or share no row.
    """
    if _where(base.machine) != _where(new.machine):
        raise ValueError(f"{_where(base.machine)} cannot be compared with {_where(new.machine)}")
    before, after = _timed(base), _timed(new)
    if not before.keys() & after.keys():
        raise ValueError("the two results files share no timed row of lora_kernels")
    lines = []
    for key in sorted(before.keys() & after.keys()):
        growth = after[key]["x_frozen"] / before[key]["x_frozen"] - 1
        limit = max(2 * (noise(before[key]) + noise(after[key])), LEAST)
        if growth > limit:
            lines.append(f"{' '.join(key)}: {growth:+.1%}, beyond the noise of {limit:.1%}")
    for row in new.untimed:
        key = row["case"], row["direction"], row["provider"]
        if key in before and not row["reason"].startswith("absent"):
            lines.append(f"{' '.join(key)}: {row['reason']}")
    return lines


def noise(row: dict[str, Any]) -> float:
    """Return the relative noise of a row: same against same, or the median's standard error."""
    deviation = (row["p80_us"] - row["p20_us"]) / 1.683  # of a normal distribution
    standard_error = 1.253 * deviation / math.sqrt(row["rounds"]) / row["median_us"]
    return max(row["noise"], standard_error)


def at_commit(commit: str, selection: str | None) -> Results:
    """Return the results of a commit on this device: the file it has, or measured in a worktree."""
    commit = _git("rev-parse", "--short=12", f"{commit}^{{commit}}")
    for path in RESULTS.glob(f"*/{commit}.json"):
        if (results := load(path)).machine["device"] == machine()["device"]:
            return results
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            shutil.copytree(ROOT / "bench", tree / "bench")  # one suite measures both
            if (tree / "setup.py").exists():
                build = [sys.executable, "setup.py", "build_ext", "--inplace"]
                subprocess.run(build, cwd=tree, check=True)
            return measure_now(tree, selection)._replace(commit=commit)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def measure_now(tree: Path, selection: str | None) -> Results:
    """Run the suite, or a selection of it, on the sources in `tree`."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "bench", "--out", out]
        command += ["-k", selection] if selection else []
        environment = os.environ | {"PYTHONPATH": str(tree)}
        subprocess.run(command, cwd=tree, env=environment, check=False)
        written = list(Path(out).glob("*.json"))
        if not written:
            raise ValueError(f"the suite wrote no results in {tree}")
        return load(written[0])


def _timed(results: Results) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        (row["case"], row["direction"], row["provider"]): row
        for row in results.rows
        if row["provider"].startswith("lora_kernels")
    }


def _where(facts: dict[str, Any]) -> str:
    if facts["device_type"] == "cpu":
        return f"{facts['cpu'].get('brand_raw', 'cpu')}, {facts['threads']} threads"
    return facts["device"]


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
