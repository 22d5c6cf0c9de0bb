"""PEFT's own tests, run plain and then with every adapter fused as soon as it is injected.

    python tests/peft_suite.py CHECKOUT [--few-rows N] [pytest arguments: files, -k lora, -n 2, ...]

CHECKOUT is a clone of PEFT's repository at the installed version, or near it: a test that fails
without us says nothing. Printed are the tests that pass plain and not fused, and what became of the
calls of fused layers, for a run in which none ran fused would pass them all.
"""

import argparse
import collections
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FUSE = "LORA_KERNELS_FUSE_BELOW"  # set for the fused run: the rows of x below which PEFT may run
_outcomes: collections.Counter[str] = collections.Counter()


def pytest_configure() -> None:
    if FUSE not in os.environ:
        return
    from peft.tuners.tuners_utils import BaseTuner

    from lora_kernels.peft import calls, fuse, small

    small.FEW_ROWS = int(os.environ[FUSE])
    inject, note = BaseTuner.inject_adapter, calls.note

    def inject_and_fuse(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        fuse(model)
        return result

    def note_and_count(layer: Any, outcome: str) -> None:
        note(layer, outcome)
        if not calls._is_compiling():
            _outcomes[outcome] += 1

    BaseTuner.inject_adapter = inject_and_fuse
    calls.note = note_and_count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield
    item.user_properties += _outcomes.items()  # which end in the XML, from any worker
    _outcomes.clear()


def run(checkout: str, arguments: list[str], **variables: str) -> dict[str, ET.Element]:
    """Run the tests in a process of its own and return what pytest wrote about each."""
    own = Path(__file__)
    path = os.pathsep.join([str(own.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", own.stem]
    # Neither PEFT's coverage options nor its own errors for what a newer transformers deprecates.
    for option in ("addopts=", "filterwarnings=", "junit_family=xunit1"):
        command += ["-o", option]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        subprocess.run(
            [*command, "-p", "no:cacheprovider", f"--junitxml={results}", *arguments],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": path} | variables,
            stdout=sys.stderr,
            check=False,
        )
        if not results.exists():
            sys.exit("pytest left no results; why stands above")
        cases = ET.parse(results).iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}": case for case in cases}


def failure(case: ET.Element | None) -> str | None:
    """Return how a test ended that did not pass, or None."""
    if case is None:
        return "was not run"
    ends = [end for end in case if end.tag in ("failure", "error", "skipped")]
    return None if not ends else f"{ends[0].tag}: {ends[0].get('message')}\n{ends[0].text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout")
    parser.add_argument("--few-rows", default="0", help="as FEW_ROWS of the fused layers")
    options, arguments = parser.parse_known_args()
    plain = run(options.checkout, arguments)
    fused = run(options.checkout, arguments, **{FUSE: options.few_rows})
    passed = [name for name, case in plain.items() if failure(case) is None]
    broken = {name: failure(fused.get(name)) for name in passed}
    broken = {name: why for name, why in broken.items() if why}
    outcomes: collections.Counter[str] = collections.Counter()
    for case in fused.values():
        for entry in case.iter("property"):
            outcomes[entry.get("name", "")] += int(entry.get("value", 0))
    print(
        f"{len(plain)} tests, {len(passed)} pass plain, {len(passed) - len(broken)} of those fused"
    )
    for outcome, count in outcomes.most_common():
        print(f"{count:>8} × {outcome}")
    for name, why in broken.items():
        print(f"\nONLY PLAIN: {name}\n{why}")
    return bool(broken) or not outcomes["fused"]


if __name__ == "__main__":
    sys.exit(main())
