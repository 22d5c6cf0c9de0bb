"""q, k and v without PEFT: three calls that read one x, whose dx a backend sums in its launches."""

import pytest
import torch
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import op, shared_dx
from lora_kernels.testing import Case, assert_accurate, expected, fp64, make_inputs


def check_readers(backend: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that three calls like `case` hand on one dx, right, which two were added to.

    Their N are multiples of the case's.
    """
    added: list[bool] = []

    def backward(call: object, onto: Tensor | None = None) -> object:
        added.append(onto is not None)
        return backend.backward(call, onto)

    here = backend._replace(backward=backward, why_not=lambda _: None, why_not_auto=None)
    monkeypatch.setattr(op, "BACKENDS", (here,))
    monkeypatch.setattr(shared_dx, "FEW_BYTES", 1)
    cases = [case._replace(n=case.n * times) for times in (2, 1, 1)]
    drawn = [make_inputs(each, seed=seed) for seed, each in enumerate(cases)]
    inputs = [each._replace(x=drawn[0].x) for each in drawn]
    leaf = drawn[0].x.clone().requires_grad_()
    x = leaf * 1
    read = shared_dx.stand_in(x, x.dtype)
    assert read is not None
    parameters = [t.requires_grad_() for i in inputs for t in (i.lora_a, i.lora_b)]
    ys = [
        lora_linear(
            read, i.weight, i.lora_a, i.lora_b, case.scaling, i.bias, dropout_p=case.dropout_p,
            seed=i.seed,
        )
        for i in inputs
    ]  # fmt: skip
    dx, *others = torch.autograd.grad(ys, (leaf, *parameters), [i.dy for i in inputs])
    assert added == [False, True, True]
    exact, eager = (
        [expected(each, i, dtype) for each, i in zip(cases, inputs, strict=True)]
        for dtype in (fp64, case.dtype)
    )
    sums = [sum(parts["dx"] for parts in reversed(found)) for found in (exact, eager)]
    assert_accurate(f"dx of three like {case}", dx, *sums)
    for at, got in enumerate(others):
        reader, name = at // 2, ("da", "db")[at % 2]
        assert_accurate(f"{name} of {cases[reader]}", got, exact[reader][name], eager[reader][name])
