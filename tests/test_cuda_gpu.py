"""The CUDA backend on a Hopper GPU: numbers, repeats, streams, graphs, launches, far offsets."""

import pytest
import torch
from cuda_cases import CASES, FP32_CASES

from bench.forced import CASES as FORCED
from bench.gpu import MANY_ITEMS
from lora_kernels.ops.lora_linear import Problem, cuda
from lora_kernels.qualify.checks import WAYS, check_far, far_call
from lora_kernels.testing import (
    Case,
    bf16,
    check_backend,
    fp16,
    fp32,
    make_inputs,
    run_backend,
)

pytestmark = pytest.mark.gpu

# More tiles than SMs, more P items than SMs, several rank tiles, ragged in every direction.
LARGE = (
    Case(4096, 2048, 1024, 16, bf16, bias=True),
    Case(2049, 4104, 520, 136, fp16),
    Case(20000, 264, 136, 8, bf16, dropout_p=0.1),
    Case(1000, 1032, 2056, 256, bf16, bias=True, dropout_p=0.5),
    Case(2049, 1032, 2056, 132, bf16, fp32, bias=True, dropout_p=0.1),
    # da items before the last waves of dx tiles.
    Case(8192, 256, 4096, 64, bf16),
)
BUSY = Case(4000, 2056, 1032, 72, bf16, bias=True, dropout_p=0.2)


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    major, minor = torch.cuda.get_device_capability()
    reason = cuda.why_not(Problem(8, 8, 8, 8, bf16, bf16, "cuda", 10 * major + minor))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("case", [*CASES, *FP32_CASES, *FORCED, *LARGE, MANY_ITEMS, BUSY], ids=str)
def test_numbers(case: Case) -> None:
    if reason := cuda.why_not(case.problem("cuda", 90)):
        pytest.skip(reason)
    check_backend(cuda.BACKEND, case, "cuda")


def test_a_seed_on_the_device_gives_the_same_mask() -> None:
    call = make_inputs(BUSY, "cuda").forward(BUSY)
    seed = torch.tensor([3 + 2**40])
    results = [cuda.forward(call._replace(seed=s)) for s in (seed, seed.cuda())]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("way", WAYS)
def test_bit_for_bit(way: str) -> None:
    WAYS[way](cuda.BACKEND, BUSY, torch.device("cuda"))


def test_one_kernel_per_direction() -> None:
    inputs = make_inputs(BUSY, "cuda")
    run_backend(cuda.BACKEND, BUSY, inputs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_backend(cuda.BACKEND, BUSY, inputs)
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert len(on_device) == 2, on_device
    assert "lora_linear_forward" in on_device[0]
    assert "lora_linear_backward" in on_device[1]


def test_offsets_beyond_two_to_the_31() -> None:
    case = Case(2**17 + 8, 2**14 + 8, 64, 8, bf16)
    check_far(cuda.BACKEND, far_call(case, "cuda"))
