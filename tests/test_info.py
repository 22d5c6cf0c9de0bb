"""`python -m lora_kernels.info`: every backend and dtype pair is in the report."""

import subprocess
import sys

import pytest

from lora_kernels import info
from lora_kernels.ops.lora_linear import BACKENDS
from lora_kernels.ops.lora_linear.validate import DTYPES, adapter_dtypes
from lora_kernels.qualify import choose


def test_the_report_has_a_row_for_each_combination(capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    report = capsys.readouterr().out
    header = next(line for line in report.splitlines() if "dropout" in line)
    assert header.split()[-len(BACKENDS) :] == [backend.name for backend in BACKENDS]
    for dtype in DTYPES:
        for adapter_dtype in adapter_dtypes(dtype):
            names = [str(t).removeprefix("torch.") for t in (dtype, adapter_dtype)]
            rows = [line for line in report.splitlines() if line.split()[:2] == names]
            assert [row.split()[2] for row in rows] == ["no", "yes"]


def test_a_reader_who_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-m", "lora_kernels.info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before anything is written, as importing takes seconds
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_a_pinned_record_that_cannot_serve_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choose, "KEPT_FOR", ("cpu",))
    monkeypatch.setenv("LORA_KERNELS_RECORD", "nowhere.json")
    choose.forget()
    try:
        assert info.main([]) == 2
    finally:
        choose.forget()
    said = capsys.readouterr()
    assert said.err == "lora_kernels.info: LORA_KERNELS_RECORD=nowhere.json is no file\n"
    assert said.out.startswith("lora_kernels ")
