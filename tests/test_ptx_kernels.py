"""Both GPU backends, as compiled: their PTX runs on the machine, from their own launches.

In `make test` a choice of cases and schedules; `make test-ptx` tries them all.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from cuda_cases import CASES as CUDA_CASES
from cuda_cases import FP32_CASES, SUBSETS, check
from ptx_machine import build, cuda_backend
from ptx_machine.faults import COMPUTED, FAULTS, Fault, study
from ptx_machine.machine import Machine
from ptx_machine.parse import Kernel
from readers import check_readers
from seeds import check_seeds
from sixteen_bits import check_infinities, check_rounding
from slices import check_slices

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear.config import TileConfig
from lora_kernels.testing import (
    CASES,
    FROZEN_CASES,
    Case,
    bf16,
    check_backend,
    check_frozen,
    check_non_finite,
    fp16,
    fp32,
    make_inputs,
    poisoned_memory,
    run_backend,
)

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:lora_linear. the cuda backend"),
]
SWEEP = os.environ.get("PTX_SWEEP") == "1"  # make test-ptx


@pytest.fixture(scope="session", autouse=True)
def _calibrated(run_folder: Path) -> None:
    """Judge nothing before the machine has passed its trials, here or in another worker."""
    from ptx_machine.calibration import require_passed

    require_passed(run_folder)


On = Callable[[Machine], Backend]


def machines() -> Iterator[Machine]:
    """Few and many CTAs, few and many of them at a time, and every way of timing them."""
    yield Machine(seed=0, multiprocessors=1, resident=1)
    yield Machine(seed=1, multiprocessors=8, resident=4)
    yield Machine(seed=2, multiprocessors=5, resident=2)
    for seed in range(3, 24 if SWEEP else 3):
        yield Machine(seed=seed, multiprocessors=1 + seed % 7, resident=1 + seed % 5)


def judge(on: On, case: Case) -> None:
    """Right against float64, the same bits whatever the order of events, no race, no trace left."""
    check_backend(on(Machine(seed=100, multiprocessors=6)), case)
    first = None
    for machine in machines():
        with poisoned_memory():
            results = run_backend(on(machine), case, make_inputs(case))
        first = first or results
        for name, one, other in zip(results._fields, first, results, strict=True):
            if one is not None and other is not None:
                assert torch.equal(one, other), f"{name} depends on the order of events in {case}"


def study_faults(
    on: On, direction: str, cases: Iterable[Case], faults: Iterable[Fault] = FAULTS
) -> dict[str, list[bool]]:
    """Return, for each of `faults`, in which of the places where it was planted a case noticed it.

    A fault is planted where one of the cases comes by, and those that do are tried: under four
    schedules if the fault is one of ANYWHERE or in a sweep, else under one.
    """
    kernel, covered = None, []
    for case in cases:
        machine = Machine()
        check_backend(on(machine), case)
        run = machine.runs[direction == "backward"]
        assert kernel in (None, run.kernel)
        kernel = run.kernel
        covered.append((case, run.executed()))
    assert kernel is not None

    def attempts(faulty: Kernel, seeds: int) -> Iterator[Callable[[], None]]:
        sites = {i for i, s in enumerate(faulty.statements) if s is not kernel.statements[i]}
        # What one case cannot notice another may: all have their turn before the next schedule.
        for seed in range(seeds):
            for case in (case for case, executed in covered if sites & executed):
                machine = Machine(
                    seed=seed,
                    multiprocessors=(6, 2, 8, 4)[seed],
                    limit=3_000_000,
                    edit=lambda k: faulty if k is kernel else k,
                )
                yield lambda machine=machine, case=case: check_backend(on(machine), case)

    noticed: dict[str, list[bool]] = {}
    executed = set().union(*(executed for _, executed in covered))
    for fault in faults:
        tries = functools.partial(attempts, seeds=4 if SWEEP or fault.name in ANYWHERE else 1)
        for planted in study(kernel, executed, tries, [fault], 6 if SWEEP else 2):
            noticed.setdefault(fault.name, []).append(bool(planted.noticed))
            print(planted)
    return noticed


# Faults that no place may hide: above all in what one CTA hands to another.
ANYWHERE = {
    "A is read transposed",
    "B is read transposed",
    "half of the bytes are expected",
    "a product waits for a group less",
    "wgmma.fence is removed",
    "an mbarrier is not waited for",
    "a flag is not waited for",
    "a store is removed",
    "a store comes after its release",
    "a store is awaited after its release",
    "a release is relaxed",
    "a fence is for the own CTA",
    "an atomic is for the own CTA",
    "an acquire is relaxed",
    "a barrier expects fewer threads",
    "an addition is removed",
    "a box to add is stored",
    "a box to store is added",
}


def require_noticed(noticed: dict[str, list[bool]]) -> None:
    """Assert that at least twelve kinds of fault were noticed, and those of ANYWHERE everywhere."""
    assert sum(map(any, noticed.values())) >= 12, noticed
    assert "a store comes after its release" in noticed
    assert not [name for name, places in noticed.items() if name in ANYWHERE and not all(places)]


# --- CUDA C++ -------------------------------------------------------------------------------------

ALL_CUDA_CASES = [*CUDA_CASES, *(c for c in CASES if cuda_backend.takes(c.problem()))]


@pytest.mark.parametrize("case", ALL_CUDA_CASES, ids=str)
def test_the_cuda_kernels_are_right(case: Case) -> None:
    judge(cuda_backend.on, case)


@pytest.mark.parametrize("case", FP32_CASES, ids=str)
def test_the_cuda_kernels_are_right_beside_fp32_adapters(case: Case) -> None:
    if SWEEP or case.dropout_p > 0:
        judge(cuda_backend.on, case)
    check(cuda_backend.on(Machine(seed=case.r, multiprocessors=6)), case)


@pytest.mark.parametrize("adapters", [bf16, fp32], ids=str)
def test_both_words_of_a_seed_count_in_cuda(adapters: torch.dtype) -> None:
    check_seeds(cuda_backend.on(Machine(multiprocessors=6)), adapters)


@pytest.mark.parametrize("adapters", [None, fp32], ids=str)
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
def test_sums_are_rounded_to_nearest_in_cuda(
    dtype: torch.dtype, adapters: torch.dtype | None
) -> None:
    check_rounding(cuda_backend.on(Machine(multiprocessors=6)), dtype, adapters or dtype)


NON_FINITE = [
    (value, Case(130, 72, 136, 24, dtype, adapters, True, dropout_p))
    for value in (float("nan"), float("inf"))
    for dtype, adapters, dropout_p in ((bf16, None, 0.3), (fp16, fp32, 0.0))
]


@pytest.mark.parametrize(("value", "case"), NON_FINITE, ids=str)
def test_non_finite_numbers_stay_where_they_belong_in_cuda(value: float, case: Case) -> None:
    check_non_finite(cuda_backend.on(Machine(multiprocessors=6)), case, value)


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
def test_adapters_may_be_infinite_in_cuda(dtype: torch.dtype) -> None:
    check_infinities(cuda_backend.on(Machine(multiprocessors=6)), dtype)


@pytest.mark.parametrize("adapters", [bf16, fp32], ids=str)
def test_slices_of_x_have_their_part_of_its_mask_in_cuda(adapters: torch.dtype) -> None:
    check_slices(cuda_backend.on(Machine(multiprocessors=6)), bf16, adapters)


@pytest.mark.parametrize("adapters", [bf16, fp32], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_readers_of_one_x_sum_its_gradient_in_cuda(
    dropout_p: float, adapters: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(140, 72, 264, 24, bf16, adapters, dropout_p=dropout_p)
    check_readers(cuda_backend.on(Machine(multiprocessors=6)), case, monkeypatch)


CUDA_FROZEN = [case for case in FROZEN_CASES if cuda_backend.takes(case.problem())]


@pytest.mark.parametrize("case", CUDA_FROZEN[:: 1 if SWEEP else 5], ids=str)
def test_b_zero_is_the_frozen_layer_in_cuda(case: Case) -> None:
    check_frozen(cuda_backend.on(Machine()), case)


# Contractions longer than the ring of four stages, and whose last stage holds more than half a
# slice; tiles of more than the two store panels; ranks of one tile and of several; and so many
# blocks of rows that they form several groups and their flags are cleared in several turns.
FAULTY = {
    "forward": (
        Case(280, 344, 344, 24, bf16, bias=True),
        Case(136, 344, 344, 136, bf16, dropout_p=0.25),
        Case(2200, 264, 264, 8, bf16),
    ),
    "backward": (
        Case(280, 344, 344, 136, bf16),
        Case(280, 344, 344, 24, bf16, dropout_p=0.25),
        Case(280, 344, 600, 24, bf16, onto=True),
        Case(280, 72, 600, 8, bf16, dropout_p=0.25, onto=True),
        Case(2200, 264, 264, 8, bf16),  # takes longest
    ),
}


@pytest.mark.parametrize("direction", FAULTY)
def test_faults_planted_in_the_cuda_kernels_are_noticed(direction: str) -> None:
    require_noticed(study_faults(cuda_backend.on, direction, FAULTY[direction]))


def test_a_rank_in_a_descriptors_address_is_noticed() -> None:
    """It once made dx wrong in every odd block of 128 rows: wgmma read W's panels elsewhere."""
    case = Case(256, 128, 256, 64, bf16, needs=(True, False, False))
    machine = Machine()
    check_backend(cuda_backend.on(machine), case)
    run = machine.runs[-1]
    (fault,) = (fault for fault in FAULTS if "rank" in fault.name)
    faulty = fault.plant(run.kernel, fault.sites(run.kernel, run.executed()))
    machine = Machine(edit=lambda kernel: faulty if kernel is run.kernel else kernel)
    with pytest.raises(AssertionError, match="race in shared memory: product"):
        check_backend(cuda_backend.on(machine), case)


