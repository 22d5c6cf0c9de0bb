"""The Triton kernels' numbers, in Triton's interpreter on the CPU; `test_triton.py` runs this file.

It needs a process of its own: TRITON_INTERPRET=1 must be set before Triton is imported.
"""

import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from readers import check_readers
from slices import check_slices
from torch.utils._python_dispatch import TorchDispatchMode

from bench import forced
from lora_kernels import lora_linear
from lora_kernels.ops.lora_linear import triton as backend
from lora_kernels.ops.lora_linear import workspace
from lora_kernels.ops.lora_linear.config import SHARED_KIB, TileConfig
from lora_kernels.ops.lora_linear.philox import LOW, keep_mask
from lora_kernels.ops.lora_linear.triton import (
    backward_kernel,
    forward_kernel,
    primitives,
)
from lora_kernels.testing import (
    CASES,
    FROZEN_CASES,
    Case,
    Inputs,
    check_backend,
    check_frozen,
    make_inputs,
    run_backend,
)

# Small enough that every case has several blocks of everything.
SMALL = TileConfig(32, 32, 32, warps=4, stages=2, br=16, group=2)
# The rank loop's edges, several rank tiles, and a scaling of its own.
RANKS = [
    Case(40, 50, 60, r, scaling=0.1 * r, dropout_p=p)
    for r, p in ((1, 0.0), (16, 0.5), (31, 0.0), (33, 0.2), (129, 0.0), (300, 0.3), (512, 0.0))
]


@pytest.fixture(autouse=True)
def bounded_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a wait in vain fail, not hang, and let no test see another's workspace."""
    monkeypatch.setattr(backend, "DEBUG", True)
    workspace._by_stream.clear()
    workspace._chunks.clear()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "pick", lambda *_, **__: SMALL)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """Small blocks, loaded by tensor descriptors where the strides allow them."""
    monkeypatch.setattr(backend, "_has_tma", lambda _: True)


def case_id(case: Case) -> str:
    dtypes = f"{case.dtype}-{case.adapter_dtype}".replace("torch.", "").replace("-None", "")
    needs = "".join(name for name, need in zip(("dx", "da", "db"), case.needs, strict=True) if need)
    return (
        f"{case.m}x{case.n}x{case.k}r{case.r}-{dtypes}-p{case.dropout_p}-{needs}"
        f"{'-bias' * case.bias}{'-strided' * case.strided}{'-onto' * case.onto}"
    )


@pytest.mark.parametrize("case", CASES[2::9], ids=case_id)
def test_the_blocks_that_pick_chooses(case: Case) -> None:
    check_backend(backend.BACKEND, case)


@pytest.mark.parametrize("case", [*CASES, *RANKS], ids=case_id)
def test_every_case_with_small_blocks(case: Case, described: None) -> None:
    check_backend(backend.BACKEND, case)


def every_tile() -> Iterator[tuple[forced.Tile, Case]]:
    """Every line of the tables of tiles, in each direction, with a forced case that may get it.

    The case gets two blocks of rows, of columns and of the contraction, all ragged.
    """
    seen = set()
    for case in forced.CASES:
        for arch in SHARED_KIB:
            for tile in forced.every_tile(case.problem("cuda", arch)):
                c = tile.config
                line = c.bm, c.bn, c.bk, c.group, tile.backward, case.dtype.itemsize
                if line not in seen:
                    seen.add(line)
                    columns, depth = c.bn + 24, c.bk + 8
                    n, k = (depth, columns) if tile.backward else (columns, depth)
                    yield tile, tile.judge(case._replace(m=c.bm + 8, n=n, k=k))


@pytest.mark.parametrize(("tile", "case"), every_tile(), ids=str)
def test_a_line_of_the_tables_is_right(tile: forced.Tile, case: Case) -> None:
    with forced.forced(tile, forced.FEW_CTAS):
        check_backend(backend.BACKEND, case)


@pytest.mark.parametrize("wrong", [{"bn": 48}, {"bk": 192}, {"bm": 20}, {"br": 24}, {"group": 0}])
@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_line_of_the_tables_is_noticed(wrong: dict[str, int], backward: bool) -> None:
    tile, case = next(
        (t, c) for t, c in every_tile() if (t.config.bm, t.backward) == (16, backward)
    )
    config = dataclasses.replace(tile.config, **wrong)
    with forced.forced(tile._replace(config=config)), pytest.raises(Exception):  # noqa: B017, PT011
        check_backend(backend.BACKEND, case)


