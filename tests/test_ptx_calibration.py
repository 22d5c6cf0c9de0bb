"""The machine is on trial: it must agree with code that is right on hardware, and notice faults."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from ptx_machine import build
from ptx_machine.faults import FAULTS, planted, study
from ptx_machine.launch import Wrong
from ptx_machine.parse import Kernel

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles here", allow_module_level=True)
from ptx_machine.calibration import FLAVOURS, Flavour
from ptx_machine.triton_compile import VERSION

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
SWEEP = os.environ.get("PTX_SWEEP") == "1"  # make test-ptx
SEEDS = range(16 if SWEEP else 3)
RESIDENT = (1, 4, 2, 8)  # CTAs at a time
# Triton before 3.7.1 forgets the fence between cp.async and wgmma here, and the machine sees it.
UNFENCED = FLAVOURS[-1]


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
def test_the_machine_agrees_with_the_compiler(flavour: Flavour) -> None:
    launch = flavour.launch()
    if flavour is UNFENCED and VERSION < (3, 8):
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
    "a store is removed",
}
EVERYWHERE = {
    "a barrier of the CTA is removed",
    "cp.async waits for a group less",
    "a product waits for a group less",
    "wgmma.fence is removed",
    "the leading offset is 16 bytes off",
}
# One flavour for each way of moving data and of synchronising.
STUDIED = [FLAVOURS[i] for i in (range(len(FLAVOURS)) if SWEEP else (1, 4, 5, 8, 9, 16))]
if VERSION < (3, 8):
    STUDIED.remove(UNFENCED)


@pytest.mark.parametrize("flavour", STUDIED, ids=str)
def test_planted_faults_are_noticed(flavour: Flavour) -> None:
    launch = flavour.launch()
    kernel, executed = launch.compiled.kernel, launch.run(launch.grid).check().executed()

    def attempts(faulty: Kernel) -> Iterator[Callable[[], None]]:
        for seed in range(4):
            grid = replace(launch.grid, seed=seed, resident=RESIDENT[seed], limit=1_000_000)
            yield lambda grid=grid: launch.check(launch.run(grid, faulty))

    anywhere = set(ANYWHERE)
    if flavour.function == "persistent":
        anywhere -= {"a release is relaxed"}  # a ticket hands over nothing
    found = list(
        study(
            kernel, executed, attempts, (f for f in FAULTS if f.name in anywhere), 8 if SWEEP else 3
        )
    )
    for fault in FAULTS:
        sites = fault.sites(kernel, executed)
        if fault.name in EVERYWHERE and sites and applies(fault.name, flavour):
            found.append(planted(kernel, fault, sites, attempts))
    assert len({each.fault.name for each in found}) >= 4
    missed = [str(each) for each in found if not each.noticed]
    assert not missed, missed


def applies(name: str, flavour: Flavour) -> bool:
    """A K-major operand has no leading offset, nor has one of a single swizzled panel."""
    return "leading" not in name or (flavour.major_b == "n" and flavour.block[1] > 64)
