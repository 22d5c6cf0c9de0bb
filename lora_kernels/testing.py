"""Inputs, the one tolerance rule and the checks that judge every backend: for anyone to use.

`check_backend(backend, case)` runs a backend's forward and backward on poisoned memory between
red zones and compares y, P, dx, da and db with the float64 oracle. `CASES` together tell a right
backend from one that writes zeros, skips a block, drops the scaling, truncates the rank or shifts
the dropout mask.
`audit(model, step)` judges every LoRA layer of a whole model the same way, whoever wrote it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear.operands import Backward, Forward, Gradients, split_scaling
from lora_kernels.ops.lora_linear.philox import is_uneven, keep_mask, mask_columns
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.ops.lora_linear.reference import oracle
from lora_kernels.redzone import RedZones

if TYPE_CHECKING:
    from lora_kernels.audit import audit as audit

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Case(NamedTuple):
    """One call to check: sizes as in `Problem`, s = `scaling`, and which gradients are needed.

    `strided` makes every operand a non-contiguous view: transposed, or a slice of something larger.
    `magnitudes` multiply x, W, A, B and dy. `first_column` is that of an x sliced off a wider one.
    With `onto` dx is added to one that is there.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype = fp32
    adapter_dtype: torch.dtype | None = None
    bias: bool = False
    dropout_p: float = 0.0
    scaling: float = 0.75
    needs: tuple[bool, bool, bool] = (True, True, True)
    strided: bool = False
    magnitudes: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
    first_column: int | None = None
    onto: bool = False

    def problem(self, device: str = "cpu", arch: int | None = None) -> Problem:
        """Return the case as dispatch sees it."""
        adapter_dtype = self.adapter_dtype or self.dtype
        sizes = self.m, self.n, self.k, self.r
        mask = self.dropout_p > 0, is_uneven(self.first_column, self.k)
        return Problem(*sizes, self.dtype, adapter_dtype, device, arch, self.bias, *mask)


EXTREME = 65, 72, 136, 24

# Ranks straddle the 16-wide tensor-core step, sizes are prime or one off a tile, and each feature
# meets a ragged shape. fp32 sees a single missing rank column, bf16 and fp16 the operand dtypes.
CASES = (
    Case(1, 1, 1, 1),
    Case(67, 131, 89, 5, bias=True),
    Case(130, 70, 257, 17),
    Case(33, 96, 64, 300, scaling=2.0),
    Case(300, 520, 40, 65, bias=True),
    Case(200, 72, 40, 16, bias=True, strided=True),
    Case(67, 131, 89, 5, bias=True, dropout_p=0.3),
    Case(129, 65, 258, 33, dropout_p=0.1, strided=True),
    Case(65, 129, 127, 20, fp16, bias=True),
    Case(65, 129, 127, 20, bf16, bias=True, dropout_p=0.25),
    Case(65, 129, 127, 20, bf16, fp32, bias=True),
    Case(65, 129, 127, 20, bf16, fp32, dropout_p=0.25),
    Case(65, 72, 136, 24, bf16, bias=True, dropout_p=0.25, first_column=1000),  # kernels: in eights
    Case(40, 50, 60, 8, needs=(True, False, False)),
    Case(40, 50, 60, 8, needs=(True, False, False), dropout_p=0.5),
    Case(40, 50, 60, 8, needs=(False, True, False)),
    Case(40, 50, 60, 8, needs=(False, True, False), dropout_p=0.5),
    Case(40, 50, 60, 8, needs=(False, False, True)),
    Case(40, 50, 60, 8, needs=(False, True, True)),
    Case(300, 72, 264, 20, onto=True),
    Case(67, 131, 89, 5, bf16, dropout_p=0.3, strided=True, onto=True),
    Case(130, 70, 257, 17, bf16, fp32, needs=(True, False, False), onto=True),
    Case(0, 5, 7, 3, bias=True),
    Case(5, 0, 7, 3),
    Case(5, 7, 0, 3, bias=True),
    # s·x·Aᵀ alone leaves fp16 above or below, and bf16 above, though every result is in range.
    Case(*EXTREME, fp16, scaling=16.0, magnitudes=(2**12, 1, 1, 2**-4, 2**-10)),
    Case(*EXTREME, fp16, scaling=2**-24, magnitudes=(1, 2**-12, 1, 2**12, 1)),
    Case(*EXTREME, fp16, dropout_p=0.5, scaling=-11.0, magnitudes=(2**12, 1, 1, 2**-4, 2**-10)),
    Case(*EXTREME, fp16, fp32, scaling=16.0, magnitudes=(2**12, 1, 1, 2**-4, 2**-10)),
    Case(*EXTREME, bf16, scaling=2**12, magnitudes=(2.0**116, 2**-80, 1, 2**-92, 2**-24)),
    Case(*EXTREME, bf16, scaling=1e-6, magnitudes=(1, 1e-3, 1, 1e3, 1)),
)


