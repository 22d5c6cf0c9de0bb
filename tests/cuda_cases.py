"""The cases of the CUDA backend, on the PTX machine and on a GPU, and how they are judged."""

import torch

from lora_kernels.dispatch import Backend
from lora_kernels.testing import (
    Case,
    bf16,
    check_backend,
    expected,
    fp16,
    fp32,
    make_inputs,
    run_backend,
)

SUBSETS = ((True, False, False), (False, True, False), (False, False, True), (False, True, True))

# A tile is 128 x 256, a stage 64 deep, a panel 64 wide, a rank tile 64: sizes stand on both sides
# of each, and K and R straddle the slices of 16. 8 is the smallest of everything but M.
CASES = (
    Case(1, 8, 8, 8, bf16),
    Case(64, 64, 64, 256, fp16),
    Case(130, 264, 72, 16, bf16, bias=True),
    # Two row blocks in a cluster; an odd number of them; several column blocks and rank tiles.
    Case(256, 128, 256, 64, bf16),
    Case(300, 520, 200, 72, fp16, bias=True, scaling=2.0),
    Case(129, 256, 320, 136, bf16, bias=True),
    Case(67, 136, 88, 8, fp16, bias=True, dropout_p=0.1),
    Case(200, 136, 264, 24, bf16, bias=True, dropout_p=0.3),
    Case(257, 72, 520, 64, bf16, bias=True, dropout_p=0.5),
    Case(72, 136, 72, 40, bf16, bias=True, strided=True, dropout_p=0.2),
    # Short contractions: P or Q is awaited when it has hardly been begun.
    Case(600, 72, 72, 8, bf16),
    Case(600, 72, 72, 8, bf16, needs=(False, True, False)),
    *(Case(136, 72, 264, 24, bf16, dropout_p=p, needs=n) for n in SUBSETS for p in (0.0, 0.5)),
    # dx added to one that is there: tiles that end in a panel; held ones that leave behind
    # products, ahead of them and at the end.
    Case(1, 8, 8, 8, fp16, onto=True),
    Case(300, 264, 520, 72, bf16, scaling=2.0, onto=True),
    Case(600, 72, 328, 8, fp16, onto=True),
    Case(257, 328, 264, 24, bf16, dropout_p=0.3, needs=(True, False, False), onto=True),
)

# fp32 adapters take R in steps of 4, and 32 of R to a stage.
FP32_CASES = tuple(
    case._replace(adapter_dtype=fp32, r=case.r - 4 * (i % 2)) for i, case in enumerate(CASES)
)


def check(backend: Backend, case: Case) -> None:
    """`check_backend`, and P, da and db of fp32 adapters to the 17 bits that two halves hold."""
    check_backend(backend, case)
    if case.adapter_dtype != fp32:  # the common tolerance is that of 16-bit operands
        return
    inputs = make_inputs(case)
    exact, results = expected(case, inputs, torch.float64), run_backend(backend, case, inputs)
    for name in ("p", "da", "db"):
        got, right = getattr(results, name), exact[name]
        if got is not None:
            assert (got - right).abs().max() <= 1e-5 * right.abs().max(), f"{name} of {case}"
