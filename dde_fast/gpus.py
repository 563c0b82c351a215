"""The GPUs that `--plan` plans for: those asked for, or this machine's."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from dde_fast.config import TrainConfig
from dde_fast.flops import peak_of


@dataclass(frozen=True)
class Gpus:
    """What is to be trained on."""

    count: int
    memory: int
    """Bytes of each."""
    name: str
    peak: float | None
    """10¹² operations per second of each; None where not known."""


def find_gpus(c: TrainConfig, dtype: torch.dtype) -> Gpus:
    """The GPUs to plan for: those asked for, else this machine's.

    Raises:
        ValueError: there are none, and none were asked for.
    """
    here = torch.cuda.device_count()
    if not (here or c.plan_memory):
        raise ValueError(
            "plan_memory: expected the GiB of a GPU, as this machine has none, got 0; with "
            "--plan_gpus and --plan_memory other machines can be planned for"
        )
    count = c.plan_gpus or max(here, int(os.environ.get("WORLD_SIZE", 1)))
    if c.plan_memory:
        return Gpus(count, round(c.plan_memory * 2**30), "", c.peak_tflops or None)
    found = torch.cuda.get_device_properties(0)
    peak = peak_of(c, dtype, torch.device("cuda", 0))
    return Gpus(count, found.total_memory, found.name, peak)
