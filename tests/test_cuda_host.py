"""The CUDA backend's host side: what it refuses, and what it copies."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import extension
from lora_kernels.dispatch import BackendUnavailable, select
from lora_kernels.ops.lora_linear import BACKENDS, Problem, cuda, workspace
from lora_kernels.ops.lora_linear.problem import UNEVEN
from lora_kernels.testing import Case, bf16, fp16, fp32, make_inputs

HOPPER = Problem(4096, 4096, 4096, 16, bf16, bf16, "cuda", 90)


@pytest.fixture(autouse=True)
def _built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_absent", lambda: None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": fp16, "adapter_dtype": fp16}, None),
        ({"bias": True, "dropout": True}, None),
        ({"m": 1, "n": 8, "k": 8, "r": 8}, None),
        ({"r": 1024}, None),
        ({"m": 2**31 - 257}, None),
        ({"arch": None}, None),  # asked about without a GPU
        ({"device": "cpu", "arch": None}, "it needs a CUDA device, not cpu"),
        ({"arch": 80}, "it needs compute capability 9.0, not 8.0"),
        ({"arch": 100}, "it needs compute capability 9.0, not 10.0"),
        ({"dtype": fp32}, "float32 is not supported, only bfloat16 and float16"),
        ({"adapter_dtype": fp32}, None),
        ({"adapter_dtype": fp32, "r": 4}, None),
        ({"adapter_dtype": fp16}, "adapters must have x's dtype or float32, not float16"),
        (
            {"adapter_dtype": fp32, "r": 6},
            "TMA needs rows of a multiple of 16 bytes: R=6 is no multiple of 4",
        ),
        ({"r": 4}, "TMA needs rows of a multiple of 16 bytes: R=4 is no multiple of 8"),
        ({"r": 20}, "TMA needs rows of a multiple of 16 bytes: R=20 is no multiple of 8"),
        ({"k": 4097}, "TMA needs rows of a multiple of 16 bytes: K=4097 is no multiple of 8"),
        ({"n": 4100}, "TMA needs rows of a multiple of 16 bytes: N=4100 is no multiple of 8"),
        ({"dropout": True, "uneven": True}, UNEVEN),
        ({"m": 0}, "an empty problem is not supported"),
        ({"k": 0}, "an empty problem is not supported"),
        ({"m": 2**31 - 256}, "a size of nearly 2**31 or more is not supported"),
    ],
    ids=str,
)
def test_why_not(changes: dict[str, object], reason: str | None) -> None:
    assert cuda.why_not(HOPPER._replace(**changes)) == reason


def test_an_absent_extension_is_the_last_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_absent", lambda: "not built")
    assert cuda.why_not(HOPPER) == "not built"
    assert cuda.why_not(HOPPER._replace(arch=80)) == "it needs compute capability 9.0, not 8.0"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            SimpleNamespace(
                INTERFACE=extension._INTERFACE, why_not=lambda: "the driver is too old"
            ),
            "the driver is too old",
        ),
        (SimpleNamespace(why_not=lambda: None), "it is older than this package"),
    ],
    ids=["driver", "build"],
)
def test_an_extension_that_cannot_serve_does_not_load(
    module: SimpleNamespace, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lora_kernels._C", module)
    monkeypatch.setattr(extension, "_load", extension._load.__wrapped__)
    with pytest.raises(ImportError, match=reason):
        extension.load()


def test_asking_for_it_by_name_gets_its_reason() -> None:
    with pytest.raises(BackendUnavailable, match=r"cuda: it needs a CUDA device, not cpu$"):
        select(BACKENDS, HOPPER._replace(device="cpu", arch=None), "cuda")


def test_only_what_tma_cannot_address_is_copied() -> None:
    base = torch.randn(32, 64).to(bf16)
    misaligned = torch.randn(32 * 64 + 1).to(bf16)[1:].view(32, 64)
    for kept in (base, base[:, :24], base[:, 8:], base[::2], base[3:]):
        assert cuda._addressed(kept) == ([(kept.data_ptr(), kept.stride(0))], [])
    for copied in (base.t(), base[:, 1:], base[:, ::2], base[:1].expand(8, 64), misaligned):
        read, (copy,) = cuda._addressed(None, copied)
        assert copy.data_ptr() != copied.data_ptr()
        assert copy.data_ptr() % 16 == 0
        assert read == [(0, 0), (copy.data_ptr(), copy.shape[1])]
        assert copy.is_contiguous()
        assert torch.equal(copy, copied)


def test_a_seed_becomes_two_words_or_an_address() -> None:
    case = Case(8, 8, 8, 8, bf16, dropout_p=0.25, first_column=48)
    call = make_inputs(case).forward(case)
    assert cuda._dropout(call._replace(seed=None)) == (False, 0, 0, 0, 0, 0)
    seed = torch.tensor([5 + 7 * 2**32])
    assert cuda._dropout(call._replace(seed=seed)) == (True, 2**14, 5, 7, 6, 0)


def test_the_per_thread_default_stream_is_another_one_in_each_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(workspace, "_by_stream", {})
    monkeypatch.setattr(workspace, "_chunks", {})
    monkeypatch.setattr(workspace, "_zeroed", lambda n, _: torch.zeros(n, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for handle, slices in ((2, 3), (0, 1), (1, 1), (0x5000, 1)):  # 0, 1: the legacy default stream
        starts: list[int] = []

        def twice(starts: list[int] = starts, handle: int = handle) -> None:
            starts += [workspace.reserve(5, device, handle).data_ptr() for _ in range(2)]

        twice()
        for _ in range(2):  # one after another, so that a thread's number is free to be used again
            thread = threading.Thread(target=twice)
            thread.start()
            thread.join()
        assert starts[::2] == starts[1::2]
        assert len(set(starts)) == slices


def test_nothing_needed_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "load", lambda: pytest.fail("launched"))
    case = Case(8, 8, 8, 8, bf16, needs=(False, False, False))
    inputs = make_inputs(case)
    none = cuda.backward(inputs.backward(case, inputs.x))
    assert none == (None, None, None)
