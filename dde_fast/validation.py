"""Held-out pairs through the training's own forward: is it learning, or remembering?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dde_fast.cache import EncodedPairs, PairStream
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.forward import PairForward
from dde_fast.inputs import Inputs
from dde_fast.metrics import Meter

LAST_DRAW = 2**32 - 1
"""Held-out draws are counted down from here, training's epochs up from 0: they never meet."""


class HeldOut(PairStream):
    """Every pair in its own order, each time with the same timestep and noise."""

    def __getitem__(self, positions: slice) -> tuple[Tensor, Tensor]:
        pairs, draws = super().__getitem__(positions)
        return pairs, LAST_DRAW - draws

    def order(self, epoch: int) -> Tensor:
        return torch.arange(len(self.data), device=self.data.pair_ids.device)


class Validation:
    """The metrics of held-out pairs, with captions, at timesteps and noises fixed for the run.

    Args:
        data: the held-out pairs.
        trained: the training's forward, whose models and loss are used.
        c, e, inputs: as for `trained`.
    """

    def __init__(
        self,
        data: EncodedPairs,
        trained: PairForward,
        c: TrainConfig,
        e: EngineConfig,
        inputs: Inputs,
    ):
        models = (trained.engine, trained.reference, trained.loss_fn)
        with_captions = replace(c, caption_dropout=0.0)
        self.forward = PairForward(with_captions, e, inputs, HeldOut(data, c.seed), *models)
        self.total, self.micro_batch = c.validation_draws * len(data), e.micro_batch
        self.meter = Meter(trained.alphas_cumprod.device, len(trained.alphas_cumprod))

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        """As `Meter.read`; nothing of the training's state is changed. All ranks must call."""
        engine, loss_fn = self.forward.engine, self.forward.loss_fn
        engine.eval()
        loss_fn.eval()  # else it would observe ratios
        starts = range(0, self.total, self.micro_batch)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        for first in range(0, len(starts), world_size):
            # where weights are split over ranks all must take part in each forward
            own = first + rank < len(starts)
            start = starts[first + rank] if own else 0
            stop = min(start + self.micro_batch, self.total)
            self.meter.observe(self.forward(start, stop), weight=float(own))
        engine.train()
        loss_fn.train()
        return self.meter.read()
