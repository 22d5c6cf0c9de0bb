"""What is asked of every path through a PTX program, on programs small enough to see through."""

import pytest
from ptx_paths import published, unfenced

PRODUCT = "tcgen05.mma.cta_group::1.kind::f16 [%r0], %rd1, %rd2, %r1, %p1;"
FENCE = "fence.proxy.async.shared::cta;"
ARRIVED = "cp.async.wait_group 0;"
STORE = "st.global.b32 [%rd1], %r1;"
RELEASE = "atom.global.gpu.release.add.u32 %r1, [%rd1], 1;"


def program(*lines: str) -> str:
    return "\n".join((".visible .entry kernel()", "{", *lines, "ret;", "}"))


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        ((ARRIVED, FENCE, PRODUCT), 0),
        ((FENCE, ARRIVED, PRODUCT, PRODUCT), 2),
        ((PRODUCT, ARRIVED), 0),
        (("st.shared.b32 [%r1], %r2;", PRODUCT), 1),
        # What stands above is not what comes before: this way there is jumped over.
        (("@%p1 bra B;", "A:", ARRIVED, "bra.uni C;", "B:", PRODUCT, "C:"), 0),
        (("bra.uni B;", "A:", ARRIVED, "ret;", "B:", PRODUCT), 0),
        # One way of two without a fence is enough, a loop's first turn and its later ones count.
        ((ARRIVED, "@%p1 bra B;", FENCE, "B:", PRODUCT), 1),
        ((ARRIVED, "@!%p1 bra B;", FENCE, PRODUCT, "ret;", "B:"), 0),
        (("A:", PRODUCT, ARRIVED, "@%p1 bra A;"), 1),
        (("A:", PRODUCT, ARRIVED, FENCE, "@%p1 bra A;"), 0),
        ((ARRIVED, "A:", PRODUCT, FENCE, "@%p1 bra A;"), 1),
        # Backwards: what stands below comes before.
        (("bra.uni B;", "A:", PRODUCT, "ret;", "B:", ARRIVED, "bra A;"), 1),
        # A predicated end may be passed; nothing comes after one without a predicate.
        ((ARRIVED, "@%p1 ret;", PRODUCT), 1),
        ((ARRIVED, "ret;", PRODUCT), 0),
        # Inline assembly repeats its labels, each in its own braces.
        (("{", "w:", "@!%p1 bra.uni w;", "}", ARRIVED, "{", "w:", "@!%p1 bra.uni w;", "}", FENCE,
          PRODUCT), 0),
        (("{", "w:", ARRIVED, "@!%p1 bra.uni w;", "}", "{", "w:", PRODUCT, "@!%p1 bra.uni w;", "}"),
         1),
        ((f"// {ARRIVED}", PRODUCT, f"{FENCE} // {ARRIVED}", PRODUCT), 0),
    ],
)  # fmt: skip
def test_a_product_needs_a_fence_on_every_way_to_it(lines: tuple[str, ...], count: int) -> None:
    assert unfenced(program(*lines)) == count


@pytest.mark.parametrize(
    ("lines", "right"),
    [
        ((STORE, "bar.sync 0;", RELEASE), [True]),
        ((STORE, "bar.sync 0;", STORE, RELEASE, RELEASE), [False, False]),
        ((STORE, "@%p1 bra B;", "bar.sync 0;", "B:", RELEASE), [False]),
        (("@%p1 bra B;", STORE, "bar.sync 0;", "B:", RELEASE), [True]),
        (("A:", "bar.sync 0;", RELEASE, STORE, "@%p1 bra A;"), [True]),
        (("A:", RELEASE, STORE, "@%p1 bra A;"), [False]),
        (("@%p1 bra B;", "A:", STORE, "ret;", "B:", RELEASE), [True]),
    ],
)
def test_a_release_needs_a_barrier_behind_every_store(
    lines: tuple[str, ...], right: list[bool]
) -> None:
    assert published(program(*lines)) == right


def test_a_branch_that_is_not_followed_is_an_error() -> None:
    with pytest.raises(ValueError, match="by a table"):
        unfenced(program("brx.idx %r1, targets;", PRODUCT))
