"""The prompts of an online run: group after group of trajectories, each as often as it has steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dde_fast.loader import PairStream
from dde_fast.prompts import read_prompts


class Prompts:
    """The prompts of a run, numbered in their order.

    Args:
        prompts, split: as in `prompts.read_prompts`.

    Raises:
        ValueError: as there.
    """

    def __init__(self, prompts: str, split: str):
        self.name, self.names = prompts, read_prompts(prompts, split=split)
        self.fingerprint = hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{len(self.names)} of {self.name}"


@dataclass
class PromptBatch:
    """One denoising step of B trajectories."""

    captions: list[str]
    prompt_ids: Tensor
    """int64 [B], on the device."""
    epochs: Tensor
    """int64 [B]: how often each prompt was drawn before."""
    step: int
    """Which of the trained steps, 0 … S-1: 0 begins new trajectories."""


class PromptStream:
    """Iterates over the denoising steps of group after group.

    Args:
        prompts: what to draw from, epoch after epoch, each in an order of its own.
        slices: (start, stop) of each group in the stream.
        steps: S, how often each group comes.
        seed: of the order.
        device: of the batches.
    """

    waited = 0.0
    """As `Loader.waited`."""

    def __init__(
        self,
        prompts: Prompts,
        slices: Iterable[tuple[int, int]],
        steps: int,
        *,
        seed: int,
        device: torch.device,
    ):
        self.prompts, self.steps, self.device = prompts, steps, device
        self.stream = PairStream(torch.arange(len(prompts.names)), seed)
        self._batches = self._all(slices)

    def __next__(self) -> PromptBatch:
        return next(self._batches)

    def _all(self, slices: Iterable[tuple[int, int]]) -> Iterator[PromptBatch]:
        for start, stop in slices:
            rows, epochs = self.stream[start:stop]
            captions = [self.prompts.names[i] for i in rows.numpy()]
            if self.device.type == "cuda":
                rows, epochs = rows.pin_memory(), epochs.pin_memory()
            rows, epochs = (x.to(self.device, non_blocking=True) for x in (rows, epochs))
            for step in range(self.steps):
                yield PromptBatch(captions, rows, epochs, step)

    def close(self) -> None:
        """Nothing runs ahead."""
