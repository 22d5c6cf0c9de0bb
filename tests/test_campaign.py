"""The GPU campaign, without a GPU: it names what is wrong, what hangs and what crashes, in time."""

import time
from itertools import product
from pathlib import Path

import pytest
import torch
from mutants import from_block, returned
from scripts import CRASHES, HANGS, RIGHT, WRONG, script

from bench import forced, gpu, ladder, process, watch
from lora_kernels.ops.lora_linear import reference, triton
from lora_kernels.ops.lora_linear.config import candidates
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.qualify import __main__ as qualify
from lora_kernels.testing import bf16, fp32

CPU = torch.device("cpu")


def test_a_limit_ends_what_runs_under_a_limit_of_its_own(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    inner = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    outer = "import sys; from bench import process; "
    outer += f"process.run([sys.executable, '-c', {inner!r}], 100, print)"
    assert process.run(script(outer), 20, lambda line: None).startswith("hung")
    deadline = time.monotonic() + 10
    while Path(f"/proc/{note.read_text()}").exists():
        assert time.monotonic() < deadline, "the inner process lives on"
        time.sleep(0.1)


# --- One process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "limit_s", "outcome"),
    [
        (RIGHT, 60, "ok"),
        ("raise SystemExit(3)", 60, "failed with status 3"),
        (CRASHES, 60, "crashed: SIGABRT"),
        (HANGS, 1, "hung: stopped after 1 s"),
        # What it leaves behind holds its output open.
        ("import subprocess; print(subprocess.Popen(['sleep', '100']).pid)", 60, "ok"),
        ("import signal, time; signal.signal(signal.SIGTERM, lambda *_: 0); time.sleep(100)", 1,
         "hung: stopped after 1 s"),
    ],
)  # fmt: skip
def test_a_process_ends_in_time_and_says_how(code: str, limit_s: float, outcome: str) -> None:
    start = time.monotonic()
    lines: list[str] = []
    assert process.run(script(code), limit_s, lines.append) == outcome
    assert time.monotonic() - start < 20
    if code == RIGHT:
        assert lines == ["fine"]
    assert not any(map(alive, map(int, filter(str.isdigit, lines)))), "a child lives on"


def alive(pid: int) -> bool:
    """Whether a process still runs; a dying one has a second to go."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return False
        except OSError:
            return False
        time.sleep(0.01)
    return True


# --- Tests with a time limit ----------------------------------------------------------------------

SUITE = """
import os, time
import pytest

