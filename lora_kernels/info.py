"""`python -m lora_kernels.info`: versions, GPUs, and which backend runs what here, or why not."""

import argparse
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

import torch

import lora_kernels
from lora_kernels import extension
from lora_kernels.ops.lora_linear import BACKENDS, Problem
from lora_kernels.ops.lora_linear.problem import arch, short
from lora_kernels.ops.lora_linear.validate import DTYPES, adapter_dtypes
from lora_kernels.output import show
from lora_kernels.qualify import choose

_PACKAGES = ("torch", "triton", "peft", "transformers")


def main(argv: list[str] | None = None) -> int:
    """Print the report; return 0, or 2 if a pinned record cannot serve here."""
    parser = argparse.ArgumentParser(prog="python -m lora_kernels.info", description=__doc__)
    parser.parse_args(argv)
    try:
        show(_report())
    except RuntimeError as error:
        print(f"lora_kernels.info: {error}", file=sys.stderr)
        return 2
    return 0


def _report() -> Iterator[str]:
    yield f"lora_kernels {lora_kernels.__version__} · Python {platform.python_version()}"
    yield "packages    " + " · ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    yield f"extension   {extension.why_absent() or 'loaded'}"
    cpu = extension.load_cpu()
    yield f"CPU routine {cpu if isinstance(cpu, str) else 'loaded'}"
    yield f"CUDA        {torch.version.cuda or 'this PyTorch is a CPU build'}"
    for i in range(torch.cuda.device_count()):
        yield f"GPU {i}       {torch.cuda.get_device_name(i)} (sm_{arch(torch.device('cuda', i))})"

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    yield ""
    yield f"lora_linear on {device.type}, 4096 tokens, a layer of 4096 x 4096, rank 16:"
    yield 'which backend can run it and may be picked; "auto" picks the first yes of a row'
    reasons: dict[str, int] = {}
    rows = [["x, W", "A, B", "dropout", *(backend.name for backend in BACKENDS)]]
    for dtype, adapter_dtype, dropout in (
        (d, a, p) for d in DTYPES for a in adapter_dtypes(d) for p in (False, True)
    ):
        problem = Problem(
            *(4096, 4096, 4096, 16),
            dtype,
            adapter_dtype,
            device.type,
            arch(device),
            dropout=dropout,
        )
        cells = []
        for backend in BACKENDS:
            reason = backend.why_not(problem)
            forward, backward = reason, reason
            if reason is None:
                forward, backward = (backend.unproven(problem, b) for b in (False, True))
            notes = dict.fromkeys(r for r in (forward, backward) if r is not None)
            marks = "".join(f" [{reasons.setdefault(r, len(reasons) + 1)}]" for r in notes)
            only = "backward only" if forward else "forward only"
            word = "no" if forward and backward else only if notes else "yes"
            cells.append(word + marks)
        rows.append([short(dtype), short(adapter_dtype), "yes" if dropout else "no", *cells])
    yield from _table(rows)
    yield from (f"[{note}] {reason}" for reason, note in reasons.items())
    if device.type in choose.KEPT_FOR:
        yield ""
        yield from choose.trust(BACKENDS, device.type)


def _table(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield (
            "  "
            + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
