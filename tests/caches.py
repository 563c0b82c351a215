"""Caches for the tests: prepared from tiny pairs, or written from random numbers."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from dde_fast import shards
from dde_fast.cache import Cache
from dde_fast.manifest import MANIFEST, fingerprint_of, shard_names, write_index
from dde_fast.models import Encoders
from dde_fast.prepare import Preparation, PrepareConfig

SHAPE = (4, 4, 4)
"""Of the tiny model's latents."""


def preparation(encoders: Encoders, pairs: Path, output: Path, **options) -> Preparation:
    """Of tiny pairs, in float32 and shards of five unless told otherwise."""
    defaults = {"dtype": "float32", "shard_size": 5, "batch_size": 2, "model": "tiny"}
    config = PrepareConfig(pairs=str(pairs), output=str(output), **{**defaults, **options})
    return Preparation(config, encoders, SHAPE)


def prepare(encoders: Encoders, pairs: Path, output: Path, **options) -> Path:
    """The finished cache's folder."""
    assert preparation(encoders, pairs, output, **options).run().startswith("cache: ")
    return output


def write_random(
    folder: Path,
    *,
    pairs: int,
    images: int,
    prompts: int = 8,
    latent: tuple[int, ...] = SHAPE,
    text: tuple[int, ...] = (8, 16),
    shard_size: int = 64,
    dtype: str = "float16",
    pooled: int | None = None,
) -> Path:
    """A cache of random numbers: pair p has the images 2p and 2p + 1 and the prompt p, modulo."""
    settings = {"height": 32, "width": 32, "dtype": dtype, "shard_size": shard_size}
    settings |= {"encoders": {"vae": "random"}}
    fingerprint, generator = fingerprint_of(settings), torch.Generator().manual_seed(0)
    folder.mkdir()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

    opened = {}
    for kind, rows in (("images", images), ("prompts", prompts)):
        for i, name in enumerate(shard_names(kind, rows, shard_size)):
            n = min(shard_size, rows - i * shard_size)
            tensors = {"embeddings": random(n, *text)}
            if pooled is not None:
                tensors["pooled"] = random(n, pooled)
            if kind == "images":
                sizes = torch.randint(1, 99, (n, 4), generator=generator, dtype=torch.int32)
                tensors = {"mean": random(n, *latent), "std": random(n, *latent).abs()}
                tensors["sizes"] = sizes
            shards.write_shard(folder / name, tensors, fingerprint, {})
            opened[name] = shards.open_shard(folder / name)
    row = torch.arange(pairs)
    columns = {"pair_ids": row, "winners": 2 * row % images}
    columns |= {"losers": (2 * row + 1) % images, "prompts": row % prompts}
    write_index(
        folder,
        settings=settings,
        shards=opened,
        columns=columns,
        counts={"images": images, "prompts": prompts, "pairs": pairs},
        rejected=[],
        reasons={},
        made_from={"model": "none", "pairs": "none"},
    )
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Checksum of every shard of a finished cache."""
    manifest = json.loads((folder / MANIFEST).read_text())
    return {name: sha256 for name, (_, sha256) in manifest["shards"].items()}


def stored(cache: Cache, index: torch.Tensor, dropped: torch.Tensor | None = None):
    """The rows of some pairs as tensors, a caption for each; `dropped` are those without."""
    none = torch.zeros(len(index), dtype=torch.bool)
    found = cache.rows(index, none if dropped is None else dropped)
    captions = found.pop("captions")
    tensors = {name: torch.stack(rows) for name, rows in found.items()}
    texts = {name: tensors[name][captions] for name in cache.empty}
    return SimpleNamespace(**({"pooled": None} | tensors | texts))
