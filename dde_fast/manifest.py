"""What a prepared cache consists of, and the manifest that says so.

    settings.json               what it is made from and how; its hash is the cache's fingerprint
    prompts-00000.safetensors   embeddings [n, L, D] and, for SDXL, pooled [n, P]; row 0 of the
                                first is the empty caption
    images-00000.safetensors    mean and std [n, C, h, w] of the VAE's posterior, sizes [n, 4]
    pairs.safetensors           pair_ids, winners, losers, prompts: int64 [pairs]
    rejected.jsonl              every pair left out, with its reason
    manifest.json               counts, versions, size and SHA-256 of each shard; written last

Each distinct image and prompt has one row; a pair is three row numbers. Rows are numbered through
the shards, all of the same number of rows but the last.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dde_fast.provenance import version
from dde_fast.shards import PARTIAL, Shard, open_shard, write_file, write_shard

FORMAT = 1
MANIFEST, SETTINGS, PAIRS, REJECTED = (
    "manifest.json",
    "settings.json",
    "pairs.safetensors",
    "rejected.jsonl",
)
COLUMNS = ("pair_ids", "winners", "losers", "prompts")
EMPTY_CAPTION = 0
"""Row of the empty caption."""
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


def fingerprint_of(settings: dict[str, Any]) -> str:
    """SHA-256 of a cache's settings: equal for caches that hold the same pairs."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_settings(
    folder: Path, settings: Mapping[str, Any], what: str, name: str = SETTINGS
) -> None:
    """Refuse a folder that holds something else than what these settings make.

    Args:
        folder: need not be there.
        settings: JSON-able.
        what: is made there: "a cache", …
        name: of the file that holds them.

    Raises:
        ValueError: it is no folder, holds other files, or was begun with other settings.
    """
    path = folder / name
    if not path.is_file():
        others = folder.is_dir() and any(
            not file.name.endswith(PARTIAL) for file in folder.iterdir()
        )
        # another process may have begun since: then its settings are there by now
        if others and path.is_file():
            return check_settings(folder, settings, what, name)
        if others or (folder.exists() and not folder.is_dir()):
            raise ValueError(
                f"output: expected a new or empty directory, or {what} to continue, got "
                f"{str(folder)!r}"
            )
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in settings if theirs.get(key) != settings[key]]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"output: expected JSON in {str(path)!r}, got a damaged file ({error})"
        ) from None
    if differing:
        key = differing[0]
        raise ValueError(
            f"output: {str(folder)!r} holds {what} of other settings: expected {key} "
            f"{theirs.get(key)!r} as there, got {settings[key]!r}; choose another output"
        )


def write_settings(folder: Path, settings: Mapping[str, Any], name: str = SETTINGS) -> None:
    """Begin a folder, unless it was begun."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).is_file():
        write_file(folder / name, (json.dumps(settings, indent=2) + "\n").encode())


def shard_names(kind: str, rows: int, shard_size: int) -> list[str]:
    """Names of the shards that hold so many rows of "images" or "prompts"."""
    return [f"{kind}-{i:05d}.safetensors" for i in range(-(-rows // shard_size))]


def in_words(reasons: Mapping[str, int]) -> str:
    """How often each reason for leaving a row out is there."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def describe(counts: Mapping[str, int], rejected: Mapping[str, int]) -> str:
    """Counts of pairs, images and prompts, and of what was left out, in words."""
    text = "{pairs} pairs of {images} images and {prompts} prompts".format(**counts)
    return text + (f" (left out: {in_words(rejected)})" if rejected else "")


