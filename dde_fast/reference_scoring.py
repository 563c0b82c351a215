"""Computes reference scores: every pair of a prepared cache through the frozen reference, K times.

    python -m dde_fast.prepare --output CACHE --model MODEL --reference_scores 4

Inference only, in batches as large as memory allows. Like encoding it is shared by the processes of
a machine (`torchrun`) and by machines (`--shard 3/16`) without their talking to each other: each
file belongs to one of them and is whole or not there, so the same command goes on after a kill.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dde_fast import models, schedule
from dde_fast.cache import Cache
from dde_fast.loader import Batch, InOrder, Loader
from dde_fast.loss import PreferenceLoss
from dde_fast.manifest import DTYPES, fingerprint_of, write_settings
from dde_fast.noising import Noising
from dde_fast.objectives import get_objective, timestep_probabilities
from dde_fast.reference_scores import SETTINGS, files_of, folder_of, settings_of
from dde_fast.shards import open_shard, write_shard


@dataclass
class ScoreConfig:
    """Reference scores: at which draws the reference is run, and how."""

    reference_scores: int = 0
    """Encode nothing, but run the model's UNet on every pair of the finished cache in `output`, at
    this many draws, and store its errors for training with --reference_scores; 0 = encode."""
    objective: str = "dde"
    """Of that training: its distribution of timesteps, which all but discounted share."""
    timestep_low: int = 0
    """Of that training."""
    timestep_high: int | None = None
    """Of that training."""
    caption_dropout: float = 0.1
    """Of that training."""
    precision: str = "float32"
    """That the reference runs in: as that training does."""
    score_batch: int = 16
    """Pairs per forward of the reference; memory grows with it."""


class ErrorOf:
    """A frozen model's mean square error on each half of a batch of pairs.

    Args:
        unet: called like a UNet.
        noising: what it is asked, and what it should answer.
        backend: of the error's kernel.
    """

    def __init__(self, unet, noising: Noising, backend: str = "auto"):
        self.unet, self.noising = unet, noising
        table = noising.alphas_cumprod
        options = {"prediction_type": noising.prediction_type, "backend": backend}
        # sft's error is that of its one model: the same sums as in a preference loss
        self.loss_fn = PreferenceLoss("sft", alphas_cumprod=table, **options).eval()
        self.loss_fn.to(table.device)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """float32 [2B], winners first."""
        noised = self.noising(batch)
        prediction = self.unet(*noised.inputs, **noised.conditions)[0]
        return self.loss_fn(prediction, None, noised.target, noised.timesteps).policy_error


def run(c: ScoreConfig, device: torch.device, part: int = 0, parts: int = 1) -> str:
    """Compute what is missing of one part of the scores; what there is to say.

    Args:
        c: a `prepare.PrepareConfig`: cache, model, seed and everything above.
        device: of the reference.
        part, parts: which share of the files is this process's.

    Raises:
        ValueError: `output` holds no finished cache, another model's, or damaged scores.
    """
    cache, dtype = Cache(c.output), DTYPES[c.precision]
    cache.check_model(c.model)
    unet, scheduler = models.load_unet(c.model), models.load_scheduler(c.model)
    alphas_cumprod = schedule.alphas_cumprod_of(scheduler)
    prediction_type = schedule.prediction_type_of(scheduler)
    same = ("objective", "timestep_low", "timestep_high", "caption_dropout", "seed")
    settings = settings_of(
        cache,
        reference=models.fingerprint(unet),
        alphas_cumprod=alphas_cumprod,
        prediction_type=prediction_type,
        dtype=dtype,
        **{name: getattr(c, name) for name in same},
    )
    probabilities = timestep_probabilities(
        get_objective(c.objective), len(alphas_cumprod), c.timestep_low, c.timestep_high
    )
    noising = Noising(
        alphas_cumprod.to(device),
        probabilities,
        prediction_type,
        seed=c.seed,
        dtype=dtype,
    )
    folder = Path(c.output) / folder_of(settings)
    write_settings(folder, settings, SETTINGS)
    names = {
        name: (draw, rows)
        for draw in range(c.reference_scores)
        for name, rows in files_of(draw, cache).items()
    }
    fingerprint = fingerprint_of(settings)
    todo = [name for name in list(names)[part::parts] if not _finished(folder / name, fingerprint)]
    if todo:
        unet = unet.to(device, dtype).eval().requires_grad_(False)
        of = ErrorOf(unet, noising)
        for name, errors in zip(todo, score(c, cache, of, [names[n] for n in todo]), strict=True):
            write_shard(folder / name, {"errors": errors}, fingerprint, {})
    missing = sum(not (folder / name).is_file() for name in names)
    done = f"{len(names) - missing} of {len(names)} files"
    return (
        f"reference scores: {c.reference_scores} draws of {len(cache)} pairs in {folder}"
        + f" ({done}; the other parts make the rest)" * bool(missing)
    )


def score(c: ScoreConfig, cache: Cache, of: ErrorOf, units: list[tuple[int, range]]):
    """Yields errors float32 [rows, 2] on the CPU of each unit, (draw, rows), as they get done."""
    n, size, batches_of = len(cache), c.score_batch, []
    for draw, rows in units:
        pieces = (rows[i : i + size] for i in range(0, len(rows), size))
        batches_of.append([(draw * n + r.start, draw * n + r.stop) for r in pieces])
    loader = Loader(
        cache,
        InOrder(cache.pair_ids, c.seed),
        [piece for pieces in batches_of for piece in pieces],
        seed=c.seed,
        caption_dropout=c.caption_dropout,
        device=of.noising.alphas_cumprod.device,
    )
    hidden = os.environ.get("LOCAL_RANK", "0") != "0"
    interval = 0.1 if sys.stderr.isatty() else 30
    total = sum(b - a for pieces in batches_of for a, b in pieces)
    with tqdm(
        desc="scoring", total=total, unit="pair", disable=hidden, mininterval=interval
    ) as bar:
        for pieces in batches_of:
            errors = []
            for a, b in pieces:
                errors.append(of(next(loader)).reshape(2, -1).T)
                bar.update(b - a)
            yield torch.cat(errors).cpu().contiguous()
    loader.close()


def _finished(path: Path, fingerprint: str) -> bool:
    """Whether a file is there; refused if it is damaged or of other scores."""
    if not path.is_file():
        return False
    if open_shard(path).fingerprint != fingerprint:
        raise ValueError(
            f"output: expected scores of {path.parent.name} in {str(path)!r}, got others; delete it"
        )
    return True
