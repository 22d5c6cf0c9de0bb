"""Builds lora_kernels._C from csrc/ where nvcc is; elsewhere the package installs without it.

Needs neither a GPU nor a CUDA build of PyTorch. LORA_KERNELS_CUDA=0 skips the extension.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent / "csrc"
SOURCES = (CSRC / "bindings.cpp", *sorted(CSRC.glob("lora_linear/*.cu")))
# The shorthand -arch=sm_90a would add a plain compute_90 pass, which knows no wgmma.
FLAGS = (
    "-std=c++20", "-O3", "-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a",
    "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden",
)  # fmt: skip
OLDEST_NVCC = (12, 5)  # cudaGetDriverEntryPointByVersion


def find_nvcc() -> str | None:
    """Return the path of an nvcc that can build the extension, or None, having said why not."""
    if os.environ.get("LORA_KERNELS_CUDA") == "0":
        print("lora_kernels: no CUDA extension, LORA_KERNELS_CUDA=0")
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if nvcc is None:
        print("lora_kernels: no CUDA extension, nvcc was not found")
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", text)
    if version is None or tuple(map(int, version.groups())) < OLDEST_NVCC:
        print(f"lora_kernels: no CUDA extension, {nvcc} is older than CUDA 12.5")
        return None
    return nvcc


class BuildKernels(build_ext):
    """Compiles every source with nvcc, at once, and links them with the static CUDA runtime."""

    def build_extension(self, ext: Extension) -> None:
        """Write the shared library where setuptools expects it."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp)
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in (pybind11.get_include(), *self.compiler.include_dirs)]

        def compile_one(source: Path) -> Path:
            made = objects / f"{source.stem}.o"
            _run([NVCC, *FLAGS, *includes, "-c", str(source), "-o", str(made)])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compile_one, SOURCES))
        _run([NVCC, "-shared", *map(str, made), "-o", str(target)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{' '.join(command)}\n{done.stdout}", end="")
    if done.returncode != 0:
        raise SystemExit(f"lora_kernels: {command[0]} failed; LORA_KERNELS_CUDA=0 installs without")


NVCC = find_nvcc()
setup(
    ext_modules=[Extension("lora_kernels._C", [str(s.relative_to(CSRC.parent)) for s in SOURCES])]
    if NVCC
    else [],
    cmdclass={"build_ext": BuildKernels},
)
