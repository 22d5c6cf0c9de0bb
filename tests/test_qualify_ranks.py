"""Ranks of a real process group choose alike: by rank 0's word, without waiting for it for ever."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrun import torchrun

from lora_kernels.qualify import ranks

SCRIPT = Path(__file__).parent / "ranks_agree.py"


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks found in every scene, all played in one torchrun."""
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(3, SCRIPT, folder)
    assert done.returncode == 0, done.stderr[:6000]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


def scene(played: list[dict[str, Any]], name: str, size: int) -> list[dict[str, Any]]:
    return [of_rank[f"{name} {size}"] for of_rank in played[:size]]


def said(results: list[dict[str, Any]]) -> list[Any]:
    return [result["said"] for result in results]


def warnings_of(results: list[dict[str, Any]]) -> list[str]:
    return [text for result in results for text in result["warned"]]


def test_without_a_group_each_obeys_its_own_and_under_torchrun_all_obey_rank_0(
    played: list[dict[str, Any]],
) -> None:
    assert [of_rank["no group"]["said"] for of_rank in played] == [10, 11, 12]
    assert [of_rank["torchrun"]["said"] for of_rank in played] == [10, 10, 10]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alike", 17),
        ("different", 10),
        ("only_rank_0_has_one", 10),
        ("rank_0_is_late", 10),
        ("pinned_on_rank_0", 19),
        ("a_shipped_record", 50),
    ],
)
def test_all_obey_the_record_of_rank_0(
    name: str, expected: float, size: int, played: list[dict[str, Any]]
) -> None:
    results = scene(played, name, size)
    assert said(results) == [expected] * size
    assert warnings_of(results) == []


@pytest.mark.parametrize("size", [2, 3])
def test_where_rank_0_has_none_nobody_has(size: int, played: list[dict[str, Any]]) -> None:
    own, *others = said(scene(played, "only_others_have_one", size))
    assert "it has not been tried on this machine" in own
    assert set(others) == {"rank 0, whose word all ranks obey, has no record for its GPU"}


@pytest.mark.parametrize("size", [2, 3])
def test_nobody_waits_for_ever_for_rank_0(size: int, played: list[dict[str, Any]]) -> None:
    results = scene(played, "rank_0_asks_after_all_others", size)
    assert len(set(said(results))) == 1
    assert said(results)[0] in (11, 12)
    assert all(result["took"] > 0.4 for result in results[1:])
    (warning,) = warnings_of(results)
    assert "LORA_KERNELS_RECORD=path pins a record" in warning


@pytest.mark.parametrize("size", [2, 3])
def test_a_pinned_record_is_obeyed_at_once(size: int, played: list[dict[str, Any]]) -> None:
    _, *others = scene(played, "pinned", size)
    assert said(others) == [11, 12][: size - 1]
    assert all(result["took"] < ranks.WAIT_S / 2 for result in others)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("another_kind_of_gpu", "name is 'other' on rank 1 and 'x' on rank 0"),
        ("mixed_gpus_in_sight", "mixed is True on rank 1 and None on rank 0"),
    ],
)
def test_what_rank_0_cannot_speak_for_is_an_error_with_a_remedy(
    name: str, difference: str, size: int, played: list[dict[str, Any]]
) -> None:
    found = said(scene(played, name, size))
    assert found.pop(1) == (
        f"error: lora_kernels: all ranks must choose alike, but {difference}; make them equal, or "
        "set LORA_KERNELS_RECORD on every rank to a record of its own GPU"
    )
    assert set(found) == {10}


@pytest.mark.parametrize("size", [2, 3])
def test_gpus_of_several_kinds_without_a_record_are_no_error(
    size: int, played: list[dict[str, Any]]
) -> None:
    found = said(scene(played, "another_kind_without_records", size))
    assert not any(reason.startswith("error") for reason in found)


def test_a_choice_from_before_the_group_gives_way(played: list[dict[str, Any]]) -> None:
    results = [of_rank["before"] for of_rank in played]
    assert [result["before"] for result in results] == ["mine", "reference", "reference"]
    assert {(result["new"], result["again"]) for result in results} == {("mine", "mine")}


def test_a_group_made_anew_has_its_own_word(played: list[dict[str, Any]]) -> None:
    anew = [of_rank["anew"] for of_rank in played]
    assert anew == [*[{"first": 10, "second": 15}] * 2, {"first": None, "second": None}]


def test_a_group_without_a_store_is_none() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        assert ranks.group() is None
    finally:
        torch.distributed.destroy_process_group()
