"""The launchers on a driver that does nothing: what is launched, and what a call costs the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import stub

ROOT = Path(__file__).parents[1]
# Times the host time of the composition, forward and backward, launches not counted: a tenth above
# the dearest that was seen, for processors differ in what Python costs them beside C++.
MOST = 1.3
TRIES = 3  # machines have neighbours, which cost both sides unevenly

pytestmark = pytest.mark.skipif(stub.why_not() is not None, reason=str(stub.why_not()))


def python(*arguments: str, arch: int = 90) -> str:
    environment = {**os.environ, "STUB_ARCH": str(arch), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("arch", "part"), [(90, ""), (80, "forward_call or hears")])
def test_every_launch_is_the_right_one(arch: int, part: str) -> None:
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    python(*command, "tests/launched.py", "tests/launched_plans.py", "-k", part, arch=arch)


def test_a_call_costs_the_host_no_more_than_what_it_replaces() -> None:
    best: dict[str, float] = {}
    for _ in range(TRIES):
        for row in json.loads(python("-m", "bench.host", "--json", "--seconds", "5")):
            if row["provider"].startswith("lora_kernels"):
                assert row["launches"] == (1 if row["direction"] == "forward" else 2)
                if row["direction"] != "forward":
                    ratio = min(row["bare_ratio"], best.get(row["provider"], float("inf")))
                    best[row["provider"]] = ratio
        if max(best.values()) <= MOST:
            return
    raise AssertionError(f"host time over the composition's: {best}")
