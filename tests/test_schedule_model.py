"""The predicted times: the model schedules as it says, and the README shows what it predicts."""

import pytest

from bench import schedule as model
from bench.items import RATES, recorded
from bench.schedule import Model, Prediction, Ticket, makespan_us
from lora_kernels.ops.lora_linear.problem import Problem

QO, KV = Problem(8192, 4096, 4096, 16), Problem(8192, 1024, 4096, 16)


def test_the_readme_s_tables_are_what_the_program_prints() -> None:
    text = model.README.read_text()
    for marker, block in model.blocks().items():
        here = f"<!-- {marker} -->\n{block}\n<!-- /{marker} -->\n"
        assert here in text, "run `python -m bench.schedule --write`"


def test_items_go_to_who_is_free_first_and_wait_for_their_flag() -> None:
    assert makespan_us([Ticket(3.0, 0.0), Ticket(1.0, 0.0), Ticket(1.0, 0.0)], 2) == 3.0
    assert makespan_us([Ticket(2.0, 1.0, 0, publishes=True), Ticket(1.0, 5.0, 0)], 2) == 8.0
    assert makespan_us([Ticket(2.0, 1.0, 0, publishes=True), Ticket(4.0, 5.0, 0)], 2) == 9.0
    # Of a row block's two rank tiles, the later counts; another row block's flag does not.
    late = [Ticket(1.0, 0.0, 0, publishes=True), Ticket(7.0, 0.0, 0, publishes=True)]
    assert makespan_us([*late, Ticket(0.0, 1.0, 0)], 3) == 8.0
    other = Ticket(1.0, 0.0, 1, publishes=True)
    assert makespan_us([*late, other, Ticket(0.0, 1.0, 1)], 4) == 7.0
    assert makespan_us([*late, other, Ticket(0.0, 1.0, all_rows=True)], 4) == 8.0


@pytest.mark.parametrize("backend", model.BACKENDS)
@pytest.mark.parametrize("problem", [QO, KV, QO._replace(dropout=True), QO._replace(r=72)], ids=str)
@pytest.mark.parametrize("waves", [0.0, 1.5, 3.0, 1e6])
def test_every_order_waits_for_smaller_tickets_alone(
    backend: str, problem: Problem, waves: float
) -> None:
    this = Prediction(problem, backend).model(backward=True)
    items = model.backward(this, waves)
    assert sorted(items) == sorted(model.backward(this))
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


def both(problem: Problem) -> tuple[Model, Model]:
    triton, cuda = (Prediction(problem, name).model(backward=True) for name in ("triton", "cuda"))
    return triton, cuda


def test_an_item_takes_what_its_work_takes_at_the_stated_rates() -> None:
    triton, cuda = both(QO)
    assert triton.steps_us("dx", 4096) == pytest.approx(2 * 128 * 256 * 4096 * 132 / 798e6)
    assert triton.steps_us("P", 4096) == pytest.approx((128 + 16) * 2 * 4096 / 64 / 1600)
    assert cuda.steps_us("dx", 4096) == 64 * 1024 / 1600
    assert cuda.rank_us("dx") == 256 / 1600
    assert both(QO._replace(r=72))[1].rank_us("dx") == pytest.approx(4.5 * 256 / 1600)
    assert both(QO._replace(r=64))[1].steps_us("P", 4096) == 64 * 384 / 1600
    masked = both(QO._replace(dropout=True))[1]
    assert masked.steps_us("P", 4096) > 2 * cuda.steps_us("P", 4096)
    assert masked.mask_us > 1 > cuda.mask_us == 0


def test_a_step_is_bound_by_what_takes_it_longest() -> None:
    item = recorded()["cuda"]["sets"]["R = 64"]["P"]
    busy = {
        "tensor cores": ("products", 2048),
        "L2": ("bytes", 64),
        "issue": ("other", 4),
        "shared memory": ("wavefronts", 1),
    }
    for name, (field, rate) in busy.items():
        slow = item._replace(step=item.step._replace(**{field: 1e6}))
        bound, clocks = slow.critical(RATES[90])
        assert (bound, round(clocks * rate / 1e6, 2)) == (name, 1.0)
        assert slow.beyond(item) == [f"step {field}: 1e+06, recorded {getattr(item.step, field):g}"]
    assert not item.beyond(item)


@pytest.mark.parametrize("backend", model.BACKENDS)
@pytest.mark.parametrize("problem", [QO, KV], ids=str)
def test_no_prediction_beats_the_work_it_schedules(backend: str, problem: Problem) -> None:
    this = Prediction(problem, backend)
    one, two = this.model(), this.model(backward=True)
    for time_us, items, workers in (
        (this.forward_us, model.forward(one), one.workers),
        (this.backward_us(), model.backward(two), two.workers),
    ):
        work_us = sum(item.before_us + item.after_us for item in items) / workers
        longest_us = max(item.before_us + item.after_us for item in items)
        assert work_us <= time_us <= work_us + 2 * longest_us


def test_da_by_duration_pays_where_its_items_are_the_longer_ones() -> None:
    narrow, wide = Prediction(KV._replace(r=64), "cuda"), Prediction(QO, "cuda")
    assert narrow.backward_us() < 0.9 * narrow.backward_us(0.0)
    assert wide.backward_us() == wide.backward_us(0.0) <= wide.backward_us(1.5)
