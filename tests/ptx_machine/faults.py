"""Faults to plant in a decoded program: each must be noticed, or the machine sees too little."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ptx_machine.launch import Wrong
from ptx_machine.parse import Kernel, Operand, Statement

Change = dict[str, Any]
NEAR = 30  # statements
_ARITHMETIC = re.compile(r"(mov|add|sub|mul|mad|and|or|xor|not|shl|shr|setp|selp|cvt|bra)\b")


class Fault(NamedTuple):
    """A kind of fault: what it does to a statement, or None where it does not apply.

    A `joint` one strikes neighbours together: of waits side by side each may stand for the others.
    One with `behind` lets a statement come late: after a near one whose opcode that is.
    """

    name: str
    change: Callable[[Statement], Change | None]
    joint: bool = False
    behind: str = ""

    def places(self, kernel: Kernel, executed: set[int]) -> list[list[int]]:
        """Return the executed statements that it applies to, neighbours in one place."""
        places: list[list[int]] = []
        for site in self.sites(kernel, executed):
            between = kernel.statements[places[-1][-1] + 1 : site] if places else ()
            if self.joint and places and all(_ARITHMETIC.match(s.opcode) for s in between):
                places[-1].append(site)
            else:
                places.append([site])
        return places

    def sites(self, kernel: Kernel, executed: set[int]) -> list[int]:
        """Return the executed statements that it applies to."""
        return [
            i
            for i in sorted(executed)
            if self.change(kernel.statements[i]) is not None
            and (not self.behind or self._overtaking(kernel, i) >= 0)
        ]

    def plant(self, kernel: Kernel, sites: Iterable[int]) -> Kernel:
        """Return the program with the fault in these places."""
        if self.behind:
            return kernel.moved({site: self._overtaking(kernel, site) for site in sites})
        for site in sites:
            change = self.change(kernel.statements[site])
            assert change is not None
            kernel = kernel.replaced(site, **change)
        return kernel

    def _overtaking(self, kernel: Kernel, site: int) -> int:
        """Return behind which near statement the one at `site` is to come, or -1."""
        at = site
        for _ in range(NEAR):
            statement = kernel.statements[at]
            leaves = statement.opcode.startswith("bra") and statement.guard < 0
            at = statement.operands[0][0][0][1] if leaves else at + 1
            if at >= len(kernel.statements):
                break
            if re.fullmatch(self.behind, kernel.statements[at].opcode):
                return at
        return -1


def removed(pattern: str) -> Callable[[Statement], Change | None]:
    """Leave out the statements whose opcode `pattern` is."""

    def change(statement: Statement) -> Change | None:
        if not re.fullmatch(pattern, statement.opcode):
            return None
        return {"opcode": "nop", "operands": ()}

    return change


def _as_it_is(pattern: str) -> Callable[[Statement], Change | None]:
    """Choose the statements whose opcode `pattern` is."""
    return lambda statement: {} if re.fullmatch(pattern, statement.opcode) else None


def _renamed(pattern: str, new: str) -> Callable[[Statement], Change | None]:
    """Replace what `pattern` finds in an opcode."""

    def change(statement: Statement) -> Change | None:
        opcode = re.sub(pattern, new, statement.opcode)
        return None if opcode == statement.opcode else {"opcode": opcode}

    return change


def _number(pattern: str, operand: int, new: Callable[[int], int]) -> Callable[[Statement], Any]:
    """Change the immediate that is an operand of the opcodes that `pattern` finds."""

    def change(statement: Statement) -> Change | None:
        if not re.search(pattern, statement.opcode) or not statement.operands:
            return None
        at = operand % len(statement.operands)
        kind, value, _ = statement.operands[at][0][0]
        if kind != "i" or new(value) == value:
            return None
        return {"operands": with_operand(statement, at, immediate(new(value)))}

    return change


def immediate(value: int) -> Operand:
    """Return a number as an operand."""
    return (("i", value, ""),), 0, False


def with_operand(statement: Statement, at: int, operand: Operand) -> tuple[Operand, ...]:
    """Return the operands of a statement with another in one place."""
    operands = list(statement.operands)
    operands[at] = operand
    return tuple(operands)


def _toggled_transposition(statement: Statement) -> Change | None:
    match = re.match(r"((?:ld|st)matrix\.sync\.aligned\.m8n8\.x\d)(\.trans)?", statement.opcode)
    if match is None:
        return None
    rest = statement.opcode[match.end() :]
    return {"opcode": match[1] + ("" if match[2] else ".trans") + rest}


def _swapped_major(which: int) -> Callable[[Statement], Change | None]:
    """Flip the transposition bit of A (0) or B (1); A in registers has none."""

    def change(statement: Statement) -> Change | None:
        if not statement.opcode.startswith("wgmma.mma_async") or not statement.operands:
            return None
        bits = len(statement.operands) - 6
        at = 6 + which - (2 - bits)
        if at < 6:
            return None
        old = statement.operands[at][0][0][1]
        return {"operands": with_operand(statement, at, immediate(1 - old))}

    return change


def _wait(parity: int | None) -> Callable[[Statement], Change | None]:
    """Let a wait for an mbarrier always ask for `parity`, or not wait at all."""

    def change(statement: Statement) -> Change | None:
        if not statement.opcode.startswith("mbarrier.try_wait.parity"):
            return None
        if parity is None:
            operands = statement.operands[0], immediate(0), immediate(0)
            return {"opcode": "setp.eq.b32", "operands": operands}
        return {"operands": with_operand(statement, 2, immediate(parity))}

    return change


def _operand(pattern: str, operand: int, value: int) -> Callable[[Statement], Change | None]:
    """Put an immediate in place of an operand of the opcodes that `pattern` finds."""

    def change(statement: Statement) -> Change | None:
        if not re.search(pattern, statement.opcode):
            return None
        return {"operands": with_operand(statement, operand, immediate(value))}

    return change


def _unmasked_access(statement: Statement) -> Change | None:
    """Let lanes take part that are masked off: those beyond an edge."""
    if statement.guard < 0 or not re.match(r"(ld|st)\.global\.(?!gpu)", statement.opcode):
        return None
    return {"guard": -1, "negated": False}


def _unmasked_copy(statement: Statement) -> Change | None:
    """Let cp.async copy beyond an edge instead of filling with zeros."""
    if not re.match(r"cp\.async\.c[ag]\.", statement.opcode) or len(statement.operands) < 4:
        return None
    return {"operands": statement.operands[:3]}


def _moved(pattern: str) -> Callable[[Statement], Change | None]:
    """Let an operation on two operands return the first."""

    def change(statement: Statement) -> Change | None:
        match = re.fullmatch(pattern, statement.opcode)
        if match is None or statement.operands[1][0][0][0] != "r":
            return None
        return {"opcode": f"mov.{match[1]}", "operands": statement.operands[:2]}

    return change


def _long_step(statement: Statement) -> Change | None:
    """Let a loop's counter skip every second step."""
    if statement.opcode != "add.s32" or statement.operands[0] != statement.operands[1]:
        return None
    kind, value, _ = statement.operands[2][0][0]
    if kind != "i" or value <= 1:
        return None
    return {"operands": with_operand(statement, 2, immediate(2 * value))}


