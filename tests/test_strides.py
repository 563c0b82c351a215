"""Every op reads a strided tensor as what it is: expanded and strided vectors and tables give what
contiguous ones do."""

import pytest
import torch
from conftest import BACKENDS, DEVICE
from steps import coefficients, inputs
from test_ops import arguments, losses_of

from dde_fast import ops


def strided(x):
    """The same numbers, every other of a longer tensor along the last dimension."""
    gaps = torch.full((*x.shape, 2), 3, dtype=x.dtype, device=x.device)
    gaps[..., 0] = x
    return gaps[..., 0]


def expanded(x):
    """The first number as often as there are numbers, without memory of their own."""
    return x[:1].expand(len(x))


def check(op, args, backend, changes=(strided,)):
    """`op(*args, backend)` with every vector and table changed and one by one, against copies."""
    vectors = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and 0 < x.dim() < 3]
    for which in ([i] for i in vectors), [vectors]:
        for chosen in which:
            for change in changes:
                given = [change(x) if i in chosen else x for i, x in enumerate(args)]
                dense = [x.contiguous() if i in chosen else x for i, x in enumerate(given)]
                assert not any(given[i].is_contiguous() for i in chosen)
                out, expected = op(*given, backend), op(*dense, backend)
                for a, b in zip(out, expected, strict=True):
                    assert a.equal(b), (chosen, change)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("halves", [False, True])
def test_loss(halves, backend):
    """Timesteps, reference errors, weights, margins; backward, logits and arriving gradients."""
    *args, _ = arguments(4, mode="errors", halves=halves)
    for op in losses_of(backend):
        check(op, args, backend, (strided, expanded))
    loss, logits, error, *_ = ops.preference_loss(*args, backend)
    policy, _, target, timesteps, weights, _, *constants = args
    arriving = (torch.ones_like(loss), logits.sin(), error.cos())
    tensors = (policy, target, timesteps, logits, weights)

    def backward(*args):
        return [ops.preference_loss_backward(*args)]

    check(backward, (*arriving, *tensors, *constants), backend, (strided, expanded))


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise(backend):
    ids = torch.tensor([3, 2**33 + 5, 0, 7], device=DEVICE)
    draws = torch.tensor([0, 1, 2, 1], device=DEVICE)
    t = torch.tensor([0, 10, 500, 999], device=DEVICE)
    alphas = torch.linspace(0.9991, 0.0047, 1000, device=DEVICE)
    latents = torch.randn(8, 4, 3, 5, device=DEVICE)
    both = (strided, expanded)
    for timesteps in (t, t.repeat(2)):
        args = (latents, timesteps, alphas, ids, draws, 5, torch.float32, False)
        check(ops.add_noise, args, backend, both)
    check(lambda *args: [ops.pair_noise(*args)], (ids, draws, [3, 5], 5), backend, both)
    check(lambda *args: [ops.pair_uniform(*args)], (ids, draws, 1, 5), backend, both)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ratios(backend):
    error, t = torch.rand(2, 8, device=DEVICE), torch.tensor([1, 9, 0, 1], device=DEVICE)

    def observe(*args):
        sums = torch.zeros(5, 10, dtype=torch.float64, device=DEVICE)
        ops.observe_ratios(sums, *args)
        return [sums]

    check(observe, (*error, t, torch.rand(10, device=DEVICE)), backend, (strided, expanded))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling(backend):
    o, x, z = inputs(2)
    k = coefficients()
    check(ops.ddim_step, (o, x, k, z, None, "epsilon"), backend)
    made, log_prob = ops.ddim_step(o, x, k, z, None, "epsilon", backend)

    def backward(*args):
        return [ops.ddim_step_backward(*args)]

    check(backward, (z, log_prob, o, x, made, k, "epsilon"), backend)
