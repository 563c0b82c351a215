"""Held-out pairs through the training's own forward: is it learning, or remembering?"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dde_fast.cache import Cache
from dde_fast.config import TrainConfig
from dde_fast.forward import PairForward
from dde_fast.loader import Loader, PairStream
from dde_fast.metrics import Meter

LAST_DRAW = 2**32 - 1
"""Held-out draws are counted down from here, training's epochs up from 0: they never meet."""


class HeldOut(PairStream):
    """Every pair in the set's own order, each time with the same timestep and noise."""

    def __getitem__(self, positions: slice) -> tuple[Tensor, Tensor]:
        rows, draws = super().__getitem__(positions)
        return rows, LAST_DRAW - draws

    def order(self, epoch: int) -> Tensor:
        return torch.arange(len(self.pair_ids))


class Validation:
    """The metrics of held-out pairs, with captions, at timesteps and noises fixed for the run.

    Args:
        cache: the held-out pairs.
        forward: the training's, whose models and loss are used.
        c: seed, number of draws and backend.
        micro_batch: pairs per forward on a rank.
    """

    def __init__(self, cache: Cache, forward: PairForward, c: TrainConfig, micro_batch: int):
        self.cache, self.forward, self.c = cache, forward, c
        self.device = forward.alphas_cumprod.device
        self.stream = HeldOut(cache.pair_ids, c.seed)
        total, rank, world_size = (
            c.validation_draws * len(cache),
            dist.get_rank(),
            dist.get_world_size(),
        )
        starts = range(0, total, micro_batch)
        rounds = -(-len(starts) // world_size)
        # where weights are split over ranks all must take part in each forward
        own = [starts[i % len(starts)] for i in range(rank, rounds * world_size, world_size)]
        self.slices = [(start, min(start + micro_batch, total)) for start in own]
        self.counted = [
            float(i < len(starts)) for i in range(rank, rounds * world_size, world_size)
        ]
        self.meter = Meter(self.device, len(forward.alphas_cumprod))

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        """As `Meter.read`; nothing of the training's state is changed. All ranks must call."""
        engine, loss_fn = self.forward.engine, self.forward.loss_fn
        engine.eval()
        loss_fn.eval()  # else it would observe ratios
        batches = Loader(
            self.cache,
            self.stream,
            self.slices,
            seed=self.c.seed,
            caption_dropout=0.0,
            device=self.device,
            backend=self.c.backend,
        )
        for batch, weight in zip(batches, self.counted, strict=True):
            self.meter.observe(self.forward(batch), weight)
        batches.close()
        engine.train()
        loss_fn.train()
        return self.meter.read()
