"""The training step of published Diffusion-DPO scripts: the baseline of `bench_train_step.py`.

Written from its description, as its authors would write it well: images are decoded in worker
processes, VAE and text encoders run in the step in the compute dtype, policy and reference run on
winners and losers together, the loss is eager, its parts are read by the host for the log in every
micro-batch, and the optimizer is PyTorch's AdamW as it comes. With one process there is nothing to
gather.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dde_fast.loader import Loader
from dde_fast.models import Encoders


@dataclass
class Inputs:
    """A micro-batch of B pairs, winners first."""

    latents: Tensor
    """[2B, C, h, w]."""
    embeddings: Tensor
    """[B, L, D]."""
    pooled: Tensor | None
    """[B, P] for SDXL."""
    time_ids: Tensor | None
    """[2B, 6] for SDXL."""


class Pictures(Dataset):
    """Rows in Pick-a-Pic's columns, over and over: pixels [2, 3, H, W] in [-1, 1], winner first, and
    tokens.

    Its epoch is as long as that of a real set: a DataLoader prefetches nothing across its end."""

    EPOCH = 10**6

    def __init__(self, parquet: Path, size: int, tokenizers: list):
        self.rows, self.size = pq.read_table(parquet).to_pylist(), size
        self.tokenizers = tokenizers

    def __len__(self) -> int:
        return self.EPOCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index % len(self.rows)]
        names = ("jpg_0", "jpg_1") if row["label_0"] else ("jpg_1", "jpg_0")
        tokens = {
            f"tokens_{i}": tokenizer(
                row["caption"],
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids[0]
            for i, tokenizer in enumerate(self.tokenizers)
        }
        return tokens | {"pixels": torch.stack([self._pixels(row[name]) for name in names])}

    def _pixels(self, data: bytes) -> Tensor:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        scale = self.size / min(picture.size)
        picture = picture.resize([round(scale * side) for side in picture.size])
        left, top = ((side - self.size) // 2 for side in picture.size)
        picture = picture.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1


class Encoding:
    """Micro-batches encoded when they are asked for."""

    def __init__(
        self, encoders: Encoders, parquet: Path, *, size: int, pairs: int, dtype: torch.dtype
    ):
        self.encoders, self.size, self.waited = encoders, size, 0.0
        self.parts = [encoders.vae.to(dtype), *(e.to(dtype) for e in encoders.text_encoders)]
        cuda = encoders.device.type == "cuda"
        workers = 8 if cuda else 1
        self.loader = DataLoader(
            Pictures(parquet, size, encoders.tokenizers),
            batch_size=pairs,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=True,
            pin_memory=cuda,
            # a forked one would hold the weights as they were before their first update
            multiprocessing_context=None if cuda else "spawn",
        )
        self.ahead = workers * self.loader.prefetch_factor
        """Micro-batches that may be ready."""
        self.batches = itertools.chain.from_iterable(itertools.repeat(self.loader))

    @torch.no_grad()
    def __call__(self) -> Inputs:
        began = time.perf_counter()
        rows = next(self.batches)
        self.waited += time.perf_counter() - began
        rows = {name: rows[name].to(self.encoders.device, non_blocking=True) for name in rows}
        vae, family = self.encoders.vae, self.encoders.family
        pixels = torch.cat([rows["pixels"][:, 0], rows["pixels"][:, 1]]).to(vae.dtype)
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        outputs = [
            encoder(rows[f"tokens_{i}"], output_hidden_states=True)
            for i, encoder in enumerate(self.encoders.text_encoders)
        ]
        hidden = torch.cat([family.hidden(output) for output in outputs], dim=-1)
        if not family.pooled:
            return Inputs(latents, hidden, None, None)
        ids = torch.tensor([self.size, self.size, 0, 0, self.size, self.size])
        time_ids = ids.to(latents).expand(len(latents), 6)
        return Inputs(latents, hidden, outputs[-1][0], time_ids)


class Encoded:
    """Micro-batches that the trainer's loader reads from a prepared cache."""

    def __init__(self, batches: Loader):
        self.batches = batches

    @property
    def waited(self) -> float:
        return self.batches.waited

    def __call__(self) -> Inputs:
        batch = next(self.batches)
        texts, pooled = batch.embeddings[batch.captions], batch.pooled
        pooled = None if pooled is None else pooled[batch.captions]
        return Inputs(batch.latents, texts, pooled, batch.time_ids)


@dataclass
class Policy:
    """What is trained, without an engine."""

    unet: torch.nn.Module
    optimizer: torch.optim.Optimizer
    autocast: torch.dtype | None
    """Compute dtype of a policy whose weights are in another."""
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self):
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]

    def __call__(self, *args, **kwargs) -> tuple[Tensor]:
        device = self.parameters[0].device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return self.unet(*args, **kwargs)

    def update(self) -> None:
        """Clip, step, and forget the gradient."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class PublishedStep:
    """One optimizer step of Diffusion-DPO on what `inputs` gives for each micro-batch."""

    def __init__(
        self,
        policy: Policy,
        reference: torch.nn.Module,
        scheduler,
        *,
        beta: float,
        accumulation: int,
        dtype: torch.dtype,
    ):
        self.policy, self.reference, self.scheduler = policy, reference, scheduler
        self.beta, self.accumulation, self.dtype = beta, accumulation, dtype
        self.log: dict[str, float] = {}

    def __call__(self, inputs: Callable[[], Inputs]) -> None:
        for _ in range(self.accumulation):
            self.micro_batch(inputs())
        self.policy.update()

    def micro_batch(self, batch: Inputs) -> None:
        latents = batch.latents.to(self.dtype)
        # both images of a pair at one timestep, with one noise
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(latents),), device=latents.device)
        timesteps = timesteps.chunk(2)[0].repeat(2)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        conditions = {"encoder_hidden_states": batch.embeddings.to(self.dtype).repeat(2, 1, 1)}
        if batch.pooled is not None:
            pooled = batch.pooled.to(self.dtype).repeat(2, 1)
            added = {"text_embeds": pooled, "time_ids": batch.time_ids}
            conditions["added_cond_kwargs"] = added

        losses = self.errors(self.policy, noise, noisy, timesteps, conditions)
        with torch.no_grad():
            ref_losses = self.errors(self.reference, noise, noisy, timesteps, conditions)
        losses_w, losses_l = losses.chunk(2)
        ref_losses_w, ref_losses_l = ref_losses.chunk(2)
        inside = -0.5 * self.beta * ((losses_w - losses_l) - (ref_losses_w - ref_losses_l))
        loss = -torch.nn.functional.logsigmoid(inside).mean()
        self.log = {
            "train_loss": loss.item() / self.accumulation,
            "mse": losses.mean().item(),
            "reference_mse": ref_losses.mean().item(),
            "implicit_accuracy": (inside > 0).float().mean().item(),
        }
        (loss / self.accumulation).backward()
        self.log["step_loss"] = loss.detach().item()  # for the progress bar

    def errors(self, unet, noise: Tensor, noisy: Tensor, timesteps: Tensor, conditions) -> Tensor:
        """[2B]."""
        prediction = unet(noisy, timesteps, **conditions, return_dict=False)[0]
        return (prediction - noise).pow(2).mean(dim=[1, 2, 3])
