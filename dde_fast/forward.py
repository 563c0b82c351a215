"""From a batch of pairs to the loss: noise, reference, policy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.inputs import Inputs
from dde_fast.loader import Batch
from dde_fast.loss import PreferenceLoss, PreferenceOutput
from dde_fast.memory_order import memory_order
from dde_fast.noising import Noising


class PairForward:
    """Noise a batch of pairs and run policy, reference and loss on it."""

    def __init__(
        self,
        c: TrainConfig,
        e: EngineConfig,
        inputs: Inputs,
        engine,
        reference: Callable | None,  # called like the UNet; None: a batch holds its errors
        loss_fn: PreferenceLoss,
    ):
        device = loss_fn.ratios.device
        self.c, self.engine, self.reference, self.loss_fn = c, engine, reference, loss_fn
        self.noising = Noising(
            inputs.alphas_cumprod.to(device),
            inputs.timesteps,
            loss_fn.prediction_type,
            seed=c.seed,
            dtype=e.dtype,
            backend=c.backend,
            memory_format=memory_order(c),
        )

    def __call__(self, batch: Batch) -> PreferenceOutput:
        noised = self.noising(batch)
        # One forward of each model for winners and losers together
        reference = batch.reference_errors
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(*noised.inputs, **noised.conditions)[0]
        policy = self.engine(*noised.inputs, **noised.conditions)[0]
        return self.loss_fn(policy, reference, noised.target, noised.timesteps)
