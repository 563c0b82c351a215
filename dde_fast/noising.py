"""From a batch of pairs to what the models are asked, and what they should answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dde_fast import noise
from dde_fast.loader import Batch


@dataclass(frozen=True)
class Noised:
    """What the models are asked of a batch of pairs, and what they should answer."""

    inputs: tuple[Tensor, ...]
    """Of a UNet: noisy latents [2B, C, h, w], timesteps [2B], embeddings [2B, L, D]."""
    conditions: dict[str, Any]
    """Its keyword arguments."""
    timesteps: Tensor
    """int64 [B]."""
    target: Tensor
    """[B, …] shared by the pair (ε), or [2B, …]."""


class Noising:
    """Timestep and noise of each pair, and the models' inputs from them.

    Args:
        alphas_cumprod: [T], on the device of the batches.
        timesteps: float64 [T], the distribution that they are drawn from, on any device but meta.
        prediction_type: of the models.
        seed: of timesteps and noise.
        dtype: of the models' inputs.
        backend: of the noise.
        memory_format: of the noisy latents and of the target.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,  # [T]
        timesteps: Tensor,  # [T]
        prediction_type: str,
        *,
        seed: int,
        dtype: torch.dtype,
        backend: str = "auto",
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.alphas_cumprod = alphas_cumprod
        self.timesteps = noise.running_sums(timesteps).to(alphas_cumprod.device)
        self.prediction_type, self.dtype = prediction_type, dtype
        self.order = {"memory_format": memory_format}
        self.key = {"seed": seed, "backend": backend}

    def __call__(self, batch: Batch) -> Noised:
        # One timestep and one noise for both images of a pair
        key = {**self.key, "pair_ids": batch.pair_ids, "draw": batch.draws}
        timesteps = noise.sample_timesteps(self.timesteps, summed=True, **key)
        given = (batch.latents, timesteps, self.alphas_cumprod)
        noisy, eps = noise.add_noise(*given, **key, **self.order)
        captions = torch.cat([batch.captions, batch.captions])
        embeddings = batch.embeddings.to(self.dtype).index_select(0, captions)
        return Noised(
            inputs=(noisy.to(self.dtype), torch.cat([timesteps, timesteps]), embeddings),
            conditions={"added_cond_kwargs": self.added(batch, captions), "return_dict": False},
            timesteps=timesteps,
            target=self.target(batch.latents, eps, timesteps).contiguous(**self.order),
        )

    def added(self, batch: Batch, captions: Tensor) -> dict[str, Tensor] | None:
        """SDXL's further conditions, [2B, …]: the caption is the pair's, the sizes each image's."""
        if batch.pooled is None:
            return None
        pooled = batch.pooled.to(self.dtype).index_select(0, captions)
        return {"text_embeds": pooled, "time_ids": batch.time_ids}

    def target(self, latents: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """What the models should predict: [B, …] shared by the pair (ε), or [2B, …]."""
        abar = self.alphas_cumprod[timesteps].repeat(2).reshape(-1, 1, 1, 1)
        signal, sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
        return {
            "epsilon": lambda: eps,
            "v_prediction": lambda: signal * eps.repeat(2, 1, 1, 1) - sigma * latents,
            "sample": lambda: latents,
        }[self.prediction_type]()
