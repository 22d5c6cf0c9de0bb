"""The machine is on trial: it must agree with code that is right on hardware, and notice faults."""

import os
from pathlib import Path

import pytest
from ptx_machine import build

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles here", allow_module_level=True)
from ptx_machine.calibration import CUTE_FLAVOURS, TRIALS, Trial, require_passed, verdict

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("trial", TRIALS, ids=str)
def test_the_machine_passes_its_trial(trial: Trial, run_folder: Path) -> None:
    failed = verdict(trial, run_folder)
    assert not failed, failed


@pytest.mark.skipif(not CUTE_FLAVOURS, reason="nvidia-cutlass-dsl is not installed")
def test_cute_is_among_the_trials() -> None:
    assert {trial.flavour for trial in TRIALS} >= set(CUTE_FLAVOURS[:3])


def test_a_failed_trial_stops_all_that_comes_after(tmp_path: Path) -> None:
    asked = []

    def question(flavour: str) -> None:
        asked.append(flavour)
        assert flavour != "wrong", "it is wrong"

    trials = [Trial(question, flavour) for flavour in ("right", "wrong", "other")]
    require_passed(tmp_path, [trials[0], trials[2]])
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception, match="it is wrong"):
            require_passed(tmp_path, trials)
    assert asked == ["right", "other", "wrong"]  # each once
