"""Compile the machine's core with the system's C++ compiler, under build/ by what it is made of."""

import fcntl
import functools
import hashlib
import os
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

from bench import builds

CORE = Path(__file__).parent / "core"
BUILD = builds.ROOT / "build" / "ptx_machine"
FLAGS = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
)


def compiler() -> str | None:
    """Return the C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


@functools.cache
def core() -> ModuleType:
    """Return the compiled module, `_machine`."""
    flags = (*FLAGS, *_vector_flags())
    headers = hashlib.sha256(f"{sys.version} {flags}".encode())
    for path in sorted(CORE.glob("*.h")):
        headers.update(path.read_bytes())
    objects = {}
    for path in sorted(CORE.glob("*.cpp"), key=lambda path: -path.stat().st_size):
        digest = headers.copy()
        digest.update(path.read_bytes())
        objects[path] = BUILD / f"{path.stem}-{digest.hexdigest()[:12]}.o"
    names = " ".join(sorted(path.name for path in objects.values()))
    folder = BUILD / hashlib.sha256(names.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"_machine{builds.SUFFIX}"
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(objects, library, flags)
    return builds.load("_machine", library)


def _vector_flags() -> tuple[str, ...]:
    """32 lanes are four vectors of AVX2, which every x86 server since 2013 has."""
    try:
        has_avx2 = " avx2 " in Path("/proc/cpuinfo").read_text()
    except OSError:
        has_avx2 = False
    return ("-mavx2", "-mfma") if has_avx2 else ()


def _compile(objects: dict[Path, Path], library: Path, flags: tuple[str, ...]) -> None:
    cxx = compiler()
    assert cxx is not None
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def compile_one(source: Path) -> None:
        if not objects[source].exists():
            partial = objects[source].with_suffix(".partial")
            builds.run(cxx, *flags, *includes, "-c", str(source), "-o", str(partial))
            partial.replace(objects[source])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, objects))
    partial = library.with_suffix(".partial")
    builds.run(cxx, "-shared", *map(str, objects.values()), "-o", str(partial))
    partial.replace(library)
