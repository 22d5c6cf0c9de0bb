"""The dropout mask: Random123's known answers, independent code, and statistics."""

import ctypes
import math
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels import extension
from lora_kernels.ops.lora_linear.philox import drop, keep_mask, philox4x32, threshold

WORD = 2**32 - 1
SOURCE = Path(__file__).parent.parent / "csrc" / "cpu" / "dropout.cpp"


def plain_philox(counter: tuple[int, ...], seed: int) -> list[int]:
    """Philox 4x32-10 as the paper states it, in Python integers."""
    c, k = list(counter), [seed & WORD, seed >> 32 & WORD]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def plain_number(m: int, k: int, seed: int) -> int:
    """The 16-bit random number of element (m, k)."""
    word = plain_philox((k // 8, m & WORD, m >> 32, 0), seed)[k % 8 // 2]
    return word >> 16 * (k % 2) & 0xFFFF


def words(counter: tuple[int, ...], seed: int, device: str = "cpu") -> list[int]:
    as_int64 = seed - 2**64 if seed >= 2**63 else seed
    tensors = tuple(torch.tensor([c], device=device) for c in counter)
    return [int(w) & WORD for w in philox4x32(tensors, torch.tensor([as_int64], device=device))]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(
    counter: tuple[int, ...], key: int, answer: tuple[int, ...], device: str
) -> None:
    assert plain_philox(counter, key) == list(answer)
    assert words(counter, key, device) == list(answer)


@given(counter=st.tuples(*[st.integers(0, WORD)] * 4), seed=st.integers(0, 2**63 - 1))
def test_words_equal_independent_code(counter: tuple[int, ...], seed: int) -> None:
    assert words(counter, seed) == plain_philox(counter, seed)


@given(
    seed=st.integers(0, 2**63 - 1),
    p=st.floats(0, 1, exclude_max=True),
    row=st.integers(0, 2**40),
    column=st.integers(0, 2**20),
    rows=st.integers(0, 5),
    columns=st.integers(0, 9),
)
def test_the_mask_is_its_definition(
    seed: int, p: float, row: int, column: int, rows: int, columns: int
) -> None:
    tile = range(row, row + rows), range(column, column + columns)
    keep = keep_mask(torch.tensor([seed]), p, *tile)
    assert keep.shape == (rows, columns)
    assert keep.dtype == torch.bool
    dropped_below = min(round(p * 2**16), 2**16 - 1)
    assert keep.tolist() == [
        [plain_number(m, k, seed) >= dropped_below for k in tile[1]] for m in tile[0]
    ]


@given(
    rows=st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted),
    columns=st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted),
)
def test_any_tiling_agrees(rows: list[int], columns: list[int]) -> None:
    seed = torch.tensor([99])
    whole = keep_mask(seed, 0.5, range(20), range(30))
    tile = keep_mask(seed, 0.5, range(*rows), range(*columns))
    assert torch.equal(tile, whole[slice(*rows), slice(*columns)])


def test_the_mask_is_pinned(device: str) -> None:
    """Checkpointed runs must not change with the version: these bits are for ever."""
    keep = keep_mask(torch.tensor([0x123456789ABCDEF], device=device), 0.5, range(4), range(16))
    bits = ["".join("01"[int(b)] for b in row) for row in keep]
    assert bits == GOLDEN


GOLDEN = ["0111101001000011", "0100111000000010", "1111010101001111", "1010110010000100"]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_the_rate_is_p_within_four_sigma(p: float) -> None:
    keep = keep_mask(torch.tensor([5]), p, range(512), range(512))
    sigma = math.sqrt(p * (1 - p) * keep.numel())
    assert abs(int(keep.sum()) - (1 - p) * keep.numel()) < 4 * sigma


@pytest.mark.parametrize("dim", [0, 1])
def test_neighbours_are_independent(dim: int) -> None:
    keep = keep_mask(torch.tensor([5]), 0.5, range(512), range(512))
    for distance in (1, 2, 3, 4, 8, 32):
        agree = (keep == keep.roll(distance, dim)).sum()
        assert abs(int(agree) - keep.numel() / 2) < 4 * math.sqrt(keep.numel() / 4)


@pytest.mark.parametrize(
    "other",
    [4, 6, 5 + 2**32, 5 << 32, 2**63 - 1 - 5],
)
def test_other_seeds_give_other_masks(other: int) -> None:
    tile = range(256), range(256)
    keep = keep_mask(torch.tensor([5]), 0.5, *tile)
    agree = int((keep == keep_mask(torch.tensor([other]), 0.5, *tile)).sum())
    assert abs(agree - keep.numel() / 2) < 4 * math.sqrt(keep.numel() / 4)


def test_rows_past_2_to_the_32_differ_from_those_before() -> None:
    seed = torch.tensor([5])
    low, high = (keep_mask(seed, 0.5, range(m, m + 8), range(64)) for m in (3, 3 + 2**32))
    assert not torch.equal(low, high)
    across = keep_mask(seed, 0.5, range(2**32 - 2, 2**32 + 2), range(64))
    assert torch.equal(across[2:], keep_mask(seed, 0.5, range(2**32, 2**32 + 2), range(64)))


@pytest.mark.parametrize(
    ("p", "number"),
    [
        (0.0, 0),
        (2.0**-18, 0),
        (2.0**-16, 1),
        (0.1, 6554),
        (0.25, 2**14),
        (0.5, 2**15),
        (1 - 2.0**-16, 2**16 - 1),
        (math.nextafter(1.0, 0.0), 2**16 - 1),
    ],
)
def test_threshold(p: float, number: int) -> None:
    assert threshold(p) == number


def test_no_element_is_dropped_at_p_zero() -> None:
    assert keep_mask(torch.tensor([5]), 0.0, range(64), range(64)).all()


