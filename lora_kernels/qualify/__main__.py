"""`python -m lora_kernels.qualify`: try the kernels on this machine and keep what was found."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from lora_kernels.ops.lora_linear import BACKENDS
from lora_kernels.output import show
from lora_kernels.qualify import choose, record
from lora_kernels.qualify.checks import SPEED, Options
from lora_kernels.qualify.parent import CHILD, Key, Progress, Steps, qualify
from lora_kernels.qualify.record import Measured, Record, Verdict

# (N, K) of the linear layers of a decoder.
MODELS = {
    "llama-3.2-1b": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "llama-3.1-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama-3.1-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "qwen-2.5-7b": ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)),
}
COMMON = ("llama-3.1-8b",)  # its sizes speak for half to twice theirs: for all of these
TOKENS = (512, 8192)
DTYPES = ("bfloat16", "float16", "float32")
BUDGET_S = 150.0
_MOST_UNREACHED = 8  # timings that a table names


def main(argv: list[str] | None = None, child: tuple[str, ...] = CHILD) -> int:
    """Qualify, print the table, keep the record.

    Returns 0, 1 if a backend is wrong, hung or crashed, 2 if nothing could be tried or kept.
    """
    arguments = _parser().parse_args(argv)
    known: Record | None = None

    def wanted(environment: Mapping[str, Any], steps: Steps) -> list[Key]:
        nonlocal known
        record.prepare()
        kept = record.kept(environment)
        known = kept if isinstance(kept, Record) and not arguments.force else None
        return unanswered(known, steps)

    try:
        progress = None if arguments.json else _bar()
        found = qualify(_options(arguments), arguments.budget, progress, child, wanted)
        note = "nothing new to try: this is what is known; --force forgets it and tries anew"
        saved = True
        if found is not None:
            found, note, saved = _keep(found, forget=arguments.force)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"lora_kernels.qualify: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora_kernels.qualify: interrupted, nothing of it is kept", file=sys.stderr)
        return 130
    found = found or known
    if found is None:
        why = "no kernel backend can run here; python -m lora_kernels.info says why"
        print(f"lora_kernels.qualify: {why}", file=sys.stderr)
        return 2
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    show([found.to_json()] if arguments.json else [*table(found), *advice(found, given)])
    if not arguments.json or not saved:
        print(note, file=sys.stdout if saved else sys.stderr)
    fine = (record.RIGHT, record.UNTRIED)
    failed = any(verdict.outcome not in fine for verdict in found.backends.values())
    return int(failed) if saved else 2


def unanswered(known: Record | None, steps: Steps) -> list[Key]:
    """Return the steps whose outcome a record does not hold.

    What failed is not tried again. What is right goes through its checks again if there are sizes
    to time that it was not timed on, for some of the checks are of these sizes.
    """
    verdicts = {} if known is None else known.backends

    def is_open(backend: str, name: str) -> bool:
        verdict = verdicts.get(backend, Verdict(record.UNTRIED))
        passed = verdict.outcome == record.RIGHT and name not in verdict.timed
        return passed or verdict.outcome == record.UNTRIED

    open_ = [(backend, name) for backend, name, _ in steps if is_open(backend, name)]
    untimed = {backend for backend, name in open_ if name.startswith(SPEED)}
    unproven = {b for b, _ in open_ if b not in verdicts or verdicts[b].outcome != record.RIGHT}
    return [key for key in open_ if key[0] in untimed | unproven]


def _keep(found: Record, *, forget: bool) -> tuple[Record, str, bool]:
    """Write `found`, with what is known by now; return both, where they are or why nowhere."""
    before = record.kept(found.environment)  # another run may have added to it meanwhile
    if isinstance(before, Record) and not forget:
        found = merged(before, found)
    try:
        return found, f"kept in {record.save(found)}", True
    except OSError as error:
        return found, f"lora_kernels.qualify: it could not be kept: {error}", False


def merged(old: Record, new: Record) -> Record:
    """Return `new` with the sizes that only `old` measured; what failed in either has failed."""
    backends = dict(old.backends)
    for name, verdict in new.backends.items():
        before = old.backends.get(name, Verdict(record.UNTRIED))
        tried = before.outcome != record.UNTRIED
        if tried and (before.outcome != record.RIGHT or verdict.outcome == record.UNTRIED):
            verdict = before  # what failed once is not made right by other sizes
        elif verdict.outcome == before.outcome == record.RIGHT:
            again = set(map(_sizes, verdict.measured))
            kept = tuple(m for m in before.measured if _sizes(m) not in again)
            timed = tuple(dict.fromkeys((*verdict.timed, *before.timed)))
            left = dict.fromkeys((*verdict.unreached, *before.unreached))
            verdict = replace(
                verdict,
                measured=(*verdict.measured, *kept),
                timed=timed,
                unreached=tuple(name for name in left if name not in timed),
            )
        backends[name] = verdict
    return replace(new, backends=backends)


def table(found: Record) -> Iterator[str]:
    """Yield the lines that people read: each backend's verdict, then each size it was timed on."""
    for name, verdict in found.backends.items():
        yield f"{name}: {record.summary(verdict)}"
        for m in sorted(verdict.measured, key=_sizes):
            dtypes = m.dtype if m.dtype == m.adapter_dtype else f"{m.dtype}+{m.adapter_dtype}"
            graph = "" if m.x_graph is None else f", {m.x_graph:.2f} in a graph"
            yield (
                f"  {'backward' if m.backward else 'forward':8} {dtypes:16} "
                f"{'dropout' if m.dropout else '':7} {choose.size(m):34} {m.time_us:9.1f} us  "
                f"{m.time_us / m.frozen_us:5.2f} x frozen  "
                f"{m.x_composition:5.2f} x composition{graph}{'  SLOWER' if m.slower else ''}"
            )
        timings = [name for name in verdict.unreached if name.startswith(SPEED)]
        yield from (f"  not reached: {name}" for name in timings[:_MOST_UNREACHED])
        if len(timings) > _MOST_UNREACHED:
            yield f"  not reached: {len(timings) - _MOST_UNREACHED} more"


