"""Pairs listed in a file beside their images: a CSV or JSONL table, or HPDv2's JSON."""

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

from dde_fast.file_pairs import ImageFiles
from dde_fast.images import Unusable
from dde_fast.records import Image, check_caption, winner_first


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
                    f"pairs: expected CSV, got {self.file!r} (after line {rows.line_num}: {error})"
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
