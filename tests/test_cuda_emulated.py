"""The CUDA kernels' own source, run on a CPU by the emulator in csrc/emulate, against the oracle.

The emulator decodes the very descriptors and tensor maps the kernels make, interleaves threads,
CTAs and asynchronous copies by a seed, and does late what the hardware may do late. It shows that
the protocol and the layouts are right as documented; it cannot show that the documents are.
"""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from cuda_builds import emulation, mutated

from lora_kernels.ops.lora_linear import cuda, reference, workspace
from lora_kernels.testing import CASES as EVERYONES_CASES
from lora_kernels.testing import (
    FROZEN_CASES,
    Case,
    Results,
    bf16,
    check_backend,
    check_frozen,
    expected,
    fp16,
    fp32,
    make_inputs,
    run_backend,
)

# A tile is 128 x 256, a stage 64 deep, a panel 64 wide, a rank tile 64: sizes stand on both sides
# of each, and K and R straddle the slices of 16. 8 is the smallest of everything but M.
CASES = (
    Case(1, 8, 8, 8, bf16),
    Case(130, 264, 72, 16, bf16, bias=True),
    Case(300, 520, 200, 72, fp16, scaling=2.0),
    Case(129, 256, 320, 136, bf16, bias=True),
    Case(64, 64, 64, 256, fp16),
    Case(67, 136, 88, 8, fp16, bias=True, dropout_p=0.1),
    Case(200, 136, 264, 24, bf16, dropout_p=0.3),
    Case(257, 72, 520, 64, bf16, bias=True, dropout_p=0.5),
    Case(72, 136, 72, 40, bf16, bias=True, strided=True, dropout_p=0.2),
    # Short contractions: P or Q is awaited when it has hardly been begun.
    Case(600, 72, 72, 8, bf16),
    Case(600, 72, 72, 8, bf16, needs=(False, True, False)),
    *(
        Case(136, 72, 264, 24, bf16, dropout_p=p, needs=needs)
        for p, needs in (
            (0.0, (True, False, False)),
            (0.5, (True, False, False)),
            (0.0, (False, True, False)),
            (0.5, (False, True, False)),
            (0.0, (False, False, True)),
        )
    ),
)


# fp32 adapters take R in steps of 4, and 32 of R to a stage.
FP32_CASES = tuple(
    case._replace(adapter_dtype=fp32, r=case.r - 4 * (i % 2)) for i, case in enumerate(CASES)
)


def _is_ours(case: Case) -> bool:
    aligned = all(size > 0 and size % 8 == 0 for size in (case.n, case.k, case.r))
    return aligned and case.dtype in (bf16, fp16)


def _check(case: Case) -> None:
    check_backend(cuda.BACKEND, case)
    if case.adapter_dtype == fp32:  # the common tolerance is that of 16-bit operands
        exact, results = expected(case, make_inputs(case), torch.float64), _results(case)
        for name in ("p", "da", "db"):
            got, right = getattr(results, name), exact[name]
            if got is not None:
                assert (got - right).abs().max() <= 1e-5 * right.abs().max(), f"{name} of {case}"


@pytest.mark.parametrize("case", [*CASES, *FP32_CASES], ids=str)
@pytest.mark.parametrize(("clusters", "resident"), [(1, 1), (4, 2)])
def test_the_kernels_compute_what_they_should(case: Case, clusters: int, resident: int) -> None:
    with emulation(clusters, clusters, resident):
        _check(case)
    words = workspace.reserve(1, torch.device("cpu"), 0)
    assert not words.any(), "the workspace must be zero between launches"


def _results(case: Case, **changes: torch.Tensor) -> Results:
    return run_backend(cuda.BACKEND, case, make_inputs(case)._replace(**changes))


@pytest.mark.parametrize("adapter_dtype", [bf16, fp32])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_no_interleaving_changes_a_bit(dropout_p: float, adapter_dtype: torch.dtype) -> None:
    case = Case(264, 328, 264, 72, bf16, adapter_dtype, bias=True, dropout_p=dropout_p)
    results = []
    for seed, (clusters, resident) in enumerate([(1, 1), (3, 3), (4, 2), (7, 7)]):
        with emulation(seed, clusters, resident):
            results.append(_results(case))
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            assert torch.equal(first, other)


FROZEN = [c for c in FROZEN_CASES if _is_ours(c)]
FROZEN += [c._replace(adapter_dtype=fp32) for c in FROZEN if c.dtype == bf16 and c.scaling > 1e4]


@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_b_zero_is_the_frozen_layer_whatever_the_scaling(case: Case) -> None:
    with emulation():
        check_frozen(cuda.BACKEND, case)


@pytest.mark.parametrize("case", [c for c in EVERYONES_CASES if _is_ours(c)], ids=str)
def test_a_power_of_two_multiplies_sums_alone(case: Case) -> None:
    with emulation():
        check_backend(cuda.BACKEND, case)