@dataclass(frozen=True)
class Manifest:
    """What a finished cache says of itself."""

    settings: dict[str, Any]
    counts: dict[str, int]
    """images, prompts, pairs."""
    rejected: dict[str, int]
    """Reason -> pairs left out."""
    shards: dict[str, list]
    """Name -> [bytes, sha256]."""
    versions: dict[str, str]
    made_from: dict[str, str]
    """The names of model and pairs, for a reader; what counts are their hashes in the settings."""
    fingerprint: str
    format: int = FORMAT

    def __str__(self) -> str:
        size = sum(size for size, _ in self.shards.values())
        text = describe(self.counts, self.rejected)
        return f"{text}, {tqdm.format_sizeof(size, 'iB', 1024)}"

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Read and check a manifest.

        Raises:
            ValueError: it is of another format, or contradicts itself.
        """
        try:
            record = json.loads(text)
            if record["format"] != FORMAT:
                raise ValueError(
                    f"cache: expected format {FORMAT} in {where!r}, got {record['format']!r}: "
                    "prepare again with this version"
                )
            manifest = cls(**record)
            sound = manifest._is_sound()
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError,
                RecursionError, ZeroDivisionError) as error:  # fmt: skip
            raise ValueError(
                f"cache: expected a manifest in {where!r}, got a damaged one "
                f"({type(error).__name__}: {error}); prepare again"
            ) from None
        if not sound:
            raise ValueError(
                f"cache: expected a manifest in {where!r}, got one that contradicts itself; "
                "prepare again"
            )
        return manifest

    def _is_sound(self) -> bool:
        """Whether its parts agree; raises what Python does where one is missing or of no use."""
        rows, size = self.counts, self.settings["shard_size"]
        numbers = [*rows.values(), size, self.settings["height"], self.settings["width"]]
        if not all(type(number) is int and number > 0 for number in numbers):
            return False
        kinds = ("images", "prompts")
        if 1 + sum(-(-rows[kind] // size) for kind in kinds) != len(self.shards):
            return False
        names = {PAIRS}.union(*(shard_names(kind, rows[kind], size) for kind in kinds))
        return (
            self.fingerprint == fingerprint_of(self.settings)
            and self.shards.keys() == names  # so no name leads out of the folder
            and all(
                len(entry) == 2 and type(entry[0]) is int and re.fullmatch("[0-9a-f]{64}", entry[1])
                for entry in self.shards.values()
            )
            and self.settings["dtype"] in DTYPES
            and isinstance(self.settings["encoders"], dict)
            and isinstance(self.made_from["model"], str)
            and str(self) != ""
        )


def write_rejected(folder: Path, rejected: Iterable[dict[str, Any]]) -> None:
    """Write a record for each row left out."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in rejected)
    write_file(folder / REJECTED, "".join(lines).encode(errors="replace"))


def write_index(
    folder: Path,
    *,
    settings: dict[str, Any],
    shards: Mapping[str, Shard],
    columns: Mapping[str, Tensor],
    counts: dict[str, int],
    rejected: Iterable[dict[str, Any]],
    reasons: dict[str, int],
    made_from: dict[str, str],
) -> Manifest:
    """Finish a cache whose shards are all there: pairs, what was rejected and, last, the manifest.

    Args:
        folder: of the cache.
        settings: what its content follows from.
        shards: the finished ones by name.
        columns: of `pairs.safetensors`.
        counts: rows of images, prompts and pairs.
        rejected: a record for each pair left out.
        reasons: how often each reason is among them.
        made_from: names of model and pairs.
    """
    fingerprint = fingerprint_of(settings)
    write_shard(folder / PAIRS, dict(columns), fingerprint, {})
    write_rejected(folder, rejected)
    every = {**shards, PAIRS: open_shard(folder / PAIRS)}
    manifest = Manifest(
        settings=settings,
        counts=counts,
        rejected=reasons,
        shards={name: [shard.size, shard.sha256] for name, shard in every.items()},
        versions=versions(),
        made_from=made_from,
        fingerprint=fingerprint,
    )
    write_file(folder / MANIFEST, manifest.to_json())
    return manifest


def versions() -> dict[str, str]:
    """Of what a cache's content depends on."""
    packages = ("dde-fast", "torch", "diffusers", "transformers", "safetensors", "pillow")
    found = {name: known for name in packages if (known := version(name))}
    return found | {"python": platform.python_version()}
