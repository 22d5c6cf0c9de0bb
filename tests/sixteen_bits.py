"""What 16 bits make of a result, for every backend: rounding to nearest, and infinities."""

import torch
from torch import Tensor

from lora_kernels.dispatch import Backend
from lora_kernels.testing import (
    Case,
    Inputs,
    expected,
    fp16,
    fp32,
    fp64,
    make_inputs,
    poisoned_memory,
    run_backend,
)


def check_rounding(backend: Backend, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """Assert that every result is its sum rounded to nearest, ties to even, bit for bit.

    Of small integers every sum is exact, and stays so in fp32; few of those of 16 bits need no
    rounding, but P does not in fp16.
    """
    case = Case(70, 72, 264, 24, dtype, adapter_dtype, bias=True, scaling=1.0)
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor, most: int) -> Tensor:
        return torch.randint(-most, most + 1, like.shape, generator=generator).to(like)

    x, weight, lora_a, lora_b, bias, dy, *others = make_inputs(case)
    inputs = Inputs(
        draw(x, 16), draw(weight, 16), draw(lora_a, 2), draw(lora_b, 2), draw(bias, 16),
        draw(dy, 16), *others,
    )  # fmt: skip
    with poisoned_memory():
        results = run_backend(backend, case, inputs)
    x, weight, lora_a, lora_b, bias, dy = (t.to(fp64) for t in inputs[:6])
    exact_p = x @ lora_a.t()
    p, q = (t.to(adapter_dtype).to(fp64) for t in (exact_p, dy @ lora_b))
    exact = {  # beside fp32 adapters 16 bits of P and Q are enough for y and dx
        "y": x @ weight.t() + p.to(dtype).to(fp64) @ lora_b.t() + bias,
        "p": exact_p,
        "dx": dy @ weight + q.to(dtype).to(fp64) @ lora_a,
        "da": q.t() @ x,
        "db": dy.t() @ p,
    }
    for name, got in results._asdict().items():
        assert torch.equal(got, exact[name].to(got.dtype)), f"{name} is rounded in another way"
        is_rounded = bool((got != exact[name]).any())
        assert is_rounded is (got.dtype.itemsize == 2 and (name, dtype) != ("p", fp16)), name


def check_infinities(backend: Backend, dtype: torch.dtype) -> None:
    """Assert that fp32 adapters beyond 16 bits give NaN and Inf just where PyTorch does in `dtype`.

    What is left of such an element, in its lower half, must not make a NaN of the infinity.
    """
    case = Case(70, 72, 136, 20, dtype, fp32)
    largest = 1e5 if dtype == fp16 else torch.finfo(fp32).max
    for name in ("lora_a", "lora_b"):
        for value in (largest, -float("inf")):
            inputs = make_inputs(case)
            getattr(inputs, name)[3, 5] = value
            with poisoned_memory():
                results = run_backend(backend, case, inputs)
            right = expected(case, inputs, dtype)
            assert right["y"].isinf().any()
            for result in ("y", "dx", "da", "db"):
                for what in (torch.isnan, torch.isinf):
                    assert torch.equal(what(getattr(results, result)), what(right[result])), (
                        f"{result} where {name} is {value}: {what.__name__} elsewhere than PyTorch"
                    )
