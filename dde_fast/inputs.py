"""Everything a user named, read and checked before anything is started."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dde_fast import checkpoint, config, models, schedule
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.engine import say
from dde_fast.loss import PreferenceLoss
from dde_fast.pairs import PairTable, load_pairs

FREE_ON_RESUME = frozenset(
    "preset deepspeed_config model pairs split limit output resume steps gradient_checkpointing "
    "backend log_every save_every keep max_skipped max_winner_error local_rank".split()
)
"""What may differ between a run and its continuation. Model and pairs are compared by content."""


@dataclass
class Inputs:
    """Everything the user named, read and checked before anything is started."""

    model: str
    table: PairTable
    loss_fn: PreferenceLoss
    alphas_cumprod: Tensor
    """[T]."""
    timesteps: Tensor
    """float64 [T], the distribution they are drawn from."""
    unet: torch.nn.Module
    identity: dict[str, Any]
    start: checkpoint.Checkpoint | None


def read_inputs(c: TrainConfig, e: EngineConfig) -> Inputs:
    """Read pairs, model and checkpoint.

    Raises:
        ValueError, OSError: one of them is missing, broken, or not what the others need.
    """
    start = place_of_run(c)

    # The pairs
    model, pairs = c.model, c.pairs
    if model == "embedded" or pairs in config.PRESETS:
        from dde_fast import embedded

        model = str(embedded.model_path()) if model == "embedded" else model
        pairs = str(embedded.pairs_path(pairs, c.split)) if pairs in config.PRESETS else pairs
    table = load_pairs(pairs, c.split, c.limit)
    say(f"pairs: {table}")

    # The loss and the policy
    models.check_model(model)
    scheduler = models.load_scheduler(model)
    loss_fn = PreferenceLoss.from_scheduler(
        scheduler,
        c.objective,
        beta=c.beta,
        link=c.link,
        label_smoothing=c.label_smoothing,
        ratio_decay=c.ratio_decay,
        backend=c.backend,
    )
    loss_fn.auto_update = False  # once per optimizer step, over all micro-batches and ranks
    timesteps = loss_fn.timestep_probabilities(c.timestep_low, c.timestep_high)
    unet = models.load_unet(model)

    # What a continuation must share with its beginning
    identity = identity_of(c, e) | {
        "model": f"weights {models.fingerprint(unet)[:16]}",
        "pairs": f"content {table.fingerprint()[:16]}",
    }
    if start is not None:
        checkpoint.check_continues(start, identity)
    alphas_cumprod = schedule.alphas_cumprod_of(scheduler)
    return Inputs(model, table, loss_fn, alphas_cumprod, timesteps, unet, identity, start)


def place_of_run(c: TrainConfig) -> checkpoint.Checkpoint | None:
    """The checkpoint to continue from; None for a run that begins, in a place of its own.

    Raises:
        ValueError: nothing to continue, or a place that holds something else.
    """
    output = Path(c.output)
    used = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if c.resume == "auto":
        if used and not any((output / name).exists() for name in ("config.json", "cache")):
            raise ValueError(
                f"output: expected a run to continue, or a new or empty directory, got {c.output!r}"
            )
        if not checkpoint.any_in(output / "checkpoints"):
            return None
    elif not c.resume:
        if used:
            raise ValueError(
                f"output: expected a new or empty directory, got {c.output!r}; continue the run it "
                "holds with --resume latest, or choose another --output"
            )
        return None
    resume = "latest" if c.resume == "auto" else c.resume
    start, torn = checkpoint.find(resume, output / "checkpoints")
    for tag in torn:
        say(f"resume: skipped {tag}, which is torn; continuing from {start.path.name}")
    if start.step > c.steps:
        raise ValueError(f"steps: expected at least the {start.step} done, got {c.steps}")
    return start


def describe(config: TrainConfig, engine: EngineConfig) -> dict[str, Any]:
    """What `config.json` of a run holds."""
    return {"config": asdict(config), "deepspeed": engine.json}


def identity_of(config: TrainConfig, engine: EngineConfig) -> dict[str, Any]:
    """Everything that a run and its continuation must share, by name."""
    same = {key: value for key, value in asdict(config).items() if key not in FREE_ON_RESUME}
    for key in ("optimizer", "scheduler", "gradient_clipping"):
        same[f"deepspeed_config: {key}"] = engine.json.get(key)
    same["deepspeed_config: ZeRO stage"] = engine.stage
    same["deepspeed_config: precision"] = str(engine.dtype).removeprefix("torch.")
    same["deepspeed_config: pairs per optimizer step"] = engine.batch
    return same
