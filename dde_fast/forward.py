"""From a slice of the stream of pairs to the loss: noise, policy, reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dde_fast import noise
from dde_fast.cache import PairStream
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.inputs import Inputs
from dde_fast.loss import PreferenceLoss, PreferenceOutput


class PairForward:
    """Noise a slice of the stream and run policy, reference and loss on it."""

    def __init__(
        self,
        c: TrainConfig,
        e: EngineConfig,
        inputs: Inputs,
        stream: PairStream,
        engine,
        reference: Callable | None,  # called like the UNet
        loss_fn: PreferenceLoss,
    ):
        device = stream.data.latents.device
        self.c, self.dtype, self.stream = c, e.dtype, stream
        self.engine, self.reference, self.loss_fn = engine, reference, loss_fn
        self.alphas_cumprod = inputs.alphas_cumprod.to(device)
        self.timesteps = inputs.timesteps.to(device)

    def __call__(self, start: int, stop: int) -> PreferenceOutput:
        index, epochs = self.stream[start:stop]
        data = self.stream.data
        key = {"seed": self.c.seed, "pair_ids": data.pair_ids[index], "draw": epochs}
        key["backend"] = self.c.backend

        # What the pair sees: its caption or none, one timestep and one noise for both images
        dropout = noise.pair_uniform(noise.CAPTION_DROPOUT, **key)
        latents, embeddings = data.take(index, dropout <= self.c.caption_dropout)
        timesteps = noise.sample_timesteps(self.timesteps, **key)
        noisy, eps = noise.add_noise(latents, timesteps, self.alphas_cumprod, **key)
        target = self.target(latents, eps, timesteps)

        # One forward of each model for winners and losers together
        inputs = (
            noisy.to(self.dtype),
            torch.cat([timesteps, timesteps]),
            torch.cat([embeddings, embeddings]).to(self.dtype),
        )
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(*inputs, return_dict=False)[0]
        policy = self.engine(*inputs, return_dict=False)[0]
        return self.loss_fn(policy, reference, target, timesteps)

    def target(self, latents: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """What the models should predict: [B, …] shared by the pair (ε), or [2B, …]."""
        abar = self.alphas_cumprod[timesteps].repeat(2).reshape(-1, 1, 1, 1)
        signal, sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
        return {
            "epsilon": lambda: eps,
            "v_prediction": lambda: signal * eps.repeat(2, 1, 1, 1) - sigma * latents,
            "sample": lambda: latents,
        }[self.loss_fn.prediction_type]()