def test_the_workspace_is_left_zeroed(small: None) -> None:
    check_backend(backend.BACKEND, Case(67, 131, 89, 20))
    (words,) = workspace._by_stream.values()
    assert words.numel() > 0
    assert not words.any()


def test_fp32_adapters_get_fp32_gradients_beside_bf16() -> None:
    case = Case(65, 70, 127, 20, torch.bfloat16, torch.float32)
    inputs = make_inputs(case)
    _, p, _, da, db = run_backend(backend.BACKEND, case, inputs)
    x64, a64, b64, dy64 = (t.double() for t in (inputs.x, inputs.lora_a, inputs.lora_b, inputs.dy))
    p64, q64 = case.scaling * x64 @ a64.T, case.scaling * dy64 @ b64
    for got, right in ((p, p64), (da, q64.T @ x64), (db, dy64.T @ p64)):
        assert got is not None
        assert (got - right).abs().max() <= 2e-5 * right.abs().max()  # bf16 alone: 4e-3


@pytest.mark.parametrize(("p", "seed"), [(0.1, 0), (0.5, 2**40 + 3), (0.9999, 2**63 - 1)])
def test_the_mask_is_the_references_bit_for_bit(p: float, seed: int) -> None:
    m, k = 37, 70
    key, ones = torch.tensor([seed]), torch.ones(m, k)
    keep = keep_mask(key, p, range(m), range(k))
    # W = 0 and A = B = identity: P is s·drop(x), dx is undrop(s·dy), and da[r,k] sums Q∘drop(x).
    weight, eye = torch.zeros(k, k), torch.eye(k)
    case = Case(m, k, k, k, scaling=1.0, dropout_p=p, needs=(True, True, False))
    inputs = Inputs(ones, weight, eye, eye, None, ones, key)
    _, dropped, dx, da, _ = run_backend(backend.BACKEND, case, inputs)
    assert torch.equal(dropped != 0, keep)
    assert dx is not None
    assert torch.equal(dx != 0, keep)
    assert da is not None
    torch.testing.assert_close(da * (1 - p), keep.sum(0).float().expand(k, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_readers_of_one_x_sum_its_gradient(
    dtype: torch.dtype, dropout_p: float, described: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_readers(backend.BACKEND, Case(67, 23, 89, 5, dtype, dropout_p=dropout_p), monkeypatch)


@pytest.mark.parametrize("onto", [False, True])
def test_a_flag_that_says_otherwise_is_noticed(
    onto: bool, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = backend._launch

    def flipped(*arguments: Any) -> None:
        launch(*arguments[:5], *(1 - adds for adds in arguments[5:]))

    monkeypatch.setattr(backend, "_launch", flipped)
    with pytest.raises(AssertionError, match=r"^dx of "):
        check_backend(backend.BACKEND, Case(67, 131, 89, 5, onto=onto))


@pytest.mark.parametrize(
    ("dtype", "first"),
    [(torch.bfloat16, 0), (torch.float32, 1000), (torch.bfloat16, 2**31 - 512)],
    ids=str,
)
def test_slices_of_x_have_their_part_of_its_mask(
    dtype: torch.dtype, first: int, described: None
) -> None:
    check_slices(backend.BACKEND, dtype, torch.float32, first, width=72)


@triton.jit
def key_kernel(seed_ptr, out_ptr):  # type: ignore[no-untyped-def]
    low, high = primitives.philox_key(seed_ptr, 0, 0)
    tl.store(out_ptr, low.to(tl.int64))
    tl.store(out_ptr + 1, high.to(tl.int64))


def test_a_seed_in_device_memory_gives_the_same_key() -> None:
    for seed in (20, 2**63 - 1, 2**40 + 2**31):
        out = torch.zeros(2, dtype=torch.int64)
        key_kernel[(1,)](torch.tensor([seed]), out)
        assert out.tolist() == [seed & LOW, seed >> 32]


@pytest.mark.parametrize("case", FROZEN_CASES[3::12], ids=str)
def test_a_zero_b_gives_the_frozen_layer_bit_for_bit(case: Case, small: None) -> None:
    check_frozen(backend.BACKEND, case._replace(m=33, n=40, k=34))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(value: float, described: None) -> None:
    case = Case(40, 50, 60, 20)
    call = make_inputs(case).forward(case)
    call.x[17, 33] = value
    y, p = backend.forward(call)
    bad = torch.arange(40) == 17
    assert not y[bad].isfinite().any()
    assert y[~bad].isfinite().all()
    assert p[~bad].isfinite().all()


def test_the_public_function_runs_on_it() -> None:
    x, weight, a, b, bias, dy, *_ = make_inputs(Case(24, 50, 60, 8, bias=True))
    outcomes = []
    for name in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = lora_linear(
            leaves[0].view(2, 3, 4, 60),
            weight,
            *leaves[1:],
            0.5,
            bias,
            dropout_p=0.3,
            seed=7,
            backend=name,
        )
        y.backward(dy.view(2, 3, 4, 50))
        outcomes.append([y, *(leaf.grad for leaf in leaves)])
    for got, right in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, right)


# --- One launch -----------------------------------------------------------------------------------


class Recorder:
    """Stands for a kernel: keeps the arguments of each launch and computes nothing."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append({"grid": grid, **options})


class Operators(TorchDispatchMode):
    """Records which PyTorch operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_launch_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, p: float, needs: tuple[int, int, int]
) -> None:
    wanted = tuple(map(bool, needs))
    case = Case(40, 50, 60, 20, bias=True, dropout_p=p, strided=True, needs=wanted)  # type: ignore[arg-type]
    inputs = make_inputs(case)
    forward, backward = Recorder(), Recorder()
    monkeypatch.setattr(forward_kernel, "lora_linear_forward", forward)
    monkeypatch.setattr(backward_kernel, "lora_linear_backward", backward)
    workspace.reserve(64, inputs.x.device, 0)  # made once per stream
    with Operators() as operators:
        run_backend(backend.BACKEND, case, inputs)
    assert (len(forward.launches), len(backward.launches)) == (1, 1)
    # Allocations, and the seed read off the CPU; no copy, no fill, no arithmetic.
    assert operators.names <= {"new_empty", "_local_scalar_dense", "item"}


def test_nothing_to_do_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Recorder()
    monkeypatch.setattr(forward_kernel, "lora_linear_forward", forward)
    case = Case(0, 5, 7, 3, needs=(False, False, False))
    _, _, *gradients = run_backend(backend.BACKEND, case, make_inputs(case))
    assert gradients == [None, None, None]
    assert forward.launches == []


def test_fp32_products_honour_torchs_tf32_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Recorder()
    monkeypatch.setattr(forward_kernel, "lora_linear_forward", forward)
    case = Case(4, 5, 7, 3)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = setting
            backend.forward(make_inputs(case).forward(case))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert [launch["PRECISION"] for launch in forward.launches] == ["ieee", "tf32"]


# --- Mutants of the kernels: each is one wrong function in place of a right one -------------------

Wrong = Callable[[Callable[..., Any]], Callable[..., Any]]


def with_argument(index: int, change: Callable[[Any], Any]) -> Wrong:
    """Change one positional argument of each call."""

    def wrong(right: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return right(*args[:index], change(args[index]), *args[index + 1 :], **kwargs)

        return call

    return wrong


def result(change: Callable[..., Any]) -> Wrong:
    """Change what is returned."""
    return lambda right: lambda *args, **kwargs: change(right(*args, **kwargs))


def nothing(right: Callable[..., Any]) -> Callable[..., None]:
    return lambda *_, **__: None


def skipped_last_rows(right: Callable[..., Any]) -> Callable[..., Any]:
    """`store` leaves out the last block of rows."""

    def store(out: Any, acc: Any, row: Any, col: Any, rows: Any, *rest: Any) -> None:
        if not row + acc.shape[0] >= rows:
            right(out, acc, row, col, rows, *rest)

    return store


def turned(right: Callable[..., Any]) -> Callable[..., Any]:
    """`store` writes each tile to the transposed place."""

    def store(out: Any, acc: Any, row: Any, col: Any, rows: Any, cols: Any, *strides: Any) -> None:
        right(out, tl.trans(acc), row, col, rows, cols, *strides)

    return store


DEPTH, SCALE = 9, 13  # positions among the arguments of `contract`; of `_p_item` and `_q_item`
MUTANTS: dict[str, tuple[ModuleType, str, Wrong]] = {
    "zeros forward": (forward_kernel, "store", with_argument(1, lambda acc: acc * 0.0)),
    "zeros backward": (backward_kernel, "store", with_argument(1, lambda acc: acc * 0.0)),
    "zeros of P, da and db": (primitives, "store", with_argument(1, lambda acc: acc * 0.0)),
    "P's mask transposed": (forward_kernel, "DROP_ROW_IS_M", lambda _: primitives.DROP_DEPTH_IS_M),
    "da's mask transposed": (
        backward_kernel, "DROP_DEPTH_IS_M", lambda _: primitives.DROP_ROW_IS_M
    ),
    "a tile of P turned once too often": (primitives, "store", turned),
    "last row block unwritten forward": (forward_kernel, "store", skipped_last_rows),
    "last row block unwritten backward": (backward_kernel, "store", skipped_last_rows),
    "second rank tile of P ignored": (forward_kernel, "skinny", result(lambda t: (t[0], t[1] * 0))),
    "second rank tile backward": (backward_kernel, "skinny", result(lambda t: (t[0], t[1] * 0))),
    "depth short forward": (forward_kernel, "contract", with_argument(DEPTH, lambda d: d - 1)),
    "depth short backward": (backward_kernel, "contract", with_argument(DEPTH, lambda d: d - 1)),
    "first column block twice": (forward_kernel, "tile", result(lambda t: (t[0], t[1] * 0))),
    "first dx block twice": (backward_kernel, "tile", result(lambda t: (t[0] * 0, t[1]))),
    "P unscaled": (forward_kernel, "_p_item", with_argument(SCALE, lambda s: s * 0 + 1)),
    "Q unscaled": (backward_kernel, "_q_item", with_argument(SCALE, lambda s: s * 0 + 1)),
    "x·Wᵀ not lowered": (forward_kernel, "_main_tile", with_argument(22, lambda s: s * 0 + 1)),
    "y not raised": (forward_kernel, "_main_tile", with_argument(23, lambda s: s * 0 + 1)),
    "dy·W not lowered": (backward_kernel, "_low_rank", with_argument(12, lambda s: s * 0 + 1)),
    "dx not raised": (backward_kernel, "_low_rank", with_argument(13, lambda s: s * 0 + 1)),
    "da and db not raised": (
        backward_kernel, "_gradient_item", with_argument(12, lambda s: s * 0 + 1)
    ),
    "R = 20 in eights": (backend, "in_eights", lambda _: lambda *_: True),
    "mask of dx off by a row": (backward_kernel, "keep_tile", with_argument(0, lambda r: r + 1)),
    "mask of P and da off by a group": (primitives, "keep_tile", with_argument(1, lambda c: c + 8)),
    "slices of P and da begin at 0": (primitives, "keep_tile", with_argument(6, lambda f: f * 0)),
    "slices of dx begin at 0": (backward_kernel, "keep_tile", with_argument(6, lambda f: f * 0)),
    "mask inverted": (primitives, "keep_tile", result(lambda keep: keep == 0)),
    "another seed forward": (forward_kernel, "philox_key", result(lambda k: (k[1], k[0]))),
    "another seed backward": (backward_kernel, "philox_key", result(lambda k: (k[1], k[0]))),
    "workspace never cleared": (forward_kernel, "finish", nothing),
}  # fmt: skip
JUDGES = (
    Case(40, 50, 60, 20, dropout_p=0.5, bias=True, scaling=3.0),
    Case(40, 50, 60, 20, scaling=3.0),
    Case(40, 50, 64, 20, dropout_p=0.5, first_column=64),
)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed(name: str, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    module, attribute, wrong = MUTANTS[name]
    monkeypatch.setattr(module, attribute, wrong(getattr(module, attribute)))
    with pytest.raises(AssertionError):
        check_judges()


@pytest.mark.parametrize("module", [forward_kernel, backward_kernel])
def test_a_wait_in_vain_is_reported(
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    small: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_judges()
    assert "waits in vain" not in capsys.readouterr().out
    monkeypatch.setattr(module, "publish", lambda *_, **__: None)
    check_judges()
    assert "lora_linear waits in vain, item" in capsys.readouterr().out


def check_judges() -> None:
    for case in JUDGES:
        check_backend(backend.BACKEND, case)
