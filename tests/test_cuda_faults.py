"""Faults of the CUDA backend that the PTX machine must notice, each by its name.

Primitives that misbehave are planted in the PTX; mistakes are made in the source and compiled anew.
`test_ptx_kernels.py` plants the general kinds of fault, one place at a time, in both backends.
"""

import functools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cuda_cases import check
from ptx_machine import build, cuda_backend
from ptx_machine.faults import (
    FAULTS,
    Change,
    Fault,
    immediate,
    removed,
    with_operand,
)
from ptx_machine.launch import MAGIC, Grid, Memory, Run
from ptx_machine.machine import Machine
from ptx_machine.parse import Kernel, Statement
from seeds import by_address
from sixteen_bits import check_infinities, check_rounding
from slices import check_slices

from lora_kernels.dispatch import Backend
from lora_kernels.testing import Case, bf16, fp32, make_inputs, run_backend

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:lora_linear. the cuda backend"),
]


CASES = (
    Case(200, 72, 264, 24, bf16, dropout_p=0.3),
    Case(200, 264, 584, 72, bf16),
    Case(600, 72, 72, 8, bf16),
    Case(200, 264, 328, 24, bf16, onto=True),
)


def notices(
    machines: Callable[[int], Machine],
    adapter_dtype: torch.dtype = bf16,
    seeds: int = 4 * len(CASES),
) -> str:
    """Return by what some case and schedule fails, or "".

    Every second time a case comes by, kernels read its seed where it is.
    """
    cases = [case._replace(adapter_dtype=adapter_dtype) for case in CASES]

    def attempts() -> Iterator[str]:
        for seed in range(seeds):
            turn, which = divmod(seed, len(cases))
            backend = cuda_backend.on(machines(seed))
            yield _failure(by_address(backend) if turn % 2 else backend, cases[which])

    return next(filter(None, attempts()), "")


def _failure(backend: Backend, case: Case) -> str:
    try:
        check(backend, case)
    except AssertionError as error:
        return str(error).splitlines()[0]
    return ""


def _machine(seed: int, edit: Callable[[Kernel], Kernel] = lambda kernel: kernel) -> Machine:
    return Machine(
        seed=seed,
        multiprocessors=(6, 2, 8, 4)[seed % 4],
        resident=1 + seed % 3,
        limit=3_000_000,
        edit=edit,
    )


@pytest.mark.parametrize("adapter_dtype", [bf16, fp32])
def test_without_a_fault_nothing_is_noticed(adapter_dtype: torch.dtype) -> None:
    assert notices(_machine, adapter_dtype, seeds=2 * len(CASES)) == ""


# --- In the PTX -----------------------------------------------------------------------------------

NAMED = {fault.name: fault.change for fault in FAULTS}


def _arrives_twice(statement: Statement) -> Change | None:
    if not re.match(r"mbarrier\.arrive(?!\.expect)", statement.opcode):
        return None
    return {"operands": (*statement.operands, immediate(2))}


def _without_leading_offset(statement: Statement) -> Change | None:
    """Let the next 64 of M or N lie where the next 8 of the contraction do."""
    for at, (parts, _, _) in enumerate(statement.operands):
        kind, value, _ = parts[0]
        if kind == "i" and statement.opcode == "or.b64" and value >> 16 == 1 << 46 | 64 << 16 | 512:
            return {"operands": with_operand(statement, at, immediate(value - (512 - 64 << 16)))}
    return None


# What happens to a statement; where: in every such place, in the middle one alone, or ahead of
# another kind of statement.
PRIMITIVES: dict[str, tuple[Callable[[Statement], Change | None], str]] = {
    "an arrival is lost": (NAMED["an arrival is removed"], "one"),
    "an arrival too many": (_arrives_twice, "one"),
    "a barrier lets through early": (NAMED["an mbarrier is not waited for"], "one"),
    "the first phase is waited for twice": (
        NAMED["the phase waited for never flips"],
        r"mbarrier\.arrive\.expect_tx",
    ),
    "no shared proxy fence": (removed(r"fence\.proxy\.async\.shared.*"), "all"),
    "no acquire": (NAMED["a fence is removed"], r"fence\.proxy\.async\.global"),
    "no global proxy fence": (removed(r"fence\.proxy\.async\.global"), "all"),
    "the leading offset is ignored": (_without_leading_offset, "all"),
    "a store's shared memory is reused at once": (
        removed(r"cp\.async\.bulk\.wait_group\.read"),
        "all",
    ),
    "read stands for written": (NAMED["read stands for written"], "all"),
    "a product is not waited for": (NAMED["a product waits for a group less"], "all"),
}
LOOK_AHEAD = 14  # statements


@functools.cache
def _kernel(direction: str) -> tuple[Kernel, set[int]]:
    """Return the kernel of bf16, and the statements that a case comes by."""
    machine = Machine()
    run_backend(cuda_backend.on(machine), CASES[0], make_inputs(CASES[0]))
    run = machine.runs[direction == "backward"]
    return run.kernel, run.executed()


