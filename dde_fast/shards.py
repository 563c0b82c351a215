"""The files of a cache: safetensors that are whole or not there, on this disk or behind a URL.

A shard's header carries the SHA-256 of its tensors and the fingerprint of the settings it was made
with, so one rename is all it takes to finish it and no second file can disagree with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dde_fast.provenance import content_hash

PARTIAL = ".partial"
"""Ending of a file that is being written."""
PAUSES = (1, 2, 4, 8, 16)
"""Seconds before each new attempt to fetch a shard after the network failed."""


@dataclass(frozen=True)
class Shard:
    """An opened shard."""

    tensors: dict[str, Tensor]
    """Mapped, not read: pages come when they are touched."""
    fingerprint: str
    """Of the settings it was made with."""
    facts: Any
    """What its writer noted beside the tensors."""
    sha256: str
    """Of tensors and facts, as its header says."""
    size: int
    """Bytes of the file."""


@contextlib.contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which appears whole or not at all and stays after a power cut."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name as well as the content
    finally:
        os.close(folder)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of a file, or of all, in a folder where nobody else writes it."""
    for leftover in folder.glob(f"{name}{PARTIAL}"):
        leftover.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Write a file by `publish`."""
    with publish(path) as file:
        file.write(data)


def write_shard(path: Path, tensors: dict[str, Tensor], fingerprint: str, facts: Any) -> None:
    """Write tensors (on the CPU, contiguous) and JSON-able facts as one shard."""
    noted = json.dumps(facts, sort_keys=True)
    header = {"fingerprint": fingerprint, "facts": noted, "sha256": _checksum(tensors, noted)}
    write_file(path, save(tensors, metadata=header))


def open_shard(path: Path) -> Shard:
    """Map a shard into memory; its content is not read, so not checked (`check_content`).

    Raises:
        ValueError: damaged, or not written by `write_shard`.
        FileNotFoundError: not there.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(header["facts"])
        return Shard(tensors, header["fingerprint"], facts, header["sha256"], path.stat().st_size)
    except (SafetensorError, KeyError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"cache: expected a whole shard in {str(path)!r}, got a damaged file ({error}); delete "
            "it and prepare again"
        ) from None


def check_content(shard: Shard, path: Path) -> None:
    """Read a shard and compare it with the checksum in its header.

    Raises:
        ValueError: it differs.
    """
    found = _checksum(shard.tensors, json.dumps(shard.facts, sort_keys=True))
    if found != shard.sha256:
        raise ValueError(
            f"cache: expected {str(path)!r} to hold sha256 {shard.sha256[:16]}…, got "
            f"{found[:16]}…; delete it and prepare again"
        )


def _checksum(tensors: Mapping[str, Tensor], noted: str) -> str:
    labelled = ((f"{name} {tensors[name].dtype}", tensors[name]) for name in sorted(tensors))
    return content_hash(labelled, beside=noted)


class Shards:
    """The shards in a folder by name, each opened once and held against what the manifest says.

    Args:
        folder: where they lie.
        expected: name -> (bytes, sha256).
        fingerprint: of the cache's settings.
    """

    def __init__(self, folder: Path, expected: Mapping[str, tuple[int, str]], fingerprint: str):
        self.folder, self.expected, self.fingerprint = folder, expected, fingerprint
        self._opened: dict[str, Shard] = {}

    def __getitem__(self, name: str) -> Shard:
        """Raises ValueError or OSError when it is missing or not what the manifest says."""
        if name not in self._opened:
            self._opened[name] = self._open(self.folder / name, name)
        return self._opened[name]

    def _open(self, path: Path, name: str) -> Shard:
        size, sha256 = self.expected[name]
        shard = open_shard(path)
        if (shard.size, shard.sha256, shard.fingerprint) != (size, sha256, self.fingerprint):
            raise ValueError(
                f"cache: expected {name} of {size} bytes and sha256 {sha256[:16]}… as in the "
                f"manifest, got {shard.size} bytes and {shard.sha256[:16]}…; delete it and prepare "
                "again"
            )
        return shard


class StreamedShards(Shards):
    """Shards behind a URL, fetched when they are first read into a folder of bounded size.

    The processes of a machine share the folder: one of them fetches, and the shard that was used
    longest ago makes room.

    Args:
        url: of the cache's folder, for fsspec.
        folder: on this machine's disk.
        limit: bytes that the folder may hold.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        expected: Mapping[str, tuple[int, str]],
        fingerprint: str,
        limit: int,
    ):
        super().__init__(folder, expected, fingerprint)
        self.url, (self.remote, self.root) = url, fsspec.url_to_fs(url)
        self.limit, self.fetched = limit, 0
        largest = max(size for size, _ in expected.values())
        if largest > limit:
            raise ValueError(
                f"cache_gib: expected at least {largest / 2**30:.3g}, the largest shard of "
                f"{url!r}, got {limit / 2**30:.3g}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / "lock")

    def __getitem__(self, name: str) -> Shard:
        path = self.folder / name
        try:
            os.utime(path)  # used now
            return super().__getitem__(name)
        except FileNotFoundError:  # never fetched, or another process made room
            self._opened.pop(name, None)
        with self.lock:
            if not path.exists():
                self._fetch(path, name)
            self._opened[name] = self._open(path, name)
        return self._opened[name]

    def _fetch(self, path: Path, name: str) -> None:
        sweep(self.folder)  # who holds the lock is alone here
        self._make_room(self.limit - self.expected[name][0])
        partial = path.with_name(name + PARTIAL)
        try:
            self._download(name, partial)
            check_content(self._open(partial, name), partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        self.fetched += 1

    def _download(self, name: str, partial: Path) -> None:
        """Fetch a file; a network that fails is given some time to come back.

        Raises:
            OSError: it did not, or the file is not there or not ours to read.
        """
        for pause in (*PAUSES, None):
            try:
                return self.remote.get_file(f"{self.root}/{name}", str(partial))
            except Exception as error:  # every remote file system raises errors of its own
                if pause is None or isinstance(error, (FileNotFoundError, PermissionError)):
                    raise OSError(
                        f"pairs: expected to fetch {name} from {self.url!r}, got "
                        f"{type(error).__name__}: {error}"
                    ) from None
            time.sleep(pause)

    def _make_room(self, limit: int) -> None:
        """Delete what was used longest ago until the rest fits."""
        files = [(path, path.stat()) for path in self.folder.glob("*.safetensors")]
        files.sort(key=lambda file: -file[1].st_mtime_ns)
        kept = 0
        for path, stat in files:
            kept += stat.st_size
            if kept > limit:
                path.unlink()
        # the disk gets a file's space back when nobody maps it any longer
        for name in [name for name in self._opened if not (self.folder / name).exists()]:
            del self._opened[name]
