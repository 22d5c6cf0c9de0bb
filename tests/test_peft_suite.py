"""The script that runs PEFT's own tests, on a checkout made up for it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

CHECKOUT = """
import pytest, torch
from peft import LoraConfig, get_peft_model

def layer():
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(target_modules=["0"]))
    return model.base_model.model[0]

@pytest.mark.parametrize("rows", [1, 100])
def test_same(rows):
    assert layer()(torch.ones(rows, 4)).shape == (rows, 4)

def test_fails_both_times():
    assert False

def test_only_plain():
    assert type(layer()).__name__ == "Linear", "its class has changed"
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("peft_suite.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    return done


def test_it_names_what_only_plain_peft_passes(tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text(CHECKOUT)
    done = run(tmp_path)
    counts = "4 tests, 3 pass plain, 2 of those fused\n       2 × fused\n"
    assert done.stdout.startswith(counts), done.stderr
    broken = "ONLY PLAIN: test_made_up::test_only_plain\nfailure: AssertionError: its class"
    assert broken in done.stdout
    assert done.stdout.count("ONLY PLAIN") == 1


def test_where_pytest_cannot_begin_that_is_the_error(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "no_such_plugin")
    assert "no_such_plugin" in done.stderr
    assert done.stderr.endswith("pytest left no results; why stands above\n")
    assert done.stdout == ""
