"""What a source of preference pairs gives: one record per row, usable or rejected with a reason."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dde_fast.images import Unusable

MAX_CAPTION = 10_000
"""Characters. Text encoders read some 77 tokens; a tokenizer given megabytes would hang."""


# slots: a million of them are held at once
@dataclass(frozen=True, slots=True)
class Image:
    """One picture of a source, not yet read."""

    key: str
    """The source's uid, else "sha256:" and the content's hash; equal keys are one picture."""
    place: tuple
    """Where its bytes are, for `Source.read`; sorted places are read fastest."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images of one caption, the first preferred."""

    pair_id: int
    """Row number in the source, counted before anything is dropped: what the pair's noise, its
    timesteps and its place in the order are made from."""
    caption: str
    winner: Image
    loser: Image


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is no pair."""

    pair_id: int
    reason: str
    """A short fixed phrase, to be counted: "tied", "unlabelled", "without a caption", …"""
    detail: str
    """What was there instead."""


class Source(ABC):
    """Preference pairs in the order of their source; holds no open file, so it can be pickled."""

    def __init__(self, limit: int = 0):
        if limit < 0:
            raise ValueError(f"limit: expected 0 (all) or a number of pairs, got {limit}")
        self.limit = limit

    def rows(self) -> Iterator[Pair | Rejected]:
        """Every row, up to the limit-th usable pair; images are read only where no uid names them.

        Raises:
            ValueError: the source itself is broken.
        """
        usable = 0
        for pair_id, row in enumerate(self._rows()):
            try:
                caption, winner, loser = self._preference(row)
                if winner.key == loser.key:
                    raise Unusable("identical images", winner.key)
            except Unusable as why:
                yield Rejected(pair_id, why.reason, why.detail)
                continue
            yield Pair(pair_id, caption, winner, loser)
            usable += 1
            if usable == self.limit:
                return

    @abstractmethod
    def read(self, places: Sequence[tuple]) -> Iterator[bytes]:
        """The images' encoded bytes in the given order, b"" where the source holds none.

        Raises:
            ValueError: the source changed, or cannot be read any more.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of what can be known of the source without reading all its images."""

    @abstractmethod
    def _rows(self) -> Iterator[Any]:
        """Every row, whatever it holds."""

    @abstractmethod
    def _preference(self, row: Any) -> tuple[str, Image, Image]:
        """(caption, winner, loser) of a row; raises Unusable."""


def check_caption(caption: Any) -> str:
    """The caption, if it is one.

    Raises:
        Unusable: no text, not Unicode, blank, or longer than `MAX_CAPTION` characters.
    """
    if caption is None or caption == "":
        raise Unusable("without a caption", repr(caption))
    if isinstance(caption, bytes):
        try:
            caption = caption.decode()
        except UnicodeDecodeError as error:
            raise Unusable("unreadable caption", str(error)) from None
    if not isinstance(caption, str):
        raise Unusable("unreadable caption", f"a {type(caption).__name__}")
    if not caption.strip():
        raise Unusable("without a caption", repr(caption[:80]))
    if len(caption) > MAX_CAPTION:
        raise Unusable("over-long caption", f"{len(caption)} characters")
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # lone surrogates: what was no UTF-8 in a table
        raise Unusable("unreadable caption", str(error)) from None
    return caption


def winner_first(first: Any, second: Any, labels: tuple[Any, Any]) -> tuple[Any, Any]:
    """The two in order of preference by their labels, 1 and 0.

    Raises:
        Unusable: a tie, no label, or other labels.
    """
    if None in labels:
        raise Unusable("unlabelled", f"labels {labels[0]} and {labels[1]}")
    if labels[0] == labels[1]:
        raise Unusable("tied", f"labels {labels[0]} and {labels[1]}")
    if set(labels) != {0, 1}:
        raise Unusable("with labels other than 0 and 1", f"labels {labels[0]} and {labels[1]}")
    return (first, second) if labels[0] == 1 else (second, first)
