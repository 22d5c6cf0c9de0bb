"""The Triton backend: its numbers, its compiled code for every GPU, its workspace."""

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_kernels.ops.lora_linear import triton as backend
from lora_kernels.ops.lora_linear import workspace
from lora_kernels.ops.lora_linear.config import SHARED_KIB, TileConfig, candidates, fits, pick
from lora_kernels.ops.lora_linear.problem import Problem

HERE = Path(__file__).parent
ARCHS = (80, 86, 89, 90, 100, 120)
COMPILED = (80, 90, 100, 120)
bf16, fp32 = torch.bfloat16, torch.float32


def python(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    """Run Python on `arguments` with or without Triton's interpreter."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": str(int(interpret)),
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


# --- Numbers: the kernels in the interpreter ------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        pytest.param("small_blocks", id="cases"),
        pytest.param("mutant", id="mutants"),
        pytest.param("not small_blocks and not mutant", id="rest"),
    ],
)
def test_the_kernels_are_right_in_the_interpreter(part: str) -> None:
    done = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *("-k", part, str(HERE / "triton_interpreted.py")),
        interpret=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


# --- Compiled code, for GPUs that are not there ---------------------------------------------------


def offline(jobs: list[dict[str, Any]], tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = python(str(HERE / "triton_offline.py"), str(path), interpret=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


def job(direction: str, problem: Problem, config: TileConfig, **more: Any) -> dict[str, Any]:
    dtypes = {"dtype": problem.dtype, "adapter_dtype": problem.adapter_dtype}
    return {
        "kind": "compile",
        "direction": direction,
        "sizes": problem[:4],
        **{name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()},
        "arch": problem.arch,
        "bias": problem.bias,
        "dropout": problem.dropout,
        "config": vars(config),
        **more,
    }


def jobs_for(arch: int) -> Iterator[dict[str, Any]]:
    """Every tile size that `pick` can choose on `arch`, and with its choice all that varies.

    sm_86 and sm_89 compile as sm_80 does, so does sm_120 but for TMA; what differs is how much
    shared memory there is, and `check_code` holds the estimate against what the compiler takes.
    """
    base = Problem(8192, 4096, 4096, 64, bias=True, arch=arch)
    mixed = base._replace(dtype=torch.float16, adapter_dtype=fp32, r=16)
    precise = base._replace(dtype=fp32, adapter_dtype=fp32)
    for direction in ("forward", "backward"):
        backward = direction == "backward"
        if arch == 120:
            for problem in (base, base._replace(r=16)):
                yield job(direction, problem, pick(problem, backward=backward))
            continue
        for config in candidates(base, backward=backward):
            yield job(direction, base, config)
        changed = [
            base._replace(r=16),
            *(base._replace(r=r, dropout=True) for r in (16, 64)),
            mixed,
        ]
        for problem in (*changed, mixed._replace(dropout=True), base._replace(r=256)):
            yield job(direction, problem, pick(problem, backward=backward))
        for problem in (precise, precise._replace(dropout=True)):
            config = pick(problem, backward=backward, tf32=True)
            yield job(direction, problem, config, tf32=True)
        if arch == 80:
            for config in candidates(precise, backward=backward):
                yield job(direction, precise, config)
        if arch == 90:
            for config in list(candidates(precise, backward=backward, tf32=True))[1:]:
                yield job(direction, precise, config, tf32=True)


def mma_kind(arch: int, bm: int) -> str:
    """The tensor-core instruction that a bf16 tile of height `bm` must compile to."""
    if arch == 90 and bm >= 64:
        return "HGMMA"
    if arch == 100 and bm >= 64:
        return "UTCHMMA"
    return "HMMA"


@pytest.mark.parametrize("arch", COMPILED)
def test_every_configuration_compiles_to_the_right_code(
    arch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := backend.why_not(Problem(64, 64, 64, 16, arch=arch)):
        pytest.skip(reason)
    jobs, lines = list(jobs_for(arch)), []
    with capsys.disabled():
        print("\n       direction dtype     tile             br drop regs stack shared instr.")
        for this, found in zip(jobs, offline(jobs, tmp_path), strict=True):
            c = TileConfig(**this["config"])
            tile = f"{c.bm:3}x{c.bn:3}x{c.bk:3}x{c.stages} w{c.warps} {c.br:3}"
            usage = (found[key] for key in ("registers", "stack", "shared", "instructions"))
            columns = [
                f"sm_{arch:<3} {this['direction']:9} {this['dtype']:9} {tile} {this['dropout']:4}",
                *(f"{value:5}" for value in usage),
                *found["mma"],
            ]
            lines.append(" ".join(columns).rstrip())
            print(lines[-1])
            check_code(arch, this, found, c)
    if (arch, importlib.metadata.version("triton")) == (90, "3.6.0"):
        text = (Path(backend.__file__).parents[1] / "README.md").read_text()
        shown = [line for line in text.splitlines() if line.startswith("sm_90 ")]
        assert lines == shown, "the op README shows other lines under Registers"


def problem_of(this: dict[str, Any]) -> Problem:
    dtypes = (getattr(torch, this[name]) for name in ("dtype", "adapter_dtype"))
    return Problem(
        *this["sizes"], *dtypes, arch=this["arch"], bias=this["bias"], dropout=this["dropout"]
    )


def check_code(arch: int, this: dict[str, Any], found: dict[str, Any], c: TileConfig) -> None:
    problem = problem_of(this)
    estimate = c.shared_bytes(
        problem, backward=this["direction"] == "backward", tf32=this.get("tf32", False)
    )
    assert found["shared"] <= estimate + 1024 <= SHARED_KIB[arch] * 1024
    assert estimate <= 1.25 * found["shared"], "a usable tile would be refused"
    # Each release follows a barrier that follows the stores: Triton 3.6 does not see to it.
    assert found["releases"]
    assert all(found["releases"])
    assert found["acquires"] == (1 if this["direction"] == "forward" else 2)
    assert not found["traps"]
    assert found["from_registers"]["in flight"] == 0
    if this["dtype"] == this["adapter_dtype"]:  # a wider operand is split in each step, which waits
        assert found["from_registers"]["done"] == 0
    assert found["unfenced"] == 0
    # The operands are what the design says: the interpreter's upcast never reaches the compiler.
    assert found["dots"] == [
        {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[this["dtype"]]
    ]
    assert found["tma"] == (arch >= 90 and this["dtype"] != "float32")
    tensor_cores = this["dtype"] != "float32" or this.get("tf32", False)
    assert bool(found["mma"]) == tensor_cores
    assert found["spills_beside_mma"] == 0
    if this["dtype"] != "float32":
        assert any(i.startswith(mma_kind(arch, c.bm)) for i in found["mma"]), found["mma"]
    # The rest is spilled outside the loops: addresses that wait for their item, a mask being made.
    assert found["stack"] <= (450 if tensor_cores else 200)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_rank_of_8_moves_16_bytes_at_a_time(direction: str, tmp_path: Path) -> None:
    problems = [Problem(8192, 4096, 4096, r, bias=True, arch=90) for r in (8, 16, 12)]
    jobs = [job(direction, problem, pick(problem)) for problem in problems]
    eight, sixteen, twelve = offline(jobs, tmp_path)
    for count in ("two_byte_loads", "wide_copies"):
        assert eight[count] == sixteen[count]
    assert eight["two_byte_loads"] <= 1 < twelve["two_byte_loads"]  # the bias
    assert eight["wide_copies"] > twelve["wide_copies"]


def test_sizes_and_scaling_do_not_compile_anew(tmp_path: Path) -> None:
    ((variants),) = offline([{"kind": "variants", "arch": 90}], tmp_path)
    assert variants == {"forward": 1, "backward": 1}


def test_a_debug_build_traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_DEBUG", "1")
    problem = Problem(64, 64, 64, 16, arch=80)
    jobs = [job(direction, problem, pick(problem)) for direction in ("forward", "backward")]
    assert all(found["traps"] for found in offline(jobs, tmp_path))


# --- Configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*ARCHS, 75, 130, None])
@pytest.mark.parametrize("m", [1, 17, 64, 500, 8192])
def test_pick_gives_a_configuration_that_fits_anything(m: int, arch: int | None) -> None:
    for dtype, r, (n, k) in itertools.product((bf16, fp32), (1, 64, 512), ((1, 1), (14336, 4096))):
        problem = Problem(m, n, k, r, dtype, dtype, arch=arch)
        for backward in (False, True):
            config = pick(problem, backward=backward)
            assert fits(config, problem, backward=backward)
            assert config.bm == 16 or config.bm < 2 * m


def test_large_problems_get_the_largest_tiles_that_do_not_spill() -> None:
    def size(backward: bool = False, tf32: bool = False, **change: Any) -> tuple[int, ...]:
        problem = Problem(8192, 4096, 4096, 16)._replace(**change)
        c = pick(problem, backward=backward, tf32=tf32)
        return c.bm, c.bn, c.bk, c.warps

    for arch in ARCHS:
        assert size(arch=arch)[:2] == (128, 256)
        assert size(arch=arch, m=16) == (16, 32, 256, 4)
    assert size(arch=90, backward=True, dropout=True)[:2] == (128, 256)
    assert size(arch=100, dropout=True)[:2] == (128, 256)
    assert size(arch=100, backward=True) == (128, 128, 64, 8)
    assert size(arch=100, backward=True, dropout=True, adapter_dtype=fp32) == (128, 128, 32, 8)
    for arch in (80, 86, 89, 120):
        assert size(arch=arch, dropout=True) == (128, 128, 32, 4)
        assert size(arch=arch, backward=True) == (128, 128, 32, 4)
        assert size(arch=arch, backward=True, dropout=True) == (128, 128, 64, 8)
        assert size(arch=arch, dropout=True, adapter_dtype=fp32) == (128, 128, 32, 8)
        assert size(arch=arch, dtype=fp32, adapter_dtype=fp32, tf32=True) == (128, 128, 32, 8)
    assert size(dtype=fp32, adapter_dtype=fp32) == (128, 64, 16, 8)


# --- Which problems it takes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "needs a CUDA device"),
        ({"device": "mps"}, "not mps"),
        ({"arch": 75}, "8.0 or newer, not 7.5"),
        ({"dtype": torch.float64}, "float64 is not supported"),
        ({"m": 2**30}, "2\\*\\*30"),
        ({"dropout": True, "uneven": True}, "must begin and end at a multiple of 8 columns"),
    ],
)
def test_why_not_names_the_reason(
    change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    right = Problem(8, 8, 8, 8, arch=90)
    assert backend.why_not(right) is None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(backend.why_not(right._replace(**change)))


@pytest.mark.parametrize(
    ("version", "arch", "reason"),
    [
        (None, 90, "not installed"),
        ("3.5.1", 90, "Triton 3.5.1 is older"),
        ("3.6.0", 90, None),
        ("3.7.1+git", 100, "Triton 3.7.1 orders shared memory wrongly on compute capability 10.0"),
        ("3.7.0", 110, "orders shared memory wrongly"),
        ("3.7.0", 120, None),
        ("3.8.0", 103, None),
    ],
)
def test_why_not_names_a_missing_or_unfit_triton(
    version: str | None, arch: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(backend, "_version", backend._version.__wrapped__)
    found = backend.why_not(Problem(8, 8, 8, 8, arch=arch))
    assert found is None if reason is None else reason in (found or "")


# --- The workspace, on a device that is played ----------------------------------------------------


class Gpu:
    """What `workspace` asks of torch.cuda, with a stream and a capture state to set."""

    stream = 0
    capturing = False
    zeroed = 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()

    def zeroed(length: int, device: torch.device) -> torch.Tensor:
        gpu.zeroed += 1
        return torch.zeros(length, dtype=torch.int32)

    cuda = SimpleNamespace(
        is_current_stream_capturing=lambda: gpu.capturing,
    )
    monkeypatch.setattr(workspace, "_zeroed", zeroed)
    monkeypatch.setattr(workspace, "_chunks", {})
    monkeypatch.setattr(workspace, "_by_stream", {})
    monkeypatch.setattr(workspace.torch, "cuda", cuda)
    return gpu


def span(words: torch.Tensor) -> range:
    return range(words.data_ptr(), words.data_ptr() + 4 * words.numel())


def test_a_stream_keeps_its_workspace_and_shares_it_with_no_other(gpu: Gpu) -> None:
    device = torch.device("cuda", 0)
    first = workspace.reserve(67, device, gpu.stream)
    assert first.numel() >= 67
    assert span(workspace.reserve(60, device, gpu.stream)) == span(first)
    gpu.stream = 1
    other = workspace.reserve(67, device, gpu.stream)
    assert not set(span(first)) & set(span(other))
    assert gpu.zeroed == 1


def test_each_captured_launch_gets_a_workspace_of_its_own_for_ever(gpu: Gpu) -> None:
    device = torch.device("cuda", 0)
    spans = [span(workspace.reserve(67, device, gpu.stream))]
    gpu.capturing = True
    spans += [span(workspace.reserve(67, device, gpu.stream)) for _ in range(1000)]
    gpu.capturing = False
    spans += [span(workspace.reserve(5000, device, gpu.stream))]  # outgrows its slice
    starts = sorted((s.start, s.stop) for s in spans)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(starts))
    assert all(start % 128 == starts[0][0] % 128 for start, _ in starts)
    assert gpu.zeroed == 1


def test_a_chunk_outlives_its_last_visible_slice(gpu: Gpu) -> None:
    device = torch.device("cuda", 0)
    workspace.reserve(8, device, gpu.stream)
    gpu.capturing = True
    captured = span(workspace.reserve(8, device, gpu.stream))
    gpu.capturing = False
    workspace.reserve(workspace.CHUNK, device, gpu.stream)  # a second chunk
    assert gpu.zeroed == 2
    held = [c.untyped_storage() for c in workspace._chunks[device]]
    assert any(s.data_ptr() <= captured.start < s.data_ptr() + s.nbytes() for s in held)
