"""setup.py: what ninja rebuilds, what a failure shows, and installation without the tools."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cuda_builds import compiled

from bench.builds import ROOT, SUFFIX

# Two sources that share one header, one of them with a header of its own.
SMALL = {
    "bindings.cpp": '#include "common/both.h"\n#include "common/own.h"\nint a = both + own;\n',
    "lora_linear/kernel.cu": '#include "../common/both.h"\n__global__ void kernel(int*) {}\n',
    "common/both.h": "#pragma once\nconst int both = 1;\n",
    "common/own.h": "#pragma once\nconst int own = 2;\n",
}
NO_COMPILER = {"CC": "/no/compiler", "CXX": "/no/compiler"}
NO_TOOLS = {  # environment, the programs that are hidden, the reason that is given
    "switched off": ({"LORA_KERNELS_CUDA": "0"}, (), "LORA_KERNELS_CUDA=0"),
    "no nvcc": ({"CUDA_HOME": "", **NO_COMPILER}, ("nvcc",), "nvcc was not found"),
    "no ninja": (NO_COMPILER, ("ninja",), "ninja was not found"),
}

SITE = """
import shutil, sys
which = shutil.which
shutil.which = lambda name, *a, **k: None if name in HIDDEN else which(name, *a, **k)
# An editable installation of this project would lend its extension.
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder with setup.py and small sources, built once."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    for name, text in SMALL.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert compiled_by(tmp_path) == {"bindings.cpp", "kernel.cu", "link"}
    return tmp_path


def build(project: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext"]
    return subprocess.run(
        [*command, "--build-lib", "lib", "--build-temp", "a folder"],
        cwd=project, capture_output=True, text=True,
        env={**os.environ, "LORA_KERNELS_CUDA": "1"},
    )  # fmt: skip


def compiled_by(project: Path) -> set[str]:
    """Build; return the sources that were compiled, and "link" if something was linked."""
    done = build(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "lib/lora_kernels" / f"_C{SUFFIX}").exists()
    linked = {"link"} if " -shared " in done.stdout else set()
    return linked | set(re.findall(r"nvcc .* -c \S*/(\S+) -o ", done.stdout))


def change(project: Path, name: str, text: str) -> None:
    (project / "csrc" / name).write_text(text)


def test_a_rebuild_compiles_exactly_what_includes_the_change(project: Path) -> None:
    assert compiled_by(project) == set()
    change(project, "common/own.h", "#pragma once\nconst int own = 3;\n")
    assert compiled_by(project) == {"bindings.cpp", "link"}
    change(project, "common/both.h", "#pragma once\nconst int both = 3;\n")
    assert compiled_by(project) == {"bindings.cpp", "kernel.cu", "link"}
    change(project, "lora_linear/kernel.cu", "__global__ void other(int*) {}\n")
    assert compiled_by(project) == {"kernel.cu", "link"}
    change(project, "common/both.h", SMALL["common/both.h"])  # which the kernel no longer includes
    assert compiled_by(project) == {"bindings.cpp", "link"}
    setup = (project / "setup.py").read_text()
    (project / "setup.py").write_text(setup.replace('"-O3"', '"-O1"'))
    assert compiled_by(project) == {"bindings.cpp", "kernel.cu", "link"}
    assert compiled_by(project) == set()


def test_a_failed_compilation_is_shown_with_its_command(project: Path) -> None:
    change(project, "lora_linear/kernel.cu", "int a = nowhere;\n")
    done = build(project)
    assert done.returncode != 0
    assert re.search(r"FAILED: .*kernel\.o", done.stdout), done.stdout
    assert re.search(r"nvcc .* -c \S*kernel\.cu -o ", done.stdout), done.stdout
    assert '"nowhere" is undefined' in done.stdout
    assert "LORA_KERNELS_CUDA=0 installs without" in done.stderr
    change(project, "lora_linear/kernel.cu", SMALL["lora_linear/kernel.cu"])
    assert compiled_by(project) == {"kernel.cu", "link"}


def test_the_dependencies_of_the_kernels_are_known() -> None:
    places = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))
    ninja = shutil.which("ninja", path=places) or pytest.skip("needs ninja")
    done = subprocess.run(
        [ninja, "-C", str(compiled() / "objects"), "-t", "deps"], capture_output=True, text=True
    )
    headers = {
        entry.partition(".o:")[0].rpartition("/")[2]: set(re.findall(r"csrc/(\S+)", entry))
        for entry in done.stdout.split("\n\n")
    }
    assert {"common/ptx.h", "lora_linear/tile_sm90.cuh"} <= headers["forward_bf16"]
    assert "lora_linear/backward_sm90.cuh" in headers["backward_bf16"]
    assert "lora_linear/backward_sm90.cuh" not in headers["forward_bf16"]
    assert "common/ptx.h" not in headers["bindings"]


@pytest.mark.parametrize("situation", NO_TOOLS)
def test_without_the_tools_the_package_installs_and_says_what_is_missing(
    situation: str, tmp_path: Path
) -> None:
    variables, hidden, reason = NO_TOOLS[situation]
    if hidden == ("ninja",) and not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("lora_kernels", "csrc"):
        shutil.copytree(
            ROOT / name,
            source / name,
            ignore=shutil.ignore_patterns("*.so", "*.txt", "__pycache__"),
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    # Loaded by every Python below, the ones that pip starts too.
    (tmp_path / "sitecustomize.py").write_text(f"HIDDEN = {hidden!r}\n{SITE}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "LORA_KERNELS_CUDA": "1", **variables}
    install = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation"]
    installed = subprocess.run(
        [*install, "--no-index", "--target", str(target), str(source)],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    log = installed.stdout + installed.stderr
    assert installed.returncode == 0, log
    assert f"lora_kernels: no CUDA extension, {reason}" in log
    built = {path.name.partition(".")[0] for path in target.rglob("*.so")}
    assert built == (set() if "CXX" in variables else {"_cpu"})
    info = subprocess.run(
        [sys.executable, "-m", "lora_kernels.info"],
        env={**environment, "PYTHONPATH": f"{target}{os.pathsep}{tmp_path}"}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert f"lora_kernels._C is not built: {reason}" in info.stdout, info.stdout + info.stderr
    missing = "lora_kernels._cpu is not built: the C++ compiler is missing or failed"
    assert (missing if "CXX" in variables else "CPU routine loaded") in info.stdout
