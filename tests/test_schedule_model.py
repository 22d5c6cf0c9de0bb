"""The predicted times: the model schedules as it says, and the README shows what it predicts."""

import pytest

from bench import schedule as model
from bench.schedule import Cuda, Item, Prediction, Triton, makespan_us
from lora_kernels.ops.lora_linear.config import TileConfig
from lora_kernels.ops.lora_linear.problem import Problem

QO, KV = Problem(8192, 4096, 4096, 16), Problem(8192, 1024, 4096, 16)
TRITON = Triton(TileConfig(128, 256, 64, warps=8, stages=4, br=16))


def test_the_readme_s_tables_are_what_the_program_prints() -> None:
    block = f"<!-- {model.MARKER} -->\n{model.tables()}\n<!-- /{model.MARKER} -->\n"
    assert block in model.README.read_text(), "run `python -m bench.schedule --write`"


def test_items_go_to_who_is_free_first_and_wait_for_their_flag() -> None:
    assert makespan_us([Item(3.0, 0.0), Item(1.0, 0.0), Item(1.0, 0.0)], 2) == 3.0
    assert makespan_us([Item(2.0, 1.0, 0, publishes=True), Item(1.0, 5.0, 0)], 2) == 8.0
    assert makespan_us([Item(2.0, 1.0, 0, publishes=True), Item(4.0, 5.0, 0)], 2) == 9.0
    # Of a row block's two rank tiles, the later counts; another row block's flag does not.
    late = [Item(1.0, 0.0, 0, publishes=True), Item(7.0, 0.0, 0, publishes=True)]
    assert makespan_us([*late, Item(0.0, 1.0, 0)], 3) == 8.0
    other = Item(1.0, 0.0, 1, publishes=True)
    assert makespan_us([*late, other, Item(0.0, 1.0, 1)], 4) == 7.0
    assert makespan_us([*late, other, Item(0.0, 1.0, all_rows=True)], 4) == 8.0


@pytest.mark.parametrize("this", [TRITON, Cuda()], ids=["triton", "cuda"])
@pytest.mark.parametrize("problem", [QO, KV, QO._replace(dropout=True), QO._replace(r=72)], ids=str)
@pytest.mark.parametrize("waves", [0.0, 1.5, 3.0, 1e6])
def test_every_order_waits_for_smaller_tickets_alone(
    this: model.Model, problem: Problem, waves: float
) -> None:
    items = model.backward(this, problem, waves)
    assert sorted(items) == sorted(model.backward(this, problem))
    published: set[int] = set()
    for item in items:
        if item.publishes:
            published.add(item.row)  # type: ignore[arg-type]
        elif item.row is not None:
            assert item.row in published
    assert published == set(range(-(-problem.m // this.config.bm)))
    first_da = next(i for i, item in enumerate(items) if item.all_rows)
    assert max(i for i, item in enumerate(items) if item.publishes) < first_da
    dx_after = sum(item.row is not None for item in items[first_da:])
    assert dx_after == min(round(waves * this.workers), sum(not i.publishes for i in items) - sum(
        i.row is None for i in items
    ))  # fmt: skip


def test_an_item_takes_what_its_work_takes_at_the_stated_rates() -> None:
    assert TRITON.tile_us(4096) == pytest.approx(2 * 128 * 256 * 4096 * 132 / 798e6)
    assert TRITON.skinny_us(128, 4096, False) == pytest.approx((128 + 16) * 2 * 4096 / 64 / 1600)
    assert Cuda().tile_us(4096) == 64 * 1024 / 1600
    assert Cuda().skinny_us(256, 4096, False) == 64 * 384 / 1600
    assert Cuda().skinny_us(256, 4096, True) > 2 * Cuda().skinny_us(256, 4096, False)


@pytest.mark.parametrize("backend", model.BACKENDS)
@pytest.mark.parametrize("problem", [QO, KV], ids=str)
def test_no_prediction_beats_the_work_it_schedules(backend: str, problem: Problem) -> None:
    this = Prediction(problem, backend)
    one, two = this.model(), this.model(backward=True)
    for time_us, items, workers in (
        (this.forward_us, model.forward(one, problem), one.workers),
        (this.backward_us(), model.backward(two, problem), two.workers),
    ):
        work_us = sum(item.before_us + item.after_us for item in items) / workers
        longest_us = max(item.before_us + item.after_us for item in items)
        assert work_us <= time_us <= work_us + 2 * longest_us


def test_da_by_duration_pays_where_its_items_are_the_longer_ones() -> None:
    narrow, wide = Prediction(KV, "cuda"), Prediction(QO, "cuda")
    assert narrow.backward_us() < 0.9 * narrow.backward_us(0.0)
    assert wide.backward_us() == wide.backward_us(0.0) <= wide.backward_us(1.5)
