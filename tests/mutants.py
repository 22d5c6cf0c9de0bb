"""Wrong backends, made from a right one: `lora_kernels.testing` must tell each of them apart.

A mutant is a function from a backend to a backend with one defect. It only changes what goes into
or comes out of `forward` and `backward`, so the same mutants judge the checks of every backend. A
backward that adds to a dx is right but in the mutants that are about it (`adding`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch import Backend
from lora_kernels.ops.lora_linear.philox import keep_mask

Mutant = Callable[[Backend], Backend]


OUTPUTS = {"forward": ("y", "p"), "backward": ("dx", "da", "db")}


def given(change: Callable[[Any], Any], *outputs: str) -> Mutant:
    """Take `outputs`, and only these, from the backend called with `change(call)`."""
    direction = _direction(outputs[0])

    def mutate(backend: Backend) -> Backend:
        run = getattr(backend, direction)

        def mutant(call: Any, onto: Tensor | None = None) -> tuple[Tensor | None, ...]:
            if onto is not None:
                return run(call, onto)
            right, wrong = run(call), run(change(call))
            return tuple(
                w if name in outputs and r is not None else r
                for name, r, w in zip(OUTPUTS[direction], right, wrong, strict=True)
            )

        return backend._replace(**{direction: mutant})

    return mutate


def returned(output: str, change: Callable[[Tensor, Any], Tensor]) -> Mutant:
    """Pass `output`, where there is one, through `change(output, arguments)`."""
    direction = _direction(output)

    def mutate(backend: Backend) -> Backend:
        run = getattr(backend, direction)

        def mutant(call: Any, onto: Tensor | None = None) -> tuple[Tensor | None, ...]:
            if onto is not None:
                return run(call, onto)
            return tuple(
                change(r, call) if name == output and r is not None else r
                for name, r in zip(OUTPUTS[direction], run(call), strict=True)
            )

        return backend._replace(**{direction: mutant})

    return mutate


def adding(change: Callable[[Tensor, Tensor], Tensor]) -> Mutant:
    """Return `change(onto, dx)` for a dx that is to be added to another."""

    def mutate(backend: Backend) -> Backend:
        def mutant(call: Any, onto: Tensor | None = None) -> Any:
            found = backend.backward(call)
            return found if onto is None else found._replace(dx=change(onto, found.dx))

        return backend._replace(backward=mutant)

    return mutate


def all_of(*mutants: Mutant) -> Mutant:
    """Apply `mutants` one after another."""

    def mutate(backend: Backend) -> Backend:
        for mutant in mutants:
            backend = mutant(backend)
        return backend

    return mutate


def _direction(output: str) -> str:
    return next(direction for direction, names in OUTPUTS.items() if output in names)


def with_(**changes: Any) -> Callable[[Any], Any]:
    """Replace operands, by a value or a function of the call; what is absent stays absent."""

    def change(call: Any) -> Any:
        present = {k: v for k, v in changes.items() if getattr(call, k) is not None}
        return call._replace(**{k: v(call) if callable(v) else v for k, v in present.items()})

    return change


def filled(value: float, *index: Any) -> Callable[[Tensor, Any], Tensor]:
    """Overwrite `tensor[index]`."""

    def change(tensor: Tensor, call: Any) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def from_block(block: int, dim: int, value: float = 0.0) -> Callable[[Tensor, Any], Tensor]:
    """Overwrite the last, possibly ragged, block of `dim` where there is more than one."""

    def change(tensor: Tensor, call: Any) -> Tensor:
        tensor = tensor.clone()
        size = tensor.shape[dim]
        if size > block:
            start = (size - 1) // block * block
            tensor.narrow(dim, start, size - start).fill_(value)
        return tensor

    return change


def truncated(rank: Callable[[int], int]) -> Callable[[Any], Any]:
    """Lose the low-rank path beyond `rank(R)`, leaving every shape as it is."""

    def change(call: Any) -> Any:
        zeroed = {}
        for name, dim in (("lora_a", 0), ("lora_b", 1), ("p", 1)):
            tensor = getattr(call, name, None)
            if tensor is not None:
                r = tensor.shape[dim]
                keep = min(max(rank(r), 0), r)
                zeroed[name] = tensor.clone()
                zeroed[name].narrow(dim, keep, r - keep).zero_()
        return call._replace(**zeroed)

    return change


def read_as_contiguous(name: str) -> Callable[[Any], Any]:
    """Ignore the strides of an argument."""

    def change(call: Any) -> Any:
        tensor = getattr(call, name)
        if tensor is None:
            return call
        strides = torch.empty(tensor.shape, device="meta").stride()
        return call._replace(**{name: tensor.as_strided(tensor.shape, strides)})

    return change


def rolled(dim: int, shift: int, *names: str) -> Callable[[Any], Any]:
    """Rotate arguments, so that the mask falls on other elements."""
    return lambda call: call._replace(
        **{
            name: None if getattr(call, name) is None else getattr(call, name).roll(shift, dim)
            for name in names
        }
    )


def without_last_row(*names: str) -> Callable[[Any], Any]:
    """Zero the last token of arguments, so that it is missing from sums over M."""

    def change(call: Any) -> Any:
        zeroed = {}
        for name in names:
            tensor = getattr(call, name)
            if tensor is not None and len(tensor) > 0:
                zeroed[name] = tensor.clone()
                zeroed[name][-1] = 0
        return call._replace(**zeroed)

    return change


def dropped(call: Any) -> Tensor:
    """Return drop(x), its rescaling included."""
    if call.seed is None:
        return call.x
    return call.x * _keep(call, *call.x.shape) / (1 - call.dropout_p)


def undropped(dx: Tensor, call: Any) -> Tensor:
    """Mask the whole of dx, instead of Q·A alone."""
    return dx if call.seed is None else dx * _keep(call, *dx.shape) / (1 - call.dropout_p)


def _keep(call: Any, m: int, k: int) -> Tensor:
    return keep_mask(call.seed, call.dropout_p, range(m), range(k), call[0].device)


def _not_rescaled(call: Any) -> Any:
    return call._replace(scaling=call.scaling * (1 - call.dropout_p))


def _coarse(*names: str) -> Callable[[Any], Any]:
    """Round fp32 operands to bf16, worse than TF32 would."""

    def change(call: Any) -> Any:
        rounded = {}
        for name in names:
            tensor = getattr(call, name)
            if tensor is not None and tensor.dtype == torch.float32:
                rounded[name] = tensor.to(torch.bfloat16).to(torch.float32)
        return call._replace(**rounded)

    return change


def _wrong_dtype(tensor: Tensor, call: Any) -> Tensor:
    return tensor.to(torch.float32 if tensor.dtype != torch.float32 else torch.float16)


def _only_if(needed: Callable[[Any], bool]) -> Callable[[Tensor, Any], Tensor]:
    return lambda tensor, call: tensor if needed(call) else torch.zeros_like(tensor)


def _where(condition: Callable[[Any], bool]) -> Callable[[Tensor, Any], Tensor]:
    return lambda tensor, call: torch.full_like(tensor, torch.nan) if condition(call) else tensor


def _each_output() -> Iterator[tuple[str, Mutant]]:
    for outputs in OUTPUTS.values():
        for name in outputs:
            yield f"{name} zero", returned(name, lambda t, call: torch.zeros_like(t))
            yield f"{name} negated", returned(name, lambda t, call: -t)
            yield f"{name} unwritten", returned(name, lambda t, call: torch.full_like(t, torch.nan))
            yield f"{name} last row unwritten", returned(name, from_block(1, 0, torch.nan))
            yield f"{name} of another dtype", returned(name, _wrong_dtype)
            if name != "p":  # the backward pass of the check would choke on it
                yield f"{name} transposed", returned(name, lambda t, call: t.t())
            for block in (16, 64, 128, 256):
                for dim, what in enumerate(("row", "column")):
                    if _length(name, what) > block:
                        mutant = returned(name, from_block(block, dim))
                        yield f"{name} last {what} block of {block} skipped", mutant


def _length(output: str, what: str) -> int:
    # R has no tile above 64; M, N and K have tiles up to 256.
    return 65 if (output, what) in {("p", "column"), ("da", "row"), ("db", "column")} else 257


def _each_direction() -> Iterator[tuple[str, Mutant]]:
    for direction, outputs in (("forward", ("y", "p")), ("backward", ("dx", "da"))):
        for name in outputs:
            for what, change in {
                "scaling missing": with_(scaling=1.0),
                "scaling applied twice": with_(scaling=lambda c: c.scaling**2),
                "scaling negated": with_(scaling=lambda c: -c.scaling),
                "mask ignored": with_(seed=None, dropout_p=0.0),
                "mask not rescaled": _not_rescaled,
                "mask of the next seed": with_(seed=lambda c: c.seed + 1),
                "seed cut to its low word": with_(seed=lambda c: c.seed & 0xFFFFFFFF),
                "seed cut to its high word": with_(seed=lambda c: c.seed >> 32 << 32),
                "keep probability for drop probability": with_(
                    dropout_p=lambda c: 1 - c.dropout_p if c.dropout_p else 0.0
                ),
                "low-rank path missing": with_(lora_a=lambda c: torch.zeros_like(c.lora_a)),
                "last rank missing": truncated(lambda r: r - 1),
                "rank beyond 16 missing": truncated(lambda r: 16),
                "rank beyond 256 missing": truncated(lambda r: 256),
                "ragged rank missing": truncated(lambda r: r // 16 * 16),
            }.items():
                if name == "da" and what == "low-rank path missing":
                    change = with_(lora_b=lambda c: torch.zeros_like(c.lora_b))
                yield f"{direction}: {what} in {name}", given(change, name)


def _overwriting(name: str) -> Callable[[Tensor, Any], Tensor]:
    def change(tensor: Tensor, call: Any) -> Tensor:
        getattr(call, name).zero_()
        return tensor

    return change


MUTANTS: dict[str, Mutant] = {
    **dict(_each_output()),
    **dict(_each_direction()),
    "base path missing in y": given(with_(weight=lambda c: torch.zeros_like(c.weight)), "y"),
    "base path missing in dx": given(with_(weight=lambda c: torch.zeros_like(c.weight)), "dx"),
    **{
        f"power of two missing in {name}": given(
            with_(scaling=lambda c: c.scale().factor * (1 - c.dropout_p)), name
        )
        for name in ("y", "dx", "da", "db")
    },
    "bias missing": given(with_(bias=None), "y"),
    "bias added twice": given(with_(bias=lambda c: 2 * c.bias), "y"),
    "bias missing in the last column": given(
        with_(bias=lambda c: filled(0.0, -1)(c.bias, c)), "y"
    ),
    "bias added to p": returned("p", lambda p, c: p if c.bias is None else p + c.bias[:1]),
    "frozen path dropped": given(with_(x=dropped, seed=None, dropout_p=0.0), "y"),
    "frozen path undropped": returned("dx", undropped),
    "p from undropped x": given(with_(seed=None, dropout_p=0.0), "p"),
    "p not scaled": returned("p", lambda p, c: p / c.scaling),
    "db from unscaled P": given(with_(p=lambda c: c.p / c.scaling), "db"),
    "db scaled again": returned("db", lambda db, c: db * c.scaling),
    "db from P without the mask's rescaling": given(
        with_(p=lambda c: c.p * (1 - c.dropout_p)), "db"
    ),
    "da without its last token": given(without_last_row("x"), "da"),
    "db without its last token": given(without_last_row("p"), "db"),
    "da without its scaling and mask": given(with_(scaling=1.0, seed=None, dropout_p=0.0), "da"),
    "mask shifted by a column in forward": given(rolled(1, 1, "x", "weight", "lora_a"), "y", "p"),
    "mask shifted by a row in forward": all_of(
        given(rolled(0, 1, "x"), "y", "p"),
        returned("y", lambda t, c: t.roll(-1, 0)),
        returned("p", lambda t, c: t.roll(-1, 0)),
    ),
    "mask shifted by a column in da": all_of(
        given(rolled(1, 1, "x", "weight", "lora_a"), "da"),
        returned("da", lambda t, c: t.roll(-1, 1)),
    ),
    "mask shifted by a column in dx": all_of(
        given(rolled(1, 1, "x", "weight", "lora_a"), "dx"),
        returned("dx", lambda t, c: t.roll(-1, 1)),
    ),
    "mask shifted by a row in da": given(rolled(0, 1, "x", "dy"), "da"),
    "mask shifted by a row in dx": all_of(
        given(rolled(0, 1, "dy"), "dx"), returned("dx", lambda t, c: t.roll(-1, 0))
    ),
    **{
        f"slice begins {what} in {name}": given(with_(first_column=change), name)
        for name in ("y", "p", "dx", "da")
        for what, change in (("at 0", None), ("a column late", lambda c: c.first_column + 1))
    },
    "fp32 operands rounded in y": given(_coarse("x", "weight"), "y"),
    "fp32 operands rounded in p": given(_coarse("x", "lora_a"), "p"),
    "fp32 operands rounded in dx": given(_coarse("dy", "weight"), "dx"),
    "fp32 operands rounded in da": given(_coarse("dy", "x"), "da"),
    "fp32 operands rounded in db": given(_coarse("dy", "p"), "db"),
    **{
        f"{name} in the storage dtype": returned(name, lambda t, c: t.to(c[0].dtype))
        for name in ("p", "da", "db")
    },
    **{
        f"strides of {name} ignored in forward": given(read_as_contiguous(name), "y", "p")
        for name in ("x", "weight", "lora_a", "lora_b", "bias")
    },
    **{
        f"strides of {name} ignored in backward": given(
            read_as_contiguous(name), "dx", "da", "db"
        )
        for name in ("dy", "x", "weight", "lora_a", "lora_b")
    },
    "dx only beside da": returned("dx", _only_if(lambda c: c.x is not None)),
    "da only beside dx": returned("da", _only_if(lambda c: c.weight is not None)),
    "db only beside da": returned("db", _only_if(lambda c: c.x is not None)),
    "db only beside dx": returned("db", _only_if(lambda c: c.weight is not None)),
    "dx wrong beside no da under dropout": returned(
        "dx", _only_if(lambda c: c.x is not None or c.seed is None)
    ),
    "da wrong beside no dx under dropout": returned(
        "da", _only_if(lambda c: c.weight is not None or c.seed is None)
    ),
    "da unwritten for no tokens": returned("da", _where(lambda c: len(c.dy) == 0)),
    "db unwritten for no tokens": returned("db", _where(lambda c: len(c.dy) == 0)),
    "y unwritten for no in-features": returned("y", _where(lambda c: c.weight.shape[1] == 0)),
    "p unwritten for no in-features": returned("p", _where(lambda c: c.weight.shape[1] == 0)),
    "dx unwritten for no out-features": returned("dx", _where(lambda c: c.dy.shape[1] == 0)),
    "da unwritten for no out-features": returned("da", _where(lambda c: c.dy.shape[1] == 0)),
    "y right, x overwritten": returned("y", _overwriting("x")),
    "dx right, dy overwritten": returned("dx", _overwriting("dy")),
    "db right, B overwritten": returned("db", _overwriting("lora_b")),
    "dx added to a new tensor": adding(lambda onto, dx: onto + dx),
    "dx returned instead of added": adding(lambda onto, dx: dx),
    "dx put in the place of another": adding(lambda onto, dx: onto.copy_(dx)),
    "dx not added": adding(lambda onto, dx: onto),
    "dx added twice": adding(lambda onto, dx: onto.add_(dx, alpha=2)),
    "a panel of dx put in the place of another": adding(
        lambda onto, dx: onto.add_(dx).index_copy_(1, torch.arange(64), dx[:, :64])
    ),
    "needed dx not returned": returned("dx", lambda t, c: None),
    "needed da not returned": returned("da", lambda t, c: None),
    "needed db not returned": returned("db", lambda t, c: None),
}  # fmt: skip
