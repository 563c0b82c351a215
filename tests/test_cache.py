"""Opening a cache: what is refused, and shards that come from afar."""

import copy
import json
import shutil
import threading

import caches
import fsspec
import pytest
import torch

from dde_fast import shards
from dde_fast.cache import Cache, is_cache
from dde_fast.manifest import fingerprint_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """100 pairs of 90 images in 9 shards, 20 prompts in 2."""
    path = tmp_path_factory.mktemp("random") / "cache"
    return caches.write_random(path, pairs=100, images=90, prompts=20, shard_size=10)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "cache")


def rows(cache: Cache, *index: int, dropped: bool = False):
    return caches.stored(cache, torch.tensor(index), torch.full((len(index),), dropped))


def test_rows_put_winners_first_and_drop_captions(folder):
    cache = Cache(folder)
    found = caches.stored(cache, torch.tensor([47, 3]), torch.tensor([False, True]))
    expected = []
    for image in (2 * 47 % 90, 6, (2 * 47 + 1) % 90, 7):
        shard = shards.open_shard(folder / f"images-{image // 10:05d}.safetensors")
        expected.append({name: rows[image % 10] for name, rows in shard.tensors.items()})
    for name in ("mean", "std", "sizes"):
        assert torch.equal(getattr(found, name), torch.stack([row[name] for row in expected]))
    texts = shards.open_shard(folder / "prompts-00000.safetensors").tensors["embeddings"]
    assert torch.equal(found.embeddings, torch.stack([texts[47 % 20], texts[0]]))
    assert found.pooled is None and found.mean.dtype == torch.float16


def test_a_folder_is_a_cache_once_it_is_finished(copied, tmp_path):
    assert is_cache(copied) and is_cache(str(copied))
    assert not is_cache(tmp_path) and not is_cache(tmp_path / "nowhere")
    (copied / "manifest.json").unlink()
    assert not is_cache(copied)
    (copied / "settings.json").touch()
    with pytest.raises(ValueError, match="pairs: expected a finished cache, got .* without manif"):
        is_cache(copied)
    with pytest.raises(ValueError, match="cache: expected manifest.json in .* got none"):
        Cache(copied)
    with pytest.raises(ValueError, match="pairs: expected a folder or a URL, got 'nope://x'"):
        is_cache("nope://x")


def mutations(manifest: dict):
    """(what was done, a damaged manifest)."""
    for key in manifest:
        yield f"without {key}", {k: v for k, v in manifest.items() if k != key}
        for value in (None, -1, "x", [], {}):
            yield f"{key} = {value!r}", manifest | {key: value}
    for group in ("counts", "settings", "shards"):
        for key in manifest[group]:
            for value in (None, -1, "x", 10**15, [1]):
                changed = copy.deepcopy(manifest)
                changed[group][key] = value
                if group == "settings":  # a careful hand
                    changed["fingerprint"] = fingerprint_of(changed["settings"])
                yield f"{group}.{key} = {value!r}", changed
    escaping = copy.deepcopy(manifest)
    escaping["shards"]["../images-00000.safetensors"] = escaping["shards"].pop(
        "images-00000.safetensors"
    )
    yield "a path out of the folder", escaping
    yield "another field", manifest | {"more": 1}


def test_every_damaged_manifest_is_one_clear_error(copied):
    """Each mutation of a manifest is refused by a ValueError that says what was expected."""
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    harmless = []
    for what, damaged in mutations(manifest):
        path.write_text(json.dumps(damaged))
        try:
            Cache(copied)
        except ValueError as error:
            assert str(error).startswith("cache: expected "), what
        else:
            harmless.append(what)
    # for a reader only: nothing is computed from these
    reading = ("rejected", "versions", "made_from")
    assert all(what.startswith(reading) for what in harmless), harmless
    for text in ("", "{", "[]", "null", '"x"', "\x00\xff"):
        path.write_text(text)
        with pytest.raises(ValueError, match="^cache: expected a manifest in "):
            Cache(copied)


