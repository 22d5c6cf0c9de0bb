"""Catch what the LoRA layers of a model compute during a step, and judge it on the spot."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.audit.diagnose import (
    Diagnosis,
    explain_gradient,
    explain_output,
    explain_sharing,
)
from lora_kernels.audit.expected import Expected, error_ratio, worst_ratio
from lora_kernels.audit.layer import (
    Operands,
    adapter_parameters,
    coarsest,
    computed_in,
    dropouts,
    read,
)
from lora_kernels.audit.report import RESULTS, VERDICTS, Report, Verdict
from lora_kernels.distributed import dropout_seed
from lora_kernels.layers import LoRALinear
from lora_kernels.ops.lora_linear.philox import seed_tensor
from lora_kernels.testing import fp64

_LETTER = {"da": "A", "db": "B"}


class Watch(ExitStack):
    """Judges every call of `layers` from `start` on; leaving the context undoes all it did."""

    def __init__(self, layers: dict[str, nn.Module], parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.layers = {name: _Layer(self, name, module) for name, module in layers.items()}
        self.parameters = parameters
        self.gradients: dict[int, _Gradient] = {}

    def start(self) -> None:
        """Set the hooks, and every `.grad` aside."""
        for parameter in self.parameters:
            self.callback(_restore_grad, parameter, parameter.grad, _copy(parameter.grad))
            parameter.grad = None
        for layer in self.layers.values():
            for role, parameter in adapter_parameters(layer.module):
                layer.follow(role, parameter)
            before, after = layer.before_call, layer.after_call
            hooks = (
                layer.module.register_forward_pre_hook(before, with_kwargs=True),
                # First of all: other hooks may change what the layer returned.
                layer.module.register_forward_hook(after, prepend=True, with_kwargs=True),
            )
            for hook in hooks:
                self.callback(hook.remove)
        self.callback(self._collect)  # before the first callbacks put the old gradients back

    def _collect(self) -> None:
        """Keep the gradients that somebody wrote to `.grad` without autograd's knowledge."""
        for gradient in self.gradients.values():
            if gradient.got is None:
                gradient.got = _copy(gradient.parameter.grad)

    def gradient(self, parameter: Tensor) -> "_Gradient":
        """Return the record of a parameter, which is followed from now on."""
        key = id(parameter)
        if key not in self.gradients:
            self.gradients[key] = _Gradient(parameter)
        gradient = self.gradients[key]
        if parameter.requires_grad and not gradient.hooked:
            gradient.hooked = True
            self.callback(parameter.register_hook(gradient.catch).remove)
        return gradient

    def operands(self) -> dict[str, Operands]:
        """Return what each layer computes with now, where that can be said."""
        found = {name: read(layer.module) for name, layer in self.layers.items()}
        return {name: o for name, o in found.items() if isinstance(o, Operands)}

    def report(self) -> Report:
        """Return the verdicts."""
        for name, diagnosis in explain_sharing(self.operands()):
            self.layers[name].found[diagnosis] = None
        return Report({name: layer.verdict() for name, layer in self.layers.items()})


class _Sum:
    """What the gradient of a parameter should be, over the calls of a step."""

    def __init__(self) -> None:
        self.exact: Tensor | None = None
        self.eager: Tensor | None = None

    def add(self, exact: Tensor, eager: Tensor) -> None:
        self.exact = exact if self.exact is None else self.exact + exact
        self.eager = eager if self.eager is None else self.eager + eager


class _Gradient:
    """The gradient of one parameter over the step: as it came, and as it should be.

    A layer that computes with another one's B sends its db there, or, if it is one faulty kernel,
    to its own B all the same. Neither makes the other layer wrong: hence two sums.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.hooked = parameter, False
        self.got: Tensor | None = None
        self.by_owner, self.by_user = _Sum(), _Sum()
        self.dtype = parameter.dtype

    def catch(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            gradient = gradient.detach()
            self.got = gradient.clone() if self.got is None else self.got + gradient

    def expected(self) -> list[tuple[Tensor, Tensor]]:
        """Return (exact, eager) of each sum that there is, the owner's first."""
        return [
            (total.exact, total.eager.to(self.dtype))
            for total in (self.by_owner, self.by_user)
            if total.exact is not None and total.eager is not None
        ]


