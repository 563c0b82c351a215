"""Encoded pairs: what the UNet reads, made once before training, and their order.

Each distinct image (by content) and each distinct caption is encoded once; a pair is three row
numbers into the two tables.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dde_fast import noise
from dde_fast.images import Unusable, decode
from dde_fast.models import Encoders
from dde_fast.pairs import Pair, Source, open_source

EMPTY_CAPTION = 0
"""Row of the empty caption."""

SHUFFLE = 2
"""Number of a pair's choice of place in its epoch, beside those of `dde_fast.noise`."""


@dataclass
class PairTable:
    """The usable pairs of a source, and what was left out."""

    source: Source
    pairs: list[Pair]
    rows: int = 0
    """Rows read."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> rows left out."""

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return f"{len(self.pairs)} pairs of {self.rows} rows" + f" (dropped: {reasons})" * bool(
            reasons
        )

    def fingerprint(self) -> str:
        """SHA-256 of the pairs' content and order."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            for part in (str(pair.pair_id), pair.caption, pair.winner.key, pair.loser.key):
                digest.update(part.encode() + b"\0")
        return digest.hexdigest()


def load_pairs(spec: str | Path, split: str = "train", limit: int = 0) -> PairTable:
    """Read a source, checking that every image decodes.

    Raises:
        ValueError: as `open_source`, or no pair left.
    """
    table = PairTable(open_source(spec, split), [])
    decodes: dict[str, str] = {}
    for row in table.source.rows():
        table.rows += 1
        reason = _undecodable(table.source, row, decodes) if isinstance(row, Pair) else row.reason
        if reason:
            table.dropped[reason] += 1
        else:
            table.pairs.append(row)
        if limit and len(table.pairs) == limit:
            break
    if not table.pairs:
        raise ValueError(f"pairs: expected at least one pair in {str(spec)!r}, got {table}")
    return table


def _undecodable(source: Source, pair: Pair, seen: dict[str, str]) -> str:
    """Why an image of the pair does not decode, or ""; each distinct image is tried once."""
    for image in (pair.winner, pair.loser):
        if image.key not in seen:
            try:
                (data,) = source.read([image.place])
                decode(data)
                seen[image.key] = ""
            except Unusable as why:
                seen[image.key] = why.reason
        if seen[image.key]:
            return seen[image.key]
    return ""


@dataclass
class EncodedPairs:
    """n pairs in memory, on the device where they are used."""

    latents: Tensor
    """float32 [images, C, H, W]."""
    embeddings: Tensor
    """float32 [captions, L, D]; row 0 is the empty caption."""
    winners: Tensor
    """int64 [n], rows of `latents`."""
    losers: Tensor
    """int64 [n], rows of `latents`."""
    captions: Tensor
    """int64 [n], rows of `embeddings`."""
    pair_ids: Tensor
    """int64 [n]."""

    def __len__(self) -> int:
        return len(self.pair_ids)

    def take(
        self,
        index: Tensor,  # int64 [B]
        without_caption: Tensor,  # bool [B]
    ) -> tuple[Tensor, Tensor]:
        """Latents [2B, C, H, W], winners first, and embeddings [B, L, D] of some pairs."""
        latents = self.latents[torch.cat([self.winners[index], self.losers[index]])]
        captions = self.captions[index].masked_fill(without_caption, EMPTY_CAPTION)
        return latents, self.embeddings[captions]


def encode_pairs(
    table: PairTable,
    encoders: Encoders,
    *,
    latent_size: int | Sequence[int],
    batch_size: int = 32,
) -> EncodedPairs:
    """Encode every distinct image and caption once; all ranks must call, and share the work.

    Args:
        table: at least one pair.
        latent_size: the UNet's `sample_size`.
        batch_size: images or captions per forward. Batches do not depend on the number of ranks.
    """
    pairs, images, captions = table.pairs, _Rows(), _Rows()
    captions.row("", "")
    winners = [images.row(pair.winner.key, pair.winner.place) for pair in pairs]
    losers = [images.row(pair.loser.key, pair.loser.place) for pair in pairs]
    prompts = [captions.row(pair.caption, pair.caption) for pair in pairs]

    def encode_images(places: list[tuple]) -> Tensor:
        return encoders.latents(list(table.source.read(places)), latent_size)

    def index(rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=encoders.device)

    return EncodedPairs(
        latents=_in_batches(encode_images, images.items, batch_size),
        embeddings=_in_batches(encoders.embeddings, captions.items, batch_size),
        winners=index(winners),
        losers=index(losers),
        captions=index(prompts),
        pair_ids=index([pair.pair_id for pair in pairs]),
    )


class PairStream:
    """The endless stream of pairs: epoch after epoch, each in an order of its own."""

    def __init__(self, data: EncodedPairs, seed: int):
        self.data, self.seed = data, seed
        self.orders: dict[int, Tensor] = {}

    def __getitem__(self, positions: slice) -> tuple[Tensor, Tensor]:
        """(pair, epoch) at each position, both int64 [stop - start]."""
        pairs, epochs, position = [], [], positions.start
        while position < positions.stop:
            epoch, at = divmod(position, len(self.data))
            part = self.order(epoch)[at : at + positions.stop - position]
            pairs.append(part)
            epochs.append(torch.full_like(part, epoch))
            position += len(part)
        return torch.cat(pairs), torch.cat(epochs)

    def order(self, epoch: int) -> Tensor:
        """int64 [n]: the pairs sorted by one random number each."""
        if epoch not in self.orders:
            ids = self.data.pair_ids
            places = noise.pair_uniform(SHUFFLE, seed=self.seed, pair_ids=ids, draw=epoch)
            self.orders = {epoch: places.argsort(stable=True)}
        return self.orders[epoch]


class _Rows:
    """Distinct items by key, in order of their first appearance."""

    def __init__(self):
        self.items: list = []
        self._rows: dict[str, int] = {}

    def row(self, key: str, item: tuple | str) -> int:
        row = self._rows.setdefault(key, len(self.items))
        if row == len(self.items):
            self.items.append(item)
        return row


def _in_batches(encode: Callable[[list], Tensor], items: list, batch_size: int) -> Tensor:
    """Rows of every item. Rank r encodes batches r, r + world, …; a sum with zeros shares them."""
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    starts = range(0, len(items), batch_size)
    # a rank beyond the last batch encodes the first item, to know the shape
    own = {i: encode(items[i : i + batch_size]) for i in starts[rank::world_size]}
    some = next(iter(own.values())) if own else encode(items[:1])
    table = some.new_zeros(len(items), *some.shape[1:])
    for i, rows in own.items():
        table[i : i + batch_size] = rows
    if world_size > 1:
        dist.all_reduce(table)
    return table
