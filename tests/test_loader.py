"""The order of pairs, and batches made ready while the device works."""

import threading
import time

import caches
import pytest
import torch

from dde_fast import loader, noise
from dde_fast.cache import Cache
from dde_fast.loader import Loader, PairStream, read, to_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    path = tmp_path_factory.mktemp("random") / "cache"
    return Cache(caches.write_random(path, pairs=30, images=40, prompts=20, shard_size=16))


def sync(cache: Cache, stream: PairStream, start: int, stop: int, caption_dropout: float = 0.3):
    packed = read(cache, *stream[start:stop], seed=5, caption_dropout=caption_dropout)
    return to_batch(packed.tensors(), seed=5)


def load(cache: Cache, stream: PairStream, slices, **more) -> Loader:
    options = {"seed": 5, "caption_dropout": 0.3, "device": CPU, **more}
    return Loader(cache, stream, slices, **options)


def test_the_thread_that_reads_ahead_is_the_one_that_begins(cache, monkeypatch):
    begun = []
    monkeypatch.setattr(
        loader.Mover, "begin", lambda mover: begun.append(threading.current_thread().name)
    )
    batches = load(cache, PairStream(cache.pair_ids, seed=1), [(0, 4)])
    assert len(next(batches).pair_ids) == 4 and begun == ["dde_fast loader"]
    batches.close()


@pytest.mark.parametrize("block", [0, 4])
def test_every_epoch_is_another_permutation(cache, block):
    stream = PairStream(cache.pair_ids, seed=0, block=block)
    orders = [stream[n * 30 : (n + 1) * 30] for n in range(3)]
    for epoch, (rows, epochs) in enumerate(orders):
        assert rows.sort().values.tolist() == list(range(30))
        assert epochs.tolist() == [epoch] * 30
    assert not torch.equal(orders[0][0], orders[1][0])
    assert not torch.equal(orders[0][0], PairStream(cache.pair_ids, seed=1, block=block)[0:30][0])
    assert torch.equal(orders[2][0], PairStream(cache.pair_ids, seed=0, block=block)[60:90][0])


