"""Preparing a cache while disks fill up and processes are killed: nothing lost, nothing twice."""

import itertools
import json
import os
import subprocess
import sys

import caches
import pytest
from train_runs import ROOT, environment, free_port

from dde_fast import shards

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_an_error_at_any_write_loses_nothing(
    encoders, pairs, whole, tmp_path, encoded, monkeypatch, call
):
    """A full disk at the n-th call: finished shards stay, nothing half-written gets a name."""
    real = {"write": open, "fsync": os.fsync, "replace": os.replace}[call]
    left = [0]

    def failing(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    if call == "write":
        monkeypatch.setattr(shards, "open", failing, raising=False)
    else:
        monkeypatch.setattr(shards.os, call, failing)
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        left[0] = n
        try:
            caches.prepare(encoders, pairs, folder)
            break
        except OSError:
            pass
        there = set(os.listdir(folder))
        assert not any(name.endswith(shards.PARTIAL) for name in there)
        assert "manifest.json" not in there or call == "fsync"  # its folder was not synced
        encoded.clear()
        caches.prepare(encoders, pairs, folder)
        assert not there & set(encoded)
        assert caches.contents(folder) == caches.contents(whole)
    assert n > 7  # settings, four shards, pairs, rejected, manifest


def test_kill_at_several_moments(model, pairs, encoders, tmp_path):
    """kill -9 of processes of their own, each as soon as one more shard is there."""
    command = [sys.executable, str(ROOT / "tests/prepare_worker.py"), str(model), str(pairs)]
    command += [str(tmp_path / "cache"), str(tmp_path / "log")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    killed = json.loads(done.stdout.splitlines()[-1])
    assert killed["finished"] == sorted(set(killed["finished"])) and killed["finished"][-1] < 16
    assert killed["twice"] == []
    expected = caches.prepare(encoders, pairs, tmp_path / "expected", shard_size=1)
    assert caches.contents(tmp_path / "cache") == caches.contents(expected)
    assert not list((tmp_path / "cache").glob(f"*{shards.PARTIAL}"))


def test_what_a_killed_process_left_is_swept(encoders, pairs, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    own, others, new = (
        folder / f"{name}.12345678{shards.PARTIAL}"
        for name in ("images-00001.safetensors", "manifest.json", "settings.json")
    )
    for path in (own, others, new):
        path.write_bytes(b"half")
    os.utime(others, (1, 1))
    caches.prepare(encoders, pairs, folder)
    # another process may be writing the new one at this moment
    assert (own.exists(), others.exists(), new.exists()) == (False, False, True)


def test_a_damaged_shard_is_never_taken_for_a_finished_one(encoders, pairs, tmp_path, encoded):
    preparation = caches.preparation(encoders, pairs, tmp_path / "cache")
    preparation.encode(0, 4)
    (name,) = encoded
    path = tmp_path / "cache" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{name}.*damaged"):
        caches.preparation(encoders, pairs, tmp_path / "cache").run()
    path.unlink()
    caches.prepare(encoders, pairs, tmp_path / "cache")
    assert len(encoded) == 5


def test_torchrun_shares_the_work(model, pairs, encoders, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", free_port(), str(ROOT / "dde_fast/prepare.py")]
    command += ["--model", str(model), "--pairs", str(pairs), "--output", str(tmp_path / "cache")]
    command += ["--shard_size", "5", "--dtype", "float32", "--batch_size", "2"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cache: 12 pairs of 12 images and 4 prompts" in done.stdout
    expected = caches.prepare(encoders, pairs, tmp_path / "expected")
    assert caches.contents(tmp_path / "cache") == caches.contents(expected)