class Inputs(NamedTuple):
    """The operands of a case, dy included; shapes as in `operands.Forward` and `.Backward`.

    dx is added to a copy of onto[M,K], which is contiguous and in x's dtype.
    """

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    dy: Tensor
    seed: Tensor | None
    onto: Tensor | None = None

    def forward(self, case: Case) -> Forward:
        """Return what `Backend.forward` takes."""
        operands = self.x, self.weight, self.lora_a, self.lora_b, self.bias, self.seed
        return Forward(*operands, case.scaling, case.dropout_p, case.first_column)

    def backward(self, case: Case, p: Tensor) -> Backward:
        """Return what `Backend.backward` takes for the gradients that `case` needs."""
        need_dx, need_da, need_db = case.needs
        return Backward(
            self.dy,
            self.x if need_da else None,
            self.weight if need_dx else None,
            self.lora_a if need_dx else None,
            self.lora_b if need_dx or need_da else None,
            p if need_db else None,
            self.seed if need_dx or need_da else None,
            case.scaling,
            case.dropout_p,
            case.first_column,
        )


class Results(NamedTuple):
    """What a backend returned for a case; None for a gradient that the case does not need."""

    y: Tensor
    p: Tensor
    dx: Tensor | None
    da: Tensor | None
    db: Tensor | None

    def copied(self) -> "Results":
        """Return copies, made in the order of the stream: as the results are when it gets there."""
        y, p, *gradients = self
        return Results(y.clone(), p.clone(), *(None if g is None else g.clone() for g in gradients))


def run_backend(backend: Backend, case: Case, inputs: Inputs) -> Results:
    """Run both directions of `case` on `inputs`; the backward raises as `run_backward` does."""
    y, p = backend.forward(inputs.forward(case))
    return Results(y, p, *run_backward(backend, inputs.backward(case, p), inputs.onto))


def run_backward(backend: Backend, call: Backward, onto: Tensor | None) -> Gradients:
    """Run a backward, and assert that it returns as dx the copy of `onto` that it was given."""
    there = None if onto is None else torch.empty_like(onto).copy_(onto)
    gradients: Gradients = backend.backward(call, there)
    assert there is None or gradients[0] is there, "dx is not the tensor it was to be added to"
    return gradients


