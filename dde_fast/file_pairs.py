"""Pairs whose images are files of one folder, and the folder of pairs itself.

An image's name is a path inside the folder; anything that leads out of it is refused. Links are
followed: they are the file system's owner's, not the author's of a table that names them.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from fsspec import AbstractFileSystem

from dde_fast.images import Unusable
from dde_fast.records import Image, Source, check_caption

MAX_BYTES = 2**28
"""Of one image file."""


class ImageFiles(Source):
    """Pairs whose images are files below one folder, keyed by their content."""

    def __init__(self, fs: AbstractFileSystem, folders: Sequence[str], limit: int = 0):
        super().__init__(limit)
        self.fs, self.folders = fs, tuple(folders)
        self._known: dict[str, Image | tuple[str, str]] = {}

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
                self._known[name] = why.reason, why.detail
        found = self._known[name]
        if isinstance(found, tuple):
            raise Unusable(*found)
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
            digest.update(os.fsencode(f"{name} {size}\n"))
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