def advice(found: Record, given: str) -> Iterator[str]:
    """Yield what the reader may do next, who gave the command the arguments `given`."""
    again = f"{choose.COMMAND} {given}".rstrip()
    verdicts = found.backends.values()
    unreached = [name for verdict in verdicts for name in verdict.unreached]
    if unreached:
        cut = any(not name.startswith(SPEED) for name in unreached)
        more = f" --budget {2 * BUDGET_S:.0f}" if cut else ""
        yield f"to go on with the {len(unreached)} steps that were not reached: {again}{more}"
    if any(verdict.outcome in (record.HUNG, record.CRASHED) for verdict in verdicts):
        yield f"to try again what hung or crashed: {again} --force"


def shapes_of(config: Path) -> list[tuple[int, int]]:
    """Return the (N, K) of a decoder's linear layers, from its config.json."""
    try:
        fields: dict[str, Any] = json.loads(config.read_text())
        hidden, inner = fields["hidden_size"], fields["intermediate_size"]
        heads = fields["num_attention_heads"]
        head = fields.get("head_dim") or hidden // heads
        narrow = (fields.get("num_key_value_heads") or heads) * head
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config} is no decoder's config.json: {error!r}") from error
    shapes = [(heads * head, hidden), (narrow, hidden), (hidden, heads * head)]
    return list(dict.fromkeys([*shapes, (inner, hidden), (hidden, inner)]))


