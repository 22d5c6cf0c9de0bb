"""Tuning: wrong candidates are left out, and the gate judges what large problems run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import tune
from bench.cases import TABLES
from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear import reference, schedule
from lora_kernels.ops.lora_linear.config import TileConfig, candidates
from lora_kernels.testing import Case

SMOKE = TABLES["smoke"][0]


def test_tuning_prints_a_table_and_leaves_out_what_is_wrong(monkeypatch: Any, capsys: Any) -> None:
    facts = SMOKE.case.problem()
    first, *_ = candidates(facts)

    def forward(call: Any) -> tuple[Tensor, Tensor]:
        y, p = reference.BACKEND.forward(call)
        return (y * 2 if tune.triton.pick(facts) == first else y), p

    monkeypatch.setattr(tune.triton, "BACKEND", reference.BACKEND._replace(forward=forward))
    monkeypatch.setattr(tune.triton, "pick", tune.pick)
    assert tune.main(["--table", "smoke", "--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"    # forward {first} wrong: y of" in "\n".join(lines)
    table = eval("\n".join(lines).partition("= ")[2], {"TileConfig": TileConfig})
    assert set(table) == {
        (None, 24, 48, 32, 4, itemsize, backward, tf32)
        for itemsize, tf32 in ((2, False), (4, False), (4, True))
        for backward in (False, True)
    }
    assert first not in [tile for key, tile in table.items() if not key[-2]]
    monkeypatch.setattr(tune.triton, "pick", tune.pick)
    assert tune.main(["--table", "smoke", "--budget", "-1"]) == 1
    printed = capsys.readouterr()
    assert "# no time left from smoke" in printed.out
    assert printed.err == "bench.tune: error: no candidate could be timed here\n"


@pytest.mark.parametrize("bench_case", TABLES["gpu"][:8], ids=lambda c: c.name)
def test_the_gate_has_more_items_than_ctas_and_judges_every_tile(
    bench_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = bench_case.case.problem()
    judged = []

    def check(backend: Backend, case: Case, device: torch.device) -> None:
        tile = remaining.pop(0)
        c = tune.triton.pick(facts, backward=tile.backward, tf32=tile.tf32)
        assert c == tile.config
        assert all(case.needs) == tile.backward
        sizes = case.m, case.n, case.r, c.bm, c.bn, c.br
        backward = case.m, case.n, case.k, case.r, c.bm, c.bn, c.bk, c.br, True, True, True
        for ends in (schedule.forward_ends(*sizes), schedule.backward_ends(*backward)):
            ctas = tune.triton._ctas(ends[-1], c, device)
            assert case.m < 64 or ends[-1] >= 2 * ctas > 2
        judged.append(tile)
        raise AssertionError("noted")

    everything = tune.every_tile(facts)
    remaining = list(everything)

    monkeypatch.setattr(tune.triton, "BACKEND", reference.BACKEND)
    monkeypatch.setattr(tune, "check_backend", check)
    assert len(list(tune.tune(bench_case, torch.device("cpu"), 0.01))) == len(judged)
    assert judged == everything