def _planted(direction: str, fault: Fault, where: str) -> Kernel:
    kernel, executed = _kernel(direction)
    sites = fault.sites(kernel, executed)
    if where == "one":
        sites = sites[len(sites) // 2 :][:1]
    elif where != "all":
        ahead = kernel.statements
        sites = [
            site
            for site in sites
            if any(re.match(where, s.opcode) for s in ahead[site + 1 : site + 1 + LOOK_AHEAD])
        ]
    assert sites, "nowhere to plant it"
    return fault.plant(kernel, sites)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_primitive_that_misbehaves_is_noticed(name: str, direction: str) -> None:
    change, where = PRIMITIVES[name]
    if name == "the leading offset is ignored" and direction == "forward":
        pytest.skip("only operands along M or N have one")
    kernel, _ = _kernel(direction)
    faulty = _planted(direction, Fault(name, change), where)
    assert notices(lambda seed: _machine(seed, lambda k: faulty if k is kernel else k))


@dataclass
class _Unswizzled(Machine):
    """A GPU whose TMA takes no notice of the swizzle."""

    def launch(self, kernel: Kernel, parameters: bytes, memory: Memory, grid: Grid) -> Run:
        magic, swizzle = struct.pack("<Q", MAGIC), struct.calcsize("<QQ5I4x4Q5H2B")
        maps = [match.start() for match in re.finditer(re.escape(magic), parameters)]
        assert maps
        plain = bytearray(parameters)
        for at in maps:
            plain[at + swizzle] = 0
        return super().launch(kernel, bytes(plain), memory, grid)


def test_a_tma_that_does_not_swizzle_is_noticed() -> None:
    assert notices(lambda seed: _Unswizzled(seed))


# --- In the source --------------------------------------------------------------------------------

TILE, STORE = "lora_linear/tile_sm90.cuh", "lora_linear/store_sm90.cuh"
FP32 = "lora_linear/fp32_sm90.cuh"
Judge = Callable[[Backend], None]
FENCE, MEET = "  ptx::fence_proxy_async_shared();\n", "  ptx::consumers_sync(kConsumersBarrier);\n"
MUTANTS = {  # what is compiled anew, the file to change, and the change
    "the rank in an address reaches the descriptor": (
        "backward_bf16",
        "common/layout.h",
        " & 0x3FFFF",
        "",
    ),
    "P is not awaited": (
        "forward_bf16",
        "lora_linear/forward_sm90.cuh",
        "  await_flag(f.workspace + kReady + row,"
        " kConsumerWarpgroups * f.p_items.rank_tiles.value);\n",
        "",
    ),
    "da does not await all of Q": (
        "backward_bf16",
        "lora_linear/backward_sm90.cuh",
        "    await_flag(f.workspace + kAllReady,"
        " kConsumerWarpgroups * f.ctas * f.q_items.count);\n",
        "",
    ),
    "the flag comes before P is written": (
        "forward_bf16",
        STORE,
        "tma_store_wait_written();\n      ptx::fence_acq_rel_gpu",
        "tma_store_wait_read<0>();\n      ptx::fence_acq_rel_gpu",
    ),
    "a stage is left while it is read": (
        "forward_bf16",
        TILE,
        "      if (previous != 0) pipeline.release<kRewrites>(previous);\n"
        "    }\n"
        "    previous = pipeline.stages.empty();",
        "    }\n    pipeline.release<kRewrites>(pipeline.stages.empty());",
    ),
    "others fill a store panel before its reader is known to be done": (
        "forward_bf16",
        STORE,
        "tma_store_wait_read<1>();\n    ptx::warpgroup_sync(own_barrier());",
        "tma_store_wait_read<1>();",
    ),
    "the last tile stays in registers": (
        "forward_bf16",
        TILE,
        "    store.put(0, kTilePanels);\n",
        "",
    ),
    "a tile held before a short contraction is lost": (
        "backward_bf16",
        TILE,
        "      panels.put(0, Panels::kCount);\n",
        "",
    ),
    "a tile goes to the rows of the first one": (
        "forward_bf16",
        STORE,
        "    held_row = row;\n",
        "    if (held_row < 0) held_row = row;\n",
    ),
    "panels go out twice and others never": (
        "backward_bf16",
        STORE,
        "store.put(kFirst + begin, kFirst + end)",
        "store.put(begin, end)",
    ),
    "the dx that is there is lost": ("backward_bf16", STORE, "if (to.adds)", "if (false)"),
    "a new dx is added to what its memory held": (
        "backward_bf16",
        "lora_linear/backward_sm90.cuh",
        "{&f.dx, f.adds_dx}",
        "{&f.dx, true}",
    ),
    "dx is added twice": (
        "backward_bf16",
        STORE,
        "ptx::tma_add(to.map, panel, inner, outer);\n",
        "ptx::tma_add(to.map, panel, inner, outer);\n" * 2,
    ),
    "one panel of dx is stored in place of added": (
        "backward_bf16",
        STORE,
        "if (to.adds)",
        "if (to.adds && inner != kPanel)",
    ),
    "products start before all threads have masked": (
        "forward_bf16",
        TILE,
        "    ptx::warpgroup_sync(own_barrier());\n    row += row_step",
        "    row += row_step",
    ),
    "the words of a seed on the GPU are swapped": (
        "forward_bf16",
        TILE,
        "dropout.key_low = ptx::load_relaxed(dropout.seed);\n"
        "    dropout.key_high = ptx::load_relaxed(dropout.seed + 1);",
        "dropout.key_high = ptx::load_relaxed(dropout.seed);\n"
        "    dropout.key_low = ptx::load_relaxed(dropout.seed + 1);",
    ),
    "the high word of a seed on the GPU is lost": (
        "backward_bf16",
        TILE,
        "    dropout.key_high = ptx::load_relaxed(dropout.seed + 1);\n",
        "",
    ),
    "the low half of fp32 is dropped": (
        "forward_bf16_fp32",
        TILE,
        "if constexpr (kSplit) Multiply",
        "if constexpr (false) Multiply",
    ),
    "halves are not fenced": ("forward_bf16_fp32", FP32, f"low);\n  }}\n{FENCE}", "low);\n  }\n"),
    "products start before all have split": (
        "forward_bf16_fp32",
        FP32,
        f"low);\n  }}\n{FENCE}{MEET}",
        f"low);\n  }}\n{FENCE}",
    ),
    "what is rounded in place is not fenced": (
        "backward_bf16_fp32",
        FP32,
        f"kPanelBytes);\n  }}\n{FENCE}",
        "kPanelBytes);\n  }\n",
    ),
    "products start before all have rounded": (
        "backward_bf16_fp32",
        FP32,
        f"kPanelBytes);\n  }}\n{FENCE}{MEET}",
        f"kPanelBytes);\n  }}\n{FENCE}",
    ),
    "a row is rounded over before all have read it": (
        "backward_bf16_fp32",
        FP32,
        "  ptx::warp_sync();\n",
        "",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_the_source_is_noticed(name: str, tmp_path: Path) -> None:
    unit = MUTANTS[name][0]
    mutant = cuda_backend.mutant(tmp_path, *MUTANTS[name])
    adapter_dtype = fp32 if unit.endswith("fp32") else bf16
    assert notices(
        lambda seed: _machine(seed, lambda k: mutant if k.name == mutant.name else k),
        adapter_dtype,
    )


# Mistakes that a tolerance bears: what is compiled anew and how, who judges, and what they say.
PTX, PHILOX, DRAWN = "common/ptx.h", "common/philox.h", ">= dropout.threshold"
SMALL_MUTANTS: dict[str, tuple[tuple[str, str, str, str], Judge, str]] = {
    "16 bits are cut off where they should be rounded": (
        (
            "forward_bf16",
            PTX,
            'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));',
            'asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(packed) : "f"(low), "f"(high));',
        ),
        lambda backend: check_rounding(backend, bf16, bf16),
        "y is rounded in another way",
    ),
    "who draws the threshold is dropped from P": (
        ("forward_bf16", PHILOX, f"{DRAWN} ?", f"{DRAWN} + 1 ?"),
        lambda backend: check_slices(backend, bf16, bf16),
        "y has another mask",
    ),
    "who draws the threshold is dropped from dx": (
        ("backward_bf16", PHILOX, f"{DRAWN})", f"{DRAWN} + 1)"),
        lambda backend: check_slices(backend, bf16, bf16),
        "dx has another mask",
    ),
    "who draws the threshold is dropped from da": (
        ("backward_bf16_fp32", PHILOX, f"{DRAWN} ?", f"{DRAWN} + 1 ?"),
        lambda backend: check_slices(backend, bf16, fp32),
        "da has another mask",
    ),
    "what is left of infinity is kept": (
        (
            "forward_bf16_fp32",
            FP32,
            "fabsf(rounded) == INFINITY ? 0.0f : value - rounded",
            "value - rounded",
        ),
        lambda backend: check_infinities(backend, bf16),
        "isnan elsewhere than PyTorch",
    ),
}


@pytest.mark.parametrize("name", SMALL_MUTANTS)
def test_a_small_mistake_in_the_source_is_noticed(name: str, tmp_path: Path) -> None:
    mistake, judge, message = SMALL_MUTANTS[name]
    mutant = cuda_backend.mutant(tmp_path, *mistake)
    edit = lambda kernel: mutant if kernel.name == mutant.name else kernel
    with pytest.raises(AssertionError, match=message):
        judge(cuda_backend.on(Machine(multiprocessors=6, edit=edit)))