# --- Triton ---------------------------------------------------------------------------------------

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles here", allow_module_level=True)
from ptx_machine import triton_backend  # noqa: E402

SMALL = TileConfig(64, 64, 64, warps=4, stages=3, br=32)
NARROW = TileConfig(16, 64, 64, warps=4, stages=4, br=32)
WIDE = TileConfig(128, 256, 64, warps=8, stages=4)
# Each warpgroup multiplies by 8 columns, the second one's begin within a row of the swizzle.
PAIRED = TileConfig(64, 64, 64, warps=8, stages=3, br=16)
FP32 = TileConfig(64, 64, 16, warps=4, stages=3, br=32)

# Sizes that TMA can address and others, R below 16 and above the rank tile, ragged everywhere.
TRITON_CASES: tuple[tuple[int, TileConfig | None, Case], ...] = (
    (80, SMALL, Case(130, 96, 136, 24, bf16, bias=True)),
    (80, SMALL, Case(200, 90, 72, 5, fp16, bias=True, dropout_p=0.25)),
    (80, SMALL, Case(67, 131, 89, 40, bf16, fp32, dropout_p=0.1)),
    (80, NARROW, Case(40, 96, 200, 65, bf16, bias=True, strided=True)),
    (80, FP32, Case(67, 70, 41, 17, fp32, bias=True)),
    (90, SMALL, Case(200, 136, 264, 72, bf16, bias=True, dropout_p=0.3)),
    (90, SMALL, Case(130, 90, 71, 20, fp16, bias=True)),
    (90, NARROW, Case(130, 96, 72, 24, fp16, fp32, dropout_p=0.2)),
    (90, WIDE, Case(264, 264, 328, 40, bf16, bias=True)),
    (90, PAIRED, Case(72, 72, 136, 16, bf16)),
    # Blocks of rows in several groups; more flags than a CTA clears at once.
    (80, NARROW, Case(4100, 72, 8, 8, bf16)),
    (90, SMALL, Case(130, 136, 72, 24, bf16, dropout_p=0.3, first_column=504)),
    # dx added to one that is there, by whole rows of 16 bytes and by ragged ones.
    (80, SMALL, Case(130, 96, 200, 24, fp16, fp32, scaling=2.0, onto=True)),
    (80, FP32, Case(67, 70, 41, 17, fp32, dropout_p=0.3, onto=True)),
    (90, SMALL, Case(130, 96, 71, 24, bf16, dropout_p=0.3, onto=True)),
    (90, WIDE, Case(264, 72, 328, 40, bf16, needs=(True, False, False), onto=True)),
    *(
        (arch, SMALL, Case(136, 72, 264, 24, bf16, dropout_p=0.5, needs=needs))
        for arch, needs in zip((80, 90, 90, 90), SUBSETS, strict=True)
    ),
    *(
        (arch, None, case)
        for arch in ((80, 90) if SWEEP else ())
        for case in CASES
        if min(case[:3]) > 0 and case.dtype.itemsize < 8
    ),
)


