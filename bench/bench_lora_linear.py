"""One layer: every case of the table, direction and provider."""

from collections.abc import Callable

from bench.cases import BenchCase
from bench.measure import Row
from bench.providers import Provider


def test_lora_linear(
    bench_case: BenchCase,
    direction: str,
    provider: Provider,
    rows_of: Callable[[BenchCase], dict[tuple[str, str], Row]],
    record: Callable[[str, Row, bool], None],
) -> None:
    """Report one row of one case."""
    row = rows_of(bench_case)[direction, provider.name]
    record(f"{bench_case.name} {direction}", row, provider.ours)