@pytest.mark.parametrize("value", [3, 3 + 2**40, 2**63 - 1])
def test_the_whole_64_bit_seed_counts(value: int) -> None:
    case, seed = Case(64, 64, 128, 8, bf16, dropout_p=0.5), torch.tensor([value])
    with emulation():
        p = _results(case, seed=seed).p
    expected = reference.forward(make_inputs(case)._replace(seed=seed).forward(case))[1]
    # Another mask would move P by about its own size, 0.75·√2.
    assert (p - expected).abs().max() < 0.05


FAULTS = (
    "an arrival is lost",
    "an arrival too many",
    "a barrier lets through early",
    "the first phase is waited for twice",
    "no shared proxy fence",
    "no acquire",
    "no global proxy fence",
    "TMA does not swizzle",
    "the leading offset is ignored",
    "a store's shared memory is reused at once",
    "written stands for read",
    "a product is not waited for",
)


TILE, STORE = "lora_linear/tile_sm90.cuh", "lora_linear/store_sm90.cuh"
FP32 = "lora_linear/fp32_sm90.cuh"
FENCE, MEET = "  ptx::fence_proxy_async_shared();\n", "  ptx::consumers_sync(kConsumersBarrier);\n"
MUTANTS = {  # what is compiled anew, the file to change, and the change
    "the rank in an address reaches the descriptor": (
        "backward_bf16",
        "common/layout.h",
        " & 0x3FFFF",
        "",
    ),
    "P is not awaited": (
        "forward_bf16",
        "lora_linear/forward_sm90.cuh",
        "  await_flag(f.workspace + kReady + row,"
        " kConsumerWarpgroups * f.p_items.rank_tiles.value);\n",
        "",
    ),
    "da does not await all of Q": (
        "backward_bf16",
        "lora_linear/backward_sm90.cuh",
        "    await_flag(f.workspace + kAllReady,"
        " kConsumerWarpgroups * f.ctas * f.q_items.count);\n",
        "",
    ),
    "the flag comes before P is written": (
        "forward_bf16",
        STORE,
        "tma_store_wait_written();\n      ptx::fence_acq_rel_gpu",
        "tma_store_wait_read<0>();\n      ptx::fence_acq_rel_gpu",
    ),
    "a stage is left while it is read": (
        "forward_bf16",
        TILE,
        "    if (previous != 0) pipeline.release<kRewrites>(previous);\n"
        "    previous = pipeline.stages.empty();",
        "    pipeline.release<kRewrites>(pipeline.stages.empty());",
    ),
    "others fill a store panel before its reader is known to be done": (
        "forward_bf16",
        STORE,
        "tma_store_wait_read<1>();\n      ptx::warpgroup_sync(own_barrier());",
        "tma_store_wait_read<1>();",
    ),
    "products start before all threads have masked": (
        "forward_bf16",
        TILE,
        "    ptx::warpgroup_sync(own_barrier());\n    row += row_step",
        "    row += row_step",
    ),
    "the low half of fp32 is dropped": (
        "forward_bf16_fp32",
        TILE,
        "if constexpr (kSplit) Multiply",
        "if constexpr (false) Multiply",
    ),
    "halves are not fenced": ("forward_bf16_fp32", FP32, f"low);\n  }}\n{FENCE}", "low);\n  }\n"),
    "products start before all have split": (
        "forward_bf16_fp32",
        FP32,
        f"low);\n  }}\n{FENCE}{MEET}",
        f"low);\n  }}\n{FENCE}",
    ),
    "what is rounded in place is not fenced": (
        "backward_bf16_fp32",
        FP32,
        f"kPanelBytes);\n  }}\n{FENCE}",
        "kPanelBytes);\n  }\n",
    ),
    "products start before all have rounded": (
        "backward_bf16_fp32",
        FP32,
        f"kPanelBytes);\n  }}\n{FENCE}{MEET}",
        f"kPanelBytes);\n  }}\n{FENCE}",
    ),
    "a row is rounded over before all have read it": (
        "backward_bf16_fp32",
        FP32,
        "  ptx::warp_sync();\n",
        "",
    ),
}


def _assert_noticed(
    defect: str,
    fault: str = "",
    module: ModuleType | None = None,
    adapter_dtype: torch.dtype = bf16,
) -> None:
    """Assert that some case fails: what the checks would not notice, they would not check."""
    cases = (
        Case(200, 264, 584, 72, bf16, adapter_dtype),
        Case(200, 72, 264, 24, bf16, adapter_dtype, dropout_p=0.3),
        Case(600, 72, 72, 8, bf16, adapter_dtype),
    )
    try:
        for seed in range(12):
            with emulation(seed, 3, 2, fault, module):
                _check(cases[seed % 3])
    except (AssertionError, RuntimeError):
        return
    finally:  # a launch cut short leaves tickets and flags behind
        workspace._by_stream.clear()
    pytest.fail(f"nothing fails although {defect}")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_primitive_that_misbehaves_is_noticed(fault: str) -> None:
    _assert_noticed(fault, fault=fault)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_the_source_is_noticed(name: str, tmp_path: Path) -> None:
    adapter_dtype = fp32 if MUTANTS[name][0].endswith("fp32") else bf16
    _assert_noticed(name, module=mutated(tmp_path, *MUTANTS[name]), adapter_dtype=adapter_dtype)