def _options(arguments: argparse.Namespace) -> Options:
    shapes: list[tuple[int, int]] = list(arguments.shapes or ())
    if arguments.model in MODELS:
        shapes += MODELS[arguments.model]
    elif arguments.model:
        path = Path(arguments.model)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            known = ", ".join(MODELS)
            raise ValueError(f"--model must be a config.json or one of {known}, got {path}")
        shapes += shapes_of(path)
    elif not shapes:
        shapes = [shape for name in COMMON for shape in MODELS[name]]
    tried = [backend.name for backend in BACKENDS if backend.why_not_auto is not None]
    for name in arguments.backend or ():
        if name not in tried:
            raise ValueError(f"--backend must be one of {', '.join(tried)}, got {name!r}")
    return Options(
        tuple(dict.fromkeys(shapes)),
        tuple(arguments.tokens),
        tuple(arguments.rank),
        tuple(arguments.dtype),
        tuple(arguments.dropout),
        arguments.device,
        tuple(arguments.backend) if arguments.backend else None,
    )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the rest of the command does."""

    def error(self, message: str) -> NoReturn:
        """End the process."""
        self.exit(2, f"lora_kernels.qualify: {message}; --help lists what there is\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lora_kernels.qualify",
        description="Try the kernels on this machine, in a process that may hang or crash: every "
        "result against float64, then their speed beside plain PyTorch. The record that is kept "
        'tells "auto" which backend to run; without one it runs plain PyTorch.',
        epilog="Exit status: 0 nothing is wrong; 1 a backend is wrong, hung or crashed; 2 nothing "
        "could be tried or kept. A later run with other sizes adds to the record.",
    )
    add = parser.add_argument
    models = f"{', '.join(MODELS)}, or the path of a config.json"
    add("--model", help=f"whose layers to time: {models}; default: {' and '.join(COMMON)}")
    add("--shapes", nargs="+", type=_pair, metavar="N,K", help="(out, in) features of layers")
    add("--rank", nargs="+", type=_positive, default=[16], metavar="R", help="default: 16")
    tokens = f"rows of x; default: {' '.join(map(str, TOKENS))}"
    add("--tokens", nargs="+", type=_positive, default=list(TOKENS), metavar="M", help=tokens)
    add(
        "--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], metavar="DTYPE",
        help=f"of x and W: {', '.join(DTYPES)}; default: bfloat16, also beside fp32 adapters",
    )  # fmt: skip
    add(
        "--dropout", nargs="+", type=_probability, default=[0.0, 0.05], metavar="P",
        help="default: 0 0.05; the mask costs the same at any other",
    )  # fmt: skip
    budget = f"the most it may take, most tokens first, to be gone on with; default: {BUDGET_S:.0f}"
    add("--budget", type=_seconds, default=BUDGET_S, metavar="SECONDS", help=budget)
    add("--backend", nargs="+", help="only these; default: every one that needs a proof")
    add("--device", type=_device, default="cuda", help="default: cuda")
    add("--force", action="store_true", help="forget what is known of this machine")
    add("--json", action="store_true", help="print the record instead of a table")
    return parser


def _pair(text: str) -> tuple[int, int]:
    n, comma, k = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"must be N,K, two positive numbers, got {text!r}")
    return _positive(n), _positive(k)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def _probability(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text!r}")
    return value


def _seconds(text: str) -> float:
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in ("cuda", "cpu") or (":" in text and not index.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be cuda, cuda:N or cpu, got {text!r}")
    return text


def _sizes(m: Measured) -> tuple[Any, ...]:
    return m.backward, m.dtype, m.adapter_dtype, m.dropout, m.n, m.k, m.r, m.m


def _bar() -> Progress:
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda done, total, name: print(f"{done + 1}/{total} {name}", flush=True)
    bars: list[tqdm[NoReturn]] = []  # none before there is a step

    def progress(done: int, total: int, name: str) -> None:
        if not bars:
            bars.append(tqdm(unit="step", dynamic_ncols=True))
        bars[0].total, bars[0].n = total, done + 1
        bars[0].set_description_str(name[:60])

    return progress


if __name__ == "__main__":
    sys.exit(main())