def on(arch: int, config: TileConfig | None) -> On:
    return lambda machine: triton_backend.on(machine, arch, config)


@pytest.mark.parametrize(("arch", "config", "case"), TRITON_CASES, ids=str)
def test_the_triton_kernels_are_right(arch: int, config: TileConfig | None, case: Case) -> None:
    judge(on(arch, config), case)


@pytest.mark.parametrize("arch", [80, 90])
def test_both_words_of_a_seed_count_in_triton(arch: int) -> None:
    check_seeds(on(arch, SMALL)(Machine(multiprocessors=6)), bf16)


@pytest.mark.parametrize("adapters", [None, fp32], ids=str)
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_sums_are_rounded_to_nearest_in_triton(
    arch: int, dtype: torch.dtype, adapters: torch.dtype | None
) -> None:
    check_rounding(on(arch, SMALL)(Machine(multiprocessors=6)), dtype, adapters or dtype)


@pytest.mark.parametrize(("value", "case"), NON_FINITE, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_non_finite_numbers_stay_where_they_belong_in_triton(
    arch: int, value: float, case: Case
) -> None:
    check_non_finite(on(arch, SMALL)(Machine(multiprocessors=6)), case, value)


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_adapters_may_be_infinite_in_triton(arch: int, dtype: torch.dtype) -> None:
    check_infinities(on(arch, SMALL)(Machine(multiprocessors=6)), dtype)


@pytest.mark.parametrize("adapters", [bf16, fp32], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_slices_of_x_have_their_part_of_its_mask_in_triton(
    arch: int, adapters: torch.dtype
) -> None:
    check_slices(on(arch, SMALL)(Machine(multiprocessors=6)), bf16, adapters)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("arch", [80, 90])
def test_readers_of_one_x_sum_its_gradient_in_triton(
    arch: int, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(70, 24, 72, 8, bf16, dropout_p=dropout_p)
    check_readers(on(arch, SMALL)(Machine(multiprocessors=6)), case, monkeypatch)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", FROZEN_CASES if SWEEP else FROZEN_CASES[3::12], ids=str)
def test_b_zero_is_the_frozen_layer_in_triton(arch: int, case: Case) -> None:
    config = FP32 if case.dtype == fp32 else SMALL
    check_frozen(on(arch, config)(Machine()), case)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("arch", [80, 90])
def test_faults_planted_in_the_triton_kernels_are_noticed(arch: int, direction: str) -> None:
    # A CTA that has done little waits for more; long contractions take the ring round; blocks of
    # rows are whole or not.
    cases = [
        Case(m, n, k, 48, bf16, bias=True, dropout_p=0.25)
        for m, n, k in ((192, 96, 336), (264, 240, 272))
    ]
    # sm_80 has no mbarriers and no asynchronous products to be wrong about.
    faults = (*FAULTS, *COMPUTED) if arch == 80 or SWEEP else FAULTS
    require_noticed(study_faults(on(arch, SMALL), direction, cases, faults))
