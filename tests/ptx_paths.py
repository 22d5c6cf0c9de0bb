"""Questions about every path through a PTX program, answered by following its branches."""

import re
from collections.abc import Callable, Iterator

LABEL = re.compile(r"^\s*(\$?[\w$]+):")
BRANCH = re.compile(r"^\s*(@!?%\w+\s+)?(?:bra(?:\.uni)?|brx\.idx(?:\.uni)?)\s+([^;]+);")
END = re.compile(r"^\s*(@!?%\w+\s+)?(?:ret|exit|trap)\b")
State = frozenset[str]  # what may be so on some way to a line
Step = Callable[[str, State], State]


def successors(lines: list[str]) -> list[list[int]]:
    """Return for each line the lines that may come next.

    A label stands for its nearest line: inline assembly repeats its own, each in braces.
    """
    labels: dict[str, list[int]] = {}
    for i, line in enumerate(lines):
        if found := LABEL.match(line):
            labels.setdefault(found[1], []).append(i)
    following = []
    for i, line in enumerate(lines):
        after = [i + 1] if i + 1 < len(lines) else []
        if found := BRANCH.match(line):
            if "," in found[2]:
                raise ValueError(f"a branch by a table: {line}")
            target = min(labels[found[2].strip()], key=lambda at: abs(at - i))
            after = [target, *(after if found[1] else [])]
        elif found := END.match(line):
            after = after if found[1] else []
        following.append(after)
    return following


def states(ptx: str, step: Step) -> Iterator[tuple[str, State]]:
    """Yield each line that can be reached with all that may be so when it is.

    `step(line, state)` says what is so after a line; nothing is at the start.
    """
    lines = [line.partition("//")[0] for line in ptx.splitlines()]
    following = successors(lines)
    before: dict[int, State] = {0: frozenset()}
    todo = [0]
    while todo:
        i = todo.pop()
        after = step(lines[i], before[i])
        for j in following[i]:
            known = before.get(j)
            if known is None or not after <= known:
                before[j] = after if known is None else known | after
                todo.append(j)
    for i in sorted(before):
        yield lines[i], before[i]


def unfenced(ptx: str) -> int:
    """Count the asynchronous products that may miss what ordinary instructions wrote for them.

    Between the arrival of cp.async, or a store to shared memory, and wgmma or tcgen05 there must be
    a fence of the asynchronous proxy on every path.
    """

    def step(line: str, state: State) -> State:
        if "fence.proxy.async" in line:
            return frozenset()
        if "cp.async.wait_group" in line:
            return state | {"copied"}
        if re.search(r"\b(?:st\.shared|stmatrix)\b", line):
            return state | {"stored"}
        return state

    product = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\b")
    return sum(bool(state) for line, state in states(ptx, step) if product.search(line))


def published(ptx: str) -> list[bool]:
    """For each release: is there a CTA barrier between it and every store before it?"""

    def step(line: str, state: State) -> State:
        if re.search(r"\bst\.global", line):
            return state | {"stored"}
        if re.search(r"\bbar(?:rier)?\.sync", line):
            return frozenset()
        return state

    release = re.compile(r"\b(?:atom|red)\.global\S*\.release\b")
    return [not state for line, state in states(ptx, step) if release.search(line)]