@pytest.mark.parametrize("block", [0, 4])
def test_the_stream_does_not_depend_on_how_it_is_sliced(cache, block):
    whole = torch.stack(PairStream(cache.pair_ids, seed=3, block=block)[0:150])
    stream = PairStream(cache.pair_ids, seed=3, block=block)
    for size in (1, 5, 7, 60, 75):
        parts = [torch.stack(stream[i : min(i + size, 150)]) for i in range(0, 150, size)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_the_order_follows_pair_ids_not_rows():
    ids = torch.tensor([5, 900, 17, 2**40, 3])
    orders = [pair_ids[PairStream(pair_ids, seed=0)[0:5][0]] for pair_ids in (ids, ids.flip(0))]
    assert torch.equal(*orders)


def test_one_pair_is_enough():
    rows, epochs = PairStream(torch.tensor([9]), seed=0, block=100)[0:3]
    assert rows.tolist() == [0, 0, 0] and epochs.tolist() == [0, 1, 2]


def test_blocks_stay_near_each_other_and_are_mixed():
    n, block = 1000, 20
    order = PairStream(torch.arange(n), seed=0, block=block)[0:n][0]
    window = loader.WINDOW * block
    for start in range(0, n, window):
        blocks = (order[start : start + window] // block).tolist()
        assert len(set(blocks)) <= loader.WINDOW
        assert blocks != sorted(blocks)  # mixed with each other
    first = [int(order[start] // block) for start in range(0, n, window)]
    assert first != sorted(first)  # blocks in random order
    # 0 mixes all of them
    assert len(set((PairStream(torch.arange(n), seed=0)[0:window][0] // block).tolist())) > 20


def test_latents_are_samples_of_the_posterior(cache):
    """mean + std · n, n the elements N … 3N-1 of the pair's stream: winner's, then loser's."""
    stream = PairStream(cache.pair_ids, seed=5)
    batch = sync(cache, stream, 28, 33)  # across two epochs
    index, epochs = stream[28:33]
    stored = caches.stored(cache, index)
    normal = noise.pair_noise((3 * 64,), seed=5, pair_ids=cache.pair_ids[index], draw=epochs)
    for half in range(2):
        mean, std = (x.chunk(2)[half].float() for x in (stored.mean, stored.std))
        n = normal[:, 64 * (1 + half) : 64 * (2 + half)].reshape(5, 4, 4, 4)
        torch.testing.assert_close(batch.latents.chunk(2)[half], mean + std * n)
    assert batch.latents.dtype == torch.float32
    assert torch.equal(batch.pair_ids, cache.pair_ids[index])
    assert torch.equal(batch.draws, epochs) and epochs.tolist() == [0, 0, 1, 1, 1]


def test_captions_are_dropped_by_the_pairs_own_choice(cache):
    stream = PairStream(cache.pair_ids, seed=5)
    batch, full = sync(cache, stream, 0, 30), sync(cache, stream, 0, 30, caption_dropout=0)
    key = {"seed": 5, "pair_ids": batch.pair_ids, "draw": batch.draws}
    dropped = noise.pair_uniform(noise.CAPTION_DROPOUT, **key) <= 0.3
    assert 0 < dropped.sum() < 30
    texts = full.embeddings[full.captions]
    expected = torch.where(dropped.view(-1, 1, 1), cache.empty["embeddings"], texts)
    assert torch.equal(batch.embeddings[batch.captions], expected)
    assert torch.equal(batch.latents, full.latents)


def test_sdxl_gets_sizes_and_pooled_captions(tmp_path):
    options = {"pairs": 30, "images": 40, "prompts": 20, "shard_size": 16, "pooled": 12}
    xl = Cache(caches.write_random(tmp_path / "cache", **options))
    stream = PairStream(xl.pair_ids, seed=5)
    batch, stored = sync(xl, stream, 0, 5, caption_dropout=0), caches.stored(xl, stream[0:5][0])
    assert torch.equal(batch.pooled[batch.captions], stored.pooled)
    assert batch.time_ids.dtype == torch.float32 and len(stored.sizes.unique(dim=0)) > 5
    assert torch.equal(batch.time_ids[:, :4], stored.sizes.float())
    assert batch.time_ids[:, 4:].tolist() == [[32, 32]] * 10


def test_a_caption_travels_once_however_many_pairs_have_it(cache):
    """Three pairs of one caption and two of another; then all without."""
    index = torch.tensor([3, 1, 23, 21, 3])  # pair p has the caption p modulo 20
    packed = {
        dropout: read(cache, index, torch.arange(5), seed=5, caption_dropout=dropout)
        for dropout in (0, 1)
    }
    own = packed[0].tensors()
    texts = caches.stored(cache, index).embeddings
    assert len(own["embeddings"]) == 2 and len(packed[1].tensors()["embeddings"]) == 1
    assert torch.equal(own["embeddings"][own["captions"]], texts)
    other = read(cache, torch.tensor([3, 1, 4, 5, 6]), torch.arange(5), seed=5, caption_dropout=0)
    bytes_of = [one.buffer.nbytes for one in (other, packed[0], packed[1])]
    caption = texts[0].nbytes
    assert [bytes_of[0] - size for size in bytes_of] == [0, 3 * caption, 4 * caption]


def test_the_loader_gives_what_reading_at_once_gives(cache):
    slices = [(i, i + 4) for i in range(0, 100, 8)]
    stream = PairStream(cache.pair_ids, seed=5, block=4)
    batches = load(cache, PairStream(cache.pair_ids, seed=5, block=4), slices)
    for (start, stop), batch in zip(slices, batches, strict=True):
        for name, value in vars(sync(cache, stream, start, stop)).items():
            other = getattr(batch, name)
            assert value is other is None or torch.equal(value, other)
    with pytest.raises(StopIteration):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_it_reads_ahead_and_no_further(cache, monkeypatch):
    asked, rows = threading.Semaphore(0), Cache.rows

    def noting(*args):
        asked.release()
        return rows(*args)

    monkeypatch.setattr(Cache, "rows", noting)
    batches = load(cache, PairStream(cache.pair_ids, seed=5), [(i, i + 2) for i in range(50)])
    for _ in range(loader.AHEAD + 1):  # and one in its hands
        assert asked.acquire(timeout=20)
    assert not asked.acquire(timeout=0.3)
    next(batches)
    assert asked.acquire(timeout=20)
    batches.close()


def test_waiting_is_counted(cache, monkeypatch):
    rows = Cache.rows

    def slow(*args):
        time.sleep(0.05)
        return rows(*args)

    monkeypatch.setattr(Cache, "rows", slow)
    batches = load(cache, PairStream(cache.pair_ids, seed=5), [(0, 2)] * 4)
    for _ in range(4):
        next(batches)
    assert 0.1 < batches.waited < 2
    monkeypatch.setattr(Cache, "rows", rows)
    batches = load(cache, PairStream(cache.pair_ids, seed=5), [(0, 2)] * 3)
    time.sleep(0.3)
    next(batches)
    assert batches.waited < 0.05
    batches.close()


def test_an_error_of_the_thread_is_raised_where_the_batch_is_asked_for(cache, monkeypatch):
    def broken(*args):
        raise ValueError("cache: expected a whole shard")

    many = [(0, 2)] * 100  # more than are read ahead before the fault
    batches = load(cache, PairStream(cache.pair_ids, seed=5), many)
    next(batches)
    monkeypatch.setattr(Cache, "rows", broken)
    with pytest.raises(ValueError, match="expected a whole shard"):
        for _ in range(loader.AHEAD + 3):
            next(batches)
    with pytest.raises(ValueError, match="expected a whole shard"):  # and again
        next(batches)
    batches.close()


def test_closing_ends_the_thread(cache):
    before = threading.active_count()
    batches = load(cache, PairStream(cache.pair_ids, seed=5), [(0, 2)] * 1000)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_nothing_waits_and_the_numbers_are_the_same(cache):
    stream, device = PairStream(cache.pair_ids, seed=5), torch.device("cuda")
    batches = load(cache, stream, [(i, i + 4) for i in range(0, 40, 4)], device=device)
    next(batches)  # compiles the noise
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [next(batches) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    batches.close()
    for i, batch in enumerate(found):
        expected = sync(cache, stream, 4 * (i + 1), 4 * (i + 2))
        torch.testing.assert_close(batch.latents.cpu(), expected.latents, rtol=1e-5, atol=1e-5)
        assert torch.equal(batch.embeddings.cpu(), expected.embeddings)
        assert torch.equal(batch.captions.cpu(), expected.captions)
        assert torch.equal(batch.pair_ids.cpu(), expected.pair_ids)


def anonymous() -> int:
    """Bytes of this process's memory that belong to no file."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Anonymous")) * 1024


def test_memory_is_flat_over_an_epoch(tmp_path):
    """An epoch over 64 MiB of latents leaves them in the page cache, not in the process."""
    options = {"pairs": 1024, "images": 1024, "latent": (4, 64, 64), "shard_size": 128}
    big = Cache(caches.write_random(tmp_path / "cache", **options))
    size = sum(size for size, _ in big.manifest.shards.values())
    assert size > 60 * 2**20
    stream = PairStream(big.pair_ids, seed=0)
    slices = [(i % 2048, i % 2048 + 8) for i in range(0, 2048 + 256, 8)]
    seen = []
    for i, _ in enumerate(load(big, stream, slices)):
        if i in (16, 128, 256):
            seen.append(anonymous())
    assert max(seen) - seen[0] < size / 3
