"""What the compiled kernels' items cost may not grow: counted on the PTX machine, nothing timed."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from ptx_machine import build, cuda_backend, profile
from ptx_machine.parse import Kernel

from bench import items

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:lora_linear. the cuda backend"),
]
SETS = [(name, *each) for name, subject in profile.SUBJECTS.items() for each in subject.sets]


def excess(
    name: str,
    r: int,
    dropout: bool,
    edit: Callable[[Kernel], Kernel] = lambda kernel: kernel,
) -> list[str]:
    """Return what the items of a set do more than recorded for this compiler."""
    record = items.recorded()[name]
    if record["compiler"] != profile.compiler(name):
        pytest.skip(f"no record for {profile.compiler(name)}")
    on_record = record["sets"][items.title(r, dropout)]
    found = profile.measure(name, r, dropout, edit)
    return [f"{k} {more}" for k, item in found.items() for more in item.beyond(on_record[k])]


@pytest.mark.parametrize(("name", "r", "dropout"), SETS)
def test_an_item_costs_no_more_than_recorded(name: str, r: int, dropout: bool) -> None:
    assert not excess(name, r, dropout)


def _doubled(pattern: str) -> Callable[[Kernel], Kernel]:
    """Return what lets every statement that `pattern` finds stand twice."""

    def edit(kernel: Kernel) -> Kernel:
        if kernel.name not in made:
            at = {i for i, s in enumerate(kernel.statements) if re.match(pattern, s.opcode)}
            made[kernel.name] = kernel.doubled(at)
        return made[kernel.name]

    made: dict[str, Kernel] = {}
    return edit


@pytest.mark.parametrize(
    ("name", "pattern", "field"),
    [
        ("cuda", r"wgmma\.fence", "other"),
        ("triton sm_90", r"wgmma\.fence", "other"),
        ("triton sm_80", r"ldmatrix", "shared"),
        ("triton sm_80", r"cp\.async\.cg", "bytes"),
    ],
)
def test_an_instruction_more_in_a_loop_is_noticed(name: str, pattern: str, field: str) -> None:
    if name not in profile.SUBJECTS:
        pytest.skip("needs triton")
    more = excess(name, 16, False, _doubled(pattern))
    assert any(line.startswith(f"main step {field}:") for line in more), more


def test_a_panel_that_is_not_swizzled_is_noticed(tmp_path: Path) -> None:
    plain = cuda_backend.mutant(
        tmp_path, "forward_bf16", "common/layout.h", "((chunk ^ (row & 7)) << 4)", "(chunk << 4)"
    )
    more = excess("cuda", 16, False, lambda k: plain if k.name == plain.name else k)
    assert any(line.startswith("main around conflicts:") for line in more), more
