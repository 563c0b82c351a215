"""Pairs whose images are files: a folder of pairs, a CSV or JSONL table, HPDv2's JSON.

An image's name in a table is a path inside the table's folder; anything that leads out of it is
refused. Links are followed: they are the file system's owner's, not the table's author's.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from fsspec import AbstractFileSystem

from dde_fast.images import Unusable
from dde_fast.records import Image, Source, check_caption, winner_first

MAX_BYTES = 2**28
"""Of one image file."""


class ImageFiles(Source):
    """Pairs whose images are files below one folder, keyed by their content."""

    def __init__(self, fs: AbstractFileSystem, folders: Sequence[str], limit: int = 0):
        super().__init__(limit)
        self.fs, self.folders = fs, tuple(folders)
        self._known: dict[str, Image | Unusable] = {}

    def read(self, places: Sequence[tuple]) -> Iterator[bytes]:
        for (path,) in places:
            try:
                yield self.fs.cat_file(path)
            except (OSError, ValueError) as error:
                raise ValueError(f"pairs: cannot read the image {path!r} ({error})") from None

    def image(self, name: Any) -> Image:
        """The image of that name; each file is read once for its hash.

        Raises:
            Unusable: no name, a path out of the folder, no such file, or one that is over-large.
        """
        if not isinstance(name, str) or not name.strip():
            raise Unusable("without an image", repr(name))
        if name not in self._known:
            try:
                self._known[name] = self._find(name)
            except Unusable as why:
                self._known[name] = why
        found = self._known[name]
        if isinstance(found, Unusable):
            raise found
        return found

    def _find(self, name: str) -> Image:
        paths = [posixpath.normpath(posixpath.join(folder, name)) for folder in self.folders]
        inside = [
            path
            for path, folder in zip(paths, self.folders, strict=True)
            if path.startswith(folder.rstrip("/") + "/")
        ]
        if not inside:
            raise Unusable("path outside the folder", repr(name))
        for path in inside:
            try:
                info = self.fs.info(path)
                if info["type"] not in ("file", "link"):
                    raise Unusable("unreadable image file", f"{name!r} is a {info['type']}")
                if info["size"] > MAX_BYTES:
                    raise Unusable("over-large image", f"{name!r}: {info['size']} bytes")
                content = hashlib.sha256(self.fs.cat_file(path)).hexdigest()
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:  # no permission, a name no file can have
                raise Unusable("unreadable image file", f"{name!r}: {error}") from None
            return Image(f"sha256:{content}", (path,))
        raise Unusable("missing image file", repr(name))


class PairFolder(ImageFiles):
    """A folder with `w/` and `l/`: winners and losers of the same name, whatever their suffixes.

    A pair's caption is `NAME.txt` beside the winner, or in `captions/`. Pairs are numbered in order
    of their names.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, split: str, limit: int = 0):
        folder = pair_folder(fs, path, split)
        super().__init__(fs, [folder], limit)
        self.folder = folder
        self.sizes = {
            posixpath.relpath(file, folder): info["size"]
            for name in ("w", "l", "captions")
            if fs.isdir(f"{folder}/{name}")
            for file, info in sorted(fs.find(f"{folder}/{name}", detail=True).items())
        }

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, size in self.sizes.items():
            digest.update(f"{name} {size}\n".encode())
            if name.endswith(".txt"):
                digest.update(self.fs.cat_file(f"{self.folder}/{name}"))
        return digest.hexdigest()

    def _rows(self) -> Iterator[tuple[str, list[str], list[str]]]:
        sides: dict[str, dict[str, list[str]]] = {"w": {}, "l": {}}
        for name in self.sizes:
            side, _, rest = name.partition("/")
            stem, suffix = posixpath.splitext(rest)
            hidden = posixpath.basename(rest).startswith(".")
            if side in sides and suffix != ".txt" and not hidden:
                sides[side].setdefault(stem, []).append(name)
        winners, losers = sides["w"], sides["l"]
        for stem in sorted({*winners, *losers}):
            yield stem, winners.get(stem, []), losers.get(stem, [])

    def _preference(self, row: tuple[str, list[str], list[str]]) -> tuple[str, Image, Image]:
        stem, *sides = row
        for side, names in zip(("w", "l"), sides, strict=True):
            if not names:
                raise Unusable("without its other image", f"no {side}/{stem}.*")
            if len(names) > 1:
                raise Unusable("with several images of one name", ", ".join(names))
        caption = self._caption(stem)
        winner, loser = (self.image(names[0]) for names in sides)
        return caption, winner, loser

    def _caption(self, stem: str) -> str:
        for name in (f"w/{stem}.txt", f"captions/{stem}.txt"):
            if name in self.sizes:
                # utf-8-sig: editors on Windows begin a file with a mark
                return check_caption(
                    self.fs.cat_file(f"{self.folder}/{name}").removeprefix(b"\xef\xbb\xbf").strip()
                )
        raise Unusable("without a caption", f"no w/{stem}.txt and no captions/{stem}.txt")


def pair_folder(fs: AbstractFileSystem, path: str, split: str) -> str | None:
    """The folder that holds `w/` and `l/`: that of the split, or the one named."""
    for folder in (f"{path}/{split}", path):
        if fs.isdir(f"{folder}/w") and fs.isdir(f"{folder}/l"):
            return folder
    return None


