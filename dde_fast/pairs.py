"""Preference pairs from parquet in Pick-a-Pic's columns, as one record type.

Columns read: caption, jpg_0, jpg_1 (bytes, or structs holding bytes), label_0, label_1 (1 for the
preferred image, 0 for the other, 0.5 for a tie) and, where present, has_label. The others are not
touched. Rows without a winner, and images that do not decode, are dropped and counted.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
_ROWS = 64


@dataclass(frozen=True)
class Pair:
    """Two images of one caption, the first preferred."""

    caption: str
    winner: bytes
    """Encoded image (JPEG, PNG, WebP, …)."""
    loser: bytes
    pair_id: int
    """Row number in the source, counted before anything is dropped: what the pair's noise, its
    timesteps and its place in the order are made from."""


@dataclass
class PairTable:
    """Pairs held in memory, and what was left out."""

    pairs: list[Pair]
    rows: int = 0
    """Rows read."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> rows left out."""

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return f"{len(self.pairs)} pairs of {self.rows} rows" + f" (dropped: {reasons})" * bool(
            reasons
        )

    def fingerprint(self) -> str:
        """SHA-256 of the pairs' content and order."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            for part in (str(pair.pair_id).encode(), pair.caption.encode()):
                digest.update(part + b"\0")
            for image in (pair.winner, pair.loser):
                digest.update(hashlib.sha256(image).digest())
        return digest.hexdigest()


def load_pairs(source: str | Path, split: str = "train", limit: int = 0) -> PairTable:
    """Read pairs into memory, checking that every image decodes.

    Args:
        source: a parquet file, or a folder of them.
        split: of a folder: the files whose name (or whose folder's name) begins so.
        limit: stop after this many pairs; 0 = all.

    Raises:
        ValueError: nothing there, no parquet, columns missing, or no pair left.
    """
    table = PairTable([])
    decodes: dict[bytes, str] = {}
    for path in parquet_files(source, split):
        for record in read_rows(path):
            reason = record if isinstance(record, str) else _undecodable(record, decodes)
            if reason:
                table.dropped[reason] += 1
            else:
                caption, winner, loser = record
                table.pairs.append(Pair(caption, winner, loser, pair_id=table.rows))
            table.rows += 1
            if limit and len(table.pairs) == limit:
                return table
    if not table.pairs:
        raise ValueError(f"pairs: expected at least one pair in {str(source)!r}, got {table}")
    return table


def parquet_files(source: str | Path, split: str) -> list[Path]:
    """The parquet files of a source, in order of their names.

    Raises:
        ValueError: there is none; the message lists what a folder holds instead.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"pairs: expected a parquet file or a folder, got {str(source)!r}")
    files = sorted(source.rglob("*.parquet"))
    chosen = [
        path
        for path in files
        if any(part.startswith(split) for part in path.relative_to(source).parts)
    ]
    if not chosen:
        there = sorted({path.name.split("-")[0] for path in files})
        raise ValueError(
            f"split: expected parquet files beginning with {split!r} in {str(source)!r}, "
            f"got {there or 'no parquet file'}"
        )
    return chosen


def read_rows(path: str | Path) -> Iterator[tuple[str, bytes, bytes] | str]:
    """Every row of a parquet file in order: (caption, winner, loser), or why there is none.

    Raises:
        ValueError: not readable as parquet, or columns missing.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"pairs: expected a parquet file, got {str(path)!r} ({error})") from None
    with file:
        columns = set(file.schema_arrow.names)
        if missing := [name for name in REQUIRED if name not in columns]:
            raise ValueError(
                f"pairs: expected columns {list(REQUIRED)}, got {str(path)!r} without {missing}"
            )
        wanted = [name for name in (*REQUIRED, "has_label") if name in columns]
        try:
            for batch in file.iter_batches(batch_size=_ROWS, columns=wanted):
                yield from map(_preference, batch.to_pylist())
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"pairs: cannot read {str(path)!r}: {error}") from None


def decode(image: bytes) -> Image.Image:
    """An RGB image; transparent pixels lie on white.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: it does not decode.
    """
    with Image.open(io.BytesIO(image)) as picture:
        picture.load()
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture).convert("RGB")
        return picture.convert("RGB")


def _preference(row: dict) -> tuple[str, bytes, bytes] | str:
    """(caption, winner, loser) of a row, or the reason to drop it."""
    labels = row["label_0"], row["label_1"]
    if row.get("has_label") is False or None in labels:
        return "unlabelled"
    if labels[0] == labels[1]:
        return "tied"
    if set(labels) != {0, 1}:
        return "with labels other than 0 and 1"
    if row["caption"] is None:
        return "without a caption"
    images = [
        image["bytes"] if isinstance(image, dict) else image
        for image in (row["jpg_0"], row["jpg_1"])
    ]
    if not all(images):
        return "without an image"
    winner, loser = images if labels[0] == 1 else reversed(images)
    return row["caption"], winner, loser


def _undecodable(record: tuple[str, bytes, bytes], seen: dict[bytes, str]) -> str:
    """Why an image of the record does not decode, or ""; each distinct image is tried once."""
    for image in _images(record):
        key = hashlib.sha256(image).digest()
        if key not in seen:
            try:
                decode(image)
                seen[key] = ""
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                seen[key] = f"with an undecodable image ({type(error).__name__})"
        if seen[key]:
            return seen[key]
    return ""


def _images(record: tuple[str, bytes, bytes]) -> Iterable[bytes]:
    return record[1:]