def test_the_seed_is_left_alone() -> None:
    seed = torch.tensor([5])
    keep_mask(seed, 0.5, range(4), range(4))
    assert seed.tolist() == [5]


# --- drop(): PyTorch's operators and the compiled routine, to the bit ---------------------------


def compiled(source: str, folder: Path) -> ctypes.CDLL:
    """The routine as setup.py compiles it, from this tree or with a mistake in it."""
    folder.mkdir(exist_ok=True)
    path = folder / "dropout.cpp"
    path.write_text(source)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-o", str(folder / "dropout.so")]
    try:
        subprocess.run([*compiler, *flags, str(path)], check=True)
    except FileNotFoundError:
        pytest.skip("needs a C++ compiler")
    return ctypes.CDLL(str(folder / "dropout.so"))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cpu")
    return {"operators": "no library", "compiled": compiled(SOURCE.read_text(), folder)}


TILES: list[tuple[int, float, range, range]] = [
    (5, 0.3, range(7), range(13)),
    (2**32 + 5, 0.1, range(3, 5), range(3, 1500)),  # past a chunk of 512, within a group
    (2**63 - 1, 0.5, range(2**32 - 2, 2**32 + 2), range(8, 24)),
    (2**40, 0.0, range(2), range(9)),
    (1, 2.0**-16, range(16), range(1024)),
    (1, math.nextafter(1.0, 0.0), range(16), range(1024)),
    (6, 0.4, range(4), range(1023, 1025)),
    (7, 0.4, range(0), range(8)),
    (7, 0.4, range(8), range(0)),
]


def assert_drops(tile: tuple[int, float, range, range]) -> None:
    number, p, rows, columns = tile
    seed, size = torch.tensor([number]), (len(rows), len(columns))
    keep = keep_mask(seed, p, rows, columns)
    wide = torch.randn(size[0], 2 * size[1] + 3, dtype=torch.float64)
    for layout in (
        lambda t: t[:, 2 : 2 + size[1]],
        lambda t: t[:, 1 : 1 + 2 * size[1] : 2],
        lambda t: t[:, : size[1]].t().contiguous().t(),
    ):
        tiles = [
            layout(wide.to(dtype))
            for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        ]
        before = [t.clone() for t in tiles]
        for got, given_, same in zip(
            drop(seed, p, rows, columns, *tiles), tiles, before, strict=True
        ):
            assert got.dtype == given_.dtype
            assert torch.equal(given_, same)
            assert torch.equal(got, given_ * keep)
            assert torch.equal(got.signbit(), given_.signbit())


def assert_all_drop() -> None:
    for tile in TILES:
        assert_drops(tile)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("how", ["operators", "compiled"])
def test_drop_zeroes_what_the_mask_drops(
    how: str, tile: tuple, libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "load_cpu", lambda: libraries[how])
    assert_drops(tile)


@pytest.mark.parametrize("how", ["operators", "compiled"])
def test_what_is_not_finite_stays_so_where_it_is_dropped(
    how: str, libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "load_cpu", lambda: libraries[how])
    seed, tile = torch.tensor([5]), (range(16), range(16))
    keep = keep_mask(seed, 0.5, *tile)
    for value in (math.inf, -math.inf, math.nan):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            (got,) = drop(seed, 0.5, *tile, torch.full((16, 16), value, dtype=dtype))
            assert got[~keep].isnan().all()
            torch.testing.assert_close(got[keep], torch.full_like(got[keep], value), equal_nan=True)


MISTAKES: dict[str, tuple[str, str]] = {
    "multiplier": ("0xD2511F53u", "0xD2511F51u"),
    "key": ("0xBB67AE85u", "0xBB67AE86u"),
    "rounds": ("kRounds = 10", "kRounds = 9"),
    "seed of 32 bits": ("seed >> 32", "seed >> 63"),
    "row of 32 bits": ("row >> 32", "row >> 63"),
    "threshold": ("number[i] >= threshold", "number[i] > threshold"),
    "group": ("mask + (begin - start)", "mask"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_shows(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = MISTAKES[mistake]
    source = SOURCE.read_text()
    assert source.count(right) == 1
    library = compiled(source.replace(right, wrong), tmp_path)
    monkeypatch.setattr(extension, "load_cpu", lambda: library)

    with pytest.raises(AssertionError):
        assert_all_drop()


def test_a_library_that_cannot_serve_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(path: Path | None) -> str:
        spec = None if path is None else type("Spec", (), {"origin": str(path)})
        monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
        return str(extension.load_cpu.__wrapped__())

    assert "_cpu is not built" in found(None)
    (tmp_path / "broken.so").write_text("nothing")
    assert "_cpu does not load" in found(tmp_path / "broken.so")
    compiled(SOURCE.read_text().replace("lora_drop", "another"), tmp_path)
    assert "_cpu does not load: " in found(tmp_path / "dropout.so")


def test_drop_sees_a_negative_view_as_it_reads() -> None:
    tile = torch._neg_view(torch.rand(5, 9) + 1)
    (got,) = drop(torch.tensor([3]), 0.5, range(5), range(9), tile)
    assert torch.equal(got, tile * keep_mask(torch.tensor([3]), 0.5, range(5), range(9)))
    assert (got < 0).any()


@pytest.mark.gpu
def test_a_cpu_seed_serves_a_gpu_mask() -> None:
    seed, tile = torch.tensor([2**40 + 5]), (range(100), range(3, 77))
    on_cpu = keep_mask(seed, 0.3, *tile)
    assert torch.equal(on_cpu, keep_mask(seed, 0.3, *tile, torch.device("cuda")).cpu())
    assert torch.equal(on_cpu, keep_mask(seed.cuda(), 0.3, *tile).cpu())
