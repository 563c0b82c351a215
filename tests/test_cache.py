"""Encoding pairs once, and the order they are seen in."""

import dataclasses
import io

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from dde_fast import cache
from dde_fast.cache import PairStream, encode_pairs, load_pairs
from dde_fast.models import Encoders


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
    return encode_pairs(table, encoders, latent_size=4, batch_size=5)


def test_each_distinct_image_and_caption_is_encoded_once(encoders, table, data, monkeypatch):
    seen: dict[str, list] = {"latents": [], "embeddings": []}
    for name in seen:
        encode = getattr(Encoders, name)

        def counting(self, items, *args, name=name, encode=encode):
            seen[name] += items
            return encode(self, items, *args)

        monkeypatch.setattr(Encoders, name, counting)
    encode_pairs(table, encoders, latent_size=4, batch_size=5)
    assert len(seen["latents"]) == len(set(seen["latents"])) == 12
    assert seen["embeddings"] == ["", "happy", "sad", "cat face"]
    assert data.latents.shape == (12, 4, 4, 4) and data.embeddings.shape == (4, 8, 16)


def test_latents_are_the_scaled_mean_of_the_posterior(model, encoders):
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    pixels = torch.arange(3 * 8 * 8).reshape(8, 8, 3).to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    expected = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean
    found = encoders.latents([_png(image)], 4)
    torch.testing.assert_close(found, expected.detach() * vae.config.scaling_factor)


def test_other_sizes_are_scaled_and_cropped_at_the_centre(encoders):
    wide = Image.new("RGB", (64, 16), "black")
    wide.paste("white", (24, 0, 40, 16))  # the central square
    white = encoders.latents([_png(Image.new("RGB", (8, 8), "white"))], 4)
    torch.testing.assert_close(encoders.latents([_png(wide)], 4), white, rtol=0, atol=0.05)
    assert encoders.latents([_png(wide)], (4, 8)).shape == (1, 4, 4, 8)


def test_embeddings_are_those_of_the_pipeline(model, encoders):
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    expected, _ = pipeline.encode_prompt("cat face", "cpu", 1, False)
    torch.testing.assert_close(encoders.embeddings(["cat face"]), expected)


def test_take_puts_winners_first_and_drops_captions(data, table, encoders):
    index = torch.tensor([3, 0])
    latents, embeddings = data.take(index, torch.tensor([False, True]))
    pairs = [table.pairs[3], table.pairs[0]]
    places = [pair.winner.place for pair in pairs] + [pair.loser.place for pair in pairs]
    images = list(table.source.read(places))
    torch.testing.assert_close(latents, encoders.latents(images, 4), rtol=1e-5, atol=1e-6)
    expected = encoders.embeddings([pairs[0].caption, ""])
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(data.pair_ids, torch.arange(12))


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
    flipped = encode_pairs(
        dataclasses.replace(table, pairs=table.pairs[::-1]), encoders, latent_size=4
    )
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
        encode_pairs(table, encoders, latent_size=4, batch_size=5)
    (latents_0, embeddings_0), (latents_1, embeddings_1) = tables.values()
    assert torch.equal(latents_0 + latents_1, data.latents)
    assert torch.equal(embeddings_0 + embeddings_1, data.embeddings)
    assert not embeddings_1.any()  # one batch of captions: rank 0's
    assert latents_1[5:10].any() and not latents_1[:5].any()


def test_one_pair_is_enough(encoders, table):
    data = encode_pairs(
        dataclasses.replace(table, pairs=table.pairs[9:10]), encoders, latent_size=4
    )
    pairs, epochs = PairStream(data, seed=0)[0:3]
    assert pairs.tolist() == [0, 0, 0] and epochs.tolist() == [0, 1, 2]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()