def _known_flag(statement: Statement) -> Change | None:
    """Let a load of a flag find it raised."""
    if not re.match(r"ld\.(global\.gpu\.acquire|relaxed\.gpu\.global)\.", statement.opcode):
        return None
    return {"opcode": "mov.b32", "operands": (statement.operands[0], immediate(1 << 20))}


def _kept_local(statement: Statement) -> Change | None:
    """Let an address in another CTA be the one in the own."""
    if not statement.opcode.startswith("mapa."):
        return None
    return {"opcode": "mov.b32", "operands": statement.operands[:2]}


def _shifted_descriptor(bit: int) -> Callable[[Statement], Change | None]:
    """Add one at `bit` to the constant part of a wgmma descriptor, wherever it is joined."""

    def change(statement: Statement) -> Change | None:
        if not re.fullmatch(r"(or|add|mov|xor)\.[bsu]64", statement.opcode):
            return None
        for at, (parts, _, _) in enumerate(statement.operands):
            kind, value, _ = parts[0]
            if kind == "i" and (value % (1 << 64)) >> 62 and (value >> 32 & 0x3FFF):
                return {"operands": with_operand(statement, at, immediate(value + (1 << bit)))}
        return None

    return change


def _unmasked(mask: int) -> int:
    """Return a mask that keeps bits 18 and up, where it cuts an address for a descriptor."""
    return mask | ~0x3FFFF if 0x3C000 <= mask <= 0x3FFFF else mask


