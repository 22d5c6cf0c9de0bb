"""`select`: the first backend that supports a problem, or exactly the one asked for."""

import warnings

import pytest

from lora_kernels import dispatch
from lora_kernels.dispatch import AUTO, Backend, BackendUnavailable, select


def backend(name: str, reason: str | None = None) -> Backend:
    def never(*arguments: object) -> object:
        raise AssertionError("selecting runs nothing")

    return Backend(name, lambda problem: reason, never, never)


FAST, SLOW = backend("fast"), backend("slow")
ABSENT = backend("absent", "not built")


def test_auto_takes_the_first_that_can() -> None:
    assert select((FAST, SLOW), "p") is FAST
    assert select((SLOW, FAST), "p", AUTO) is SLOW
    assert select((ABSENT, SLOW, FAST), "p") is SLOW


def test_why_not_is_asked_about_the_problem() -> None:
    picky = Backend("picky", lambda problem: f"cannot {problem}", FAST.forward, FAST.backward)
    with pytest.raises(
        BackendUnavailable, match=r"^no backend for the job: picky: cannot the job$"
    ):
        select((picky,), "the job")


def test_a_name_takes_that_backend() -> None:
    assert select((FAST, SLOW), "p", "slow") is SLOW


def test_auto_passes_over_what_asks_for_that() -> None:
    shy = FAST._replace(name="shy", why_not_auto=lambda problem, backward: "only by name")
    assert select((shy, SLOW), "p") is SLOW
    with pytest.warns(UserWarning, match="the shy backend is unproven here: only by name"):
        assert select((shy, SLOW), "p", "shy") is shy
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        assert select((shy, SLOW), "another", "shy") is shy
    with pytest.raises(BackendUnavailable, match=r"^no backend for p: shy: only by name$"):
        select((shy,), "p")


def test_each_direction_is_asked_for() -> None:
    forth = FAST._replace(why_not_auto=lambda problem, backward: "slower" if backward else None)
    assert select((forth, SLOW), "p") is forth
    assert select((forth, SLOW), "p", backward=True) is SLOW


def test_a_choice_is_remembered_for_these_backends_alone() -> None:
    asked: list[object] = []

    def ask(problem: object) -> None:
        asked.append(problem)

    curious = (FAST._replace(why_not=ask), SLOW)
    for _ in range(3):
        assert select(curious, "p") is curious[0]
    assert asked == ["p"]
    assert select((SLOW,), "p") is SLOW
    dispatch.forget()
    select(curious, "p")
    assert asked == ["p", "p"]


def test_a_name_never_falls_back() -> None:
    with pytest.raises(BackendUnavailable) as raised:
        select((ABSENT, FAST), "p", "absent")
    assert str(raised.value) == "no backend for p: absent: not built"


def test_the_error_lists_every_reason_in_order() -> None:
    with pytest.raises(BackendUnavailable) as raised:
        select((ABSENT, backend("old", "needs sm_90, got sm_80")), "p")
    assert str(raised.value) == "no backend for p: absent: not built; old: needs sm_90, got sm_80"


def test_backends_after_the_chosen_one_are_not_asked() -> None:
    def ask(problem: object) -> str:
        raise AssertionError("asked in vain")

    assert select((FAST, Backend("last", ask, FAST.forward, FAST.backward)), "p") is FAST


def test_unavailability_is_a_runtime_error() -> None:
    assert issubclass(BackendUnavailable, RuntimeError)
