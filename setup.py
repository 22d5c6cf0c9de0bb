"""Builds what csrc/ has for the tools that are there; the package installs without them, too.

lora_kernels._C, the CUDA kernels, takes nvcc and ninja, but neither a GPU nor a CUDA build of
PyTorch. LORA_KERNELS_CUDA=0 skips it. What headers a source includes, nvcc itself tells ninja:
after a change only what it concerns is rebuilt. lora_kernels._cpu, a C library, takes a C++
compiler.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path(__file__).parent.absolute() / "csrc"
SOURCES = (CSRC / "bindings.cpp", *sorted(CSRC.glob("lora_linear/*.cu")))
# The shorthand -arch=sm_90a would add a plain compute_90 pass, which knows no wgmma.
FLAGS = (
    "-std=c++20", "-O3", "-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a",
    "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden",
)  # fmt: skip
OLDEST_NVCC = (12, 5)  # cudaGetDriverEntryPointByVersion
CPU = Extension(
    "lora_kernels._cpu", ["csrc/cpu/dropout.cpp"], optional=True,
    extra_compile_args=["-std=c++17", "-O3"],
)  # fmt: skip
REASON_FILE, CPU_REASON_FILE = "no_extension.txt", "no_cpu_extension.txt"  # extension.py reads them
RULES = """\
rule compile
  command = {nvcc} {flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {nvcc} -shared $in -o $out
"""


class Tools(NamedTuple):
    """The programs that build the extension."""

    nvcc: str
    ninja: str


def find_tools() -> Tools | str:
    """Return what builds the extension, or why it cannot be built."""
    if os.environ.get("LORA_KERNELS_CUDA") == "0":
        return "LORA_KERNELS_CUDA=0"
    path = os.environ.get("PATH", os.defpath)
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if nvcc is None:
        return "nvcc was not found"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", text)
    if version is None or tuple(map(int, version.groups())) < OLDEST_NVCC:
        return f"{nvcc} is older than CUDA 12.5"
    # Beside this Python first: a virtual environment need not be activated.
    ninja = shutil.which("ninja", path=os.pathsep.join((sysconfig.get_path("scripts"), path)))
    return Tools(nvcc, ninja) if ninja else "ninja was not found"


class BuildKernels(build_ext):
    """Lets ninja compile what has changed with nvcc, and link with the static CUDA runtime."""

    def build_extension(self, ext: Extension) -> None:
        """Bring the shared library up to date where setuptools expects it."""
        if ext is CPU:
            leave_word(self, CPU_REASON_FILE, "the C++ compiler is missing or failed")
            super().build_extension(ext)  # where it raises, setuptools prints why and goes on
            leave_word(self, CPU_REASON_FILE, None)
            return
        import pybind11

        assert isinstance(TOOLS, Tools)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        folder = Path(self.build_temp).absolute()
        for made in (target.parent, folder):
            made.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in (pybind11.get_include(), *self.compiler.include_dirs)]
        (folder / "build.ninja").write_text(rules(TOOLS.nvcc, includes, folder, target))
        if subprocess.run([TOOLS.ninja, "-C", str(folder)]).returncode != 0:
            raise SystemExit("lora_kernels: the build failed; LORA_KERNELS_CUDA=0 installs without")


def rules(nvcc: str, includes: list[str], folder: Path, target: Path) -> str:
    """Return the text of build.ninja: an object of every source, linked into `target`."""

    def path(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    made = {source: folder / f"{source.stem}.o" for source in SOURCES}
    flags = shlex.join([*FLAGS, *includes]).replace("$", "$$")
    lines = [RULES.format(nvcc=shlex.quote(nvcc).replace("$", "$$"), flags=flags)]
    lines += [f"build {path(out)}: compile {path(source)}" for source, out in made.items()]
    lines += [f"build {path(target)}: link {' '.join(map(path, made.values()))}"]
    return "\n".join(lines) + "\n"


class BuildPython(build_py):
    """Leaves word beside the package why it has no CUDA extension."""

    def run(self) -> None:
        """Copy the package, and the reason."""
        super().run()
        leave_word(self, REASON_FILE, TOOLS if isinstance(TOOLS, str) else None)


def leave_word(command: build_ext | build_py, name: str, reason: str | None) -> None:
    """Write beside the package why something was not built, or remove what was written."""
    in_place = command.editable_mode or getattr(command, "inplace", False)
    root = CSRC.parent if in_place else Path(command.build_lib)
    file = root / "lora_kernels" / name
    if reason is None:
        file.unlink(missing_ok=True)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(reason)


TOOLS = find_tools()
if isinstance(TOOLS, str):
    print(f"lora_kernels: no CUDA extension, {TOOLS}")
setup(
    ext_modules=[
        CPU,
        *(
            [Extension("lora_kernels._C", [str(s.relative_to(CSRC.parent)) for s in SOURCES])]
            if isinstance(TOOLS, Tools)
            else []
        ),
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
)
