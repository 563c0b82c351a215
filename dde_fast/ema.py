"""Exponential moving average of the trained weights, kept as one more state of the optimizer.

What the base optimizer steps is the exact float32 of every weight under training: the parameters
themselves at ZeRO stage 0, this rank's flat slices of them at stages 1 to 3, in CPU memory where the
JSON offloads them. An average that lies beside their moments is therefore float32, partitioned and
offloaded like them, costs no communication, and is saved and restored by DeepSpeed's checkpoints.
The decay rises as in `diffusers.training_utils.EMAModel`: min(decay, (1 + n) / (10 + n)) at update
n, which starts from 0 with a copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

STATE = "ema"
"""Name of the average among the states of a parameter."""


def attach(engine, decay: float) -> None:
    """Average after each of the engine's optimizer steps from now on; a skipped step is none, also
    where the optimizer alone knows of it, on the device (`optimizer_step.step_optimizer`)."""

    @torch.no_grad()
    def update(optimizer: torch.optim.Optimizer, *_) -> None:
        step = engine.global_steps  # those done before this one
        averages, weights = [], []
        for group in optimizer.param_groups:
            # one without a gradient was not stepped, and its states are still to be made
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                state = optimizer.state[weight]
                if STATE in state:
                    averages.append(state[STATE])
                    weights.append(weight)
                else:
                    state[STATE] = weight.detach().clone()
        kept = min(decay, (1 + step) / (10 + step))
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None:  # 1 or 0: the host does not know, and shall not wait to hear it
            share = (1 - kept) * (1 - skipped)
            for average, weight in zip(averages, weights, strict=True):
                average.lerp_(weight, share.to(weight.dtype))
        elif weights:
            get_ema_multi_avg_fn(kept)(averages, weights, step)

    engine.basic_optimizer.register_step_post_hook(update)


@contextlib.contextmanager
def averaged(engine) -> Iterator[None]:
    """Within, the engine's float32 weights are the averages (its 16-bit ones are left alone)."""
    _swap(engine.basic_optimizer)
    try:
        yield
    finally:
        _swap(engine.basic_optimizer)


@torch.no_grad()
def _swap(optimizer: torch.optim.Optimizer) -> None:
    # by value: ZeRO's views point into the memory of both
    for weight, state in optimizer.state.items():
        if STATE in state:
            kept = weight.clone()
            weight.copy_(state[STATE])
            state[STATE].copy_(kept)
