"""What a run writes while it trains: `metrics.jsonl`, TensorBoard, W&B and the progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dde_fast.loss import PreferenceOutput

BINS = 10
"""Equal parts of the schedule for which every metric of the pairs is logged by itself."""

OF_THE_MACHINE = frozenset({"pairs_per_second", "mfu", "data_wait", "memory_gib"})
"""What a record says of the machine; the rest depends on the run's configuration alone."""


class Meter:
    """Sums of metrics on the device; only `read` makes the host wait.

    Args:
        device: where the metrics are.
        length: of the schedule, T.
    """

    def __init__(self, device: torch.device, length: int):
        self.device, self.length = device, length
        lows = [-(-length * i // BINS) for i in range(BINS + 1)]  # the first t of each part
        width = len(str(length - 1))
        pairs = zip(lows, lows[1:], strict=False)
        self.labels = [f"{low:0{width}}-{high - 1:0{width}}" for low, high in pairs]
        self.parts = torch.arange(BINS, device=device)
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self.names: list[str] = []
        self.bins: Tensor | None = None  # [names + 1, BINS], the last row counts the pairs

    def add(self, metrics: dict[str, Tensor | float], weight: float = 1.0) -> None:
        """Add one observation of each."""
        for name, value in metrics.items():
            value = weight * torch.as_tensor(value, dtype=torch.float32, device=self.device)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def observe(self, out: PreferenceOutput, weight: float = 1.0) -> None:
        """Add the loss and the metrics of every pair, each in its part of the schedule."""
        self.add({"loss": out.loss.detach()}, weight * len(out.timesteps))
        metrics = out.per_pair()
        self.names = list(metrics)
        rows = torch.stack([*metrics.values(), torch.ones_like(out.timesteps)]).float()  # [·, B]
        inside = (out.timesteps * BINS // self.length)[:, None] == self.parts  # [B, BINS]
        # no index_add: on a GPU it adds in an order of its own, and a rerun would differ
        sums = torch.where(inside, weight * rows[:, :, None], 0.0).sum(1)
        self.bins = sums if self.bins is None else self.bins + sums

    def read(self) -> dict[str, Any]:
        """Means since the last reading, over the pairs of all ranks.

        Returns:
            name -> mean, and under "by_timestep" name -> part of the schedule -> mean, with the
            number of "pairs" behind it; parts without pairs are left out.
        """
        weights = torch.tensor(list(self.weights.values()), device=self.device)
        bins = self.bins.flatten() if self.bins is not None else weights.new_zeros(0)
        everything = torch.cat([torch.stack(list(self.sums.values())), weights, bins])
        dist.all_reduce(everything)
        values, count = everything.tolist(), len(self.sums)
        means = {
            name: total / weight
            for name, total, weight in zip(
                self.sums, values[:count], values[count : 2 * count], strict=True
            )
        }
        if self.bins is not None:
            rows = np.reshape(values[2 * count :], (-1, BINS))
            *sums, pairs = rows.tolist()
            there = [i for i in range(BINS) if pairs[i]]
            means |= {
                name: sum(row) / sum(pairs) for name, row in zip(self.names, sums, strict=True)
            }
            means["by_timestep"] = {"pairs": {self.labels[i]: int(pairs[i]) for i in there}} | {
                name: {self.labels[i]: row[i] / pairs[i] for i in there}
                for name, row in zip(self.names, sums, strict=True)
            }
        self.clear()
        return means


def tags(record: dict[str, Any], group: str = "") -> dict[str, float]:
    """A record flat, under names whose part before the slash is the group a dashboard shows."""
    flat = {}
    for name, value in record.items():
        if name == "by_timestep":
            for metric, parts in value.items():
                place = f"{group}_{metric}_by_timestep".removeprefix("_")
                flat |= {f"{place}/{part}": mean for part, mean in parts.items()}
        elif isinstance(value, dict):
            flat |= tags(value, name)
        elif name != "step":
            place = group or ("machine" if name in OF_THE_MACHINE else "train")
            flat[f"{place}/{name}"] = value
    return flat


class RunLog:
    """Log of a run, written by rank 0.

    Args:
        output: the run's directory.
        settings: for its `config.json`.
        steps: optimizer steps in all.
        start: those already done.
        batch: pairs per optimizer step.
        pairs_at_peak: pairs per second that the arithmetic of all devices would allow; None where
            it is not known, then no MFU is logged.
        wandb_project: also log to this project of Weights & Biases.
    """

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any],
        *,
        steps: int,
        start: int,
        batch: int,
        pairs_at_peak: float | None = None,
        wandb_project: str = "",
    ):
        self.last_step, self.last_time, self.batch = start, time.perf_counter(), batch
        self.output, self.pairs_at_peak, self.wandb = output, pairs_at_peak, None
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
        if wandb_project:
            self.wandb = start_wandb(wandb_project, output, settings)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside takes no time from the run's throughput."""
        begin = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - begin

    def write(self, step: int, metrics: dict[str, Any], learning_rate: float) -> None:
        """Log the means since the last time."""
        now = time.perf_counter()
        rate = (step - self.last_step) * self.batch / (now - self.last_time)
        self.last_step, self.last_time = step, now
        if self.active:
            record = {"step": step, **metrics, "learning_rate": learning_rate}
            record["pairs_per_second"] = rate
            if self.pairs_at_peak is not None:
                record["mfu"] = rate / self.pairs_at_peak
            record["memory_gib"] = peak_memory()
            with open(self.metrics, "a") as file:
                file.write(json.dumps(record) + "\n")
            for name, value in tags(record).items():
                self.tensorboard.add_scalar(name, value, step)
            if self.wandb is not None:
                self.wandb.log({**tags(record), "step": step})
            shown = {"loss": metrics["loss"], "accuracy": metrics.get("implicit_accuracy")}
            shown["held-out"] = metrics.get("validation", {}).get("implicit_accuracy")
            shown = {name: f"{value:.4g}" for name, value in shown.items() if value is not None}
            self.bar.set_postfix({**shown, "pairs/s": f"{rate:.1f}"})
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"loss: expected a finite number, got {metrics['loss']} before step {step}; resume "
                "from the last checkpoint with a smaller learning rate or beta"
            )

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Log a picture, and keep it as OUTPUT/NAME/step-STEP.png."""
        if not self.active:
            return
        path = self.output / name / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".new")
        picture.save(unfinished, "png")
        os.replace(unfinished, path)
        self.tensorboard.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self.wandb is not None:
            import wandb

            self.wandb.log({name: wandb.Image(str(path)), "step": step})

    def advance(self) -> None:
        """One optimizer step done."""
        self.bar.update()

    def close(self) -> None:
        """Write out what is pending."""
        self.bar.close()
        if self.active:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def check_wandb(project: str) -> None:
    """Refuse to log to Weights & Biases without its package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        if project:
            import wandb  # noqa: F401
    except ImportError:
        raise ValueError(
            f"wandb_project: expected the package wandb (pip install wandb) for {project!r}, got "
            "none installed"
        ) from None


def start_wandb(project: str, output: Path, settings: dict[str, Any]):
    """The W&B run of this output directory: a new one, or the one that a resumed run began."""
    import wandb

    identity = output / "wandb_run"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:8])
    run = wandb.init(
        project=project,
        name=output.name,
        id=identity.read_text(),
        resume="allow",
        dir=str(output),
        config=settings,
    )
    # charts over our step: W&B's own must never go back, and a resumed run takes steps again
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def peak_memory() -> float:
    """GiB: the device's peak on a GPU, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
