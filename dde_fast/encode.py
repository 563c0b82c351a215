"""The rows of a shard: prompts through the text encoders, images through the VAE."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dde_fast import images
from dde_fast.images import Geometry, Unusable
from dde_fast.models import Encoders
from dde_fast.pairs import Source

Progress = Callable[[int], object]
"""Told how many more rows are done."""


def encode_prompts(
    encoders: Encoders,
    prompts: Sequence[str],
    *,
    batch_size: int,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, Tensor]:
    """`embeddings` [n, L, D] and, for SDXL, `pooled` [n, P], on the CPU."""
    batches = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        batches.append({k: stored(v, dtype) for k, v in encoders.prompts(batch).items()})
        progress(len(batch))
    return {name: torch.cat([rows[name] for rows in batches]) for name in batches[0]}


def encode_images(
    encoders: Encoders,
    pictures: Iterator[list[tuple[int, Any]]],
    shape: Sequence[int],
    *,
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[int, tuple[str, str]]]:
    """The posterior of every image that can be used.

    Args:
        encoders: of the model.
        pictures: what `read_pictures` yields.
        shape: (n, C, h, w) of the result.

    Returns:
        `mean` and `std` [n, C, h, w] and `sizes` int32 [n, 4] (height and width before scaling,
        top and left of the crop), zeros where an image is unusable; and row -> (reason, detail)
        for those.
    """
    mean, std = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    sizes = torch.zeros(shape[0], 4, dtype=torch.int32)
    unusable: dict[int, tuple[str, str]] = {}
    for batch in pictures:
        unusable |= {row: (p.reason, p.detail) for row, p in batch if isinstance(p, Unusable)}
        good = [(row, picture) for row, picture in batch if not isinstance(picture, Unusable)]
        if good:
            rows = [row for row, _ in good]
            pixels = torch.from_numpy(np.stack([pixels for _, (pixels, _) in good]))
            pixels = pixels.to(encoders.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            for table, encoded in zip((mean, std), encoders.posterior(pixels), strict=True):
                table[rows] = stored(encoded, dtype)
            sizes[rows] = torch.tensor([size for _, (_, size) in good], dtype=torch.int32)
        progress(len(batch))
    return {"mean": mean, "std": std, "sizes": sizes}, unusable


def read_pictures(
    source: Source,
    chosen: Sequence[tuple[tuple, Geometry]],
    pool: ThreadPoolExecutor,
    *,
    size: tuple[int, int],
    min_side: int,
    max_pixels: int,
    batch_size: int,
) -> Iterator[list[tuple[int, Any]]]:
    """Batches of (row, picture): what `images.fit` returns, or the `Unusable` that it met.

    The pool decodes the next batch while the caller is busy with this one.
    """

    def fitted(data: bytes, geometry: Geometry) -> Any:
        try:
            picture = images.decode(data, min_side=min_side, max_pixels=max_pixels)
            return images.fit(picture, size, geometry)
        except Unusable as why:
            return why

    rows = sorted(range(len(chosen)), key=lambda row: chosen[row][0])  # as they lie in the source
    found = zip(rows, source.read([chosen[row][0] for row in rows]), strict=True)
    ahead: list[tuple[int, Future]] = []
    while True:
        batch = [
            (row, pool.submit(fitted, data, chosen[row][1]))
            for row, data in itertools.islice(found, batch_size)
        ]
        if ahead:
            yield [(row, future.result()) for row, future in ahead]
        if not batch:
            return
        ahead = batch


def stored(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in the cache's dtype on the CPU.

    Raises:
        ValueError: they are not finite in it.
    """
    small = rows.to(dtype)
    if not small.isfinite().all():
        raise ValueError(
            "dtype: expected one that holds what the model's encoders give, up to "
            f"{float(rows.abs().max()):.3g}, got {str(dtype).removeprefix('torch.')!r}"
        )
    return small.cpu().contiguous()
