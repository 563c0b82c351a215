"""A prepared cache, opened and checked for training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import fsspec
import torch
from torch import Tensor

from dde_fast import models
from dde_fast.manifest import COLUMNS, DTYPES, EMPTY_CAPTION, MANIFEST, PAIRS, SETTINGS, Manifest
from dde_fast.shards import Shard, Shards, StreamedShards, check_content

TENSORS = {"images": {"mean", "std", "sizes"}, "prompts": {"embeddings"}}
"""What every shard of a kind holds; `pooled` as well for SDXL."""


def is_cache(location: str | Path) -> bool:
    """Whether a folder or an fsspec URL holds a finished cache.

    Raises:
        ValueError: it holds an unfinished one, or the URL cannot be read.
    """
    if _read(str(location), MANIFEST) is not None:
        return True
    if _read(str(location), SETTINGS) is not None:
        raise ValueError(
            f"pairs: expected a finished cache, got {str(location)!r} without {MANIFEST}; the "
            "command that began it goes on where it was"
        )
    return False


def _read(location: str, name: str) -> bytes | None:
    """A small file's content, or None where there is none."""
    if "://" not in location:  # fsspec would read "::" and "*" in a name
        path = Path(location) / name
        return path.read_bytes() if path.is_file() else None
    try:
        files, root = fsspec.url_to_fs(location)
        path = f"{root}/{name}"
        return files.cat_file(path) if files.isfile(path) else None
    except Exception as error:  # every remote file system raises errors of its own
        raise ValueError(
            f"pairs: expected a folder or a URL, got {location!r} ({type(error).__name__}: {error})"
        ) from None


