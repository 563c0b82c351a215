"""Encoded pairs: what the UNet reads, made once before training, and their order.

Each distinct image (by content) and each distinct caption is encoded once; a pair is three row
numbers into the two tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor

from dde_fast import noise
from dde_fast.models import Encoders
from dde_fast.pairs import Pair, decode

EMPTY_CAPTION = 0
"""Row of the empty caption."""

SHUFFLE = 2
"""Number of a pair's choice of place in its epoch, beside those of `dde_fast.noise`."""


@dataclass
class Batch:
    """What one forward of policy and reference reads, on their device."""

    latents: Tensor
    """float32 [2B, C, h, w], winners first, sampled from the VAE's posterior."""
    embeddings: Tensor
    """float32 [B, L, D]; the empty caption's where the caption was dropped."""
    pooled: Tensor | None
    """float32 [B, P], for SDXL."""
    time_ids: Tensor | None
    """float32 [2B, 6], for SDXL: original height and width, top and left of the crop, height and
    width of the image, in pixels."""
    pair_ids: Tensor
    """int64 [B]."""
    epochs: Tensor
    """int64 [B]: how often the pair was seen before."""


@dataclass
class EncodedPairs:
    """n pairs in memory, on the device where they are used."""

    mean: Tensor
    """float32 [images, C, h, w] of the posterior."""
    std: Tensor
    """float32 [images, C, h, w] of the posterior."""
    time_ids: Tensor
    """float32 [images, 6]."""
    text: dict[str, Tensor]
    """Per caption what `Encoders.prompts` gives; row 0 is the empty caption."""
    winners: Tensor
    """int64 [n], rows of the images."""
    losers: Tensor
    """int64 [n], rows of the images."""
    captions: Tensor
    """int64 [n], rows of the captions."""
    pair_ids: Tensor
    """int64 [n]."""

    def __len__(self) -> int:
        return len(self.pair_ids)


def encode_pairs(
    pairs: Sequence[Pair],
    encoders: Encoders,
    *,
    latent_shape: tuple[int, int, int],
    batch_size: int = 32,
) -> EncodedPairs:
    """Encode every distinct image and caption once; all ranks must call, and share the work.

    Args:
        pairs: at least one.
        latent_shape: (C, h, w) of the UNet.
        batch_size: images or captions per forward. Batches do not depend on the number of ranks.
    """
    images, captions = _Rows(), _Rows()
    captions.row("")
    winners = [images.row(pair.winner) for pair in pairs]
    losers = [images.row(pair.loser) for pair in pairs]
    prompts = [captions.row(pair.caption) for pair in pairs]
    height, width = (side * encoders.scale for side in latent_shape[1:])

    def encode_images(batch: list[bytes]) -> dict[str, Tensor]:
        pictures = [decode(image) for image in batch]
        pixels = torch.stack([_pixels(picture, (width, height)) for picture in pictures])
        mean, std = encoders.posterior(pixels)
        ids = [[p.height, p.width, 0, 0, height, width] for p in pictures]
        return {"mean": mean, "std": std, "time_ids": mean.new_tensor(ids)}

    def index(rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=encoders.device)

    return EncodedPairs(
        **_in_batches(encode_images, images.items, batch_size),
        text=_in_batches(encoders.prompts, captions.items, batch_size),
        winners=index(winners),
        losers=index(losers),
        captions=index(prompts),
        pair_ids=index([pair.pair_id for pair in pairs]),
    )


def _pixels(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """float32 [3, H, W] in [-1, 1]; another size is scaled to cover, and cropped at its centre."""
    if picture.size != size:
        picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


class PairStream:
    """The endless stream of pairs: epoch after epoch, each in an order of its own."""

    def __init__(
        self, data: EncodedPairs, seed: int, caption_dropout: float = 0.0, backend: str = "auto"
    ):
        self.data, self.seed = data, seed
        self.caption_dropout, self.backend = caption_dropout, backend
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

    def batch(self, start: int, stop: int) -> Batch:
        """The pairs at these positions: captions dropped, latents drawn, each a function of (seed,
        pair id, epoch)."""
        index, epochs = self[start:stop]
        data, pair_ids = self.data, self.data.pair_ids[index]
        key = {"seed": self.seed, "pair_ids": pair_ids, "draw": epochs, "backend": self.backend}
        dropped = noise.pair_uniform(noise.CAPTION_DROPOUT, **key) <= self.caption_dropout
        captions = data.captions[index].masked_fill(dropped, EMPTY_CAPTION)
        images = torch.cat([data.winners[index], data.losers[index]])
        # the first of the three is the noise that training adds
        draws = noise.pair_noise((3, *data.mean.shape[1:]), device=data.mean.device, **key)
        latents = data.mean[images] + data.std[images] * torch.cat([draws[:, 1], draws[:, 2]])
        pooled = data.text.get("pooled")
        return Batch(
            latents=latents,
            embeddings=data.text["embeddings"][captions],
            pooled=None if pooled is None else pooled[captions],
            time_ids=None if pooled is None else data.time_ids[images],
            pair_ids=pair_ids,
            epochs=epochs,
        )

    def order(self, epoch: int) -> Tensor:
        """int64 [n]: the pairs sorted by one random number each."""
        if epoch not in self.orders:
            ids = self.data.pair_ids
            places = noise.pair_uniform(SHUFFLE, seed=self.seed, pair_ids=ids, draw=epoch)
            self.orders = {epoch: places.argsort(stable=True)}
        return self.orders[epoch]


class _Rows:
    """Distinct items by content, in order of their first appearance."""

    def __init__(self):
        self.items: list = []
        self._rows: dict[bytes, int] = {}

    def row(self, item: bytes | str) -> int:
        content = item.encode() if isinstance(item, str) else item
        row = self._rows.setdefault(hashlib.sha256(content).digest(), len(self.items))
        if row == len(self.items):
            self.items.append(item)
        return row


def _in_batches(
    encode: Callable[[list], dict[str, Tensor]], items: list, batch_size: int
) -> dict[str, Tensor]:
    """Rows of every item. Rank r encodes batches r, r + world, …; a sum with zeros shares them."""
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    starts = range(0, len(items), batch_size)
    # a rank beyond the last batch encodes the first item, to know the shapes
    own = {i: encode(items[i : i + batch_size]) for i in starts[rank::world_size]}
    some = next(iter(own.values())) if own else encode(items[:1])
    tables = {name: rows.new_zeros(len(items), *rows.shape[1:]) for name, rows in some.items()}
    for name, table in tables.items():
        for i, encoded in own.items():
            table[i : i + batch_size] = encoded[name]
        if world_size > 1:
            dist.all_reduce(table)
    return tables