def is_large(case: Case) -> bool:
    """Return whether a CPU would take minutes to draw a case and to multiply it in float64."""
    return case.m * case.n * case.k >= 2**30


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Draw normal operands scaled so that the frozen and the low-rank path weigh the same in y.

    x[M,K] weight[N,K] bias[N] dy[M,N] have `case.dtype`, lora_a[R,K] lora_b[N,R] the adapters'.
    The same seed gives the same values on every device, but for large cases, which are drawn where
    they are used.
    """
    m, n, k, r = case.m, case.n, case.k, case.r
    place = device if is_large(case) else "cpu"
    generator = torch.Generator(place).manual_seed(seed)
    drawn: dict[str, Any] = {
        "generator": generator,
        "device": place,
        "dtype": fp32 if is_large(case) else fp64,
    }
    adapter_dtype = case.adapter_dtype or case.dtype

    def draw(rows: int, columns: int, dtype: torch.dtype, scale: float) -> Tensor:
        if not case.strided:
            values = torch.randn(rows, columns, **drawn) * scale
            return values.to(device, dtype)
        values = torch.randn(columns + 3, rows, **drawn) * scale
        return values.to(device, dtype)[1:-2].t()

    wide, tall = max(k, 1) ** -0.5, max(r, 1) ** -0.5
    loud_x, loud_w, loud_a, loud_b, loud_dy = case.magnitudes
    return Inputs(
        x=draw(m, k, case.dtype, loud_x),
        weight=draw(n, k, case.dtype, wide * loud_w),
        lora_a=draw(r, k, adapter_dtype, wide * loud_a),
        lora_b=draw(n, r, adapter_dtype, tall * loud_b),
        bias=draw(2 if case.strided else 1, n, case.dtype, 1.0)[0] if case.bias else None,
        dy=draw(m, n, case.dtype, loud_dy),
        # Both halves of the key differ from zero.
        seed=torch.tensor([(7 << 33) + seed + 20]) if case.dropout_p > 0 else None,
        onto=draw(m, k, case.dtype, loud_dy).contiguous() if case.onto else None,
    )


def tolerance(dtype: torch.dtype, reference64: Tensor, eager: Tensor) -> Tensor:
    """Return `2·(max|eager − ref64| + eps·max|ref64|)`, the error a result of `dtype` may have.

    eps is that of eager's dtype; a float64 result gets 1e-12 of `max|ref64|`.
    """
    magnitude = reference64.detach().abs().max()
    if dtype == fp64:
        return 1e-12 * magnitude
    eager_error = (eager.detach().to(reference64.device, fp64) - reference64.detach()).abs().max()
    return 2 * (eager_error + torch.finfo(eager.dtype).eps * magnitude)


def assert_accurate(name: str, actual: Tensor, reference64: Tensor, eager: Tensor) -> float:
    """Assert that `actual` is as close to float64 as eager PyTorch in the same dtype, twice over.

    `max|actual − ref64| ≤ tolerance`; also finite, and of the same shape.

    Args:
        name: what is compared, for the message.
        actual: the result on trial, of any dtype.
        reference64: the float64 result, on the device that compares.
        eager: the same computation by eager PyTorch in the operands' dtype.

    Returns:
        The largest error over the tolerance, at most 1.

    Raises:
        AssertionError: naming the error, the tolerance and the worst element.
    """
    assert actual.shape == reference64.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference64.shape)}"
    )
    if actual.numel() == 0:
        return 0.0
    got = actual.detach().to(reference64.device, fp64)
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} elements are not finite"
    assert eager.shape == actual.shape, f"{name}: eager has shape {tuple(eager.shape)}"
    allowed = tolerance(actual.dtype, reference64, eager)
    assert allowed.isfinite(), f"{name}: eager itself overflows; choose a smaller case"
    error = (got - reference64.detach()).abs()
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= allowed, (
        f"{name}: error {error.max():.3g} at {worst} exceeds the tolerance {allowed:.3g}"
    )
    return float(error.max() / allowed) if allowed > 0 else 0.0


def expected(case: Case, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return y, p, dx, da and db of the oracle, every operand converted to `dtype`.

    Where dx is added to another, the sum is as autograd's: of both in `dtype`.
    """
    x, lora_a, lora_b = (
        t.detach().to(dtype).requires_grad_() for t in (inputs.x, inputs.lora_a, inputs.lora_b)
    )
    weight, dy = inputs.weight.to(dtype), inputs.dy.to(dtype)
    bias = None if inputs.bias is None else inputs.bias.to(dtype)
    p, seed, first = case.dropout_p, inputs.seed, case.first_column
    mask: dict[str, Any] = {"dropout_p": p, "seed": seed, "first_column": first}
    y = oracle(x, weight, lora_a, lora_b, case.scaling, bias, **mask)
    dx, da, db = torch.autograd.grad(y, (x, lora_a, lora_b), dy)
    if inputs.onto is not None:
        dx = dx + inputs.onto.to(dtype)
    # P is what the layer gives for a zero weight and the identity as B, but for the power of two.
    zero, identity = torch.zeros_like(lora_a), torch.eye(case.r, dtype=dtype, device=x.device)
    scaling = split_scaling(case.scaling, p, case.dtype).factor * (1 - p)
    low_rank = oracle(x, zero, lora_a, identity, scaling, **mask)
    return {"y": y, "p": low_rank, "dx": dx, "da": da, "db": db}


