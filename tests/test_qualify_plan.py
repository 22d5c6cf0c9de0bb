"""How long a default qualification takes on an H100, by count (docs/qualification.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from qualified import PROBLEM, measured

from lora_kernels.qualify import __main__ as command
from lora_kernels.qualify.choose import nearest

TABLE = Path(__file__).parents[1] / "docs" / "qualification.md"


def test_the_default_sizes_speak_for_every_model_that_has_a_name() -> None:
    options = command._options(command._parser().parse_args([]))
    sizes = [measured(n=n, k=k) for n, k in options.shapes]
    for name, shapes in command.MODELS.items():
        for n, k in shapes:
            assert nearest(sizes, PROBLEM._replace(n=n, k=k), backward=False), (name, n, k)


def test_a_default_run_is_about_two_minutes_by_count() -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("qualify_plan.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(done.stdout)
    assert plan["names"] == plan["steps"]  # by which the parent and the record know them
    costs = {  # how many, seconds of each
        "start of the child": (1, 5.0),
        "Triton compilations": (plan["compilations"], 1.1),
        "checks": (sum(plan["checks"].values()), 0.05),
        "timings": (plan["timings"], 0.13),
        "more for a slow composition": (plan["timings under dropout of many tokens"], 0.2),
    }
    seconds = sum(count * each for count, each in costs.values())
    assert seconds <= 125 < command.BUDGET_S, costs
    text = TABLE.read_text()
    for what, (count, each) in costs.items():
        assert f"| {what} | {count} | {each:g} | {count * each:.0f} |" in text, (what, count)
    assert f"| **together** | | | **{seconds:.0f}** |" in text, seconds
