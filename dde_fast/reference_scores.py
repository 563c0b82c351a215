"""Reference scores: the frozen reference's errors, computed once per pair and draw.

What a pair sees in its draw d (timestep, noise, sample of the VAE's posterior, caption or none) is a
function of (seed, pair id, d), so the reference's error on it is one number for the winner and one
for the loser. They lie beside the pairs they belong to, in the cache's folder:

    reference-KEY/settings.json                  what they follow from; KEY is its hash
    reference-KEY/draw-000-00000.safetensors     errors float32 [rows, 2] of draw 0: winner, loser;
                                                 rows as in the cache, the same number in each file

Training on them runs no reference: epoch e sees draw e modulo K.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from dde_fast.cache import Cache
from dde_fast.manifest import fingerprint_of
from dde_fast.objectives import get_objective
from dde_fast.shards import check_content, open_shard

SETTINGS, PREFIX = "settings.json", "reference-"
SHARDS = 8
"""Pairs per file, in the cache's shard size: what a killed process does again."""
COMMAND = "python -m dde_fast.prepare --reference_scores"
"""What computes them."""


def settings_of(
    cache: Cache,
    *,
    reference: str,
    alphas_cumprod: Tensor,  # [T]
    prediction_type: str,
    seed: int,
    objective: str,
    timestep_low: int,
    timestep_high: int | None,
    caption_dropout: float,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Everything that reference scores follow from, for a reader and for their key.

    Args:
        cache: of the pairs.
        reference: fingerprint of its weights.
        alphas_cumprod, prediction_type: of its schedule.
        seed, timestep_low, timestep_high, caption_dropout: of the training, as in `TrainConfig`.
        objective: of the training; only its distribution of timesteps counts, which all but
            `discounted` share.
        dtype: that the reference runs in.
    """
    table = alphas_cumprod.detach().double().cpu()
    return {
        "pairs": cache.fingerprint,
        "reference": reference,
        "schedule": hashlib.sha256(table.numpy().tobytes()).hexdigest(),
        "prediction_type": prediction_type,
        "timesteps": get_objective(objective).timesteps.__name__,
        "timestep_low": timestep_low,
        "timestep_high": len(table) if timestep_high is None else timestep_high,
        "caption_dropout": caption_dropout,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
    }


def folder_of(settings: dict[str, Any]) -> str:
    """Name of the folder, in the cache's, of scores with these settings."""
    return PREFIX + fingerprint_of(settings)[:16]


def files_of(draw: int, cache: Cache) -> dict[str, range]:
    """The files that hold one draw of a cache's pairs, by name, and the rows in each."""
    size, pairs = SHARDS * cache.shard_size, len(cache)
    return {
        f"draw-{draw:03d}-{block:05d}.safetensors": range(start, min(start + size, pairs))
        for block, start in enumerate(range(0, pairs, size))
    }


class ReferenceScores:
    """The reference's errors on every pair of a cache at K draws, in memory.

    Args:
        errors: float32 [K, pairs, 2], the winner's and the loser's.
    """

    def __init__(self, errors: Tensor):
        self.errors, self.draws = errors, len(errors)

    def of(
        self,
        index: Tensor,  # int64 [B]
        draws: Tensor,  # int64 [B]
    ) -> Tensor:
        """float32 [2B], winners first."""
        return self.errors[draws, index].T.reshape(-1)

    @classmethod
    def open(
        cls, cache: Cache, settings: dict[str, Any], draws: int, command: str = COMMAND
    ) -> ReferenceScores:
        """Read K draws of the scores in a cache that follow from these settings.

        Args:
            cache: of the pairs.
            settings: as `settings_of` gives them.
            draws: K.
            command: what computes them, for the message.

        Raises:
            ValueError: there are none, fewer draws than asked for, or a damaged file; the message
                says how those that are there differ.
        """
        files, root = LocalFileSystem(), str(Path(cache.location).absolute())
        if "://" in cache.location:
            files, root = fsspec.url_to_fs(cache.location)
        place = f"{root}/{folder_of(settings)}"
        if not files.isdir(place):
            raise ValueError(_explain(files, root, cache, settings, command))
        found: list[Tensor] = []
        for draw in range(draws):
            names = files_of(draw, cache)
            if not all(files.isfile(f"{place}/{name}") for name in names):
                raise ValueError(
                    f"reference_scores: expected at most the {len(found)} whole draws in "
                    f"{cache.location!r}, got {draws}; run {command}"
                )
            blocks = [_read(files, f"{place}/{name}", settings) for name in names]
            found.append(torch.cat(blocks))
            if found[-1].shape != (len(cache), 2):
                raise ValueError(
                    f"reference_scores: expected errors {[len(cache), 2]} of draw {draw} in "
                    f"{place!r}, got {list(found[-1].shape)}; delete its files and compute it again"
                )
        return cls(torch.stack(found))


def _read(files: fsspec.AbstractFileSystem, path: str, settings: dict[str, Any]) -> Tensor:
    """Errors [rows, 2] out of one file, compared with its checksum."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(path).name
        files.get_file(path, str(copy))
        try:
            shard = open_shard(copy)
            check_content(shard, copy)
            if shard.fingerprint == fingerprint_of(settings):
                return shard.tensors["errors"].float().clone()
            raise ValueError(f"made for {shard.fingerprint[:16]}")
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"reference_scores: expected a whole file of this run's scores in {path!r}, got "
                f"another ({error}); delete it and compute it again"
            ) from None


def _explain(files, root: str, cache: Cache, settings: dict[str, Any], command: str) -> str:
    """Why no scores in a cache fit: what the nearest ones were made with."""
    others = []
    for path in files.ls(root, detail=False):
        if Path(path).name.startswith(PREFIX) and files.isfile(f"{path}/{SETTINGS}"):
            others.append(json.loads(files.cat_file(f"{path}/{SETTINGS}")))
    differing = [
        [key for key, value in settings.items() if other.get(key) != value] for other in others
    ]
    got = "none"
    if others:
        nearest = min(range(len(others)), key=lambda i: len(differing[i]))
        got = "scores of " + ", ".join(
            f"{key} {others[nearest].get(key)!r} instead of {settings[key]!r}"
            for key in differing[nearest]
        )
    return (
        f"reference_scores: expected scores of this run's reference, pairs and draws in "
        f"{cache.location!r}, got {got}; run {command}"
    )