@pytest.mark.parametrize("damage", ["missing", "short", "long", "other", "pairs"])
def test_damaged_shards_are_refused(copied, damage):
    path = copied / ("pairs.safetensors" if damage == "pairs" else "images-00004.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(data[:-1])
    elif damage == "long":
        path.write_bytes(data + b"x")
    elif damage == "other":  # of the right size
        shutil.copy(copied / "images-00005.safetensors", path)
    else:
        data[-8] ^= 1
        path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^cache: expected .*{path.name}"):
        rows(Cache(copied), 20)


def test_another_models_cache_is_refused(folder):
    cache = Cache(folder)
    cache.check_fits({"vae": "random"}, channels=4, width=16)
    with pytest.raises(ValueError, match="pairs: expected a cache made with the model's own vae"):
        cache.check_fits({"vae": "else"}, channels=4, width=16)
    with pytest.raises(ValueError, match="the model's own text_encoder"):
        cache.check_fits({"vae": "random", "text_encoder": "x"}, channels=4, width=16)
    with pytest.raises(ValueError, match="expected a cache of 16 latent channels"):
        cache.check_fits({"vae": "random"}, channels=16, width=16)
    with pytest.raises(ValueError, match="expected a cache of 768 numbers per token"):
        cache.check_fits({"vae": "random"}, channels=4, width=768)


@pytest.fixture
def url(folder):
    """The same cache in another file system."""
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/cache/{path.name}", path.read_bytes())
    yield "memory://cache"
    memory.rm("/cache", recursive=True)


def largest(folder) -> int:
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_shards_from_a_url_are_fetched_once_and_bounded(folder, url, tmp_path):
    assert is_cache(url)
    here, limit = Cache(folder), 4 * largest(folder)
    afar = Cache(url, folder=tmp_path, limit=limit)
    place, fetched = tmp_path / afar.fingerprint[:16], []
    order = [*range(45), *range(45)]
    for pair in order:
        for a, b in zip(
            vars(rows(here, pair)).values(), vars(rows(afar, pair)).values(), strict=True
        ):
            assert a is b is None or torch.equal(a, b)
        assert sum(path.stat().st_size for path in place.glob("*.safetensors")) <= limit
        fetched.append(afar.shards.fetched)
    assert fetched[0] == 3 and fetched[2] == fetched[0]  # the first images, prompts and pairs
    assert fetched[44] == 1 + 9 + 2 + (fetched[44] - 12)
    assert 12 <= fetched[44] < 20 and fetched[-1] > fetched[44]  # gone, and fetched again
    assert not list(place.glob(f"*{shards.PARTIAL}"))
    room = Cache(url, folder=tmp_path / "room", limit=2**30)
    for pair in order:
        rows(room, pair)
    assert room.shards.fetched == 12
    again = Cache(url, folder=tmp_path / "room", limit=2**30)
    rows(again, *range(45))
    assert again.shards.fetched == 0  # another run finds them


class Unplugged:
    """A file system that fails the first times that a certain file is asked for."""

    def __init__(self, remote, name: str, times: float, error: Exception):
        self.remote, self.name, self.times, self.error, self.asked = remote, name, times, error, 0

    def get_file(self, path: str, local: str) -> None:
        if path.endswith(self.name):
            self.asked += 1
            if self.asked <= self.times:
                raise self.error
        self.remote.get_file(path, local)


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """What would have been waited for."""
    waited: list[float] = []
    monkeypatch.setattr(shards.time, "sleep", waited.append)
    return waited


def test_a_network_that_comes_back_costs_nothing_but_time(folder, url, tmp_path, pauses):
    cache = Cache(url, folder=tmp_path, limit=2**30)
    failing = Unplugged(cache.shards.remote, "images-00003.safetensors", 3, RuntimeError("away"))
    cache.shards.remote = failing
    assert torch.equal(rows(cache, 15).mean, rows(Cache(folder), 15).mean)
    assert failing.asked == 4 and pauses == [1, 2, 4]


@pytest.mark.parametrize(
    ("error", "attempts"), [(TimeoutError("slow"), 6), (PermissionError("expired"), 1)]
)
def test_a_network_that_stays_away_is_one_clear_error(url, tmp_path, pauses, error, attempts):
    cache = Cache(url, folder=tmp_path, limit=2**30)
    failing = Unplugged(cache.shards.remote, "images-00003.safetensors", torch.inf, error)
    cache.shards.remote = failing
    message = f"^pairs: expected to fetch images-00003.* from 'memory://cache', got {type(error).__name__}: {error}$"
    with pytest.raises(OSError, match=message):
        rows(cache, 15)
    assert failing.asked == attempts and len(pauses) == attempts - 1


def test_processes_share_the_folder(folder, url, tmp_path):
    """What one reader makes room for may be what another one reads."""
    here, limit, errors = Cache(folder), 4 * largest(folder), []
    expected = {pair: rows(here, pair).mean for pair in range(45)}

    def read(start: int) -> None:
        try:
            afar = Cache(url, folder=tmp_path, limit=limit)
            for i in range(45):
                pair = (start + i) % 45
                assert torch.equal(rows(afar, pair).mean, expected[pair])
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read, args=(start,)) for start in (0, 11, 29)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert not errors
    place = tmp_path / here.fingerprint[:16]
    assert sum(path.stat().st_size for path in place.glob("*.safetensors")) <= limit


def test_a_shard_damaged_on_its_way_is_not_taken(url, tmp_path):
    memory = fsspec.filesystem("memory")
    data = bytearray(memory.cat_file("/cache/images-00002.safetensors"))
    data[-1] ^= 1
    memory.pipe_file("/cache/images-00002.safetensors", bytes(data))
    cache = Cache(url, folder=tmp_path, limit=2**30)
    rows(cache, 0)
    with pytest.raises(ValueError, match="cache: expected .*images-00002.* to hold sha256"):
        rows(cache, 12)
    names = {path.name for path in (tmp_path / cache.fingerprint[:16]).iterdir()}
    assert not any(name.startswith("images-00002") for name in names)


def test_what_a_killed_fetch_left_is_swept(url, tmp_path):
    cache = Cache(url, folder=tmp_path, limit=2**30)
    leftover = tmp_path / cache.fingerprint[:16] / f"images-00007.safetensors{shards.PARTIAL}"
    leftover.write_bytes(b"half")
    rows(cache, 30)
    assert not leftover.exists()


def test_a_bound_below_one_shard_is_refused(folder, url, tmp_path):
    with pytest.raises(ValueError, match="cache_gib: expected at least .*, the largest shard"):
        Cache(url, folder=tmp_path, limit=largest(folder) - 1)
