"""Mutated inputs through the commands: each ends in one clear line and exit code 2, nothing lost.

The tables are in `mutations.py`. Images, tables and listings as sources see them have their own
tests (test_images, test_parquet_pairs, …).
"""

import json
import shutil
from pathlib import Path

import caches
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from mutations import (
    CAPTIONS,
    FLAGS,
    JSONS,
    MANIFESTS,
    MODELS,
    PARQUETS,
    PICTURES,
    SHARDS,
    TORN,
    WHOLE,
)
from train_runs import Folder

from dde_fast import checkpoint, prepare, train
from dde_fast.models import Encoders

STEP = "step-00000002"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    """A model, pairs, a cache of them, and a run of two steps."""
    folder = Folder(tmp_path_factory.mktemp("mutated"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encoders = Encoders.load(str(folder.model), torch.device("cpu"))
    caches.prepare(encoders, folder.pairs, folder.path / "cache")
    args = folder.args("run", steps=2, save_every=1, pairs=folder.path / "cache")
    train.main(args)
    yield folder
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


def contents(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def refused(capfd, main, args: list[str], expected: str, kept: Path) -> None:
    """The command ends in one line that says `expected`, and what is in `kept` stays as it was."""
    before = contents(kept)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    printed = capfd.readouterr().err
    assert stop.value.code == 2, printed
    lines = [line for line in printed.splitlines() if line and not line.startswith("encoding:")]
    assert len(lines) == 1, printed
    assert lines[0].startswith("dde_fast: error: ") and expected in lines[0], lines[0]
    assert contents(kept) == before


@pytest.mark.parametrize(("flag", "value", "expected"), FLAGS)
def test_flags(folder, tmp_path, capfd, flag, value, expected):
    args = [*folder.args("flags", tmp_path / "out"), flag, value]
    if flag == "--split":
        args += ["--pairs", folder.path]
    refused(capfd, train.main, args, expected, folder.path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list(JSONS))
def test_deepspeeds_json(folder, tmp_path, capfd, name):
    content, expected = JSONS[name]
    path = tmp_path / "ds.json"
    if isinstance(content, dict):
        tiny.write_ds(path, **content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    args = folder.args("json", tmp_path / "out", pairs=folder.path / "cache")
    args += ["--deepspeed_config", path]
    refused(capfd, train.main, args, expected, folder.path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list(MANIFESTS))
def test_manifests(folder, tmp_path, capfd, name):
    change, cache = MANIFESTS[name], shutil.copytree(folder.path / "cache", tmp_path / "cache")
    path = cache / "manifest.json"
    if callable(change):
        change = json.dumps(change(json.loads(path.read_text())))
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    args = folder.args("manifest", tmp_path / "out", pairs=cache)
    refused(capfd, train.main, args, "cache: expected ", cache)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list(SHARDS))
def test_shards(folder, tmp_path, capfd, name):
    cache = shutil.copytree(folder.path / "cache", tmp_path / "cache")
    SHARDS[name](cache)
    args = folder.args("shard", tmp_path / "out", pairs=cache)
    refused(capfd, train.main, args, "cache: expected ", cache)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*TORN, *WHOLE])
def test_checkpoints(folder, tmp_path, capfd, name):
    shutil.copytree(folder.path / "run", tmp_path / "run")
    place = tmp_path / "run/checkpoints" / STEP
    (TORN | WHOLE)[name](place)
    if name in WHOLE:
        marker = json.dumps(checkpoint._contents(place))
        (place / checkpoint.MARKER).write_text(marker)
    args = folder.args("checkpoint", tmp_path / "run", pairs=folder.path / "cache", resume=place)
    refused(capfd, train.main, args, "resume: ", tmp_path / "run/checkpoints")
    assert checkpoint.is_complete(place.with_name("step-00000001"))


@pytest.mark.parametrize("name", list(MODELS))
def test_models(folder, tmp_path, capfd, name):
    model = shutil.copytree(folder.model, tmp_path / "model")
    MODELS[name](model)
    args = folder.args("model", tmp_path / "out", model=model, pairs=folder.pairs)
    refused(capfd, train.main, args, "model: expected ", model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list(PICTURES))
def test_images(folder, tmp_path, capfd, name):
    rows = tiny.rows()
    for i, row in enumerate(rows):
        row |= {
            side: PICTURES[name](tiny.png(i + 9 * n)) for n, side in enumerate(("jpg_0", "jpg_1"))
        }
    pairs = tiny.write_pairs(tmp_path / "train.parquet", rows)
    args = ["--model", folder.model, "--pairs", pairs, "--output", tmp_path / "out"]
    refused(capfd, prepare.main, args, "expected at least one usable pair", folder.path)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("name", list(CAPTIONS))
def test_captions(folder, tmp_path, capfd, name):
    caption, expected = CAPTIONS[name]
    rows = [row | {"caption": caption} for row in tiny.rows()]
    pairs = tiny.write_pairs(tmp_path / "train.parquet", rows)
    if caption is None:
        table = pq.read_table(pairs)
        table = table.set_column(0, "caption", pa.array([None] * len(rows), pa.string()))
        pq.write_table(table, pairs)
    args = ["--model", folder.model, "--pairs", pairs, "--output", tmp_path / "out"]
    refused(capfd, prepare.main, args, expected, folder.path)


@pytest.mark.parametrize("name", list(PARQUETS))
def test_parquet(folder, tmp_path, capfd, name):
    pairs = tmp_path / "train.parquet"
    pairs.write_bytes(PARQUETS[name](folder.pairs.read_bytes()))
    args = ["--model", folder.model, "--pairs", pairs, "--output", tmp_path / "out"]
    refused(capfd, prepare.main, args, "pairs: expected ", folder.path)
    assert not (tmp_path / "out").exists()


def test_there_are_more_than_a_hundred():
    tables = (FLAGS, JSONS, MANIFESTS, SHARDS, TORN, WHOLE, MODELS, PICTURES, CAPTIONS, PARQUETS)
    assert sum(map(len, tables)) > 180
