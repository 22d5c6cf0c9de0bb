"""The Triton backend on a GPU: numbers of every tile, repeats, streams, graphs, launches."""

import itertools

import pytest
import torch

from bench.forced import CASES as FORCED
from bench.forced import FEW_CTAS, every_tile, forced
from bench.providers import problem
from lora_kernels.ops.lora_linear import triton as backend
from lora_kernels.qualify.checks import WAYS
from lora_kernels.testing import CASES, Case, bf16, check_backend, make_inputs, run_backend

pytestmark = pytest.mark.gpu
MOST_TILES = 16  # that a problem has on any GPU, both directions and precisions together


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_on_the_gpu(case: Case) -> None:
    _skip_what_it_refuses(case)
    check_backend(backend.BACKEND, case, "cuda")


@pytest.mark.parametrize("case", FORCED, ids=str)
@pytest.mark.parametrize("index", range(MOST_TILES))
def test_every_tile_is_right_with_several_items_for_each_cta(index: int, case: Case) -> None:
    _skip_what_it_refuses(case)
    several = every_tile(problem(case, torch.device("cuda")))
    assert len(several) <= MOST_TILES
    if index >= len(several):
        pytest.skip("this GPU has fewer tiles")
    tile = several[index]
    with forced(tile, FEW_CTAS):
        check_backend(backend.BACKEND, tile.judge(case), "cuda")


def _skip_what_it_refuses(case: Case) -> None:
    if reason := backend.why_not(problem(case, torch.device("cuda"))):
        pytest.skip(reason)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_repeats_are_bitwise_equal_on_two_streams_and_few_ctas(
    dropout_p: float,
) -> None:
    case = Case(1000, 1024, 768, 24, bf16, dropout_p=dropout_p)
    check_backend(backend.BACKEND, case, "cuda")
    runs = [Run(case, seed) for seed in (0, 1)]
    right = [run() for run in runs]
    streams = [torch.cuda.Stream() for _ in runs]
    for ctas in (None, 1, 3):
        for _ in range(1000 if ctas is None else 20):
            got = []
            for run, stream in zip(runs, streams, strict=True):
                with torch.cuda.stream(stream), forced(ctas=ctas):
                    got += run()
            torch.cuda.synchronize()
            assert all(map(torch.equal, got, itertools.chain(*right)))


@pytest.mark.parametrize("way", WAYS)
def test_bit_for_bit(way: str) -> None:
    case = Case(1000, 1024, 768, 24, bf16, dropout_p=0.1)
    WAYS[way](backend.BACKEND, case, torch.device("cuda"))


def test_one_kernel_per_direction_and_no_memset() -> None:
    run = Run(Case(1000, 1024, 768, 24, bf16, bias=True), 0)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(names) == ["lora_linear_backward", "lora_linear_forward"]


class Run:
    """One forward and backward on fixed inputs, giving y, dx, da and db."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.inputs = case, make_inputs(case, "cuda", seed)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        y, _, *gradients = run_backend(backend.BACKEND, self.case, self.inputs)
        return (y, *gradients)  # type: ignore[arg-type]
