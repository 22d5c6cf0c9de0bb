"""`python -m bench.host`: what a call costs Python, beside the three launches that it replaces.

No GPU is needed, and none would help: the launches go to a stub driver (bench/stub), so all that is
left is the host's time, from the public function down to the driver. The yardstick is the leanest
composition of torch's own operators, through autograd as we are,

    addmm(linear(x, W), linear(x, A), Bᵀ, alpha=s)

on CPU tensors so small that arithmetic does not count, in fp32, torch's cheapest path there.

A launch costs the host 2 to 3 µs in CUDA's driver and next to nothing in the stub, or in what torch
calls on a CPU. We launch once each way, the composition at least its products: 3 forward and 5
backward. So two ratios are given: of what was measured, and with LAUNCH_US for each launch.

Times are CPU time of this thread, so that neighbours on the machine matter little; calls of all
providers are interleaved in batches, and a figure is the median over them.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import stub

SIZE = 16  # of M, N, K and R
SCALING = 0.5
BATCH = 40  # calls between two readings of the clock
DIRECTIONS = ("forward", "forward + backward")
COMPOSITION = "composition"
LAUNCH_US = 2.0  # the least of what is reported for a launch
PRODUCTS = {"forward": 3, "forward + backward": 8}  # of the composition, a launch each
KEPT = Path(__file__).parent / "results" / "cpu" / "host.md"
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Print the table, or the rows as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="timing in all")
    parser.add_argument("--json", action="store_true", help="print rows, not a table")
    parser.add_argument("--keep", action="store_true", help=f"write {KEPT.name} of this machine")
    options = parser.parse_args(argv)
    if (reason := stub.why_not()) is not None:
        print(f"not measured: {reason}")
        return 0
    rows = measure(stub.install(), options.seconds)
    if options.json:
        print(json.dumps(rows))
        return 0
    print(table(rows))
    if options.keep:
        KEPT.write_text(f"# Host time\n\n{table(rows)}\n\n{provenance()}\n")
    return 0


def measure(gpu: stub.Gpu, seconds: float) -> list[Row]:
    """Return a row for each direction and provider: time, launches, ratios to the composition."""
    calls = {(d, name): call for name, both in providers(gpu).items() for d, call in both.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for call in calls.values():  # compiles, and fills every cache
        _time_us(call)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            for key, call in calls.items():
                times[key].append(_time_us(call))
    finally:
        gc.enable()
    rows = []
    for (direction, name), call in calls.items():
        before = gpu.record.launches
        call()
        launches = gpu.record.launches - before or PRODUCTS[direction]
        pairs = list(zip(times[direction, name], times[direction, COMPOSITION], strict=True))
        ours, theirs = (LAUNCH_US * n for n in (launches, PRODUCTS[direction]))
        rows.append({
            "direction": direction,
            "provider": name,
            "host_us": statistics.median(times[direction, name]),
            "launches": launches,
            "bare_ratio": statistics.median(a / b for a, b in pairs),
            "ratio": statistics.median((a + ours) / (b + theirs) for a, b in pairs),
        })  # fmt: skip
    return rows


def providers(gpu: stub.Gpu) -> dict[str, dict[str, Callable[[], object]]]:
    """Return the calls of the composition and of every kernel backend there is, by direction."""
    import torch
    import torch.nn.functional as F

    from lora_kernels import lora_linear
    from lora_kernels.ops.lora_linear import BACKENDS, Problem

    torch.set_num_threads(1)
    if (reason := gpu.load_extension()) is not None:
        print(f"lora_kernels.cuda is not measured: {reason}", file=sys.stderr)

    def directions(dtype: torch.dtype, layer: Callable[..., torch.Tensor]) -> dict[str, Any]:
        weight, dy = torch.randn(2, SIZE, SIZE).to(dtype)
        leaves = tuple(torch.randn(SIZE, SIZE).to(dtype).requires_grad_() for _ in range(3))
        x, a, b = leaves

        def forward() -> torch.Tensor:
            return layer(x, weight, a, b)

        return dict(
            zip(DIRECTIONS, (forward, lambda: torch.autograd.grad(forward(), leaves, dy)),
                strict=True)
        )  # fmt: skip

    def composition(x: Any, weight: Any, a: Any, b: Any) -> torch.Tensor:
        return torch.addmm(F.linear(x, weight), F.linear(x, a), b.t(), alpha=SCALING)

    found = {COMPOSITION: directions(torch.float32, composition)}
    for backend in BACKENDS:
        problem = Problem(SIZE, SIZE, SIZE, SIZE, arch=gpu.arch)
        if backend.name != "reference" and backend.why_not(problem) is None:

            def ours(x: Any, weight: Any, a: Any, b: Any, name: str = backend.name) -> Any:
                return lora_linear(x, weight, a, b, SCALING, backend=name)

            found[f"lora_kernels.{backend.name}"] = directions(torch.bfloat16, ours)
    return found


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = ["| direction | provider | host µs | launches | × composition | with launches |",
             "| --- | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    lines += [
        f"| {row['direction']} | {row['provider']} | {row['host_us']:.1f} | {row['launches']} "
        f"| {row['bare_ratio']:.2f} | {row['ratio']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def provenance() -> str:
    """Return what the times depend on."""
    import platform
    from importlib.metadata import version

    versions = " · ".join(f"{name} {version(name)}" for name in ("torch", "triton"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    python = platform.python_version()
    return f"{_processor()} · {versions} · Python {python} · commit {commit or 'unknown'}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


def _time_us(call: Callable[[], object]) -> float:
    start = time.thread_time()
    for _ in range(BATCH):
        call()
    return (time.thread_time() - start) / BATCH * 1e6


if __name__ == "__main__":
    sys.exit(main())
