"""Batches of a prepared SD 1.5 cache out of the page cache, posterior sampled, on two cores.

One call reads a pass of batches in a shuffled order: `loader` with its thread reading ahead,
`at_once` the same without it, `dataloader` PyTorch's DataLoader with one worker over the same mapped
files. Bytes are those stored for the pairs of a pass, each read once: mean and std of two
4×64×64 latents and one 77×768 embedding in float16.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, SMALL
from torch.utils.data import DataLoader

from dde_fast.cache import Cache
from dde_fast.loader import Loader, PairStream, read, to_batch
from dde_fast.manifest import fingerprint_of, shard_names, write_index
from dde_fast.packing import Mover
from dde_fast.shards import open_shard, write_shard

PAIRS, BATCH, SHARD = (64, 16, 32) if SMALL else (2048, 16, 512)
LATENT, TEXT = (4, 64, 64), (77, 768)
OPTIONS = {"seed": 0, "caption_dropout": 0.1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    """Random numbers: every pair has two images and a prompt of its own."""
    folder = tmp_path_factory.mktemp("data")
    settings = {"height": 512, "width": 512, "dtype": "float16", "shard_size": SHARD}
    settings["encoders"] = {}
    rows, shards = {"images": 2 * PAIRS, "prompts": PAIRS}, {}
    shapes = {"images": {"mean": LATENT, "std": LATENT}, "prompts": {"embeddings": TEXT}}
    for kind, count in rows.items():
        for name in shard_names(kind, count, SHARD):
            tensors = {
                key: torch.randn(SHARD, *shape).half() for key, shape in shapes[kind].items()
            }
            if kind == "images":
                tensors["sizes"] = torch.full((SHARD, 4), 512, dtype=torch.int32)
            write_shard(folder / name, tensors, fingerprint_of(settings), {})
            shards[name] = open_shard(folder / name)
    row = torch.arange(PAIRS)
    write_index(
        folder,
        settings=settings,
        shards=shards,
        columns={
            "pair_ids": row,
            "winners": 2 * row,
            "losers": 2 * row + 1,
            "prompts": row.clone(),
        },
        counts=rows | {"pairs": PAIRS},
        rejected=[],
        reasons={},
        made_from={"model": "random", "pairs": "random"},
    )
    return Cache(folder)


class Mapped(torch.utils.data.Dataset):
    """A pair at a time, as a map-style data set for PyTorch's DataLoader."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        rows = self.cache.rows(torch.tensor([index]), torch.tensor([False]))
        mean, std = (torch.stack(rows[name]) for name in ("mean", "std"))
        return mean, std, rows["embeddings"][0]


def passes(cache: Cache):
    """Name -> a function that reads every pair once and returns how many."""
    stream = PairStream(cache.pair_ids, seed=0)
    slices = [(start, start + BATCH) for start in range(0, PAIRS, BATCH)]

    def loader() -> int:
        batches = Loader(cache, stream, slices, device=DEVICE, **OPTIONS)
        return sum(len(batch.pair_ids) for batch in batches)

    def at_once() -> int:
        mover, count = Mover(DEVICE), 0
        for start, stop in slices:
            packed = mover.send(read(cache, *stream[start:stop], **OPTIONS, pinned=mover.pinned))
            count += len(to_batch(mover.receive(packed), seed=0).pair_ids)
        return count

    order = stream[0:PAIRS][0].tolist()
    options = {"batch_size": BATCH, "sampler": order, "num_workers": 1, "prefetch_factor": 3}
    workers = DataLoader(Mapped(cache), persistent_workers=True, **options)

    def dataloader() -> int:
        count = 0
        for mean, std, embeddings in workers:
            mean, std = (x.to(DEVICE).transpose(0, 1).flatten(0, 1).float() for x in (mean, std))
            mean.addcmul_(std, torch.randn_like(std))
            count += len(embeddings.to(DEVICE))
        return count

    return {"loader": loader, "at_once": at_once, "dataloader": dataloader}


@pytest.mark.parametrize("name", ["dataloader", "at_once", "loader"])
def bench_data(measure, benchmark, cache, name):
    benchmark.group = f"data sd15 B={BATCH} float16"
    read = passes(cache)[name]
    assert read() == PAIRS
    stored = 2 * (4 * 2 * torch.Size(LATENT).numel() + torch.Size(TEXT).numel())
    measure(
        [read],
        bytes=PAIRS * stored,
        op="data",
        name=name,
        pairs=PAIRS,
        batch=BATCH,
        shape=list(LATENT),
        dtype="float16",
    )
    if benchmark.stats is not None:
        benchmark.extra_info["pairs_per_s"] = PAIRS / benchmark.stats.stats.median