def check_backend(
    backend: Backend,
    case: Case,
    device: torch.device | str = "cpu",
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> float:
    """Run `backend` on `case` and assert that y, P and the needed gradients are right.

    `change` may make other inputs of the drawn ones; it must do so the same way every time.

    Returns:
        The largest error over its tolerance, at most 1.

    Raises:
        AssertionError: on the first result of wrong shape, dtype or value.
    """
    inputs, pristine = (change(make_inputs(case, device)) for _ in range(2))
    with poisoned_memory(), RedZones() as zones:
        results = run_backend(backend, case, inputs)
    zones.check()
    results = results.copied()  # what is written later is too late

    exact = pristine if is_large(case) else change(make_inputs(case))
    reference64 = expected(case, exact, fp64)
    eager = expected(case, pristine, case.dtype)
    for name, given, kept in zip(Inputs._fields, inputs, pristine, strict=True):
        if given is not None and kept is not None:
            assert torch.equal(given, kept), f"{name} was written to in {case}"
    worst, wanted = 0.0, (True, True, *case.needs)
    likes = inputs.x, inputs.lora_a, inputs.x, inputs.lora_a, inputs.lora_b
    for name, got, like, needed in zip(Results._fields, results, likes, wanted, strict=True):
        if not needed:
            continue
        assert got is not None, f"{name} is missing in {case}"
        assert got.dtype == like.dtype, f"{name} is {got.dtype}, expected {like.dtype} in {case}"
        error = assert_accurate(f"{name} of {case}", got, reference64[name], eager[name])
        worst = max(worst, error)
    return worst


def check_non_finite(
    backend: Backend, case: Case, value: float, device: torch.device | str = "cpu"
) -> None:
    """Assert that a NaN or Inf in x and in dy comes out where PyTorch has one, and only there.

    It stands in an element of x that dropout keeps: what becomes of a dropped one is not asked.

    Raises:
        AssertionError: on the first result that differs.
    """
    inputs = make_inputs(case, device)
    if case.m and case.k and case.n:
        row = case.m // 2
        keep = torch.ones(1, case.k)
        if inputs.seed is not None:
            columns = mask_columns(case.first_column, range(case.k))
            keep = keep_mask(inputs.seed, case.dropout_p, range(row, row + 1), columns)
        inputs.x[row, int(keep[0].nonzero()[-1])] = value
        inputs.dy[case.m // 3, case.n // 2] = value
    results = run_backend(backend, case, inputs)
    right = expected(case, inputs, case.dtype)
    for name, got in results._asdict().items():
        if got is not None:
            same = torch.equal(got.isfinite(), right[name].isfinite())
            assert same, f"{name} has {value} elsewhere than PyTorch in {case}"


def check_frozen(backend: Backend, case: Case, device: torch.device | str = "cpu") -> None:
    """Assert that B = 0 gives the frozen layer of the same backend, bit for bit, whatever s.

    y and dx must equal those of s = 0, where nothing of the adapter is left, and da must be zero.

    Raises:
        AssertionError: on the first result that differs.
    """
    inputs = make_inputs(case, device)
    inputs = inputs._replace(lora_b=torch.zeros_like(inputs.lora_b))
    with poisoned_memory():
        results = run_backend(backend, case, inputs)
        frozen = run_backend(backend, case._replace(scaling=0.0), inputs)
    for name, got, kept in zip(Results._fields, results, frozen, strict=True):
        if got is None or kept is None:
            continue
        assert name in ("p", "db") or torch.equal(got, kept), f"{name} is not frozen in {case}"
    assert results.da is None or not results.da.any(), f"da is not zero in {case}"


# An x that s·x·Aᵀ would take out of fp16, an s beyond fp16 itself, and both ends of fp32.
FROZEN_CASES = tuple(
    Case(130, 72, 136, 24, dtype, adapter_dtype, True, dropout_p, s, magnitudes=(loud, 1, 1, 1, 1))
    for dtype, adapter_dtype in ((fp16, None), (bf16, None), (fp16, fp32), (fp32, None))
    for dropout_p, s, loud in (
        *((p, s, 1.0) for p in (0.0, 0.3) for s in (1.0, -3.0, 0.3, 1e5, 1e-9, 1e38, 1e-30)),
        *((p, 16.0, 2.0**12) for p in (0.0, 0.3)),
    )
)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an element never written shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def __getattr__(name: str) -> Any:
    """Import `audit` when it is asked for: it is built on this module."""
    if name == "audit":
        from lora_kernels.audit import audit

        return audit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