def _fewer_threads(statement: Statement) -> Change | None:
    """Let a barrier of some threads open for half of them."""
    if len(statement.operands) < 2:
        return None
    return _number(r"^bar(rier)?(\.cta)?\.sync", 1, lambda n: n // 64 * 32 or n)(statement)


# What hands data to other CTAs, and what says that it is there.
_STORE = (
    r"st\.global\..*|cp\.async\.bulk\.tensor\..*\.global\.shared.*|cp\.async\.bulk\.commit_group"
)
_RELEASE = r"(?:atom|red)\.global\.gpu\.(?:release|acq_rel)\.add.*|red\.relaxed\.gpu\.global\.add.*"

# Faults in how data moves and who waits for it.
FAULTS = (
    Fault("a barrier of the CTA is removed", removed(r"bar(rier)?(\.cta)?\.sync(\.aligned)?")),
    Fault("a barrier of the cluster is removed", removed(r"barrier\.cluster\..*")),
    Fault(
        "cp.async waits for a group less", _number(r"^cp\.async\.wait_group", 0, lambda n: n + 1)
    ),
    Fault("a product waits for a group less", _number(r"^wgmma\.wait_group", 0, lambda n: n + 1)),
    Fault("wgmma.fence is removed", removed(r"wgmma\.fence\..*")),
    Fault(
        "a release is relaxed", _renamed(r"\b(release|acq_rel)(?=\.add|\.exch|\.cas)", "relaxed")
    ),
    Fault(
        "an acquire is relaxed", _renamed(r"^((?:ld|atom)\.global\.gpu)\.acquire", r"\1.relaxed")
    ),
    Fault("a fence is removed", removed(r"fence\.acq_rel\..*|membar\..*")),
    Fault("a fence is for the own CTA", _renamed(r"^fence\.acq_rel\.gpu", "fence.acq_rel.cta")),
    Fault("a proxy fence is removed", removed(r"fence\.proxy\..*")),
    Fault("a matrix is loaded or stored transposed", _toggled_transposition),
    Fault("A is read transposed", _swapped_major(0)),
    Fault("B is read transposed", _swapped_major(1)),
    Fault("the leading offset is 16 bytes off", _shifted_descriptor(16)),
    Fault("the stride offset is 16 bytes off", _shifted_descriptor(32)),
    Fault("a descriptor takes the rank in its address", _number(r"^and\.b(32|64)$", 2, _unmasked)),
    Fault("the phase waited for never flips", _wait(0), joint=True),
    Fault("an mbarrier is not waited for", _wait(None), joint=True),
    Fault("half of the bytes are expected", _number(r"expect_tx", 2, lambda n: n // 2)),
    Fault("an arrival is removed", removed(r"mbarrier\.arrive(?!\.expect).*")),
    Fault(
        "an arrival is relaxed",
        _renamed(r"^mbarrier\.arrive(\.release\.\w+)?(?=\.shared)", "mbarrier.arrive.relaxed.cta"),
    ),
    Fault("the peer's mbarrier is taken for the own", _kept_local),
    Fault("a box for several CTAs goes to one", _operand(r"^cp\.async.*\.multicast", 3, 1)),
    Fault("nobody is told of an mbarrier's init", removed(r"fence\.mbarrier_init.*")),
    Fault(
        "a remote release is for the own CTA",
        _renamed(r"arrive\.release\.cluster", "arrive.release.cta"),
    ),
    Fault(
        "TMA stores' shared memory is reused early",
        _number(r"bulk\.wait_group\.read", 0, lambda n: n + 1),
    ),
    Fault(
        "read stands for written",
        _renamed(r"^cp\.async\.bulk\.wait_group$", "cp.async.bulk.wait_group.read"),
    ),
    Fault("a store is removed", removed(r"st\.(relaxed\.gpu\.)?global\..*")),
    Fault("a store comes after its release", _as_it_is(_STORE), joint=True, behind=_RELEASE),
    Fault(
        "a store is awaited after its release",
        _as_it_is(r"cp\.async\.bulk\.wait_group"),
        behind=_RELEASE,
    ),
    Fault("an addition is removed", removed(r"red\.global.*|red\.relaxed\.gpu\.global.*")),
    Fault(
        "a box to add is stored",
        _renamed(r"^cp\.reduce(.*)\.add(?=\.)", r"cp\1"),
    ),
    Fault(
        "a box to store is added",
        _renamed(r"^cp(\.async\.bulk\.tensor.*\.global\.shared::cta)", r"cp.reduce\1.add"),
    ),
    Fault("a group of cp.async is never closed", removed(r"cp\.async\.commit_group")),
    Fault("a flag is not waited for", _known_flag),
    Fault("an atomic is for the own CTA", _renamed(r"^((?:red|atom)\..*)\.gpu", r"\1.cta")),
    Fault("a barrier expects fewer threads", _fewer_threads),
)
# Faults in what is computed and where, of which every program has plenty of places.
COMPUTED = (
    Fault("an access beyond the edge is not masked", _unmasked_access),
    Fault("a copy beyond the edge is not masked", _unmasked_copy),
    Fault("a factor is left out", _moved(r"mul\.(f32)")),
    Fault("a swizzle is left out", _moved(r"xor\.(b32)")),
    Fault("what is dropped out is kept", _moved(r"selp\.(b16|f32)")),
    Fault("a product is left out", removed(r"mma\.sync\..*")),
    Fault("a loop skips every second step", _long_step),
    Fault("the random bits are others", _number(r"^mul\.hi\.u32", 2, lambda n: n + (1 << 28))),
)


class Planted(NamedTuple):
    """A fault in some places of a program, and by what it was noticed, if it was."""

    fault: Fault
    lines: list[int]
    noticed: str

    def __str__(self) -> str:
        lines = " ".join(map(str, self.lines))
        return f"{self.fault.name}, line {lines}: {self.noticed or 'not noticed'}"


Attempts = Callable[[Kernel], Iterable[Callable[[], object]]]


def study(
    kernel: Kernel,
    executed: set[int],
    attempts: Attempts,
    faults: Iterable[Fault] = FAULTS,
    sites: int = 3,
) -> Iterator[Planted]:
    """Plant each fault at up to `sites` executed places, one at a time, evenly spread.

    `attempts` returns for a program the ways to run it, each of which raises if something is wrong;
    they are tried until one does.
    """
    for fault in faults:
        found = fault.places(kernel, executed)
        count = min(sites, len(found))
        for i in range(count):
            place = found[i * (len(found) - 1) // max(count - 1, 1)]
            yield planted(kernel, fault, place, attempts)


def planted(kernel: Kernel, fault: Fault, sites: list[int], attempts: Attempts) -> Planted:
    """Plant a fault at all of `sites` and try."""
    faulty = fault.plant(kernel, sites)
    noticed = next(filter(None, map(_failure, attempts(faulty))), "")
    return Planted(fault, [kernel.statements[site].line for site in sites], noticed)


def _failure(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except Wrong as wrong:
        return str(wrong).splitlines()[0]
    except AssertionError as wrong:
        return f"wrong numbers: {str(wrong)[:80]}"
    return ""
