"""What a source asks to be encoded: distinct images and prompts, cut into shards.

The plan follows from the source's metadata alone, so every process makes the same one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from dde_fast import images
from dde_fast.images import Geometry
from dde_fast.manifest import COLUMNS, EMPTY_CAPTION, describe, in_words, shard_names
from dde_fast.pairs import Image, Pair, Rejected, Source


@dataclass(frozen=True)
class Unit:
    """The rows of one shard."""

    kind: str
    """images or prompts."""
    name: str
    """Of its file."""
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass
class Plan:
    """What has to be encoded, row by row, and which rows make a pair."""

    images: list[tuple[tuple, Geometry]]
    """Of each distinct image where its bytes are, and how it is cropped."""
    prompts: list[str]
    """The distinct ones; the first is the empty caption."""
    pairs: dict[str, list[int]]
    """Columns pair_ids, winners, losers, prompts."""
    rejected: list[Rejected]

    @property
    def counts(self) -> dict[str, int]:
        """Rows of images, prompts and pairs."""
        rows = {"images": self.images, "prompts": self.prompts, "pairs": self.pairs["pair_ids"]}
        return {name: len(values) for name, values in rows.items()}

    def __str__(self) -> str:
        return describe(self.counts, count_reasons(self.rejected))

    def units(self, shard_size: int) -> list[Unit]:
        """The shards, in an order that is the same for every process."""
        units = []
        for kind, rows in (("prompts", len(self.prompts)), ("images", len(self.images))):
            for i, name in enumerate(shard_names(kind, rows, shard_size)):
                units.append(Unit(kind, name, i * shard_size, min((i + 1) * shard_size, rows)))
        return units

    def without(self, unusable: dict[int, tuple[str, str]]) -> Plan:
        """The plan less the pairs with one of these images (row -> reason and detail).

        Raises:
            ValueError: no pair is left.
        """
        rejected, kept = list(self.rejected), []
        for i, rows in enumerate(zip(self.pairs["winners"], self.pairs["losers"], strict=True)):
            why = next((unusable[row] for row in rows if row in unusable), None)
            if why is None:
                kept.append(i)
            else:
                rejected.append(Rejected(self.pairs["pair_ids"][i], *why))
        rejected.sort(key=lambda row: row.pair_id)
        _check_some(kept, rejected)
        pairs = {name: [column[i] for i in kept] for name, column in self.pairs.items()}
        return Plan(self.images, self.prompts, pairs, rejected)


def make_plan(source: Source, *, seed: int, crop: str, flip: bool) -> Plan:
    """Read a source's metadata.

    Args:
        source: of the pairs.
        seed, crop, flip: as in `images.geometries`.

    Raises:
        ValueError: it cannot be read, or no pair is left of it.
    """
    pairs: list[Pair] = []
    rejected: list[Rejected] = []
    for row in source.rows():
        (pairs if isinstance(row, Pair) else rejected).append(row)
    _check_some(pairs, rejected)
    shapes = images.geometries([pair.pair_id for pair in pairs], seed, crop, flip)

    rows: dict[tuple[str, Geometry], int] = {}
    places: list[tuple[tuple, Geometry]] = []
    prompts = {"": EMPTY_CAPTION}

    def row_of(image: Image, geometry: Geometry) -> int:
        row = rows.setdefault((image.key, geometry), len(places))
        if row == len(places):
            places.append((image.place, geometry))
        return row

    columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
    for pair, geometry in zip(pairs, shapes, strict=True):
        columns["pair_ids"].append(pair.pair_id)
        columns["winners"].append(row_of(pair.winner, geometry))
        columns["losers"].append(row_of(pair.loser, geometry))
        columns["prompts"].append(prompts.setdefault(pair.caption, len(prompts)))
    return Plan(places, list(prompts), columns, rejected)


def count_reasons(rejected: Iterable[Rejected]) -> dict[str, int]:
    """Reason -> rows, the most frequent first."""
    return dict(Counter(row.reason for row in rejected).most_common())


def _check_some(pairs: list, rejected: list[Rejected]) -> None:
    if not pairs:
        reasons = in_words(count_reasons(rejected))
        raise ValueError(
            f"pairs: expected at least one usable pair, got none of {len(rejected)} rows"
            + (f": {reasons}" if reasons else "")
        )
