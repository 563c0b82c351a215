"""What a run writes while it trains: `metrics.jsonl`, TensorBoard and the progress bar."""

from __future__ import annotations

import json
import math
import os
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
    """Means of metrics, summed on the device; only `read` makes the host wait.

    A value that is not finite is left out: the optimizer step that it belongs to is skipped and
    counted, and it would hide the others.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        """Add one observation of each."""
        values = torch.stack([self._tensor(value) for value in metrics.values()])
        finite = values.isfinite()
        seen = torch.stack([values.where(finite, 0.0), finite.float()])  # [2, n]: sums, counts
        names = tuple(metrics)
        self.sums[names] = self.sums[names] + seen if names in self.sums else seen

    def read(self, also: dict[str, Tensor] | None = None) -> dict[str, float]:
        """Means since the last reading, over all ranks (nan where no value was finite), and what
        else is to be read, [] each and the same on all ranks."""
        also = also or {}
        sums = torch.cat(list(self.sums.values()), dim=1)
        dist.all_reduce(sums)
        names = [name for group in self.sums for name in group] + list(also)
        values = torch.cat([sums[0] / sums[1], *(value.reshape(1) for value in also.values())])
        self.sums = {}
        return dict(zip(names, values.tolist(), strict=True))

    def _tensor(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self.device, torch.float32)
        return torch.full((), value, dtype=torch.float32, device=self.device)


def winner_warning(metrics: dict[str, float], multiple: float) -> str | None:
    """What to tell of a policy that forgets the winners, its error on them being more than this
    multiple of the reference's."""
    policy, reference = metrics.get("policy_win_error"), metrics.get("reference_win_error")
    if policy is None or reference is None or not policy > multiple * reference:
        return None
    return (
        f"the policy's error on winners, {policy:.4g}, is {policy / reference:.2g} times the "
        "reference's: images degrade, however good the accuracy looks; start again with a lower "
        "--learning_rate or a larger --beta"
    )


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
        # by replacing it: a kill in between would lose the others
        (output / "metrics.new").write_text("".join(line + "\n" for line in kept))
        os.replace(output / "metrics.new", self.metrics)
        self.tensorboard = SummaryWriter(output / "tensorboard", purge_step=start + 1)

    def write(
        self, step: int, metrics: dict[str, float], learning_rate: float, warning: str | None = None
    ) -> None:
        """Log the means since the last time; a warning is shown, too."""
        now = time.perf_counter()
        rate = (step - self.last_step) * self.batch / (now - self.last_time)
        self.last_step, self.last_time = step, now
        if self.active:
            extra = {"learning_rate": learning_rate, "pairs_per_second": rate}
            record = {"step": step, **metrics, **extra, "memory_gib": peak_memory()}
            for name, value in record.items():
                self.tensorboard.add_scalar(name, value, step)
            # JSON knows no nan, which is the mean of nothing
            record = {name: v if math.isfinite(v) else None for name, v in record.items()}
            with open(self.metrics, "a") as file:
                line = record if warning is None else {**record, "warning": warning}
                file.write(json.dumps(line) + "\n")
            if warning is not None:
                self.bar.write(f"warning: step {step}: {warning}")
            shown = {"loss": metrics["loss"], "accuracy": metrics.get("implicit_accuracy")}
            shown = {name: f"{value:.4g}" for name, value in shown.items() if value is not None}
            self.bar.set_postfix({**shown, "pairs/s": f"{rate:.1f}"})

    def advance(self, step: int) -> None:
        """So many optimizer steps are done."""
        self.bar.update(step - self.bar.n)

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
