"""Preparing a cache: each thing encoded once, by whoever, whatever happens meanwhile."""

import json
import shutil
from pathlib import Path

import caches
import numpy as np
import pytest
import tiny
import torch

from dde_fast import images, prepare
from dde_fast.cache import Cache
from dde_fast.encoding_plan import make_plan
from dde_fast.images import Geometry
from dde_fast.models import Encoders
from dde_fast.pairs import open_source

pytestmark = pytest.mark.usefixtures("one_thread")


def rejected(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def everything(folder: Path):
    cache = Cache(folder)
    return cache, caches.stored(cache, torch.arange(len(cache)))


def test_each_distinct_image_and_prompt_is_encoded_once(encoders, pairs, tmp_path, monkeypatch):
    seen: dict[str, list] = {"posterior": [], "prompts": []}
    for name in seen:
        encode = getattr(Encoders, name)

        def noting(self, items, name=name, encode=encode):
            keys = [item if isinstance(item, str) else item.numpy().tobytes() for item in items]
            seen[name] += keys
            return encode(self, items)

        monkeypatch.setattr(Encoders, name, noting)
    caches.prepare(encoders, pairs, tmp_path / "cache")
    assert len(seen["posterior"]) == len(set(seen["posterior"])) == 12
    assert seen["prompts"] == ["", "happy", "sad", "cat face"]


def test_the_rows_of_a_pair_are_its_own(encoders, pairs, tmp_path):
    """Against the encoders called one by one, with a geometry that differs from pair to pair."""
    rows = tiny.rows()
    wide = [
        r | {"jpg_0": tiny.png(i, 16), "jpg_1": tiny.png(i + 50, 12)} for i, r in enumerate(rows)
    ]
    source = tiny.write_pairs(tmp_path / "wide.parquet", wide)
    cache, found = everything(
        caches.prepare(encoders, source, tmp_path / "cache", crop="random", flip=True, resolution=8)
    )
    shapes = images.geometries(range(12), 0, "random", True)
    assert len({shape.flip for shape in shapes}) == 2
    for i, (row, geometry) in enumerate(zip(wide, shapes, strict=True)):
        first = ("jpg_0", "jpg_1") if row["label_0"] else ("jpg_1", "jpg_0")
        for half, column in enumerate(first):
            picture = images.decode(row[column])
            pixels, size = images.fit(picture, (8, 8), geometry)
            pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            mean, std = encoders.posterior(pixels)
            torch.testing.assert_close(found.mean[i + 12 * half], mean[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.std[i + 12 * half], std[0], rtol=1e-5, atol=1e-5)
            assert tuple(found.sizes[i + 12 * half].tolist()) == size
        embedded = encoders.prompts([row["caption"]])["embeddings"][0]
        torch.testing.assert_close(found.embeddings[i], embedded, rtol=1e-5, atol=1e-5)
    assert cache.pair_ids.tolist() == list(range(12))
    torch.testing.assert_close(cache.empty["embeddings"], encoders.prompts([""])["embeddings"][0])


def test_a_shared_image_is_encoded_for_each_geometry(pairs):
    source = open_source(pairs)
    assert len(make_plan(source, seed=0, crop="center", flip=False).images) == 12
    centred = Geometry(0.5, 0.5, False)
    assert all(g == centred for _, g in make_plan(source, seed=0, crop="center", flip=False).images)
    assert len(make_plan(source, seed=0, crop="random", flip=False).images) == 24
    flipped = make_plan(source, seed=0, crop="center", flip=True)
    assert 12 < len(flipped.images) < 24
    for winner, loser in zip(flipped.pairs["winners"], flipped.pairs["losers"], strict=True):
        assert flipped.images[winner][1] == flipped.images[loser][1]


def test_sdxl_keeps_pooled_captions_and_sizes(tmp_path, pairs):
    model = tiny.make_sdxl_model(tmp_path / "model")
    encoders = Encoders.load(str(model), torch.device("cpu"))
    cache, found = everything(caches.prepare(encoders, pairs, tmp_path / "cache"))
    expected = encoders.prompts(["happy", "sad"])
    torch.testing.assert_close(found.pooled[:2], expected["pooled"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.embeddings[:2], expected["embeddings"], rtol=1e-5, atol=1e-5)
    assert found.sizes.tolist() == [[8, 8, 0, 0]] * 24
    assert cache.empty["pooled"].shape == found.pooled.shape[1:]


def test_bad_images_cost_their_pairs_and_nothing_else(encoders, tmp_path, whole):
    rows = tiny.rows()
    rows[2] |= {"label_0": 0.5, "label_1": 0.5}
    rows[4] |= {"jpg_0": rows[4]["jpg_0"][:40]}  # torn: decodes no more
    rows[7] |= {"jpg_1": tiny.png(3, 1)}
    rows[9] |= {"has_label": False}
    source = tiny.write_pairs(tmp_path / "train.parquet", rows)
    folder = caches.prepare(encoders, source, tmp_path / "cache", min_side=2)
    lost = rejected(folder)
    assert [row["pair_id"] for row in lost] == [2, 4, 7, 9]
    assert [row["reason"].split()[0] for row in lost] == [
        "tied",
        lost[1]["reason"].split()[0],
        "too",
        "unlabelled",
    ]
    assert lost[1]["reason"] in ("truncated image", "undecodable image")
    cache, found = everything(folder)
    kept = [i for i in range(12) if i not in (2, 4, 7, 9)]
    assert cache.pair_ids.tolist() == kept
    assert cache.manifest.counts["pairs"] == 8 and sum(cache.manifest.rejected.values()) == 4
    sound = everything(whole)[1]
    rows = torch.tensor(kept + [i + 12 for i in kept])
    torch.testing.assert_close(found.mean, sound.mean[rows], rtol=1e-5, atol=1e-5)


def test_no_usable_image_at_all_is_an_error(encoders, tmp_path):
    rows = [row | {"jpg_0": b"no", "jpg_1": b"image"} for row in tiny.rows()]
    source = tiny.write_pairs(tmp_path / "train.parquet", rows)
    with pytest.raises(ValueError, match="at least one usable pair.*12 undecodable image"):
        caches.preparation(encoders, source, tmp_path / "cache").run()
    assert not (tmp_path / "cache/manifest.json").exists()


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_make_the_same_cache(encoders, pairs, whole, tmp_path, encoded, parts):
    said = [
        caches.preparation(encoders, pairs, tmp_path / "cache").run(part, parts)
        for part in range(parts)
    ]
    assert said[0].startswith(f"part 0 of {parts} is done: expected 4 shards")
    assert "images-" in said[0] and "which the other parts make" in said[0]
    assert any(line.startswith("cache: 12 pairs of 12 images and 4 prompts") for line in said)
    assert len(encoded) == len(set(encoded)) == 4
    assert caches.contents(tmp_path / "cache") == caches.contents(whole)


def test_machines_that_share_nothing(encoders, pairs, whole, tmp_path, encoded):
    for part in range(2):
        caches.preparation(encoders, pairs, tmp_path / str(part)).run(part, 2)
    shutil.copytree(tmp_path / "1", tmp_path / "0", dirs_exist_ok=True)
    assert caches.preparation(encoders, pairs, tmp_path / "0").run().startswith("cache: ")
    assert len(encoded) == 4
    assert caches.contents(tmp_path / "0") == caches.contents(whole)


def test_a_finished_cache_is_left_alone(encoders, pairs, tmp_path, encoded, monkeypatch):
    folder = caches.prepare(encoders, pairs, tmp_path / "cache")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(prepare, "make_plan", None)  # not even planned again
    caches.prepare(encoders, pairs, tmp_path / "cache")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert len(encoded) == 4


DIFFERENT = {
    "crop": ({"crop": "random"}, "expected crop 'center' as there, got 'random'"),
    "dtype": ({"dtype": "float16"}, "expected dtype 'float32' as there"),
    "shard_size": ({"shard_size": 6}, "expected shard_size 5 as there"),
    "limit": ({"limit": 3}, "expected limit 0 as there"),
    "resolution": ({"resolution": 16}, "expected height 8 as there, got 16"),
}


@pytest.mark.parametrize("name", list(DIFFERENT))
def test_another_setting_is_refused(encoders, pairs, whole, name):
    options, message = DIFFERENT[name]
    with pytest.raises(ValueError, match=message):
        caches.preparation(encoders, pairs, whole, **options).run()


def test_other_pairs_models_and_folders_are_refused(encoders, pairs, whole, tmp_path):
    fewer = tiny.write_pairs(tmp_path / "train.parquet", tiny.rows()[:9])
    with pytest.raises(ValueError, match="output: .*: expected source "):
        caches.preparation(encoders, fewer, whole).run()
    other = tiny.make_model(tmp_path / "model", seed=1)
    others = Encoders.load(str(other), torch.device("cpu"))
    with pytest.raises(ValueError, match="output: .*: expected encoders "):
        caches.preparation(others, pairs, whole).run()
    with pytest.raises(ValueError, match="output: expected a new or empty directory"):
        caches.preparation(encoders, pairs, tmp_path).run()
    with pytest.raises(ValueError, match="output: expected a new or empty directory"):
        caches.preparation(encoders, pairs, fewer).run()
    # a shard of another cache under a name of this one
    foreign = caches.prepare(others, pairs, tmp_path / "foreign")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    shutil.copy(whole / "settings.json", mixed)
    shutil.copy(foreign / "images-00000.safetensors", mixed)
    with pytest.raises(ValueError, match="expected shards of one cache .* got images-00000"):
        caches.preparation(encoders, pairs, mixed).run()


def test_a_cache_begun_by_another_process_meanwhile_is_joined(encoders, pairs, whole, monkeypatch):
    is_file, asked = Path.is_file, []

    def late(path, **options):  # the settings appear after the first look
        if path.name == "settings.json" and not asked:
            return asked.append(path)
        return is_file(path, **options)

    monkeypatch.setattr(Path, "is_file", late)
    assert caches.preparation(encoders, pairs, whole).manifest() is not None
    assert asked


def test_a_file_that_another_process_finishes_meanwhile_is_left_alone(
    encoders, pairs, tmp_path, monkeypatch
):
    folder = tmp_path / "cache"
    folder.mkdir()
    partial, glob = folder / "settings.json.0123.partial", Path.glob
    partial.touch()

    def renamed(path, pattern):
        found = list(glob(path, pattern))
        partial.rename(folder / "settings.json.done") if partial in found else None
        return found

    preparation = caches.preparation(encoders, pairs, folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", renamed)
        preparation._sweep(preparation.units)
    assert (folder / "settings.json.done").exists()


def test_verify_finds_a_flipped_bit_and_preparing_mends_it(
    encoders, pairs, whole, tmp_path, capfd, encoded
):
    folder = caches.prepare(encoders, pairs, tmp_path / "cache")
    prepare.main(["--verify", "--output", str(folder)])
    assert "whole: 12 pairs of 12 images and 4 prompts" in capfd.readouterr().out
    path = folder / "images-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--verify", "--output", str(folder)])
    assert stop.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "dde_fast" in line]
    assert len(lines) == 1 and "images-00001.safetensors' to hold sha256" in lines[0]
    path.unlink()
    encoded.clear()
    caches.prepare(encoders, pairs, folder)
    assert encoded == ["images-00001.safetensors"]
    assert caches.contents(folder) == caches.contents(whole)


def test_the_content_must_fit_the_dtype(encoders, pairs, tmp_path, monkeypatch):
    large = lambda self, pixels: (
        torch.full((len(pixels), 4, 4, 4), 1e5),
        torch.ones(len(pixels), 4, 4, 4),
    )
    monkeypatch.setattr(Encoders, "posterior", large)
    with pytest.raises(ValueError, match="dtype: expected one that holds .* 1e.05, got 'float16'"):
        caches.preparation(encoders, pairs, tmp_path / "half", dtype="float16").run()
    caches.prepare(encoders, pairs, tmp_path / "brain", dtype="bfloat16")


def test_stored_numbers_are_the_dtypes(encoders, pairs, whole, tmp_path):
    exact = everything(whole)[1]
    for dtype, bound in (("float16", 2e-3), ("bfloat16", 2e-2)):
        rounded = everything(caches.prepare(encoders, pairs, tmp_path / dtype, dtype=dtype))[1]
        for name in ("mean", "std", "embeddings"):
            values = getattr(rounded, name)
            assert values.dtype == getattr(torch, dtype)
            torch.testing.assert_close(values.float(), getattr(exact, name), rtol=bound, atol=bound)


BAD = {
    "unknown flag": (["--crops", "center"], "Unrecognized options: --crops"),
    "unknown crop": (["--crop", "left"], "crop: expected one of center, random, got 'left'"),
    "unknown dtype": (["--dtype", "int8"], "dtype: expected one of float16"),
    "no part": (["--shard", "2/2"], 'shard: expected "i/n" with 0 <= i < n, got'),
    "no number": (["--shard", "a/b"], 'shard: expected "i/n"'),
    "no rows": (["--shard_size", "0"], "shard_size: expected at least 1, got 0"),
    "no such pairs": (["--pairs", "nowhere.parquet"], "pairs: expected"),
    "no such model": (["--model", "nowhere/at/all"], "model: expected a diffusers directory"),
    "odd size": (["--resolution", "9"], "resolution: expected a multiple of 2, got 9"),
    "no cache": (["--verify"], "cache: expected manifest.json in"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_flags_are_one_line_and_exit_2(model, pairs, tmp_path, capfd, name):
    flags, message = BAD[name]
    args = ["--model", str(model), "--pairs", str(pairs), "--output", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as stop:
        prepare.main(args + flags)
    assert stop.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "dde_fast" in line]
    assert len(lines) == 1 and lines[0].startswith("dde_fast: error: ") and message in lines[0]
    assert not (tmp_path / "cache").exists()


def test_the_command_prepares_and_says_so(model, pairs, tmp_path, capfd):
    args = ["--model", str(model), "--pairs", str(pairs), "--output", str(tmp_path / "cache")]
    prepare.main([*args, "--shard", "0/2", "--shard_size", "8"])
    assert "part 0 of 2 is done: expected 3 shards" in capfd.readouterr().out
    prepare.main([*args, "--shard", "1/2", "--shard_size", "8"])
    assert "cache: 12 pairs of 12 images and 4 prompts, " in capfd.readouterr().out
    assert np.isclose(len(Cache(tmp_path / "cache")), 12)
