"""The loss's gradient made with its forward, and what becomes of it in the backward."""

import pytest
import torch
from conftest import BACKENDS, DEVICE
from longhand import scaled_linear
from test_ops import CASES, arguments, term_sizes

from dde_fast import PreferenceLoss, ops


@pytest.mark.parametrize("backend", [b for b in ops.WITH_GRADIENT if b in BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 3, 4, 6, 8)])
def test_gradient_with_the_forward_is_the_backwards(case, dtype, backend):
    """Same bits from one op as from two, for few pairs and many, in every layout; on CUDA, where one
    kernel sums otherwise than three do, the same numbers."""
    args = list(arguments(**case, dtype=dtype, backend=backend))
    if case["shape"] == (4, 9, 7):
        args[0] = args[0].contiguous(memory_format=torch.channels_last)
    *out, gradient = ops.preference_loss_with_gradient(*args)
    expected = ops.preference_loss(*args)
    policy, _, target, timesteps, weights, _, *constants = args
    backward = ops.preference_loss_backward(
        torch.ones_like(out[0]), None, None, policy, target, timesteps, out[1], weights, *constants
    )
    for a, b in zip((*out, gradient), (*expected, backward), strict=True):
        assert a.stride() == b.stride()
        if DEVICE.type == "cpu" or not a.numel():
            assert a.equal(b)
        else:
            # a logit's rounding is absolute, and it is a slope's and so a gradient's relative one
            slack = (1e-14 if dtype == torch.float64 else 1e-6) * (1 + term_sizes(args).max())
            slack = slack + (torch.finfo(a.dtype).eps if a.dtype.itemsize == 2 else 0)
            least = 0 if a is gradient else 1
            assert (a - b).abs().max() <= slack * b.abs().max().clamp(min=least)
    args[0] = args[0].requires_grad_()
    torch.library.opcheck(torch.ops.dde_fast.preference_loss_with_gradient, tuple(args))


@pytest.mark.parametrize("backend", [b for b in ops.WITH_GRADIENT if b in BACKENDS])
def test_gradient_with_the_forward_serves_every_backward(backend):
    """A scaled loss, a second backward, and gradients that arrive elsewhere than at the loss."""
    base = arguments(pairs=4, backend=backend)
    inputs, table = base[:4], scaled_linear()
    loss_fn = PreferenceLoss("dde-single", alphas_cumprod=table, beta=20.0, backend=backend)
    loss_fn = loss_fn.to(DEVICE)
    eager = PreferenceLoss("dde-single", alphas_cumprod=table, beta=20.0, backend="reference")
    eager = eager.to(DEVICE)
    wholes = (
        lambda out: out.loss,
        lambda out: out.loss * 0.3,
        lambda out: out.logits.square().mean(),
        lambda out: out.loss + out.policy_error.sum(),
    )
    for whole in wholes:
        gradients = []
        for module in (loss_fn, eager):
            policy = inputs[0].detach().requires_grad_()
            total = whole(module(policy, *inputs[1:]))
            (once,) = torch.autograd.grad(total, policy, retain_graph=True)
            kept = once.clone()
            (again,) = torch.autograd.grad(2 * total, policy)
            assert once.equal(kept)  # the second backward left the first's result alone
            torch.testing.assert_close(again, 2 * once)
            gradients.append(once)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("backend", [b for b in ops.WITH_GRADIENT if b in BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 3.0, 1 / 3, 65536.0])
def test_a_gradient_made_with_the_forward_is_given_away_once(scale, dtype, backend):
    """Whatever becomes of it then, a later backward through the same graph is right."""
    args = list(arguments(pairs=3, dtype=dtype, backend=backend))
    policy, _, target, timesteps, weights, _, *constants = args
    args[0] = leaf = policy.requires_grad_()
    total = scale * ops.preference_loss_with_gradient(*args)[0]
    logits = ops.preference_loss(*args)[1].detach()
    given = torch.tensor(scale, dtype=logits.dtype, device=DEVICE), None, None
    inputs = policy.detach(), target, timesteps, logits, weights
    expected = ops.preference_loss_backward(*given, *inputs, *constants)
    rounding = 4 * torch.finfo(dtype).eps
    for _ in range(3):
        (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=rounding, atol=0)
        gradient.fill_(float("nan"))
    total.backward(retain_graph=True)
    kept = leaf.grad
    total.backward()
    assert leaf.grad is kept
    torch.testing.assert_close(kept, 2 * expected, rtol=2 * rounding, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("backend", [b for b in ops.WITH_GRADIENT if b in BACKENDS])
def test_a_scaled_gradient_takes_no_memory_of_its_own(backend, monkeypatch):
    args = list(arguments(backend=backend))
    args[0].requires_grad_()
    made = []
    for scale in (1.0, 0.5):
        monkeypatch.setattr(ops, "_is_one", lambda factor: False)  # as on a GPU
        loss, *_, gradient = ops.preference_loss_with_gradient(*args)
        unscaled = gradient.clone()
        (got,) = torch.autograd.grad(scale * loss, args[0])
        assert got.data_ptr() == gradient.data_ptr() and got.equal(scale * unscaled)
        made.append(got)
    assert made[1].equal(0.5 * made[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend):
    """Its gradient is not made of differentiable steps: better none than half of one."""
    args = arguments(pairs=2, backend=backend)
    policy = args[0].requires_grad_()
    for op in (ops.preference_loss, ops.preference_loss_with_gradient):
        if op is ops.preference_loss or backend in ops.WITH_GRADIENT:
            total = op(policy, *args[1:])[0] * policy.sum()
            (gradient,) = torch.autograd.grad(total, policy, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                gradient.sum().backward()


def test_fp16_gradients_wait_for_the_loss_scale():
    """Made with the forward, a small fp16 gradient would be 0 before the scale reaches it."""
    for backend in ops.WITH_GRADIENT:
        for dtype, wanted in ((torch.float16, False), (torch.bfloat16, True)):
            policy = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
            assert ops.gradient_with_forward(backend, policy) is wanted
            with torch.no_grad():
                assert not ops.gradient_with_forward(backend, policy)
    assert not ops.gradient_with_forward("reference", policy)
