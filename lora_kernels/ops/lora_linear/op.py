"""The public function, its autograd.Function, the operator schemas and the choice of backend."""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from lora_kernels.dispatch import AUTO, BackendUnavailable, select
from lora_kernels.ops.lora_linear import composition, cuda, flops, reference, shared_dx, triton
from lora_kernels.ops.lora_linear.composition import unwrap
from lora_kernels.ops.lora_linear.operands import Backward, Forward
from lora_kernels.ops.lora_linear.philox import seed_tensor
from lora_kernels.ops.lora_linear.problem import Problem
from lora_kernels.ops.lora_linear.validate import PLAIN_TYPES, is_traced, validate

BACKENDS = (cuda.BACKEND, triton.BACKEND, reference.BACKEND)
_ops = torch.ops.lora_kernels
_PLAIN = PLAIN_TYPES | {type(None)}
_NAMES = (AUTO, *(backend.name for backend in BACKENDS))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    first_column: int | None = None,
    backend: str = AUTO,
    rebuild: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Apply a frozen linear layer and its LoRA adapter in one operator.

    `y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ (+ bias)`, with gradients for x, A and B.

    Args:
        x: (..., K); bf16, fp16, fp32 or fp64, any strides.
        weight: (N, K), frozen, in x's dtype.
        lora_a: (R, K), in x's dtype or fp32, R >= 1.
        lora_b: (N, R), in lora_a's dtype.
        scaling: s, a number; alpha/R for LoRA, alpha/√R for rsLoRA.
        bias: (N,), frozen, in x's dtype, or None.
        dropout_p: probability in [0, 1) of dropping an element of the adapter's input; survivors
            are scaled by 1/(1-p). The frozen path never drops.
        seed: which mask, for dropout_p > 0: an int in [0, 2⁶³), an int64 tensor of one element
            on x's device or the CPU, or None to draw one from torch's generator. The same seed
            and p give the same mask on every backend and device.
        first_column: for an x that is a slice of a wider one's columns, as tensor parallelism makes
            it, where the slice starts: its mask is that part of the wider x's. None for a whole x.
        backend: "auto", "cuda", "triton" or "reference"; only "auto" ever falls back.
        rebuild: for a weight that is a transient, dequantised for this call, say: the backward
            calls it for the same bits again, and nothing of size N·K lives in between.

    Returns:
        y: (..., N), in x's dtype. Under autocast every operand is first converted to the autocast
        dtype, and y has that dtype; gradients have the dtype of what they belong to.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shape, device, probability, seed or backend name, or a frozen tensor
            that requires grad.
        BackendUnavailable: no backend, or not the one asked for, can run this call.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; the gradients
    are derived in the README.md beside this file.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        x, weight, lora_a, lora_b, bias, seed = map(unwrap, (x, weight, lora_a, lora_b, bias, seed))
    if torch._C._is_any_autocast_enabled() and isinstance(x, Tensor) and autocasts(x):
        x, weight, lora_a, lora_b, bias = map(_autocast, (x, weight, lora_a, lora_b, bias))
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(
                x, weight, lora_a, lora_b, scaling, bias, dropout_p=dropout_p, seed=seed,
                first_column=first_column, backend=backend, rebuild=rebuild,
            )  # fmt: skip
    tensors: tuple[Tensor, ...] = (x, weight, lora_a, lora_b)
    if bias is not None:
        tensors += (bias,)
    traced = is_traced(tensors)
    problem = validate(
        tensors, scaling, dropout_p, seed, first_column, rebuild, backend, _NAMES, traced
    )
    scaling, dropout_p = float(scaling), float(dropout_p)
    column = first_column if dropout_p else None
    where = composition.surrounds()
    if where is None and not compiling:
        read = (*tensors, seed) if isinstance(seed, Tensor) else tensors
        where = composition.functional(read)
    if where is None and traced and torch.compiler.is_exporting():
        where = "in an exported program"
    if where:
        _refuse(backend, where)
        given = None if seed is None or not dropout_p else seed_tensor(seed, x)
        call = Forward(x, weight, lora_a, lora_b, bias, given, scaling, dropout_p, column)
        return composition.forward(call)
    drawn = scale = None
    if dropout_p > 0:
        if backend != AUTO and not compiling:
            # A refusal must come before a seed is drawn; "auto" always finds a backend.
            call = Forward(x, weight, lora_a, lora_b, bias, None, scaling, dropout_p, column)
            select(BACKENDS, problem or call.problem(), backend)
        drawn = seed_tensor(seed, x)
    if compiling and _is_symbolic(scaling):
        # A number in the graph would be guarded on, one graph for each; a tensor is an input.
        scale, scaling = torch.ones((), dtype=torch.float64, device="cpu") * scaling, 1.0
    if torch.is_grad_enabled() and (
        x.requires_grad or lora_a.requires_grad or lora_b.requires_grad
    ):
        # Autograd's own nodes would keep a transient weight.
        if x.numel() == x.shape[-1] > 0 and rebuild is None and problem is not None:
            call = Forward(x, weight, lora_a, lora_b, bias, drawn, scaling, dropout_p, column)
            if _autograd_is_cheaper(call, problem, backend):
                return reference.compose(call)
        own_seed = not (traced or isinstance(seed, Tensor))
        rest = scaling, dropout_p, column, backend, rebuild, problem, own_seed
        apply = _LoRALinear.apply if traced else _apply
        return apply(x, weight, lora_a, lora_b, bias, drawn, scale, rest)
    call = Forward(x, weight, lora_a, lora_b, bias, drawn, scaling, dropout_p, column)
    return _forward(call, backend, problem, scale)[0]


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor,
        bias: Tensor | None, seed: Tensor | None, scale: Tensor | None, rest: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        scaling, dropout_p, column, backend, rebuild, problem, own_seed = rest
        call = Forward(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, column)
        y, p = _forward(call, backend, problem, scale)
        need_dx, _, need_da, need_db, *_ = ctx.needs_input_grad
        if not (need_dx or need_da):
            seed = None
        # In the order of Backward, and no more than the needed gradients read: what is not saved
        # may be an inference tensor, or be written to before the backward pass.
        ctx.save_for_backward(
            x if need_da else None,
            weight if need_dx and rebuild is None else None,
            lora_a if need_dx else None,
            lora_b if need_dx or need_da else None,
            p if need_db else None,
            None if own_seed else seed,
            scale,
        )
        rebuild = rebuild if need_dx else None
        seed = seed if own_seed else None  # nobody else holds it: it needs no watching
        traced = problem is None
        joint = shared_dx.node_of(x) if need_dx and not traced else None
        # A that a second derivative alone reads: saved, it could not be written to.
        alone = need_db and need_da and not (need_dx or traced)
        unread = (lora_a, lora_a._version) if alone else None
        rest = x.shape, scaling, dropout_p, column, backend, problem
        ctx.rest = *rest, rebuild, seed, joint, unread
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, p, seed, scale = ctx.saved_tensors
        shape, scaling, dropout_p, column, backend, problem, *rest = ctx.rest
        rebuild, own_seed, joint, unread = rest
        if not torch.compiler.is_compiling():
            dy = unwrap(dy)
        if rebuild is not None:
            weight = unwrap(rebuild().to(dy.dtype))  # autocast may have converted it
        if len(shape) != 2:
            dy, x = _flatten(dy), None if x is None else _flatten(x)
        seed = seed if own_seed is None else own_seed
        call = Backward(dy, x, weight, lora_a, lora_b, p, seed, scaling, dropout_p, column)
        # With create_graph=True the gradients must not pass for constants. `once_differentiable`
        # would let them: it raises for what depends on dy, and these depend on x, A and B too.
        if not torch.is_grad_enabled():
            dx, da, db = _backward(call, backend, scale, problem, joint)
        elif composition.is_differentiable(call) and not _is_by_name(backend):
            dx, da, db = composition.differentiable(call, unread)
        else:
            if composition.surrounds(dy):  # there a Function's results are constants
                _not_twice()
            dx, da, db = _NotTwiceDifferentiable.apply(*call, scale, backend)
        need_dx, need_da, need_db = call.needs
        if dx is not None and need_dx and len(shape) != 2:  # None where it went to `joint`
            dx = dx.view(shape)
        return (
            dx if need_dx else None,
            None,
            da if need_da else None,
            db if need_db else None,
            *(None,) * 4,
        )


