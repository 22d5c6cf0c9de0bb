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
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = _built("emulated", _compile_emulated) / f"_C{SUFFIX}"
    loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
    spec = importlib.util.spec_from_loader("_C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulation(
    seed: int = 0, clusters: int = 3, resident: int = 3, fault: str = ""
) -> Iterator[None]:
    """Let the cuda backend run on the emulator: `clusters` at most, `resident` at a time."""
    module, load = emulated(), extension.load
    module.emulate(seed, clusters, resident, fault)
    extension.load = lambda: module
    try:
        yield
    finally:
        extension.load = load


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


def _compile_emulated(folder: Path) -> None:
    def compile_one(source: Path) -> str:
        made = folder / f"{source.stem}.o"
        flags = "-std=c++20 -O2 -fPIC -DLORA_EMULATE -Wall -Wextra -Werror -Wno-unknown-pragmas"
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        _run(["g++", *flags.split(), *includes, "-xc++", "-c", str(source), "-o", str(made)])
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    _run(["g++", "-shared", *objects, "-o", str(folder / f"_C{SUFFIX}")])


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout
