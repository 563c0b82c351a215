"""What a run writes while it trains: `metrics.jsonl`, TensorBoard, W&B and the progress bar."""

from __future__ import annotations

import contextlib
import io
import json
import math
import resource
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
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
from dde_fast.shards import sweep, write_file

BINS = 10
"""Equal parts of the schedule for which every metric of the pairs is logged by itself."""

OF_THE_MACHINE = frozenset(
    {"pairs_per_second", "mfu", "data_wait", "memory_gib", "compile_seconds"}
)
"""What a record says of the machine; the rest depends on the run's configuration alone."""


class Meter:
    """Means of metrics, summed on the device; only `read` makes the host wait.

    A value that is not finite is left out: the optimizer step that it belongs to is skipped and
    counted, and it would hide the others.

    Args:
        device: where the metrics are.
        length: of the schedule, T.
    """

    def __init__(self, device: torch.device, length: int):
        self.device, self.length = device, length
        lows = [-(-length * i // BINS) for i in range(BINS + 1)]  # the first t of each part
        width = len(str(length - 1))
        self.labels = [f"{lows[i]:0{width}}-{lows[i + 1] - 1:0{width}}" for i in range(BINS)]
        self.parts = torch.arange(BINS, device=device)
        self.sums: dict[tuple[str, ...], Tensor] = {}  # names -> [2, names]: sums, weights
        self.bins: dict[tuple[str, ...], Tensor] = {}  # names -> [2, names, BINS]

    def add(self, metrics: dict[str, Tensor | float], weight: float = 1.0) -> None:
        """Add one observation of each."""
        values = torch.stack([self._tensor(value) for value in metrics.values()])
        self._accumulate(self.sums, metrics, weight * _finite(values))

    def observe(self, out: PreferenceOutput, weight: float = 1.0) -> None:
        """Add the loss and the metrics of every pair, each in its part of the schedule."""
        self.add({"loss": out.loss.detach()}, weight * len(out.timesteps))
        metrics = out.per_pair()
        seen = weight * _finite(torch.stack(list(metrics.values())).float())  # [2, names, B]
        inside = (out.timesteps * BINS // self.length)[:, None] == self.parts  # [B, BINS]
        # no index_add: on a GPU it adds in an order of its own, and a rerun would differ
        self._accumulate(self.bins, metrics, torch.where(inside, seen[..., None], 0.0).sum(2))

    def read(self, also: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """Means since the last reading, over the pairs of all ranks.

        Args:
            also: what else is to be read, [] each and the same on all ranks.

        Returns:
            name -> mean (nan where no value was finite), and under "by_timestep" name -> part of
            the schedule -> mean, with the number of "pairs" behind it; parts without are left out.
        """
        also = also or {}
        flat = [part.flatten(1) for sums in (self.sums, self.bins) for part in sums.values()]
        everything = torch.cat(flat, dim=1)
        dist.all_reduce(everything)
        more = [value.float().reshape(1) for value in also.values()]
        values = np.array(torch.cat([everything.flatten(), *more]).tolist())
        totals, weights = values[: everything.numel()].reshape(2, -1)
        means = _means([name for names in self.sums for name in names], totals, weights)
        first = len(means)
        means |= dict(zip(also, values[everything.numel() :].tolist(), strict=True))
        names = [name for names in self.bins for name in names]
        self.sums, self.bins = {}, {}
        if not names:
            return means
        totals, weights = (x[first:].reshape(-1, BINS) for x in (totals, weights))
        means |= _means(names, totals.sum(1), weights.sum(1))
        means["by_timestep"] = {
            "pairs": {self.labels[i]: int(n) for i, n in enumerate(weights[0]) if n}
        } | {
            name: _means((self.labels[i] for i in n.nonzero()[0]), total[n > 0], n[n > 0])
            for name, total, n in zip(names, totals, weights, strict=True)
        }
        return means

    def _accumulate(self, sums: dict, metrics: dict, seen: Tensor) -> None:
        names = tuple(metrics)
        sums[names] = sums[names] + seen if names in sums else seen

    def _tensor(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self.device, torch.float32)
        return torch.full((), value, dtype=torch.float32, device=self.device)


def _finite(values: Tensor) -> Tensor:
    """[2, …]: the values with zeros for what is not finite, and ones with zeros there."""
    finite = values.isfinite()
    return torch.stack([values.where(finite, 0.0), finite.float()])


def _means(names: Iterable[str], totals: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    with np.errstate(invalid="ignore"):  # nothing over nothing is nan
        return dict(zip(names, (totals / weights).tolist(), strict=False))


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
        self.last_step, self.last_time, self.last_waited = start, time.perf_counter(), 0.0
        self.batch, self.rates = batch, []
        self.compile_seconds = 0.0
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
        sweep(output)
        write_file(output / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
        self.metrics = output / "metrics.jsonl"
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        # a run killed after its last checkpoint has logged steps that are taken again now
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        write_file(self.metrics, "".join(line + "\n" for line in kept).encode())
        self.tensorboard = SummaryWriter(output / "tensorboard", purge_step=start + 1)
        if wandb_project:
            self.wandb = start_wandb(wandb_project, output, settings)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside takes no time from the run's throughput."""
        begin = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - begin

    def compiled(self, seconds: float) -> None:
        """Tell how long torch.compile has just taken, which counts in no throughput."""
        if seconds:
            self.last_time += seconds
            self.compile_seconds += seconds
            if self.active:
                self.bar.write(f"torch.compile took {seconds:.1f} s of the last step")

    def write(
        self,
        step: int,
        metrics: dict[str, Any],
        learning_rate: float,
        waited: float = 0.0,
        warning: str | None = None,
    ) -> None:
        """Log the means since the last time.

        Args:
            step: optimizer steps done.
            metrics: as `Meter.read` gives them.
            learning_rate: of the last step.
            waited: seconds spent waiting for data since the start; `data_wait` is their share.
            warning: is shown, too.
        """
        now = time.perf_counter()
        seconds, data_wait = now - self.last_time, waited - self.last_waited
        rate = (step - self.last_step) * self.batch / seconds
        self.rates.append(rate)
        self.last_step, self.last_time, self.last_waited = step, now, waited
        if self.active:
            record = {"step": step, **metrics, "learning_rate": learning_rate}
            record |= {"pairs_per_second": rate, "data_wait": data_wait / seconds}
            if self.pairs_at_peak is not None:
                record["mfu"] = rate / self.pairs_at_peak
            record["memory_gib"] = peak_memory()
            if self.compile_seconds:
                record["compile_seconds"], self.compile_seconds = self.compile_seconds, 0.0
            with open(self.metrics, "a") as file:
                line = record if warning is None else {**record, "warning": warning}
                file.write(json.dumps(_for_json(line)) + "\n")
            if warning is not None:
                self.bar.write(f"warning: step {step}: {warning}")
            for name, value in tags(record).items():
                self.tensorboard.add_scalar(name, value, step)
            if self.wandb is not None:
                self.wandb.log({**tags(record), "step": step})
            shown = {"loss": metrics["loss"], "accuracy": metrics.get("implicit_accuracy")}
            shown["held-out"] = metrics.get("validation", {}).get("implicit_accuracy")
            shown = {name: f"{value:.4g}" for name, value in shown.items() if value is not None}
            self.bar.set_postfix({**shown, "pairs/s": f"{rate:.1f}"})

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Log a picture, and keep it as OUTPUT/NAME/step-STEP.png."""
        if not self.active:
            return
        path = self.output / name / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        file = io.BytesIO()
        picture.save(file, "png")
        write_file(path, file.getvalue())
        self.tensorboard.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self.wandb is not None:
            import wandb

            self.wandb.log({name: wandb.Image(str(path)), "step": step})

    def advance(self, step: int) -> None:
        """So many optimizer steps are done."""
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Write out what is pending."""
        self.bar.close()
        if self.active:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _for_json(value: Any) -> Any:
    """JSON knows no nan, which is the mean of nothing."""
    if isinstance(value, dict):
        return {name: _for_json(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_wandb(project: str) -> None:
    """Refuse to log to Weights & Biases without its package.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        if project:
            import wandb  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"wandb_project: expected the package wandb (pip install wandb), got {error}"
        ) from None


def start_wandb(project: str, output: Path, settings: dict[str, Any]):
    """The W&B run of this output directory: a new one, or the one that a resumed run began."""
    import wandb

    identity = output / "wandb_run"
    if not identity.exists():
        write_file(identity, uuid.uuid4().hex[:8].encode())
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
