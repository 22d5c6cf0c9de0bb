"""Compile the Triton kernels for GPUs that are not there; `test_triton.py` runs this file.

    python tests/triton_offline.py JOB.json > RESULT.json

It needs a process of its own, without TRITON_INTERPRET. The launchers run on tensors without
storage, so that arguments and specialisation are those of a real launch; only the last step, the
launch itself, is replaced by a compilation.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from ptx_paths import published, unfenced
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lora_kernels.ops.lora_linear import triton as backend
from lora_kernels.ops.lora_linear.config import TileConfig, pick
from lora_kernels.ops.lora_linear.operands import Backward, Forward
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.ops.lora_linear.triton import backward_kernel, forward_kernel

KERNELS = {
    "forward": (forward_kernel, "lora_linear_forward"),
    "backward": (backward_kernel, "lora_linear_backward"),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DOT = re.compile(r"tt\.dot .*: tensor<[\dx]+x(\w+)> \*")
MMA = re.compile(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b[.\w]*")


class Target:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """Stands for a kernel and keeps the arguments of its launch."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.arguments, self.options = arguments, options

        return launch


def record(direction: str, problem: Problem, config: TileConfig, scaling: float = 0.5) -> Recorder:
    """Return the arguments with which `direction` would launch its kernel for `problem`."""
    m, n, k, r, dtype, adapter_dtype, *_ = problem
    module, name = KERNELS[direction]
    kernel, recorder = getattr(module, name), Recorder()
    setattr(module, name, recorder)
    backend.pick = lambda *_, **__: config  # type: ignore[assignment]
    has_tma = backend._has_tma(problem)
    saved, backend._has_tma = backend._has_tma, lambda _: has_tma

    def empty(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    x, w, dy = empty(m, k), empty(n, k), empty(m, n)
    a, b, p = (empty(*s, like=adapter_dtype) for s in ((r, k), (n, r), (m, r)))
    bias = empty(n) if problem.bias else None
    seed, rate = (torch.tensor([2**40 + 3]), 0.1) if problem.dropout else (None, 0.0)
    try:
        if direction == "forward":
            backend.forward(Forward(x, w, a, b, bias, seed, scaling, rate))
        else:
            backend.backward(Backward(dy, x, w, a, b, p, seed, scaling, rate))
    finally:
        setattr(module, name, kernel)
        backend._has_tma = saved
    return recorder


def compile_kernel(direction: str, problem: Problem, config: TileConfig) -> Any:
    """Return the compiled kernel that the launch would run."""
    recorder = record(direction, problem, config)
    assert problem.arch is not None
    driver.set_active(Target(problem.arch))
    kernel = getattr(*KERNELS[direction])
    kernel.device_caches.clear()
    return kernel.warmup(*recorder.arguments, grid=(1,), **recorder.options)


def tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / name, *options, file.name]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True)


def blocks_with_mma(sass: str) -> list[str]:
    """Return the loop bodies and other straight-line pieces that hold tensor-core instructions."""
    pieces = re.split(r"\n\s*\.L_\w+:|\n[^\n]*\bBRA\b[^\n]*", sass)
    return [piece for piece in pieces if MMA.search(piece)]


def facts(compiled: Any) -> dict[str, Any]:
    """Return what the tests judge a compiled kernel by."""
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    usage = tool("cuobjdump", cubin, "--dump-resource-usage")
    sass = tool("nvdisasm", cubin, "-c")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills_beside_mma": sum(
            len(re.findall(r"\b(?:LDL|STL)\b", b)) for b in blocks_with_mma(sass)
        ),
        "shared": compiled.metadata.shared,
        "mma": sorted({".".join(i.split(".")[:2]) for i in MMA.findall(sass)}),
        "two_byte_loads": len(re.findall(r"\bLDG\.E\.U16\b", sass)),
        "wide_copies": len(re.findall(r"\bcp\.async\.\w+\.shared\.global\S* .*, 0x10", ptx)),
        "tma": "UTMALDG" in sass,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        "from_registers": from_registers(ptx),
        "unfenced": unfenced(ptx),
        "releases": published(ptx),
        "acquires": len(re.findall(r"\bld\.global\.gpu\.acquire\b", ptx)),
        "dots": sorted(set(DOT.findall(compiled.asm["ttir"]))),
        "traps": "__assertfail" in ptx,
    }


def from_registers(ptx: str) -> dict[str, int]:
    """Count the wgmmas that take their left operand from registers, by whether they end in time.

    wgmma reads them until a wait_group of 0. Where a block of the program ends before that, the
    next turn of its loop writes them while they may still be read.
    """
    found = {"done": 0, "in flight": 0}
    pending = 0
    for line in ptx.splitlines():
        if re.search(r"\bwgmma\.mma_async\b[^{]*\{[^}]*\}\s*,\s*\{", line):
            pending += 1
        elif re.search(r"\bwgmma\.wait_group\S* 0;", line):
            found["done"] += pending
            pending = 0
        elif re.search(r"^\$L__BB|\bbra\b|\bret;", line):
            found["in flight"] += pending
            pending = 0
    return found


def variants(arch: int) -> dict[str, int]:
    """Count the compiled kernels that many calls need which differ in sizes and scaling alone."""
    driver.set_active(Target(arch))
    counts = {}
    for direction in KERNELS:
        kernel = getattr(*KERNELS[direction])
        binder = kernel.device_caches[arch][-1]
        keys = set()
        for m in (64, 100, 4096, 8191):
            for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)):
                for r, scaling in ((48, 2.0), (64, 0.5), (64, 1.0)):
                    problem = Problem(m, n, k, r, arch=arch)
                    recorder = record(
                        direction, problem, pick(Problem(8192, 8192, 8192, r, arch=arch)), scaling
                    )
                    options = {"num_stages": 1, **recorder.options}
                    _, specialisation, _ = binder(*recorder.arguments, **options)
                    keys.add(str(specialisation))
        counts[direction] = len(keys)
    return counts


def run(job: dict[str, Any]) -> dict[str, Any]:
    if job["kind"] == "variants":
        return variants(job["arch"])
    dtypes = (getattr(torch, job[name]) for name in ("dtype", "adapter_dtype"))
    problem = Problem(
        *job["sizes"], *dtypes, arch=job["arch"], bias=job["bias"], dropout=job["dropout"]
    )
    torch.backends.cuda.matmul.fp32_precision = "tf32" if job.get("tf32") else "ieee"
    return facts(compile_kernel(job["direction"], problem, TileConfig(**job["config"])))


if __name__ == "__main__":
    results = [run(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    print(json.dumps(results))
