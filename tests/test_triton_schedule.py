"""The one-launch protocol as a model: tickets, flags and items under any interleaving of CTAs.

The model decodes tickets with the very functions that the kernels compile (`schedule.py`). One step
is one access that other CTAs can see. Small launches are explored exhaustively, large ones by a
random scheduler, with every number of CTAs and of CTAs resident at a time.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from lora_kernels.ops.lora_linear import schedule
from lora_kernels.ops.lora_linear.schedule import ALL_READY, FINISHED, READY, TICKET, blocks


class Wait(NamedTuple):
    """Spin until `workspace[word] >= target`."""

    word: int
    target: int


class Read(NamedTuple):
    """Read a tile that another item writes."""

    tile: tuple[str, int, int]


class Write(NamedTuple):
    """Write an output tile that no other item may write."""

    tile: tuple[str, int, int]


class Add(NamedTuple):
    """Count an item of P or Q as done."""

    word: int


Step = Wait | Read | Write | Add


class Sizes(NamedTuple):
    """A problem and tile sizes, of which only the block counts matter here."""

    m: int
    n: int
    k: int
    r: int
    bm: int = 2
    bn: int = 3
    bk: int = 2
    br: int = 2
    group: int = 2


class Launch(NamedTuple):
    """What one launch works off: the number of items, each item's steps, and all output tiles."""

    row_blocks: int
    items: int
    steps: Callable[[int], list[Step]]
    outputs: set[tuple[str, int, int]]


def tiles(name: str, rows: int, columns: int) -> set[tuple[str, int, int]]:
    return {(name, i, j) for i in range(rows) for j in range(columns)}


def forward(s: Sizes) -> Launch:
    """The control flow of `lora_linear_forward`."""
    rows, columns, ranks = blocks(s.m, s.bm), blocks(s.n, s.bn), blocks(s.r, s.br)
    p_end, end = schedule.forward_ends(s.m, s.n, s.r, s.bm, s.bn, s.br)

    def steps(ticket: int) -> list[Step]:
        if ticket < p_end:
            row, rank = schedule.skinny(ticket, ranks)
            return [Write(("p", row, rank)), Add(READY + row)]
        row, column = schedule.tile(ticket - p_end, rows, columns, s.group)
        reads = [Read(("p", row, rank)) for rank in range(ranks)]
        return [Wait(READY + row, ranks), *reads, Write(("y", row, column))]

    return Launch(rows, end, steps, tiles("p", rows, ranks) | tiles("y", rows, columns))


def backward(s: Sizes, dx: bool = True, da: bool = True, db: bool = True) -> Launch:
    """The control flow of `lora_linear_backward` for the needed gradients."""
    rows, columns, ranks = blocks(s.m, s.bm), blocks(s.k, s.bn), blocks(s.r, s.br)
    q_end, db_end, dx_end, end = schedule.backward_ends(
        s.m, s.n, s.k, s.r, s.bm, s.bn, s.bk, s.br, dx, da, db
    )

    def steps(ticket: int) -> list[Step]:
        if ticket < q_end:
            row, rank = schedule.skinny(ticket, ranks)
            return [Write(("q", row, rank)), Add(READY + row), Add(ALL_READY)]
        if ticket < db_end:
            return [Write(("db", *schedule.skinny(ticket - q_end, ranks)))]
        if ticket < dx_end:
            row, column = schedule.tile(ticket - db_end, rows, columns, s.group)
            reads = [Read(("q", row, rank)) for rank in range(ranks)]
            return [Wait(READY + row, ranks), *reads, Write(("dx", row, column))]
        column, rank = schedule.skinny(ticket - dx_end, ranks)
        reads = [Read(("q", row, rank)) for row in range(rows)]
        return [Wait(ALL_READY, q_end), *reads, Write(("da", column, rank))]

    outputs = tiles("q", rows, ranks) if dx or da else set()
    outputs |= tiles("dx", rows, columns) if dx else set()
    outputs |= tiles("da", blocks(s.k, s.bk), ranks) if da else set()
    outputs |= tiles("db", blocks(s.n, s.bk), ranks) if db else set()
    return Launch(rows, end, steps, outputs)


