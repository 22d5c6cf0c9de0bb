"""`python -m lora_kernels.qualify`: try the kernels on this machine and keep what was found."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_kernels.ops.lora_linear import BACKENDS
from lora_kernels.qualify import record
from lora_kernels.qualify.checks import SPEED, Options
from lora_kernels.qualify.choose import size
from lora_kernels.qualify.parent import CHILD, Progress, listed, qualify
from lora_kernels.qualify.record import Measured, Record, Verdict

# (N, K) of the linear layers of a decoder.
MODELS = {
    "llama-3.2-1b": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "llama-3.1-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama-3.1-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "qwen-2.5-7b": ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)),
}
COMMON = ("llama-3.1-8b", "llama-3.2-1b")
TOKENS = (16, 512, 8192)
DTYPES = ("bfloat16", "float16", "float32")


def main(argv: list[str] | None = None, child: tuple[str, ...] = CHILD) -> int:
    """Qualify, print the table, keep the record.

    Returns 0, 1 if a backend is wrong, hung or crashed, 2 if nothing could be tried or kept.
    """
    arguments = _parser().parse_args(argv)
    try:
        options = _options(arguments)
        here, steps = listed(options, child)
        if not steps:
            raise ValueError("no kernel backend can run here; python -m lora_kernels.info says why")
        known = record.kept(here)
        found = None
        if isinstance(known, Record) and not arguments.force:
            found = known if _covers(known, steps) else None
        if found is None:
            progress = None if arguments.json else _bar()
            found = qualify(options, arguments.budget, progress, child)
            if isinstance(known, Record) and not arguments.force:
                found = merged(known, found)
            record.save(found)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"lora_kernels.qualify: {error}", file=sys.stderr)
        return 2
    print(found.to_json() if arguments.json else "\n".join(table(found)))
    fine = (record.RIGHT, record.UNTRIED)
    return int(any(verdict.outcome not in fine for verdict in found.backends.values()))


def merged(old: Record, new: Record) -> Record:
    """Return `new` with the sizes that only `old` measured; what failed in either has failed."""
    backends = dict(old.backends)
    for name, verdict in new.backends.items():
        before = old.backends.get(name, Verdict(record.UNTRIED))
        if before.outcome not in (record.RIGHT, record.UNTRIED):
            verdict = before  # what failed once is not made right by other sizes
        elif verdict.outcome == before.outcome == record.RIGHT:
            again = set(map(_sizes, verdict.measured))
            kept = tuple(m for m in before.measured if _sizes(m) not in again)
            timed = tuple(dict.fromkeys((*verdict.timed, *before.timed)))
            verdict = replace(verdict, measured=(*verdict.measured, *kept), timed=timed)
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
                f"{'dropout' if m.dropout else '':7} {size(m):34} {m.time_us:9.1f} us  "
                f"{m.time_us / m.frozen_us:5.2f} x frozen  "
                f"{m.x_composition:5.2f} x composition{graph}{'  SLOWER' if m.slower else ''}"
            )


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels.qualify", description=__doc__.partition(":")[2]
    )
    add = parser.add_argument
    add("--model", help=f"{', '.join(MODELS)}, or a config.json; default: common ones")
    add("--shapes", nargs="+", type=_pair, metavar="N,K", help="sizes of linear layers")
    add("--rank", nargs="+", type=_positive, default=[16], metavar="R")
    add("--tokens", nargs="+", type=_positive, default=list(TOKENS), metavar="M")
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    add("--dropout", nargs="+", type=_probability, default=[0.0, 0.05], metavar="P")
    add("--budget", type=float, default=100.0, help="seconds of timing, after the checks")
    add("--backend", nargs="+", help="only these; default: all that need a proof")
    add("--device", default="cuda", help="default: cuda")
    add("--force", action="store_true", help="forget what is known of this machine")
    add("--json", action="store_true", help="print the record instead of a table")
    return parser


def _pair(text: str) -> tuple[int, int]:
    n, k = map(_positive, text.split(","))
    return n, k


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError(text)
    return value


def _sizes(m: Measured) -> tuple[Any, ...]:
    return m.backward, m.dtype, m.adapter_dtype, m.dropout, m.n, m.k, m.r, m.m


def _covers(known: Record, steps: Sequence[tuple[str, str, float]]) -> bool:
    """Return whether a record answers all that the child would try."""
    for backend, step, _ in steps:
        verdict = known.backends.get(backend, Verdict(record.UNTRIED))
        if verdict.outcome == record.UNTRIED:
            return False
        open_ = step.startswith(SPEED) and step not in verdict.timed
        if verdict.outcome == record.RIGHT and open_:
            return False
    return True


def _bar() -> Progress:
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda done, total, name: print(f"{done + 1}/{total} {name}", flush=True)
    bar = tqdm(unit="step", dynamic_ncols=True)

    def progress(done: int, total: int, name: str) -> None:
        bar.total, bar.n = total, done + 1
        bar.set_description_str(name[:60])

    return progress


if __name__ == "__main__":
    sys.exit(main())