def test_right(): pass
def test_hangs(): time.sleep(100)
def test_after_the_hang(): pass
def test_wrong(): assert 1 == 2, "one is not two"
def test_crashes(): os.abort()
def test_after_the_crash(): pass
@pytest.mark.skip
def test_skipped(): pass
def test_exits(): os._exit(0)
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_broken(broken): pass
"""


def test_a_hang_has_a_name_and_the_rest_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    start = time.monotonic()
    command = ["--limit", "2", "--jobs", "2", str(tmp_path), "--rootdir", str(tmp_path)]
    assert watch.main(command) == 1
    assert time.monotonic() - start < 90
    printed = capsys.readouterr().out
    last = printed.splitlines()
    assert last[-1] == "3 passed, 2 failed, 1 skipped, 3 lost"
    assert set(last[-6:-1]) == {
        "failed: test_suite.py::test_wrong",
        "failed: test_suite.py::test_broken",
        "hung: more than 2 s: test_suite.py::test_hangs",
        "crashed: SIGABRT: test_suite.py::test_crashes",
        "crashed: it ended its process: test_suite.py::test_exits",
    }
    assert "Timeout (0:00:02)!" in printed  # and where it hung
    assert "in test_hangs" in printed
    assert "one is not two" in printed


def test_a_file_that_does_not_import_is_named_and_the_rest_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_broken.py").write_text("import not_installed_here\n")
    (tmp_path / "test_right.py").write_text("def test_right(): pass\n")
    assert watch.main(["--jobs", "1", str(tmp_path), "--rootdir", str(tmp_path)]) == 1
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last == ["failed: test_broken.py", "1 passed, 1 failed, 0 skipped, 0 lost"]


def test_tests_end_with_their_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = ["--limit", "60", "--budget", "8", "--jobs", "1", str(tmp_path)]
    start = time.monotonic()
    assert watch.main([*command, "--rootdir", str(tmp_path)]) == 1
    assert time.monotonic() - start < 30
    assert "out of time: test_suite.py::test_hangs" in capsys.readouterr().out


def test_a_suite_that_cannot_run_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watch.main(["--jobs", "1", str(tmp_path / "nowhere")]) == 1
    assert "pytest itself" in capsys.readouterr().out


def test_a_lost_context_ends_the_process_but_not_the_tests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An illegal address leaves nothing usable in its process; here torch.cuda is played."""
    (tmp_path / "test_suite.py").write_text(
        "import torch\n"
        "lost = []\n"
        "def synchronize():\n"
        "    if lost: raise RuntimeError('an illegal memory access was encountered')\n"
        "torch.cuda.is_initialized = lambda: True\n"
        "torch.cuda.synchronize = synchronize\n"
        "def test_breaks(): lost.append(1); assert False\n"
        "def test_next(): assert not lost\n"
    )
    assert watch.main(["--jobs", "1", str(tmp_path), "--rootdir", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "1 passed, 1 failed, 0 skipped, 0 lost"
    assert "the CUDA context is lost" in printed


# --- The campaign ---------------------------------------------------------------------------------


NOWHERE = Path("nowhere")


def campaign(
    stages: list[gpu.Stage], total_s: float = 60, folder: Path = NOWHERE
) -> tuple[int, list[str]]:
    lines: list[str] = []
    status = gpu.campaign(stages, total_s, lines.append, folder)
    return status, lines[-1].strip().splitlines()


def test_a_campaign_goes_on_and_ends_with_a_table() -> None:
    start = time.monotonic()
    status, table = campaign(
        [
            gpu.Stage("right", script(RIGHT), 60),
            gpu.Stage("wrong", script(WRONG), 60),
            gpu.Stage("hangs", script(HANGS), 1),
            gpu.Stage("crashes", script(CRASHES), 60),
            gpu.Stage("absent", script(RIGHT), 60, "no nvcc"),
            gpu.Stage("nowhere", ["/nowhere"], 60),
            gpu.Stage("last", script("print('{budget}')"), 60),
        ]
    )
    assert status == 1
    assert time.monotonic() - start < 30
    assert [line.split(" s  ")[1] for line in table] == [
        "ok",
        f"failed with status {ladder.WRONG}",
        "hung: stopped after 1 s",
        "crashed: SIGABRT",
        "skipped: no nvcc",
        "failed: [Errno 2] No such file or directory: '/nowhere'",
        "ok",
    ]


def test_a_campaign_keeps_its_total_where_everything_hangs() -> None:
    start = time.monotonic()
    status, table = campaign([gpu.Stage(str(i), script(HANGS), 3) for i in range(9)], total_s=4)
    assert time.monotonic() - start < 20
    assert status == 1
    assert len(table) == 9
    assert all("hung: stopped" in line for line in table[:2])
    assert all("out of time: not started" in line for line in table[3:])


@pytest.mark.parametrize(("informs", "status"), [(True, 0), (False, 1)])
def test_a_stage_that_informs_does_not_gate(informs: bool, status: int) -> None:
    stage = gpu.Stage("racecheck", script("raise SystemExit(9)"), 60, informs=informs)
    got, (line,) = campaign([stage])
    assert got == status
    assert "failed with status 9" in line
    assert ("does not gate" in line) == informs


def test_a_backend_that_hung_is_not_benchmarked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [RIGHT, CRASHES, RIGHT]
    rungs = tuple(ladder.RUNGS[i]._replace(backend=name) for i, name in enumerate("aba"))
    monkeypatch.setattr(ladder, "RUNGS", rungs)
    monkeypatch.setattr(ladder, "_command", lambda i, options: script(codes[i]))
    note = tmp_path / gpu.UNSAFE
    assert ladder.main(["--device=cpu", f"--unsafe={note}"]) == 1
    assert note.read_text() == "b"
    lines: list[str] = []
    stage = gpu.Stage("bench", script("print('(all){safe}')"), 60)
    assert gpu.run_stage(stage, 60, lines.append, tmp_path) == "ok"
    assert lines[-1] == "(all) and not lora_kernels.b"
    assert gpu.run_stage(stage, 60, lines.append, NOWHERE) == "ok"
    assert lines[-1] == "(all)"
    (bench,) = (stage for stage in gpu.stages(tmp_path, quick=False) if stage.name == "bench")
    assert any(word.endswith("){safe}") for word in bench.command)


def test_the_stages_find_the_mechanism_first_and_memcheck_gates() -> None:
    stages = gpu.stages(Path("out"), quick=False)
    names = [stage.name for stage in stages]
    assert names[:5] == ["info", "build", "ladder", "tests", "memcheck"]
    assert {stage.name for stage in stages if stage.informs} == {
        "racecheck", "synccheck", "initcheck",
    }  # fmt: skip
    assert gpu.stages(Path("out"), quick=True) == stages[:4]
    (qualification,) = (stage for stage in stages if stage.name == "qualify")
    at = qualification.command.index("lora_kernels.qualify") + 1
    words = [word.format(budget=60) for word in qualification.command[at:]]
    assert qualify._parser().parse_args(words).budget == 60
    assert "LORA_KERNELS_CACHE=out/records" in qualification.command
    before = sum(stage.limit_s for stage in stages[:5])
    assert gpu.TOTAL_S - before > 2 * gpu.REPORT_S, "the benchmarks must always get a time"
    assert gpu.QUICK_S < 4 * 60
    assert gpu.TOTAL_S + 2 * process.GRACE_S <= 9 * 60


def test_the_small_set_has_big_tiles_and_more_items_than_ctas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def run_backend(backend, case, inputs):  # type: ignore[no-untyped-def]
        facts, tf32 = case.problem("cuda", 90), triton._precision(case.dtype) == "tf32"
        backward = any(case.needs)
        config = triton.pick(facts, backward=backward, tf32=tf32)
        seen.append((case._replace(needs=()), forced.Tile(config, backward, tf32)))
        assert triton._ctas(10**6, config, CPU) == forced.FEW_CTAS
        raise AssertionError("noted")

    played = reference.BACKEND._replace(name="triton")
    monkeypatch.setattr(gpu, "BACKENDS", (played,))
    monkeypatch.setattr(gpu, "run_backend", run_backend)
    monkeypatch.setattr(gpu, "make_inputs", lambda case, device: None)
    monkeypatch.setattr(gpu, "problem", lambda case, device: case.problem("cuda", 90))
    assert not any(gpu.check_small_set(CPU))
    assert seen == [
        (case._replace(needs=()), tile)
        for case in forced.CASES
        for tile in forced.every_tile(case.problem("cuda", 90))
    ]
    # Two CTAs of every cluster, 66 clusters on an H100, tiles of 256 x 256 for a cluster.
    m, n, k = gpu.MANY_ITEMS[:3]
    assert min(-(-m // 256) * -(-n // 256), -(-m // 256) * -(-k // 256)) > 66


def unforced(arch: int) -> set[object]:
    """Return the tiles that `pick` may choose on a GPU and the campaign does not force."""

    def found(tile: forced.Tile, problem: Problem) -> tuple[object, ...]:
        return problem.dtype.itemsize, tile

    tried = {
        found(tile, problem)
        for problem in [case.problem("cuda", arch) for case in forced.CASES]
        for tile in forced.every_tile(problem)
    }
    sizes = ((64, 64), (512, 512), (4096, 4096), (14336, 4096))
    dtypes = ((bf16, bf16), (bf16, fp32), (fp32, fp32))
    chosen = set()
    for m, (n, k), r in product((1, 17, 300, 8192), sizes, (4, 8, 16, 24, 64, 200)):
        for (dtype, adapters), dropout in product(dtypes, (False, True)):
            problem = Problem(m, n, k, r, dtype, adapters, arch=arch, dropout=dropout)
            for backward, tf32 in product((False, True), {False, dtype == fp32}):
                config = triton.pick(problem, backward=backward, tf32=tf32)
                chosen.add(found(forced.Tile(config, backward, tf32), problem))
    return chosen - tried


def test_every_tile_that_may_be_chosen_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for arch in (80, 86, 89, 90, 100, 120):
        assert not unforced(arch)
    # Planted: a tile, a direction, a precision or a class of ranks that nobody forces.
    for left_out in (
        lambda c, how: (c.bm, c.bn) == (128, 128),
        lambda c, how: c.bm == 16 and how["backward"],
        lambda c, how: how["tf32"],
        lambda c, how: c.br == 128,
    ):

        def some(problem, left_out=left_out, **how):  # type: ignore[no-untyped-def]
            return [c for c in candidates(problem, **how) if not left_out(c, how)]

        monkeypatch.setattr(forced, "candidates", some)
        assert unforced(90)


def test_the_small_set_passes_on_what_is_right_and_not_on_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for change, right in (
        (lambda b: b, True),
        (returned("dx", from_block(128, 0)), False),
    ):
        backend = change(reference.BACKEND._replace(name="cuda"))
        monkeypatch.setattr(gpu, "BACKENDS", (backend,))
        monkeypatch.setattr(gpu, "MANY_ITEMS", forced.CASES[0])
        assert all(gpu.check_small_set(CPU)) == right


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the GPU tests within the tests")
def test_a_campaign_without_a_gpu_says_what_it_skips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    assert gpu.main([str(tmp_path), "--quick"]) == 0
    log = (tmp_path / "campaign.log").read_text()
    assert "lora_kernels" in log
    table = log.strip().splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["info", "build", "ladder", "tests"]
    assert all("skipped: there is no CUDA device" in line for line in table[2:])