# A CTA is at (ticket, step): before its next ticket at step -1; WAITING to become resident; then
# counted out in two steps, so that others can move between its last look and the clearing.
WAITING, IDLE, LAST, GONE = (-2, 0), (-1, -1), (-3, 0), (-4, 0)


class State(NamedTuple):
    workspace: tuple[int, ...]
    ctas: tuple[tuple[int, int], ...]
    written: frozenset[tuple[str, int, int]]


class BrokenPromiseError(AssertionError):
    """The model broke a promise."""


class Machine(NamedTuple):
    """A launch on `ctas` CTAs of which `resident` run at a time; the last fields seed faults."""

    launch: Launch
    ctas: int
    resident: int
    cleared: Callable[[int], bool] = lambda word: True
    last: int = 1

    def start(self) -> State:
        length = schedule.workspace_length(self.launch.row_blocks)
        return State((0,) * length, (WAITING,) * self.ctas, frozenset())

    def moves(self, state: State) -> list[int]:
        """Which CTAs can take a step."""
        running = sum(cta not in (WAITING, GONE) for cta in state.ctas)
        return [i for i, cta in enumerate(state.ctas) if self._can_move(state, cta, running)]

    def _can_move(self, state: State, cta: tuple[int, int], running: int) -> bool:
        if cta == WAITING:
            return running < self.resident
        if cta == GONE:
            return False
        ticket, step = cta
        if ticket < 0:
            return True
        now = self.launch.steps(ticket)[step]
        return not isinstance(now, Wait) or state.workspace[now.word] >= now.target

    def step(self, state: State, i: int) -> State:
        """Let CTA i take one step."""
        workspace, written = list(state.workspace), state.written
        ticket, step = state.ctas[i]
        after = (ticket, step + 1)
        if state.ctas[i] == WAITING:
            after = IDLE
        elif state.ctas[i] == IDLE:
            taken = workspace[TICKET]
            workspace[TICKET] += 1
            after = (taken, 0)
            if taken >= self.launch.items:
                after = LAST if workspace[FINISHED] == self.ctas - self.last else GONE
                workspace[FINISHED] += 1
        elif state.ctas[i] == LAST:
            workspace = [0 if self.cleared(w) else v for w, v in enumerate(workspace)]
            after = GONE
        else:
            now = self.launch.steps(ticket)[step]
            if isinstance(now, Read) and now.tile not in written:
                raise BrokenPromiseError(f"item {ticket} reads {now.tile} before it is written")
            if isinstance(now, Write):
                if now.tile in written:
                    raise BrokenPromiseError(f"item {ticket} writes {now.tile} again")
                written |= {now.tile}
            if isinstance(now, Add):
                workspace[now.word] += 1
            if step + 1 == len(self.launch.steps(ticket)):
                after = IDLE
        ctas = (*state.ctas[:i], after, *state.ctas[i + 1 :])
        return State(tuple(workspace), ctas, written)

    def check_end(self, state: State) -> None:
        """Check a state in which nothing can move."""
        stuck = [cta for cta in state.ctas if cta != GONE]
        if stuck:
            raise BrokenPromiseError(f"deadlock: CTAs hang in {stuck}")
        if state.written != self.launch.outputs:
            raise BrokenPromiseError(f"never written: {self.launch.outputs - state.written}")
        if any(state.workspace):
            raise BrokenPromiseError(f"the workspace is left as {state.workspace}")

    def explore(self) -> int:
        """Visit every reachable state; return how many there are."""
        seen, todo = set(), [self.start()]
        while todo:
            state = todo.pop()
            # CTAs are alike: states that differ by their numbering are one.
            key = state._replace(ctas=tuple(sorted(state.ctas)))
            if key in seen:
                continue
            seen.add(key)
            moves = self.moves(state)
            if not moves:
                self.check_end(state)
            todo += [self.step(state, i) for i in moves]
        return len(seen)

    def run(self, rng: random.Random) -> None:
        """Follow one random interleaving, in bursts so that some CTAs lag far behind."""
        state = self.start()
        while moves := self.moves(state):
            i = rng.choice(moves)
            for _ in range(rng.choice((1, 1, 2, 8, 64))):
                if i not in self.moves(state):
                    break
                state = self.step(state, i)
        self.check_end(state)


