"""The machine on trial: it must agree with products that are right on hardware, and notice faults.

A trial is one product and one question. `verdict` asks it once in a test run, whichever worker of
the run needs to know first; `require_passed` stands before all that lets the machine judge.
"""

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ptx_machine.faults import COMPUTED, FAULTS, planted, study
from ptx_machine.launch import Wrong
from ptx_machine.parse import Kernel
from ptx_machine.triton_compile import VERSION
from ptx_machine.triton_products import FLAVOURS

try:
    from ptx_machine.cute_products import CUTE_FLAVOURS
except ModuleNotFoundError:
    CUTE_FLAVOURS = ()

SWEEP = os.environ.get("PTX_SWEEP") == "1"  # make test-ptx
SEEDS = range(16 if SWEEP else 3)
RESIDENT = (1, 4, 2, 8)  # CTAs at a time
# Triton before 3.7.1 forgets the fence between cp.async and wgmma here, and the machine sees it.
UNFENCED = FLAVOURS[-1]


def agrees(flavour: Any) -> None:
    """Assert that the product is right, race-free and the same however events are ordered."""
    launch = flavour.launch()
    if flavour is UNFENCED and VERSION < (3, 7, 1):
        with pytest.raises(Wrong, match=r"no proxy fence .* product's read .* cp.async write"):
            launch.run(launch.grid).check()
        return
    results = []
    for seed in SEEDS:
        launch.check(launch.run(replace(launch.grid, seed=seed, resident=RESIDENT[seed % 4])))
        results.append(launch.output.clone())
    for other in results[1:]:
        assert torch.equal(other, results[0]), "the order of events shows in the numbers"


# Faults of which none may pass, wherever it is planted, and those that must be noticed when planted
# everywhere at once: compilers' barriers and waits come in pairs.
ANYWHERE = {
    "A is read transposed",
    "B is read transposed",
    "the stride offset is 16 bytes off",
    "a proxy fence is removed",
    "a matrix is loaded or stored transposed",
    "an mbarrier is not waited for",
    "the phase waited for never flips",
    "half of the bytes are expected",
    "a release is relaxed",
    "an acquire is relaxed",
    "an atomic is for the own CTA",
    "a store is removed",
    "a store comes after its release",
    "a product is left out",
}
EVERYWHERE = {
    "a barrier of the CTA is removed",
    "cp.async waits for a group less",
    "a product waits for a group less",
    "wgmma.fence is removed",
    "the leading offset is 16 bytes off",
}


def notices_faults(flavour: Any) -> None:
    """Assert that faults planted in the product's program are noticed, whatever their kind."""
    launch = flavour.launch()
    kernel, executed = launch.compiled.kernel, launch.run(launch.grid).check().executed()

    def attempts(faulty: Kernel) -> Iterator[Callable[[], None]]:
        for seed in range(4):
            grid = replace(launch.grid, seed=seed, resident=RESIDENT[seed], limit=1_000_000)
            yield lambda grid=grid: launch.check(launch.run(grid, faulty))

    anywhere = (ANYWHERE | flavour.exact) - flavour.harmless
    faults = [fault for fault in (*FAULTS, *COMPUTED) if fault.name in anywhere]
    found = list(study(kernel, executed, attempts, faults, 8 if SWEEP else 3))
    for fault in FAULTS:
        sites = fault.sites(kernel, executed)
        if fault.name in EVERYWHERE - flavour.harmless and sites:
            found.append(planted(kernel, fault, sites, attempts))
    print(*found, sep="\n")
    kinds = {each.fault.name for each in found}
    assert len(kinds) >= 4, f"too few kinds of fault apply: {sorted(kinds)}"
    missed = [str(each) for each in found if not each.noticed]
    assert not missed, missed


@dataclass(frozen=True)
class Trial:
    """A question to the machine about a product."""

    question: Callable[[Any], None]
    flavour: Any

    def __str__(self) -> str:
        return f"{self.question.__name__}-{self.flavour}"


# One flavour for each way of moving data and of synchronising.
STUDIED = [FLAVOURS[i] for i in (range(len(FLAVOURS)) if SWEEP else (1, 4, 5, 8, 9, 16))]
if VERSION < (3, 7, 1) and UNFENCED in STUDIED:
    STUDIED.remove(UNFENCED)
TRIALS = [
    *(Trial(agrees, flavour) for flavour in (*FLAVOURS, *CUTE_FLAVOURS[: None if SWEEP else 3])),
    *(Trial(notices_faults, flavour) for flavour in STUDIED),
    *(Trial(notices_faults, flavour) for flavour in CUTE_FLAVOURS[: None if SWEEP else 2]),
]


def verdict(trial: Trial, folder: Path) -> str:
    """Return what the machine has done wrong in `trial`, "" for nothing.

    `folder` is of this test run and shared by its workers, of which one tries and others wait.
    """
    path = folder / f"ptx-{trial}"
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            try:
                trial.question(trial.flavour)
                path.write_text("")
            except (Exception, pytest.fail.Exception) as wrong:
                path.write_text(f"{trial}: {type(wrong).__name__}: {wrong}")
        return path.read_text()


def require_passed(folder: Path, trials: Iterable[Trial] = TRIALS) -> None:
    """Fail unless the machine has passed all of `trials`."""
    failed = [text for text in (verdict(trial, folder) for trial in trials) if text]
    if failed:
        pytest.fail("\n".join(["the machine fails its calibration:", *failed]), pytrace=False)
