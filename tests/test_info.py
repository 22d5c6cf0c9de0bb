"""`python -m lora_kernels.info`: every backend and dtype pair is in the report."""

import pytest

from lora_kernels import info
from lora_kernels.ops.lora_linear import BACKENDS
from lora_kernels.ops.lora_linear.validate import DTYPES, adapter_dtypes


def test_the_report_has_a_row_for_each_combination(capsys: pytest.CaptureFixture[str]) -> None:
    info.main()
    report = capsys.readouterr().out
    header = next(line for line in report.splitlines() if "dropout" in line)
    assert header.split()[-len(BACKENDS) :] == [backend.name for backend in BACKENDS]
    for dtype in DTYPES:
        for adapter_dtype in adapter_dtypes(dtype):
            names = [str(t).removeprefix("torch.") for t in (dtype, adapter_dtype)]
            rows = [line for line in report.splitlines() if line.split()[:2] == names]
            assert [row.split()[2] for row in rows] == ["no", "yes"]