class _Layer:
    """One layer: its hooks, and what they found."""

    def __init__(self, watch: Watch, name: str, module: nn.Module) -> None:
        self.watch, self.name, self.module = watch, name, module
        self.call: _Call | None = None
        self.calls = self.tokens = 0
        self.reached = self.alive = self.active = self.mispaired = self.detached = False
        self.ratios: dict[str, float] = {}
        # Ordered sets of sentences.
        self.obstacles: dict[str, None] = {}
        self.notes: dict[str, None] = {}
        self.off: dict[str, None] = {}
        self.found: dict[Diagnosis, None] = {}
        self.followed: dict[int, tuple[str, Tensor]] = {}
        self.parts: tuple[Any, ...] = ()

    def follow(self, role: str, parameter: Tensor) -> None:
        self.followed[id(parameter)] = role, parameter
        self.watch.gradient(parameter)

    def rate(self, result: str, ratio: float) -> None:
        self.ratios[result] = max(ratio, self.ratios.get(result, 0.0))

    # --- Around a call -----------------------------------------------------------------------

    def before_call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.calls += 1
        self.call = None
        x, operands = _x(args, kwargs), read(module)
        if not isinstance(x, Tensor) or isinstance(operands, str):
            self.obstacles[operands if isinstance(operands, str) else "called without x"] = None
            return None
        self.call = _Call(self, self._as_expected(operands, x), computed_in(x, operands))
        self._look_at(operands)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return None
        x = x.view_as(x)  # what flows back to this view is the dx of this layer alone
        x.register_hook(self.call.judge_dx)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "x": x})

    def after_call(self, module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        call, self.call = self.call, None
        if call is None:
            return None
        # Only now: PEFT adds arguments by hooks that run after the one above.
        extra = [k for k, v in kwargs.items() if k != "x" and v is not None]
        if args[1:] or extra:
            self.obstacles[f"called with extra arguments: {', '.join(extra) or len(args)}"] = None
            return None
        if not isinstance(y, Tensor):
            self.obstacles[f"it returned a {type(y).__qualname__}"] = None
            return None
        x = _x(args, kwargs)
        call.judge_y(x, y)
        return _Tap.apply(y, x, call) if y.requires_grad and torch.is_grad_enabled() else None

    def _as_expected(self, operands: Operands, x: Tensor) -> Expected:
        if not operands.dropout_p:
            return Expected(operands)
        if _mask_is_known(self.module, x):
            with torch.random.fork_rng(devices=[]):  # the seed that the layer is about to draw
                seed = dropout_seed(self.module, x)
                seed = seed_tensor(None, x) if seed is None else seed
                return Expected(operands, operands.dropout_p, seed)
        for owner, attribute in dropouts(self.module):
            self.watch.callback(setattr, owner, attribute, getattr(owner, attribute))
            setattr(owner, attribute, 0.0)
        self.notes["dropout was off"] = None
        return Expected(operands)

    def _look_at(self, operands: Operands) -> None:
        if operands.off:
            self.off[operands.off] = None
            return
        self.active, self.parts = True, operands.parts
        for part, nominal in zip(operands.parts, operands.nominal, strict=True):
            for role, parameter in (("da", part.lora_a), ("db", part.lora_b)):
                self.follow(role, parameter)
                if not parameter.requires_grad:
                    self.notes[f"{_LETTER[role]} is frozen"] = None
            if part.scaling == 0:
                self.found[Diagnosis("dead", "its scaling is zero")] = None
            if not part.lora_b.any():
                if not part.lora_a.any():
                    self.found[Diagnosis("dead", "A and B are both zero")] = None
                self.notes["B is zero: y and dx show the frozen layer only"] = None
            if nominal is not None and not math.isclose(part.scaling, nominal, rel_tol=1e-6):
                status = "twice" if math.isclose(part.scaling, 2 * nominal) else "wrong"
                reason = f"its scaling is {part.scaling:g} where alpha and r give {nominal:g}"
                self.found[Diagnosis(status, reason)] = None

    # --- After the step ----------------------------------------------------------------------

    def verdict(self) -> Verdict:
        stray = self._judge_gradients()
        found = [*self.found, *self._undiagnosed()]
        if not self.obstacles:
            found += self._unreached(stray)
        if found:
            status = min((d.status for d in found), key=VERDICTS.index)
            return Verdict(status, "; ".join(dict.fromkeys(d.reason for d in found)), self.ratios)
        if self.obstacles or not self.active:
            unseen = _why_unseen(self.module) or "it was not called"
            reasons = self.obstacles or self.off or (unseen,)
            return Verdict("unjudged", "; ".join(reasons), self.ratios)
        return Verdict("right", "; ".join(self.notes), self.ratios)

    def _judge_gradients(self) -> bool:
        """Judge da and db; return whether there are some that nothing explains."""
        stray, explained, missing, judged = False, [], [], 0
        for role, parameter in self.followed.values():
            gradient = self.watch.gradients[id(parameter)]
            got, expected = gradient.got, gradient.expected()
            if not expected:
                stray |= got is not None and bool(got.any())
            elif parameter.requires_grad and not self.obstacles and not self.mispaired:
                ratio = min(error_ratio(got, *pair) for pair in expected)
                self.rate(role, ratio)
                judged += 1
                if got is None:
                    missing.append(_LETTER[role])
                elif ratio > 1:
                    explained.append(explain_gradient(got, *expected[0], self.parts))
        self.detached = judged > 0 and len(missing) == judged
        status = "dead" if self.detached else "wrong"
        for letter in missing:
            self.found[Diagnosis(status, f"{letter} requires a gradient and gets none")] = None
        if not self.found:
            self.found.update(dict.fromkeys(d for d in explained if d is not None))
        return stray

    def _undiagnosed(self) -> Iterator[Diagnosis]:
        gone = ("dx", "da", "db") if self.detached else ()  # with the adapter's part of dx
        wrong = [r for r in RESULTS if r not in gone and self.ratios.get(r, 0.0) > 1]
        if wrong and not any(d.status != "dead" for d in self.found):
            yield Diagnosis("wrong", f"{', '.join(wrong)} beyond the tolerance")

    def _unreached(self, stray: bool) -> Iterator[Diagnosis]:
        if stray and not self.reached:
            how = "through its output" if self.calls else "through a call of it"
            yield Diagnosis("bypassed", f"its adapter got gradients, but not {how}")
        elif not any(p.requires_grad for _, p in self.followed.values()):
            return
        elif not self.calls:
            if not _why_unseen(self.module):
                yield Diagnosis("dead", "it was not called, but skipped or computed past it")
        elif self.active and not self.tokens:
            yield Diagnosis("dead", "no token reached it")
        elif self.active and not self.reached:
            yield Diagnosis("dead", "no gradient reaches its output")
        elif self.active and not self.alive:
            yield Diagnosis("dead", "the gradient of its output is zero")


class _Call:
    """One call of a layer, judged as its x, y, dy and dx come by."""

    def __init__(self, layer: _Layer, expected: Expected, dtype: torch.dtype) -> None:
        self.layer, self.expected, self.dtype = layer, expected, dtype
        self.used: Expected | None = None  # what y was really computed with, if something else
        self.dx: tuple[Tensor, Tensor, Tensor] | None = None  # exact, eager, and dy

    def judge_y(self, x: Tensor, y: Tensor) -> None:
        layer = self.layer
        layer.tokens += math.prod(x.shape[:-1])
        exact, eager = self.expected.output(x, fp64), self.expected.output(x, self.dtype)
        if not eager.isfinite().all():
            layer.obstacles["x or the plain composition is not finite"] = None
            return
        ratio = worst_ratio(y, exact, eager, x)
        layer.rate("y", ratio)
        if ratio <= 1:
            return
        others = layer.watch.operands()
        found = explain_output(self.expected, layer.name, x, y, others, self.dtype)
        if found is not None:
            layer.found[found._replace(parts=None)] = None
        if found is not None and found.parts is not None:
            layer.mispaired = True
            operands = self.expected.operands._replace(parts=found.parts)
            self.used = self.expected._replace(operands=operands)

    def judge_gradients(self, x: Tensor, dy: Tensor) -> None:
        layer = self.layer
        layer.reached = True
        layer.alive |= bool(dy.any())
        for expected in (self.expected, self.used) if self.used else (self.expected,):
            dx, exact = expected.gradients(x, dy, fp64)
            eager_dx, eager = expected.gradients(x, dy, self.dtype)
            if not all(t.isfinite().all() for t in (eager_dx, *eager.values())):
                layer.obstacles["dy or the plain gradient is not finite"] = None
                return
            self.dx = dx, eager_dx, dy
            for parameter in expected.trained():
                gradient = layer.watch.gradient(parameter)
                # Autograd adds calls up in the parameter's dtype.
                added = exact[id(parameter)], eager[id(parameter)].to(parameter.dtype)
                gradient.dtype = coarsest(parameter.dtype, self.dtype)
                if expected is self.expected:
                    gradient.by_owner.add(*added)
                if expected is (self.used or self.expected):
                    gradient.by_user.add(*added)

    def judge_dx(self, dx: Tensor | None) -> None:
        if self.dx is not None:
            self.layer.rate("dx", worst_ratio(dx, *self.dx))
            self.dx = None


class _Tap(torch.autograd.Function):
    """The identity of y, at which dy is seen on its way back.

    x travels as a saved tensor, so that activation checkpointing may drop and recompute it; and as
    an input, so that a dx that never comes is noticed.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, call: _Call) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = call
        return y.clone()  # not a view: the caller may modify what a layer returns in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.call.judge_gradients(*ctx.saved_tensors, dy)
        return dy, None, None


def _x(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("x")


def _mask_is_known(layer: Any, x: Tensor) -> bool:
    """Return whether this call draws the seed of a mask first of all and then obeys it."""
    if isinstance(layer, LoRALinear):
        return True
    if not type(layer).__module__.startswith("lora_kernels."):
        return False
    from lora_kernels.peft import why_not

    return why_not(layer, x) is None


def _why_unseen(layer: nn.Module) -> str:
    """Return why a layer that was not called need not have been, or nothing."""
    operands = read(layer)
    return operands if isinstance(operands, str) else operands.off or ""


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _restore_grad(parameter: nn.Parameter, grad: Tensor | None, values: Tensor | None) -> None:
    parameter.grad = grad
    if grad is not None and values is not None:
        with torch.no_grad():
            grad.copy_(values)
