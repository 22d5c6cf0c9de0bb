"""The reference backend computes block by block what it would compute at once."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.ops.lora_linear import reference
from lora_kernels.testing import CASES as ALL
from lora_kernels.testing import (
    Case,
    bf16,
    check_backend,
    fp16,
    fp32,
    fp64,
    make_inputs,
    run_backend,
)

CASES = [
    Case(201, 67, 211, 5, fp32, dropout_p=0.3),
    Case(201, 67, 211, 5, bf16, fp32),
    Case(201, 67, 211, 5, bf16, fp32, dropout_p=0.3, strided=True),
    Case(201, 67, 211, 5, fp16, fp32, dropout_p=0.3, needs=(True, False, False)),
    Case(201, 67, 211, 5, bf16, fp32, dropout_p=0.3, needs=(False, True, False)),
    Case(201, 267, 111, 17, fp64, dropout_p=0.3),
    Case(64, 65, 128, 3, bf16, fp32, dropout_p=0.5),
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference._BLOCK_ELEMENTS, "cpu", 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_are_right(case: Case) -> None:
    cpu = torch.device("cpu")
    assert len(list(reference._blocks(case.m, case.k, cpu))) == -(-case.m // 64)
    check_backend(reference.BACKEND, case)


@pytest.mark.parametrize("case", [c for c in CASES if c.adapter_dtype is None], ids=str)
def test_the_blocking_does_not_change_the_mask(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_backend(reference.BACKEND, case, make_inputs(case))
    monkeypatch.setitem(reference._BLOCK_ELEMENTS, "cpu", 1)
    blocked = run_backend(reference.BACKEND, case, make_inputs(case))
    for at_once, by_block in zip(whole, blocked, strict=True):
        torch.testing.assert_close(by_block, at_once)


@pytest.mark.parametrize(
    ("length", "width"), [(0, 5), (1, 1), (64, 1 << 20), (65, 1 << 20), (1000, 4097), (7, 0)]
)
def test_blocks_cover_a_range_once(length: int, width: int) -> None:
    blocks = list(reference._blocks(length, width, torch.device("cpu")))
    assert [i for block in blocks for i in block] == list(range(length))
    # A tile that starts inside a Philox group would compute it twice.
    assert all(block.start % 8 == 0 for block in blocks)


ADDING = [c._replace(onto=True) for c in (*ALL, Case(3, 700, 96, 20, bf16), *CASES) if c.needs[0]]


@pytest.mark.parametrize("case", ADDING, ids=str)
def test_dx_is_added_to_what_is_there(case: Case) -> None:
    """Rounded as seldom as autograd's own sum, and nothing else changes."""
    check_backend(reference.BACKEND, case)
    inputs = make_inputs(case)
    added, alone = (
        run_backend(reference.BACKEND, case, each) for each in (inputs, inputs._replace(onto=None))
    )
    for name in ("y", "p", "da", "db"):
        one, other = getattr(added, name), getattr(alone, name)
        assert one is other is None or torch.equal(one, other), name


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_what_is_not_needed_is_none(needs: tuple[bool, bool, bool]) -> None:
    case = Case(5, 6, 7, 2, dropout_p=0.5, needs=needs)
    _, _, *gradients = run_backend(reference.BACKEND, case, make_inputs(case))
    assert tuple(g is not None for g in gradients) == needs


def test_the_oracle_is_differentiable_code_of_its_own() -> None:
    """Its gradients come from autograd; gradcheck holds them against finite differences."""
    x, weight, lora_a, lora_b, bias, _, seed, _ = make_inputs(
        Case(3, 4, 5, 2, fp64, bias=True, dropout_p=0.4)
    )

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return reference.oracle(x, weight, a, b, 0.75, bias, dropout_p=0.4, seed=seed)

    leaves = [t.requires_grad_() for t in (x, lora_a, lora_b)]
    assert torch.autograd.gradcheck(run, leaves)


class Allocations(TorchDispatchMode):
    """Sizes in bytes of the memory that operators allocate, `known` tensors' own excepted."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self._known = [t.untyped_storage() for t in known if t is not None]
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                # Storages are held, so that no address is seen twice.
                if all(storage.data_ptr() != known.data_ptr() for known in self._known):
                    self._known.append(storage)
                    self.sizes.append(storage.nbytes())
        return result


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [(fp32, fp32), (bf16, bf16), (bf16, fp32)], ids=str)
def test_no_temporary_of_the_size_of_x_or_y(
    dropout_p: float, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = Case(4096, 512, 640, 8, *dtypes, dropout_p=dropout_p)
    inputs = make_inputs(case)
    small = min(inputs.x.nbytes, inputs.dy.nbytes) // 2
    with Allocations(*inputs) as forward:
        y, p = reference.forward(inputs.forward(case))
    assert [size for size in forward.sizes if size > small] == [y.nbytes]
    with Allocations(*inputs, p) as backward:
        dx, *_ = reference.backward(inputs.backward(case, p))
    assert [size for size in backward.sizes if size > small] == [dx.nbytes]
