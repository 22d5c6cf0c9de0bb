"""Builds of csrc/ for the tests: for sm_90a as setup.py makes it, and for the CPU emulator.

A build lands under build/ by the hash of its sources, so that test workers and later runs share it.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

from lora_kernels import extension

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SOURCES = (CSRC / "bindings.cpp", *sorted(CSRC.glob("lora_linear/*.cu")))
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def compiled() -> Path:
    """Return the folder with lora_kernels/_C* for sm_90a and the compiler's log.txt."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    return _built("sm90a", _compile)


@functools.cache
def emulated() -> ModuleType:
    """Return lora_kernels._C whose kernels run in the emulator."""
    return _load(_emulated_folder())


def mutated(folder: Path, unit: str, file: str, old: str, new: str) -> ModuleType:
    """Return the same with `old` replaced by `new` in a source that lora_linear/`unit`.cu sees."""
    shutil.copytree(CSRC, folder / "csrc")
    source = folder / "csrc" / file
    text = source.read_text()
    assert old in text, f"{file} has changed: {old!r}"
    source.write_text(text.replace(old, new))
    mutant = _compile_one(folder / f"csrc/lora_linear/{unit}.cu", folder, "-O1")
    others = [str(path) for path in _emulated_folder().glob("*.o") if path.stem != unit]
    # The mutant comes first: of an inline function in several objects the linker takes the first.
    _run(["g++", "-shared", mutant, *others, "-o", str(folder / f"_C{SUFFIX}")])
    return _load(folder)


@contextlib.contextmanager
def emulation(
    seed: int = 0,
    clusters: int = 3,
    resident: int = 3,
    fault: str = "",
    module: ModuleType | None = None,
) -> Iterator[None]:
    """Let the cuda backend run in the emulator: `clusters` at most, `resident` at a time."""
    module, load = module or emulated(), extension.load
    module.emulate(seed, clusters, resident, fault)
    extension.load = lambda: module
    try:
        yield
    finally:
        extension.load = load


def _load(folder: Path) -> ModuleType:
    name = f"{folder.name}._C"  # pybind11 would take a second module of one name for the first
    loader = importlib.machinery.ExtensionFileLoader(name, str(folder / f"_C{SUFFIX}"))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _built(name: str, build: Callable[[Path], None]) -> Path:
    digest = hashlib.sha256(sys.version.encode())
    for path in (ROOT / "setup.py", Path(__file__), *sorted(CSRC.rglob("*.*"))):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / f"{name}-{digest.hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            build(folder)
            (folder / "done").touch()
    return folder


def _compile(folder: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    environment = {**os.environ, "LORA_KERNELS_CUDA": "1"}
    (folder / "log.txt").write_text(_run(command, environment))


def _emulated_folder() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return _built("emulated", _compile_emulated)


def _compile_emulated(folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile_one(source, folder, "-O2"), SOURCES))
    _run(["g++", "-shared", *objects, "-o", str(folder / f"_C{SUFFIX}")])


def _compile_one(source: Path, folder: Path, optimise: str) -> str:
    made = folder / f"{source.stem}.o"
    flags = ["-std=c++20", "-fPIC", "-DLORA_EMULATE"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    _run(["g++", optimise, *flags, *includes, "-xc++", "-c", str(source), "-o", str(made)])
    return str(made)


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout
