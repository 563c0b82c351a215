"""What a run writes while it trains: `metrics.jsonl`, TensorBoard and the progress bar."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Meter:
    """Sums of metrics on the device; only `read` makes the host wait."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        """Add one observation of each."""
        for name, value in metrics.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Means since the last reading, over all ranks."""
        means = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        dist.all_reduce(means)
        values = dict(zip(self.sums, (means / dist.get_world_size()).tolist(), strict=True))
        self.sums, self.counts = {}, {}
        return values


class RunLog:
    """Log of a run, written by rank 0.

    Args:
        output: the run's directory.
        settings: for its `config.json`.
        steps: optimizer steps in all.
        start: those already done.
        batch: pairs per optimizer step.
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], *, steps: int, start: int, batch: int
    ):
        self.last_step, self.last_time, self.batch = start, time.perf_counter(), batch
        self.active = dist.get_rank() == 0
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not self.active,
            mininterval=0.1 if sys.stderr.isatty() else 30,
        )
        if not self.active:
            return
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        self.metrics = output / "metrics.jsonl"
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        # a run killed after its last checkpoint has logged steps that are taken again now
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        self.metrics.write_text("".join(line + "\n" for line in kept))
        self.tensorboard = SummaryWriter(output / "tensorboard", purge_step=start + 1)

    def write(self, step: int, metrics: dict[str, float], learning_rate: float) -> None:
        """Log the means since the last time."""
        now = time.perf_counter()
        rate = (step - self.last_step) * self.batch / (now - self.last_time)
        self.last_step, self.last_time = step, now
        if self.active:
            extra = {"learning_rate": learning_rate, "pairs_per_second": rate}
            record = {"step": step, **metrics, **extra, "memory_gib": peak_memory()}
            with open(self.metrics, "a") as file:
                file.write(json.dumps(record) + "\n")
            for name, value in record.items():
                self.tensorboard.add_scalar(name, value, step)
            shown = {"loss": metrics["loss"], "accuracy": metrics.get("implicit_accuracy")}
            shown = {name: f"{value:.4g}" for name, value in shown.items() if value is not None}
            self.bar.set_postfix({**shown, "pairs/s": f"{rate:.1f}"})
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"loss: expected a finite number, got {metrics['loss']} before step {step}; resume "
                "from the last checkpoint with a smaller learning rate or beta"
            )

    def advance(self) -> None:
        """One optimizer step done."""
        self.bar.update()

    def close(self) -> None:
        """Write out what is pending."""
        self.bar.close()
        if self.active:
            self.tensorboard.close()


def peak_memory() -> float:
    """GiB: the device's peak on a GPU, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