# What `Function.apply` calls in the end. Its Python, which looks for functorch's transforms, costs
# a twentieth of a small call.
_apply = super(torch.autograd.Function, _LoRALinear).apply


class _NotTwiceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        *operands, scale, backend = arguments
        return _backward(Backward(*operands), backend, scale)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        _not_twice()


def _not_twice() -> NoReturn:
    raise RuntimeError(
        "lora_linear: double backward is not supported in compiled code, by a backend asked for by "
        "name, or beside a frozen lora_a"
    )


def _forward(
    call: Forward, backend: str, problem: Problem | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y and P; without a problem, something traces."""
    x, weight, *_ = call
    flat = x.dim() == 2
    if not flat:
        call = call._replace(x=_flatten(x))
    if problem is None:
        _teach()
        y, p = _ops.lora_linear.default(*call, backend, scale)
    else:
        y, p = select(BACKENDS, problem, backend).forward(call)
    if not flat:
        # Not a view for autograd: the caller may modify what a layer returns in place.
        y = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], weight.shape[0]))
    return y, p


def _backward(
    call: Backward,
    backend: str,
    scale: Tensor | None,
    problem: Problem | None = None,
    joint: Any = None,
) -> tuple[Tensor | None, ...]:
    """Return dx, da and db; None for a dx that went to `joint`."""
    if torch._C._is_any_autocast_enabled() and autocasts(call.dy):
        with torch.autocast(call.dy.device.type, enabled=False):
            return _backward(call, backend, scale, problem, joint)
    where = composition.surrounds(call.dy)
    if where:
        _refuse(backend, where)
        return composition.backward(call)
    if is_traced(call[:6], _PLAIN):
        _teach()
        return _ops.lora_linear_backward.default(*call, backend, scale)
    if problem is None:
        problem = call.problem()
    chosen = select(BACKENDS, problem, backend, backward=True)
    if joint is None:
        return chosen.backward(call)
    return shared_dx.add(joint, call, chosen.backward)


def _autograd_is_cheaper(call: Forward, problem: Problem, backend: str) -> bool:
    """Return whether autograd's own nodes should run one token: where the reference would anyway.

    A Function in Python costs more than all of a token's products (README.md).
    """
    x, _, lora_a, _, _, seed, *_ = call
    if seed is not None or lora_a.dtype != x.dtype:
        return False
    if x.dtype == torch.float16:  # autograd scales 16-bit gradients by s on its own
        return False
    return all(
        select(BACKENDS, problem, backend, backward=backward) is reference.BACKEND
        for backward in (False, True)
    )


def _teach() -> None:
    if not torch.compiler.is_compiling():
        flops.teach()


def _is_by_name(backend: str) -> bool:
    return backend not in (AUTO, reference.BACKEND.name)


def _refuse(backend: str, where: str) -> None:
    """Raise unless plain PyTorch may run: a kernel asked for by name has no derivative there."""
    if _is_by_name(backend):
        raise BackendUnavailable(f"lora_linear: backend {backend!r} cannot run {where}")


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _flatten(x: Tensor) -> Tensor:
    """View (..., K) as [M,K]; copies only where the leading strides cannot be merged."""
    return x if x.dim() == 2 else x.reshape(_tokens(x), x.shape[-1])


def _is_symbolic(number: float) -> bool:
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

    return not has_static_value(number)


def autocasts(x: Tensor) -> bool:
    """Return whether autocast is on for x's device; some devices (meta) know no autocast."""
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _autocast(tensor: Any) -> Any:
    """Convert to the autocast dtype what torch itself would: floating tensors, except float64."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


# --- The operator boundary: one schema per direction, the same for every backend -----------------
# The operands of a direction are its NamedTuple's fields, then comes the backend's name; `scale` is
# a float64 number on the CPU that multiplies the scaling. A gradient that is not needed is None in
# a backend and an empty tensor here: the arity is fixed.

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int | None: "int?"}


def _schema(operands: type[Forward] | type[Backward], returns: str) -> str:
    fields = ", ".join(f"{_TYPES[t]} {name}" for name, t in operands.__annotations__.items())
    return f"({fields}, str backend, Tensor? scale=None) -> {returns}"


def _call(kind: Any, *arguments: Any) -> tuple[Any, str]:
    count = len(kind._fields)
    call, (backend, *scale) = kind(*arguments[:count]), arguments[count:]
    if scale and scale[0] is not None:
        call = call._replace(scaling=call.scaling * float(scale[0]))
    return call, backend


def _forward_impl(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, backend = _call(Forward, *arguments)
    return select(BACKENDS, call.problem(), backend).forward(call)


def _backward_impl(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, backend = _call(Backward, *arguments)
    dx, da, db = select(BACKENDS, call.problem(), backend, backward=True).backward(call)
    return (
        call.dy.new_empty(0) if dx is None else dx,
        call.dy.new_empty(0) if da is None else da,
        call.dy.new_empty(0) if db is None else db,
    )


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, weight, lora_a, *_ = arguments
    m = x.shape[0]
    return x.new_empty(m, weight.shape[0]), lora_a.new_empty(m, lora_a.shape[0])


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Backward(*arguments[: len(Backward._fields)])
    (m, n, k, r), (need_dx, need_da, need_db) = call.sizes(), call.needs
    dtype = call.adapter_dtype()
    return (
        call.dy.new_empty((m, k) if need_dx else 0),
        call.dy.new_empty((r, k), dtype=dtype) if need_da else call.dy.new_empty(0),
        call.dy.new_empty((n, r), dtype=dtype) if need_db else call.dy.new_empty(0),
    )


for _name, _fields, _returns, _impl, _fake in (
    ("lora_linear", Forward, "(Tensor y, Tensor p)", _forward_impl, _forward_fake),
    (
        "lora_linear_backward",
        Backward,
        "(Tensor dx, Tensor da, Tensor db)",
        _backward_impl,
        _backward_fake,
    ),
):
    torch.library.define(f"lora_kernels::{_name}", _schema(_fields, _returns))
    torch.library.impl(f"lora_kernels::{_name}", "default", _impl)
    torch.library.register_fake(f"lora_kernels::{_name}", _fake)
