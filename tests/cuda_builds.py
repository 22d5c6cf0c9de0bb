"""The CUDA extension, compiled once for all tests that look into it."""

import shutil
from pathlib import Path

import pytest

from bench import builds


def compiled() -> Path:
    """Return the folder with lora_kernels/_C* for sm_90a, its objects/ and log.txt, or skip."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    return builds.extension()
