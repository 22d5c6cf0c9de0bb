"""Builds of csrc/ for the tests: for sm_90a, as setup.py makes it.

A build lands under build/ by the hash of its sources, so that test workers and later runs share it.
"""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def compiled() -> Path:
    """Return the folder with lora_kernels/_C* for sm_90a and the compiler's log.txt."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    return _built("sm90a", _compile)


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


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout
