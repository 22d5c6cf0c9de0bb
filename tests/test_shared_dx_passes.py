"""One dx for layers that read one x: passes that repeat, nest or fail, hooks, and writes to x."""

import copy
import threading
from typing import Any

import pytest
import torch
from peft_models import K, bf16, fp64, one_thread, run, x_for
from sharing_models import MEMBERS, assert_right, inner, judge, models, onto, small_x
from torch import Tensor

__all__ = ["one_thread", "onto", "small_x"]  # fixtures


# --- Passes that repeat, nest or fail ------------------------------------------------------------


def test_a_retained_graph_gives_the_same_again() -> None:
    sharing, _, plain = models()
    x = x_for(plain).requires_grad_()
    loss = sharing(x).square().sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("where", MEMBERS)
def test_a_pass_that_fails_leaves_nothing_behind(where: str) -> None:
    sharing, _, plain = models()
    expected = run(sharing, x_for(plain))["dx"]
    broken = [True]

    def fail(dy: Tensor) -> None:
        if broken:
            broken.clear()
            raise RuntimeError("planted")

    def watch(name: str, t: Tensor) -> Tensor:
        if name == where:
            t.register_hook(fail)
        return t

    inner(sharing).watch = watch
    x = x_for(plain).requires_grad_()
    y = sharing(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=fp64).reshape(y.shape)
    loss = (y.to(fp64) * weights).sum()
    with pytest.raises(RuntimeError, match="planted"):
        loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(x.grad, expected)


def test_a_pass_inside_a_pass_keeps_its_own_sum() -> None:
    sharing, _, plain = models()
    nested: list[Tensor] = []
    x = x_for(plain).requires_grad_()

    def watch(name: str, t: Tensor) -> Tensor:
        if name == "k":  # with v's part already in the outer sum, q's not yet

            def again(dy: Tensor) -> None:
                if not nested:
                    nested.append(dy)
                    nested[0] = torch.autograd.grad(loss, x, retain_graph=True)[0]

            t.register_hook(again)
        return t

    inner(sharing).watch = watch
    loss = sharing(x).square().sum()
    loss.backward(retain_graph=True)
    assert torch.equal(nested[0], x.grad)
    assert torch.equal(torch.autograd.grad(loss, x)[0], x.grad)


def test_threads_share_nothing() -> None:
    sharing, _, plain = models()
    shapes = [(2, 4, K), (3, 5, K), (7, K), (2, 2, 2, K)]
    # The parameters' own gradients would be summed by all threads.
    for p in sharing.parameters():
        p.requires_grad_(False)

    def dx(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(sharing(x).square().sum(), x)[0]

    inputs = [x_for(plain, *shape) for shape in shapes]
    expected = [dx(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        bound = 1e-5 * expected[i].abs().max()  # a BLAS in another thread may sum otherwise
        wrong.extend(i for _ in range(20) if (dx(inputs[i]) - expected[i]).abs().max() > bound)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- Hooks ---------------------------------------------------------------------------------------


def test_hooks_on_x_see_the_whole_gradient_once() -> None:
    seen = []
    sharing, apart, plain = models()
    for model in (sharing, apart):
        gradients: list[Tensor] = []

        def watch(name: str, t: Tensor, gradients: list[Tensor] = gradients) -> Tensor:
            if name == "h":
                t.retain_grad()
                t.register_hook(gradients.append)
                gradients.append(t)
            return t

        inner(model).watch = watch
        x = x_for(plain).requires_grad_()
        model(x).square().sum().backward()
        h, *hooked = gradients
        assert len(hooked) == 1
        assert torch.equal(hooked[0], h.grad)
        seen.append((h.grad, x.grad))
    for got, expected in zip(*seen, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("full", [True, False])
def test_module_hooks_see_their_layers_own_dx(full: bool, onto: list[bool]) -> None:
    seen: list[list[Any]] = [[], []]
    sharing, apart, plain = models()
    for model, gradients in zip((sharing, apart), seen, strict=True):
        layer = inner(model).k
        register = layer.register_full_backward_hook if full else layer.register_backward_hook
        register(lambda _, dx, dy, gradients=gradients: gradients.extend([dx[0], dy[0]]))
        model(x_for(plain).requires_grad_()).square().sum().backward()
    assert onto.count(True) == 1
    assert len(seen[0]) == 2
    for got, expected in zip(*seen, strict=True):
        assert torch.equal(got, expected)


def test_forward_hooks_may_exchange_x() -> None:
    trio = models()
    for model in trio:
        inner(model).v.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
        inner(model).q.register_forward_hook(lambda module, inputs, y: y + inputs[0].sum())
    judge(*trio)


# --- A caller that writes to x -------------------------------------------------------------------


def test_an_x_written_to_between_readers(onto: list[bool]) -> None:
    """Adapters wider than x: there PEFT keeps a copy of its own, too."""
    trio = models(dtype=bf16)
    for model in trio:
        inner(model).between = lambda h: h.add_(1)
        for name, p in model.named_parameters():
            p.data = p.data.float() if "lora_" in name else p.data
    sharing, apart, plain = trio
    x = x_for(plain).to(bf16)
    exact = copy.deepcopy(plain).to(fp64)
    inner(exact).between = lambda h: h + 1  # where PEFT keeps x itself
    for _ in range(2):
        assert_right(run(sharing, x), run(apart, x), run(exact, x.to(fp64)))
    assert onto == [False] * 6


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_an_x_whose_data_is_replaced_between_readers(autocast: bool) -> None:
    """It keeps its version."""

    def replace(h: Tensor) -> Tensor:
        h.data = h.data * 3
        return h

    ys = []
    for model in models():
        inner(model).between = replace
        with torch.autocast("cpu", bf16, enabled=autocast):
            ys.append(model(x_for(model).requires_grad_()))
    for y in ys[:2]:
        assert (y - ys[2]).norm() <= 0.02 * ys[2].norm()  # of another x most is another


def test_a_write_after_all_readers_is_noticed() -> None:
    sharing, _, plain = models()
    kept = []
    inner(sharing).watch = lambda name, t: kept.append(t) or t
    y = sharing(x_for(plain).requires_grad_())
    kept[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_first_step_gives_the_bits_of_the_second(dropout: float, onto: list[bool]) -> None:
    """In the first, layers work on a copy of x where PEFT keeps another tensor than x."""
    sharing, *_ = models(dtype=bf16, lora_dropout=dropout)
    for name, p in sharing.named_parameters():
        p.data = p.data.float() if "lora_" in name else p.data
    steps = []
    for _ in range(3):
        torch.manual_seed(1)
        steps.append(run(sharing.train(), x_for(sharing).to(bf16)))
    assert onto == [False, True, True] * 3
    for name, first in steps[0].items():
        assert torch.equal(first, steps[1][name]), name
        assert torch.equal(first, steps[2][name]), name
