"""The loss head against the published scripts' eager formula and that formula compiled.

`salesforce` is train.py of DiffusionDPO as published, `compiled` the same under torch.compile. All
compute Diffusion-DPO with beta 5000 on the same tensors; `dde_fast` rows name their backend.

`forward` is the loss alone, under no_grad. `backward` is the gradient alone: of the baselines that of
one loss, taken again and again; ours the op that makes it from the logits, what a second backward or a
loss with other terms runs. `both` is a loss and its gradient as in training, where the cpp backend
makes the two in one pass: it is less than forward and backward together.

Bytes are what any implementation must move: prediction, reference and target read once, the gradient
written once; a backward by itself reads prediction and target again.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from conftest import ALPHAS_CUMPROD, BACKENDS, BATCHES, DEVICE, SETS, SHAPES
from torch import Tensor

from dde_fast import PreferenceLoss

BETA = 5000.0


def salesforce(model_pred: Tensor, ref_pred: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
    """DiffusionDPO's train.py: target holds the pair's noise twice, as it does there."""
    model_losses = (model_pred - target).pow(2).mean(dim=[1, 2, 3])
    model_losses_w, model_losses_l = model_losses.chunk(2)
    model_diff = model_losses_w - model_losses_l
    with torch.no_grad():
        ref_losses = (ref_pred - target).pow(2).mean(dim=[1, 2, 3])
        ref_losses_w, ref_losses_l = ref_losses.chunk(2)
        ref_diff = ref_losses_w - ref_losses_l
    inside_term = -0.5 * BETA * (model_diff - ref_diff)
    return -torch.nn.functional.logsigmoid(inside_term).mean()


@lru_cache(maxsize=1)
def compiled(shape: str, pairs: int, dtype: torch.dtype):
    """`salesforce` compiled for these inputs, once for the modes that follow one another."""
    torch._dynamo.reset()
    # the backward is timed alone too, again and again on one graph
    torch._functorch.config.donated_buffer = False
    return torch.compile(salesforce, dynamic=False)


def our_backward(loss_fn: PreferenceLoss, policy: Tensor, *rest: Tensor):
    """A function that makes the gradient of one loss in policy, from its logits."""
    policy, (_, target, timesteps) = policy.detach(), rest
    one, logits = torch.ones((), device=DEVICE), loss_fn(policy, *rest).logits
    given = (one, None, None, policy, target, timesteps, logits, loss_fn.weights)
    constants = (loss_fn.beta, loss_fn.objective.lose_weight, loss_fn.link, loss_fn.label_smoothing)
    op = torch.ops.dde_fast.preference_loss_backward
    return lambda: op(*given, *constants, loss_fn.backend)


def inputs(pairs: int, shape: tuple[int, ...], dtype: torch.dtype, repeat: bool):
    """Reference off by 0.3 from the target, policy by 0.01 from the reference."""
    target = torch.randn(pairs, *shape, device=DEVICE)
    reference = target.repeat(2, 1, 1, 1) + 0.3 * torch.randn(2 * pairs, *shape, device=DEVICE)
    policy = reference + 0.01 * torch.randn_like(reference)
    if repeat:
        target = target.repeat(2, 1, 1, 1)
    timesteps = torch.randint(0, 1000, (pairs,), device=DEVICE)
    return policy.to(dtype).requires_grad_(), reference.to(dtype), target.to(dtype), timesteps


def calls(loss_of, mode: str, sets: list):
    """Functions without arguments, one per set of inputs; loss_of is a PreferenceLoss or a baseline."""
    ours = isinstance(loss_of, PreferenceLoss)

    def loss(*inputs):
        return loss_of(*inputs).loss if ours else loss_of(*inputs)

    @torch.no_grad()
    def forward(*inputs):
        return loss(*inputs)

    def both(policy, *rest):
        return torch.autograd.grad(loss(policy, *rest), policy)

    def backward(policy, *rest):
        if ours:
            return our_backward(loss_of, policy, *rest)
        made = loss(policy, *rest)
        return lambda: torch.autograd.grad(made, policy, retain_graph=True)

    if mode == "backward":
        return [backward(*s) for s in sets]
    return [lambda s=s: {"forward": forward, "both": both}[mode](*s) for s in sets]


@pytest.mark.parametrize(
    ("mode", "cache"),
    [("forward", "warm"), ("backward", "warm"), ("both", "warm"), ("both", "cold")],
)
@pytest.mark.parametrize("name", ["salesforce", "compiled", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pairs", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_loss(measure, benchmark, shape, pairs, dtype, name, mode, cache):
    benchmark.group = f"{mode} {cache} {shape} B={pairs} {str(dtype)[6:]}"
    ours = name in BACKENDS
    latent = 2 * pairs * torch.Size(SHAPES[shape]).numel() * dtype.itemsize
    needed = {"forward": 2.5 * latent, "backward": 2.5 * latent, "both": 3.5 * latent}[mode]
    sets = [inputs(pairs, SHAPES[shape], dtype, repeat=not ours) for _ in range(SETS)]
    if ours:
        options = {"alphas_cumprod": ALPHAS_CUMPROD, "beta": BETA, "backend": name}
        loss_of = PreferenceLoss("diffusion-dpo", **options).to(DEVICE)
    else:
        loss_of = salesforce if name == "salesforce" else compiled(shape, pairs, dtype)
    measure(
        calls(loss_of, mode, sets),
        bytes=int(needed),
        cache=cache,
        op="loss",
        name=name,
        mode=mode,
        pairs=pairs,
        shape=list(SHAPES[shape]),
        dtype=str(dtype)[6:],
    )