def listing(fs: AbstractFileSystem, path: str, split: str, suffixes: Sequence[str]) -> str | None:
    """The file with one of these suffixes: the one named, or the split's in a folder."""
    candidates = [path, *(f"{path}/{split}{suffix}" for suffix in suffixes)]
    return next((p for p in candidates if p.endswith(tuple(suffixes)) and fs.isfile(p)), None)


class Listed(ImageFiles):
    """Pairs listed in a file; images lie in its folder, a folder of its name, or `images/`."""

    SUFFIXES: tuple[str, ...]

    def __init__(self, fs: AbstractFileSystem, path: str, split: str, limit: int = 0):
        self.file = listing(fs, path, split, self.SUFFIXES)
        folder, name = posixpath.split(self.file)
        stem = posixpath.splitext(name)[0]
        super().__init__(fs, [folder, f"{folder}/{stem}", f"{folder}/images"], limit)

    def fingerprint(self) -> str:
        """Of the listing alone: another picture under the same name shows in its key."""
        return hashlib.sha256(self.fs.cat_file(self.file)).hexdigest()


class Table(Listed):
    """CSV, TSV or JSONL with the columns caption, winner and loser (names of image files)."""

    SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
    COLUMNS = ("caption", "winner", "loser")

    def _rows(self) -> Iterator[dict[str, Any] | bytes]:
        try:
            if self.file.endswith((".csv", ".tsv")):
                yield from self._csv_rows()
            else:
                with self.fs.open(self.file, "rb") as file:
                    yield from (line for line in file if line.strip())
        except OSError as error:
            raise ValueError(f"pairs: cannot read {self.file!r} ({error})") from None

    def _csv_rows(self) -> Iterator[dict[str, Any]]:
        # surrogates mark what is no UTF-8, so that it costs its own row
        text = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
        with io.TextIOWrapper(self.fs.open(self.file, "rb"), **text) as file:
            rows = csv.DictReader(file, delimiter="\t" if self.file.endswith(".tsv") else ",")
            try:
                columns = rows.fieldnames or []
                if missing := [name for name in self.COLUMNS if name not in columns]:
                    raise ValueError(
                        f"pairs: expected columns {list(self.COLUMNS)}, "
                        f"got {self.file!r} without {missing}"
                    )
                yield from rows
            except csv.Error as error:
                raise ValueError(
                    f"pairs: expected CSV, got {self.file!r} (line {rows.line_num}: {error})"
                ) from None

    def _preference(self, row: dict[str, Any] | bytes) -> tuple[str, Image, Image]:
        if isinstance(row, bytes):
            row = _json_object(row.removeprefix(b"\xef\xbb\xbf"))
        if None in row:
            raise Unusable("unreadable row", f"cells beyond the columns: {row[None]}")
        caption = check_caption(row.get("caption"))
        return caption, self.image(row.get("winner")), self.image(row.get("loser"))


class Rankings(Listed):
    """HPDv2's JSON: a list of {prompt, image_path or file_path: [names], and human_preference: [1
    for the preferred, 0] or rank: [1 = best, …]}.

    n images give their n(n - 1)/2 pairs, each a row of its own, in the order (0, 1), (0, 2), …;
    equal ranks are ties.
    """

    SUFFIXES = (".json",)
    MAX_IMAGES = 64

    def _rows(self) -> Iterator[tuple | Unusable]:
        try:
            entries = json.loads(self.fs.cat_file(self.file))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"pairs: expected JSON, got {self.file!r} ({error})") from None
        if not isinstance(entries, list):
            raise ValueError(
                f"pairs: expected a list of rankings in {self.file!r}, "
                f"got a {type(entries).__name__}"
            )
        for entry in entries:
            try:
                prompt, images, scores = self._ranking(entry)
            except Unusable as why:
                yield why
                continue
            for i, j in itertools.combinations(range(len(images)), 2):
                yield prompt, images[i], images[j], scores[i], scores[j]

    def _ranking(self, entry: Any) -> tuple[Any, list, list[float]]:
        """Prompt, images, and one number for each, the better the higher."""
        if not isinstance(entry, dict):
            raise Unusable("unreadable row", f"a {type(entry).__name__}")
        images = entry.get("image_path", entry.get("file_path"))
        if not isinstance(images, list) or len(images) < 2:
            raise Unusable("without its other image", f"images {images!r:.80}")
        if len(images) > self.MAX_IMAGES:
            raise Unusable("with too many images", f"{len(images)}, above {self.MAX_IMAGES}")
        label = "human_preference" if "human_preference" in entry else "rank"
        scores = entry.get(label)
        if scores is None:
            raise Unusable("unlabelled", "neither human_preference nor rank")
        if not isinstance(scores, list) or len(scores) != len(images):
            raise Unusable("unreadable preference", f"{label} {scores!r:.80}")
        if not all(isinstance(s, (int, float)) and abs(s) < float("inf") for s in scores):
            raise Unusable("unreadable preference", f"{label} {scores!r:.80}")
        return entry.get("prompt"), images, [-s if label == "rank" else s for s in scores]

    def _preference(self, row: tuple | Unusable) -> tuple[str, Image, Image]:
        if isinstance(row, Unusable):
            raise row
        prompt, first, second, *scores = row
        labels = [int(score == max(scores)) for score in scores]
        winner, loser = winner_first(first, second, tuple(labels))
        caption = check_caption(prompt)
        return caption, self.image(winner), self.image(loser)


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Unusable("unreadable row", str(error)) from None
    if not isinstance(row, dict):
        raise Unusable("unreadable row", f"a {type(row).__name__}")
    return row