def small_launches() -> Iterator[Launch]:
    yield forward(Sizes(m=4, n=4, k=1, r=2))
    yield forward(Sizes(m=3, n=2, k=1, r=3))
    yield backward(Sizes(m=3, n=2, k=2, r=1))
    yield backward(Sizes(m=2, n=2, k=4, r=3), db=False)
    for needs in itertools.product((True, False), repeat=3):
        yield backward(Sizes(m=4, n=2, k=2, r=2), *needs)


@pytest.mark.parametrize(("ctas", "resident"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_small_launches_are_right_in_every_interleaving(ctas: int, resident: int) -> None:
    for launch in small_launches():
        assert Machine(launch, ctas, resident).explore() > launch.items


@pytest.mark.parametrize("seed", range(30))
def test_large_launches_are_right_in_random_interleavings(seed: int) -> None:
    rng = random.Random(seed)
    sizes = Sizes(
        *(rng.randint(0, 24) for _ in range(3)), rng.randint(1, 5), group=rng.choice((1, 3, 8))
    )
    ctas = rng.choice((1, 7, 40, 132))
    for launch in (
        forward(sizes),
        backward(sizes),
        backward(sizes, dx=False),
        backward(sizes, da=False),
    ):
        Machine(launch, ctas, rng.randint(1, ctas)).run(rng)


def explore(launch: Launch, **fault: object) -> None:
    for ctas in (1, 2, 3):
        Machine(launch, ctas, ctas, **fault).explore()  # type: ignore[arg-type]


def test_a_wait_for_a_later_ticket_is_caught() -> None:
    right = forward(Sizes(m=4, n=2, k=1, r=2))
    backwards = right._replace(steps=lambda ticket: right.steps(right.items - 1 - ticket))
    with pytest.raises(BrokenPromiseError, match="deadlock"):
        explore(backwards)


def test_a_flag_not_reset_is_caught() -> None:
    sizes = Sizes(m=4, n=2, k=1, r=2)
    for word in (TICKET, FINISHED, ALL_READY, READY + 1):
        launch = backward(sizes) if word == ALL_READY else forward(sizes)
        with pytest.raises(BrokenPromiseError, match="workspace"):
            explore(launch, cleared=lambda w, word=word: w != word)


def test_clearing_before_the_last_cta_is_caught() -> None:
    with pytest.raises(BrokenPromiseError):
        explore(forward(Sizes(m=4, n=2, k=1, r=2)), last=2)


def test_publishing_before_writing_is_caught() -> None:
    right = forward(Sizes(m=4, n=2, k=1, r=2))
    with pytest.raises(BrokenPromiseError, match="before it is written"):
        explore(
            right._replace(steps=lambda ticket: sorted(right.steps(ticket), key=_publish_first))
        )


def _publish_first(step: Step) -> bool:
    return not isinstance(step, Add)


def test_not_waiting_is_caught() -> None:
    right = backward(Sizes(m=4, n=2, k=2, r=2))

    def steps(ticket: int) -> list[Step]:
        return [step for step in right.steps(ticket) if not isinstance(step, Wait)]

    with pytest.raises(BrokenPromiseError, match="before it is written"):
        explore(right._replace(steps=steps))


def test_a_tile_handed_out_twice_is_caught() -> None:
    right = forward(Sizes(m=4, n=4, k=1, r=2))
    with pytest.raises(BrokenPromiseError, match=r"again|never written"):
        explore(right._replace(steps=lambda ticket: right.steps(max(ticket - 1, 0))))


@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 5), (8, 3), (17, 4), (1, 9)])
def test_tiles_cover_the_grid_once_a_band_of_rows_at_a_time(
    rows: int, columns: int, group: int
) -> None:
    order = [schedule.tile(i, rows, columns, group) for i in range(rows * columns)]
    assert sorted(order) == sorted(itertools.product(range(rows), range(columns)))
    bands = [row // group for row, _ in order]
    assert bands == sorted(bands)