class Cache:
    """A finished cache.

    Args:
        location: its folder, or an fsspec URL of it.
        folder: where shards of a URL are kept for a while.
        limit: bytes of that folder.

    Raises:
        ValueError: there is no finished cache, or it is damaged.
    """

    def __init__(self, location: str | Path, folder: Path | None = None, limit: int = 2**40):
        self.location = str(location)
        text = _read(self.location, MANIFEST)
        if text is None:
            raise ValueError(f"cache: expected {MANIFEST} in {self.location!r}, got none")
        self.manifest = manifest = Manifest.from_json(text, self.location)
        self.shards = self._open_shards(folder, limit)
        self.shard_size = manifest.settings["shard_size"]
        self.dtype = DTYPES[manifest.settings["dtype"]]
        self._check_pairs()
        self.empty = {
            name: rows[EMPTY_CAPTION].clone()
            for name, rows in self._shard("prompts", EMPTY_CAPTION).tensors.items()
        }
        self.latent_shape = list(self._shard("images", 0).tensors["mean"].shape[1:])

    def _open_shards(self, folder: Path | None, limit: int) -> Shards:
        expected = {name: tuple(entry) for name, entry in self.manifest.shards.items()}
        if "://" in self.location:
            assert folder is not None
            place = folder / self.fingerprint[:16]
            return StreamedShards(self.location, place, expected, self.fingerprint, limit)
        shards = Shards(Path(self.location), expected, self.fingerprint)
        for name, (size, _) in expected.items():
            path = shards.folder / name
            found = path.stat().st_size if path.is_file() else "none"
            if found != size:
                raise ValueError(
                    f"cache: expected {name} of {size} bytes in {self.location!r}, got {found}; "
                    "delete it if it is there and prepare again, which makes what is missing"
                )
        return shards

    def _check_pairs(self) -> None:
        """Take the table of pairs into memory; it is small and everything hangs on it."""
        table = self.shards[PAIRS]
        check_content(table, self.shards.folder / PAIRS)
        counts, first = self.manifest.counts, table.tensors.get(COLUMNS[0])
        limits = {"winners": counts["images"], "losers": counts["images"]}
        limits["prompts"] = counts["prompts"]
        for name in COLUMNS:
            column, last = table.tensors.get(name), limits.get(name, 2**63) - 1
            whole = column is not None and column.dtype == torch.int64 and column.dim() == 1
            whole = whole and 0 < len(column) == len(first)
            if not whole or column.min() < 0 or column.max() > last:
                raise ValueError(
                    f"cache: expected numbers from 0 to {last}, one per pair, for the {name} in "
                    f"{str(self.shards.folder / PAIRS)!r}, got others; prepare again"
                )
        columns = (table.tensors[name].clone() for name in COLUMNS)
        self.pair_ids, self.winners, self.losers, self.prompts = columns
        if len(self) != self.manifest.counts["pairs"]:
            raise ValueError(
                f"cache: expected {len(self)} pairs, as many as {PAIRS} holds, got "
                f"{self.manifest.counts['pairs']} in the manifest of {self.location!r}; prepare again"
            )

    def __str__(self) -> str:
        return f"{self.manifest} in {self.location}"

    def sizes(self) -> list[int]:
        """Bytes of each shard."""
        return [size for size, _ in self.manifest.shards.values()]

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return len(self.pair_ids)

    def check_model(self, model: str) -> None:
        """As `check_fits`, of a model by name; its encoders are loaded for their hashes."""
        unet = models.load_unet_config(model)
        encoders = models.Encoders.load(model, torch.device("cpu")).identity()
        self.check_fits(encoders, unet["in_channels"], unet["cross_attention_dim"])

    def check_fits(self, encoders: dict[str, str], channels: int, width: int) -> None:
        """Refuse a model other than the one whose encoders made this cache.

        Args:
            encoders: hashes of the model's parts (`Encoders.identity`).
            channels: of the UNet's latents.
            width: of the embeddings its attention reads.

        Raises:
            ValueError: naming what differs.
        """
        theirs = self.manifest.settings["encoders"]
        for name in theirs.keys() | encoders.keys():
            if theirs.get(name) != encoders.get(name):
                raise ValueError(
                    f"pairs: expected a cache made with the model's own {name} "
                    f"{str(encoders.get(name))[:16]}, got {self.location!r}, made with "
                    f"{str(theirs.get(name))[:16]} of {self.manifest.made_from['model']!r}; "
                    "prepare the pairs with this model"
                )
        for name, expected, found in (
            ("latent channels", channels, self.latent_shape[0]),
            ("numbers per token", width, self.empty["embeddings"].shape[-1]),
        ):
            if expected != found:
                raise ValueError(
                    f"pairs: expected a cache of {expected} {name}, which the model's UNet reads, "
                    f"got {found} in {self.location!r}"
                )

    def rows(
        self,
        index: Tensor,  # int64 [B], on the CPU
        without_caption: Tensor,  # bool [B]
    ) -> dict[str, Tensor | list[Tensor]]:
        """Some pairs as they lie in the mapped shards: nothing is copied, `packing.pack` does that.

        Returns:
            mean, std: [C, h, w] of each of 2B images, winners first, in the cache's dtype.
            sizes: of the same, int32 [4]: height and width before scaling, top and left of the crop.
            embeddings: [L, D] of each distinct caption, the empty one for pairs without.
            pooled: [P] of the same, for SDXL.
            captions: int64 [B], which of these captions is each pair's.
        """
        images = torch.cat([self.winners[index], self.losers[index]])
        prompts = torch.where(without_caption, EMPTY_CAPTION, self.prompts[index])
        distinct, captions = prompts.unique(return_inverse=True)  # sorted: the empty one first
        others = distinct[distinct != EMPTY_CAPTION]
        empty = len(distinct) - len(others)  # 0 or 1; its shard may be far away
        texts = self._rows("prompts", others, self.empty)
        found = self._rows("images", images, sorted(TENSORS["images"]))
        found |= {name: [self.empty[name]] * empty + rows for name, rows in texts.items()}
        return found | {"captions": captions}

    def _rows(self, kind: str, numbers: Tensor, names: Iterable[str]) -> dict[str, list[Tensor]]:
        opened: dict[int, Shard] = {}  # each is asked for once
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for number in numbers.tolist():
            i, row = divmod(number, self.shard_size)
            if i not in opened:
                opened[i] = self._shard(kind, number)
            for name, found in rows.items():
                found.append(opened[i].tensors[name][row])
        return rows

    def _shard(self, kind: str, number: int) -> Shard:
        name = f"{kind}-{int(number) // self.shard_size:05d}.safetensors"
        shard = self.shards[name]
        if missing := TENSORS[kind] - shard.tensors.keys():
            raise ValueError(
                f"cache: expected {sorted(TENSORS[kind])} in {name} of {self.location!r}, got none "
                f"of {sorted(missing)}; delete it and prepare again"
            )
        return shard
