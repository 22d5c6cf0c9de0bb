"""Builds of csrc/ and of what stands for a GPU, for tests and benchmarks on machines without one.

A build lands under build/ by the hash of its sources, so that processes and later runs share it.
"""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def build(name: str, inputs: Iterable[Path], make: Callable[[Path], None]) -> Path:
    """Return a folder under build/ that `make` has filled, once for what the inputs contain."""
    digest = hashlib.sha256(sys.version.encode())
    for path in inputs:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / f"{name}-{digest.hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            make(folder)
            (folder / "done").touch()
    return folder


def sources() -> list[Path]:
    """Return what the extension is made of, and by."""
    return [Path(__file__), ROOT / "setup.py", *sorted(CSRC.rglob("*.*"))]


def extension() -> Path:
    """Return a folder with lora_kernels/_C*, its objects/ and the compiler's log.txt.

    For sm_90a, as setup.py makes it, by nvcc and ninja.
    """

    def make(folder: Path) -> None:
        command = (sys.executable, "setup.py", "build_ext", "--build-lib", str(folder))
        objects = ("--build-temp", str(folder / "objects"))
        log = run(*command, *objects, environment={**os.environ, "LORA_KERNELS_CUDA": "1"})
        (folder / "log.txt").write_text(log)
        if not any((folder / "lora_kernels").glob("_C*")):
            raise RuntimeError(f"setup.py built no lora_kernels._C: {log}")

    return build("sm90a", sources(), make)


def load(name: str, path: Path) -> ModuleType:
    """Return the extension module of this name in the file at `path`."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    """Return what a command prints.

    Raises:
        RuntimeError: it failed; the message holds all it printed.
    """
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stdout}")
    return done.stdout
