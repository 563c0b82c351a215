"""Encoding pairs once, and the order they are seen in."""

import pytest
import tiny
import torch
from PIL import Image

from dde_fast import cache, noise
from dde_fast.cache import PairStream, encode_pairs
from dde_fast.models import Encoders
from dde_fast.pairs import Pair, decode, load_pairs

SHAPE = (4, 4, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoders(model):
    return Encoders.load(model, torch.device("cpu"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "train.parquet"
    return load_pairs(tiny.write_pairs(path, tiny.rows()))


@pytest.fixture(scope="module")
def data(encoders, table):
    return encode_pairs(table.pairs, encoders, latent_shape=SHAPE, batch_size=5)


def test_each_distinct_image_and_caption_is_encoded_once(encoders, table, data, monkeypatch):
    seen: dict[str, list] = {"posterior": [], "prompts": []}
    for name in seen:
        encode = getattr(Encoders, name)

        def counting(self, items, *args, name=name, encode=encode):
            seen[name] += items
            return encode(self, items, *args)

        monkeypatch.setattr(Encoders, name, counting)
    encode_pairs(table.pairs, encoders, latent_shape=SHAPE, batch_size=5)
    assert len(seen["posterior"]) == 12
    assert seen["prompts"] == ["", "happy", "sad", "cat face"]
    assert data.mean.shape == data.std.shape == (12, 4, 4, 4)
    assert data.text["embeddings"].shape == (4, 8, 16)


def test_other_sizes_are_scaled_and_cropped_at_the_centre():
    wide = Image.new("RGB", (64, 16), "black")
    wide.paste("white", (24, 0, 40, 16))  # the central square
    assert (cache._pixels(wide, (8, 8)) > 0.8).all()
    assert cache._pixels(wide, (16, 8)).shape == (3, 8, 16)


def test_a_batch_has_winners_first_and_drops_captions(data, table, encoders):
    whole = PairStream(data, seed=0, caption_dropout=0.5).batch(0, 12)
    assert whole.pooled is None and whole.time_ids is None
    assert whole.pair_ids.sort().values.tolist() == list(range(12))
    assert whole.epochs.tolist() == [0] * 12
    draws = noise.pair_noise((3, *SHAPE), seed=0, pair_ids=whole.pair_ids, draw=0)
    dropped = 0
    for i, number in enumerate(whole.pair_ids.tolist()):
        pair = table.pairs[number]
        for image, at, drawn in ((pair.winner, i, 1), (pair.loser, i + 12, 2)):
            mean, std = encoders.posterior(cache._pixels(decode(image), (8, 8))[None])
            expected = mean[0] + std[0] * draws[i, drawn]
            torch.testing.assert_close(whole.latents[at], expected, rtol=1e-4, atol=1e-5)
        own, empty = encoders.prompts([pair.caption, ""])["embeddings"]
        is_empty = torch.allclose(whole.embeddings[i], empty, atol=1e-5)
        assert is_empty or torch.allclose(whole.embeddings[i], own, atol=1e-5)
        dropped += is_empty
    assert 0 < dropped < 12


def test_each_epoch_draws_other_latents(data):
    stream = PairStream(data, seed=0)
    first, second = stream.batch(0, 12), stream.batch(12, 24)
    assert second.epochs.tolist() == [1] * 12
    a, b = first.pair_ids.argsort(), second.pair_ids.argsort()
    assert (first.latents[a] != second.latents[b]).all()


def test_every_epoch_is_another_permutation(data):
    stream = PairStream(data, seed=0)
    orders = [stream[n * 12 : (n + 1) * 12] for n in range(3)]
    for epoch, (pairs, epochs) in enumerate(orders):
        assert pairs.sort().values.tolist() == list(range(12))
        assert epochs.tolist() == [epoch] * 12
    assert not torch.equal(orders[0][0], orders[1][0])
    assert not torch.equal(orders[0][0], PairStream(data, seed=1)[0:12][0])


def test_the_stream_does_not_depend_on_how_it_is_sliced(data):
    whole = torch.stack(PairStream(data, seed=3)[0:60])
    stream = PairStream(data, seed=3)
    for size in (1, 5, 7, 24, 30):
        parts = [torch.stack(stream[i : min(i + size, 60)]) for i in range(0, 60, size)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_the_order_follows_pair_ids_not_rows(data, table, encoders):
    flipped = encode_pairs(table.pairs[::-1], encoders, latent_shape=SHAPE)
    ids = [d.pair_ids[PairStream(d, seed=0)[0:12][0]].tolist() for d in (data, flipped)]
    assert ids[0] == ids[1]


def test_ranks_share_the_encoding(encoders, table, data, monkeypatch):
    """Each rank's table has its batches and zeros elsewhere; their sum is the whole."""
    tables: dict[int, list] = {0: [], 1: []}
    for rank in tables:
        monkeypatch.setattr(cache.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(cache.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(cache.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(cache.dist, "all_reduce", tables[rank].append)
        encode_pairs(table.pairs, encoders, latent_shape=SHAPE, batch_size=5)
    (latents_0, _, _, embeddings_0), (latents_1, _, _, embeddings_1) = tables.values()
    assert torch.equal(latents_0 + latents_1, data.mean)
    assert torch.equal(embeddings_0 + embeddings_1, data.text["embeddings"])
    assert not embeddings_1.any()  # one batch of captions: rank 0's
    assert latents_1[5:10].any() and not latents_1[:5].any()


def test_one_pair_is_enough(encoders):
    data = encode_pairs([Pair("a", tiny.png(0), tiny.png(1), 9)], encoders, latent_shape=SHAPE)
    pairs, epochs = PairStream(data, seed=0)[0:3]
    assert pairs.tolist() == [0, 0, 0] and epochs.tolist() == [0, 1, 2]
