"""The CUDA backend compiled for sm_90a, without a GPU: registers and machine code."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_builds import compiled

from bench.builds import SUFFIX

KERNELS = tuple(
    (direction, element, adapter)
    for direction in ("forward", "backward")
    for element in ("Bf16", "Fp16")
    for adapter in (element, "float")
)


class Instruction(NamedTuple):
    """One line of machine code: its address, and what it says."""

    address: int
    text: str


@pytest.fixture(scope="module")
def log() -> str:
    return (compiled() / "log.txt").read_text()


@pytest.fixture(scope="module")
def sass() -> dict[str, list[Instruction]]:
    """Return the machine code of each kernel."""
    library = compiled() / "lora_kernels" / f"_C{SUFFIX}"
    done = subprocess.run(
        [_cuobjdump(), "-sass", str(library)], capture_output=True, text=True, check=True
    )
    kernels: dict[str, list[Instruction]] = {}
    for part in done.stdout.split("Function : ")[1:]:
        name, *lines = part.splitlines()
        matches = (re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?) *;", line) for line in lines)
        kernels[name] = [Instruction(int(m[1], 16), m[2]) for m in matches if m]
    return kernels


def _cuobjdump() -> str:
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        if path.exists():
            return str(path)
    return shutil.which("cuobjdump") or pytest.skip("needs cuobjdump")


def _code(
    sass: dict[str, list[Instruction]], direction: str, element: str, adapter: str
) -> list[Instruction]:
    types = f"4{element}" + ("E?f" if adapter == "float" else "E?S")  # S: as the one before
    (code,) = (c for name, c in sass.items() if re.search(f"_{direction}INS_{types}", name))
    return code


def _loops(code: list[Instruction]) -> list[list[str]]:
    """Return the bodies of the innermost loops with products of 256 columns, one in flight."""
    bodies = []
    for i, (address, text) in enumerate(code):
        branch = re.search(r"\bBRA 0x([0-9a-f]+)", text)
        if branch is None or int(branch[1], 16) > address:
            continue
        body = [t for a, t in code[: i + 1] if a >= int(branch[1], 16)]
        if any("HGMMA.64x256x16" in t for t in body):
            bodies.append(body)
    smallest: list[list[str]] = []
    for body in sorted(bodies, key=len):
        if not any(set(map(id, inner)) <= set(map(id, body)) for inner in smallest):
            smallest.append(body)
    return [body for body in smallest if any("DEPBAR.LE gsb0, 0x1" in t for t in body)]


def test_every_kernel_fits_its_registers_without_spilling(log: str) -> None:
    used = re.findall(r"Used (\d+) registers", log)
    # 384 threads of 168 registers fill the file; setmaxnreg then redistributes them.
    assert used == ["168"] * len(KERNELS)
    clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert log.count(clean) == len(KERNELS)


def test_the_compiler_serialises_nothing_and_ignores_no_register_request(log: str) -> None:
    # C7508: setmaxnreg ignored; C7510 to C7520: wgmma serialised, or fences inserted for it.
    assert re.findall(r"\(C75\d\d\).*", log) == []
    assert "warning" not in log.replace("SetuptoolsWarning", "").lower()


@pytest.mark.parametrize(("direction", "element", "adapter"), KERNELS)
def test_the_main_loop_is_four_products_in_flight(  # type: ignore[no-untyped-def]
    sass, direction: str, element: str, adapter: str
) -> None:
    loops = _loops(_code(sass, direction, element, adapter))
    kind = ".BF16" if element == "Bf16" else ""
    products = [[t for t in body if "HGMMA" in t] for body in loops]
    assert all(f"HGMMA.64x256x16.F32{kind} " in t for body in products for t in body)
    # A tile's frozen loop, and the rank loop with and without a power of two; in dx also both of
    # dropout, in the other order. The rank loop of fp32 adapters rounds 32 of R at a time.
    frozen, rank = (1, 2) if direction == "forward" else (2, 3)
    lengths = [4] * frozen + [2 if adapter == "float" else 4] * rank
    assert sorted(map(len, products)) == sorted(lengths)
    for body in (body for body, found in zip(loops, products, strict=True) if len(found) == 4):
        text = "\n".join(body)
        for slow in ("MEMBAR", "LDL", "STL", "BAR.SYNC", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FENCE"):
            assert slow not in text, slow


@pytest.mark.parametrize(("direction", "element", "adapter"), KERNELS)
def test_a_held_tile_goes_out_while_products_are_in_flight(  # type: ignore[no-untyped-def]
    sass, direction: str, element: str, adapter: str
) -> None:
    kinds = {"HGMMA": "p", "STSM.16.M88.4": "s", "WARPGROUP.DEPBAR": "w"}
    texts = [text for _, text in _code(sass, direction, element, adapter)]
    events = "".join(kind for text in texts for name, kind in kinds.items() if name in text)
    stored = [len(run) for run in re.findall("p(s+)", events)]  # no wait in between
    # Four panels behind four stages; in dx under dropout two behind two.
    assert stored == [4] * (4 if direction == "forward" else 6)


@pytest.mark.parametrize(("direction", "element", "adapter"), KERNELS)
def test_the_instructions_of_the_design_are_there(  # type: ignore[no-untyped-def]
    sass, direction: str, element: str, adapter: str
) -> None:
    code = _code(sass, direction, element, adapter)
    count = Counter(re.sub(r"^@!?U?P\d+ ", "", t).split()[0] for _, t in code)
    assert count["USETMAXREG.DEALLOC.CTAPOOL"] == count["USETMAXREG.TRY_ALLOC.CTAPOOL"] == 1
    assert count["UTMALDG.2D"] > 0
    assert count["UTMALDG.2D.MULTICAST"] > 0
    assert count["UTMASTG.2D"] > 0
    assert any(name.startswith("STSM.16") for name in count)  # stmatrix
    transposed = direction == "backward" and adapter != "float"  # da
    assert any(name.startswith("STSM.16.MT88") for name in count) == transposed
    # P or Q is read through TMA behind a flag: forward in main tiles, backward in dx and da items.
    flags = 1 if direction == "forward" else 2
    assert count["FENCE.VIEW.ASYNC.G"] == flags
    # gpu-scope fences: behind each flag, before a publication, with a ticket for the cluster, in
    # the clean-up (two) and where the cluster meets at start and end.
    # Where consumers rewrite a stage, each of a contraction's three releases is to the cluster.
    rewriting = 0 if adapter != "float" else 4 if direction == "forward" else 7
    assert count["MEMBAR.ALL.GPU"] == flags + 1 + 1 + 2 + 2 + 3 * rewriting
    assert not any(name.startswith(("LDL", "STL", "CALL")) for name in count)
    # No division (which begins with a reciprocal) between a ticket and its first load, and the bias
    # in pairs.
    assert count["MUFU.RCP"] == count["LDG.E.U16"] == 0
    # One elected thread loads; only the few stores loop over the lanes, and what is added in place
    # of a dx panel's store, which ptxas lets each lane do that is there.
    adding = count["UTMAREDG.2D.ADD"]
    assert (adding > 0) == (direction == "backward")
    assert count["ELECT"] == 1 + adding
    assert count["BRA.U.ANY"] == count["UTMASTG.2D"] + adding


def test_the_extension_loads_without_a_gpu_and_fails_with_a_message() -> None:
    code = (
        "from lora_kernels import _C\n"
        "matrices = [(16, 8)] * 4\n"
        "try:\n"
        "    _C.lora_linear_forward(True, False, 8, 8, 8, 8, *matrices, 0, *matrices[:2], 16,"
        " (1.0, 1.0), (False, 0, 0, 0, 0, 0), 0)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    package = str(compiled())
    # The built package holds the extension alone: a namespace package of its own.
    environment = {**os.environ, "PYTHONPATH": package, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=package
    )
    assert re.fullmatch(r"lora_linear forward: cudaGetDevice: cudaError\w+ \(.*\)\n", done.stdout)


DRIVER_OF_11_8 = """
#include <string.h>
int cuDriverGetVersion(int* version) { return *version = 11080, 0; }
int cuInit(unsigned flags) { return flags; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long flags,
                        int* status) {
  *function = strcmp(name, "cuDriverGetVersion") == 0 ? (void*)cuDriverGetVersion
              : strcmp(name, "cuInit") == 0           ? (void*)cuInit
              : strstr("cuGetProcAddress", name)      ? (void*)cuGetProcAddress_v2
                                                      : 0;
  return *function ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** function, int version, unsigned long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
"""


def test_a_driver_older_than_the_runtime_is_named_as_the_reason(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    build = ["gcc", "-shared", "-fPIC", "-w", "-xc", "-", "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(build, input=DRIVER_OF_11_8, text=True, check=True)
    package = str(compiled())
    environment = {**os.environ, "PYTHONPATH": package, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "from lora_kernels import _C; print(_C.why_not())"],
        env=environment, capture_output=True, text=True, cwd=package,
    )  # fmt: skip
    match = re.fullmatch(
        r"it is built with CUDA (\d+), which needs an NVIDIA driver of (\d+) or newer; "
        r"the one here is for CUDA 11\.8\n",
        done.stdout,
    )
    assert match, done
