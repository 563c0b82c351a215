"""From a batch of pairs to the loss: noise, policy, reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dde_fast import noise
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.inputs import Inputs
from dde_fast.loader import Batch
from dde_fast.loss import PreferenceLoss, PreferenceOutput


class PairForward:
    """Noise a batch of pairs and run policy, reference and loss on it."""

    def __init__(
        self,
        c: TrainConfig,
        e: EngineConfig,
        inputs: Inputs,
        engine,
        reference: Callable | None,  # called like the UNet
        loss_fn: PreferenceLoss,
    ):
        device = loss_fn.ratios.device
        self.c, self.dtype = c, e.dtype
        self.engine, self.reference, self.loss_fn = engine, reference, loss_fn
        self.alphas_cumprod = inputs.alphas_cumprod.to(device)
        self.timesteps = inputs.timesteps.to(device)

    def __call__(self, batch: Batch) -> PreferenceOutput:
        # One timestep and one noise for both images of a pair
        key = {"seed": self.c.seed, "pair_ids": batch.pair_ids, "draw": batch.epochs}
        key["backend"] = self.c.backend
        timesteps = noise.sample_timesteps(self.timesteps, **key)
        noisy, eps = noise.add_noise(batch.latents, timesteps, self.alphas_cumprod, **key)
        target = self.target(batch.latents, eps, timesteps)

        # One forward of each model for winners and losers together
        inputs = (
            noisy.to(self.dtype),
            torch.cat([timesteps, timesteps]),
            torch.cat([batch.embeddings, batch.embeddings]).to(self.dtype),
        )
        conditions = {"added_cond_kwargs": self.added(batch), "return_dict": False}
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(*inputs, **conditions)[0]
        policy = self.engine(*inputs, **conditions)[0]
        return self.loss_fn(policy, reference, target, timesteps)

    def added(self, batch: Batch) -> dict[str, Tensor] | None:
        """SDXL's further conditions, [2B, …]: the caption is the pair's, the sizes each image's."""
        if batch.pooled is None:
            return None
        pooled = torch.cat([batch.pooled, batch.pooled]).to(self.dtype)
        return {"text_embeds": pooled, "time_ids": batch.time_ids}

    def target(self, latents: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """What the models should predict: [B, …] shared by the pair (ε), or [2B, …]."""
        abar = self.alphas_cumprod[timesteps].repeat(2).reshape(-1, 1, 1, 1)
        signal, sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
        return {
            "epsilon": lambda: eps,
            "v_prediction": lambda: signal * eps.repeat(2, 1, 1, 1) - sigma * latents,
            "sample": lambda: latents,
        }[self.loss_fn.prediction_type]()
