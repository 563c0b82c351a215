"""Preference pairs labelled anew by a reward: `python -m dde_fast.evaluate --relabel PAIRS`.

A source is cut into parts: each row group of Pick-a-Pic's parquet, or so many pairs of another
source. A part becomes one parquet file, SPLIT-00003-of-00012.parquet, whole or not there, so that after
a kill the same command continues and processes share the work without talking to each other. The
folder is then a `--pairs` for training.

Columns kept: all of Pick-a-Pic's. Written anew: label_0 and label_1 (1 and 0 by the first reward; 0.5
and 0.5 where its scores are equal), best_image_uid ("tie" for a tie), has_label. Added: the scores,
REWARD_0 and REWARD_1 for each reward, and `unlabelled`: why a row has no label, its caption or images
being of no use; else null. Rows of other sources that are no pairs stand in rejected.jsonl.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from dde_fast import embedded, images, rewards
from dde_fast.encoding_plan import count_reasons
from dde_fast.images import Unusable
from dde_fast.manifest import check_settings, in_words, write_rejected, write_settings
from dde_fast.pairs import Pair, Rejected, Source, open_source
from dde_fast.parquet_pairs import IMAGES, UIDS, PickAPic, as_bytes
from dde_fast.records import check_caption
from dde_fast.shards import publish, sweep

LABELS = "labels.json"
"""What a folder is made from and by; not named as a cache's settings, by which caches are told."""

ROWS = 64
"""Read, scored and written at a time."""

PART = 1024
"""Pairs in a part of a source that has no row groups."""


def relabel(
    pairs: str, split: str, specs: Sequence[str], output: Path, batch: int, device: torch.device
) -> str:
    """Write what is missing of this process's parts.

    Args:
        pairs, split: as in training.
        specs: of rewards, the one to label by first.
        output: the folder.
        batch: images scored at once.
        device: where.

    Returns:
        what there is to say.

    Raises:
        ValueError: the source cannot be read, the folder holds something else, or a reward scores
            sets or is not finite.
    """
    scorers = {scorer.name: scorer for scorer in map(rewards.load_reward, specs)}
    sets = [name for name, scorer in scorers.items() if scorer.per == "set"]
    if sets or len(scorers) < len(specs):
        raise ValueError(
            f"rewards: expected different ones that score single images, got {list(specs)}"
        )
    if not re.fullmatch(r"[\w.-]+", split):  # it begins the names of files
        raise ValueError(f"split: expected one word of letters, digits and . _ -, got {split!r}")
    path = embedded.pairs_path(pairs, split) if pairs in embedded.SETS else pairs
    source = open_source(path, split)
    identities = [scorer.identity() for scorer in scorers.values()]
    settings = {"source": source.fingerprint(), "rewards": identities}
    check_settings(output, settings, "relabelled pairs", LABELS)
    parts, rejected = parts_of(source)
    if not parts:
        why = f": {in_words(count_reasons(rejected))}" * bool(rejected)
        raise ValueError(f"relabel: expected at least one pair, got none in {pairs!r}{why}")
    write_settings(output, settings, LABELS)
    if rejected:
        write_rejected(output, map(asdict, rejected))
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    paths = [output / f"{split}-{i:05d}-of-{len(parts):05d}.parquet" for i in range(len(parts))]
    own, label = list(zip(parts, paths, strict=True))[rank::ranks], Labeller(scorers, batch, device)
    for part, path in tqdm(own, desc="relabelling", unit="part", disable=rank != 0 or None):
        if not path.is_file():
            sweep(output, f"{path.name}.*")
            write_tables(path, map(label, part))
    if lacking := sum(not path.is_file() for path in paths):
        return f"part {rank} of {ranks} is done; {lacking} of {len(parts)} files are still missing"
    said = f"relabelled: {count(paths)} in {output}"
    return said + f"; left out: {in_words(count_reasons(rejected))}" * bool(rejected)


@dataclass
class Part:
    """A part of a source: iterates over its tables of up to `ROWS` rows in Pick-a-Pic's columns."""

    source: Source
    rows: Any
    """(file, row group) of Pick-a-Pic, or the pairs."""

    def __iter__(self) -> Iterator[pa.Table]:
        if isinstance(self.source, PickAPic):
            yield from self.source.tables(*self.rows, ROWS)
            return
        for start in range(0, len(self.rows), ROWS):
            yield _table(self.source, self.rows[start : start + ROWS])


def parts_of(source: Source) -> tuple[list[Part], list[Rejected]]:
    """The parts that a source is written in, and its rows that are in none of them."""
    if isinstance(source, PickAPic):
        return [Part(source, place) for place in source.groups()], []
    pairs: list[Pair] = []
    rejected: list[Rejected] = []
    for row in source.rows():
        (pairs if isinstance(row, Pair) else rejected).append(row)
    return [Part(source, pairs[i : i + PART]) for i in range(0, len(pairs), PART)], rejected


def _table(source: Source, pairs: Sequence[Pair]) -> pa.Table:
    """Pairs of any source in Pick-a-Pic's columns, the winners first."""
    sides = [[getattr(pair, side) for pair in pairs] for side in ("winner", "loser")]
    columns: dict[str, Any] = {"caption": [pair.caption for pair in pairs]}
    for i, side in enumerate(sides):
        columns[UIDS[i]] = [image.key for image in side]
        columns[IMAGES[i]] = list(source.read([image.place for image in side]))
    columns |= {"best_image_uid": columns[UIDS[0]], "has_label": [True] * len(pairs)}
    columns |= {"ranking_id": [pair.pair_id for pair in pairs]}
    return pa.table(columns)


class Labeller:
    """Labels tables in Pick-a-Pic's columns by the first of some scorers.

    Args:
        scorers: by name.
        batch: images scored at once.
        device: where.
    """

    def __init__(self, scorers: dict[str, Any], batch: int, device: torch.device):
        self.scorers, self.batch, self.device = scorers, batch, device

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with labels and scores."""
        rows = [_readable(*row) for row in _captions_and_images(table)]
        good = [number for number, row in enumerate(rows) if not isinstance(row, Unusable)]
        captions = [rows[number][0] for number in good]
        scores = {
            name: np.stack(
                [self._scores(name, captions, [rows[n][side] for n in good]) for side in (1, 2)]
            )
            for name in self.scorers
        }
        first, *_ = scores.values()
        why = [row.reason if isinstance(row, Unusable) else None for row in rows]
        columns: dict[str, list[Any]] = {"has_label": [reason is None for reason in why]}
        columns["unlabelled"] = why
        found = {"label": (np.sign(first - first[::-1]) + 1) / 2} | scores
        for name, (zero, one) in found.items():
            columns |= {f"{name}_0": _spread(zero, good, len(rows))}
            columns |= {f"{name}_1": _spread(one, good, len(rows))}
        if all(name in table.column_names for name in UIDS):
            uids = [table.column(name).to_pylist() for name in UIDS]
            best = {1.0: uids[0], 0.0: uids[1], 0.5: ["tie"] * len(rows), None: [None] * len(rows)}
            columns["best_image_uid"] = [
                best[label][n] for n, label in enumerate(columns["label_0"])
            ]
        for name, values in columns.items():
            column = pa.array(values, _TYPES.get(name, pa.float64()))
            if name in table.column_names:
                table = table.set_column(table.column_names.index(name), name, column)
            else:
                table = table.append_column(name, column)
        return table.replace_schema_metadata()  # it describes the columns that were

    def _scores(self, name: str, captions: list[str], pictures: list[Tensor]) -> np.ndarray:
        """float32 [N] of pictures, uint8 [3, H, W], each of a size of its own."""
        found = np.empty(len(pictures), dtype=np.float32)
        by_size: dict[torch.Size, list[int]] = {}
        for i, picture in enumerate(pictures):
            by_size.setdefault(picture.shape, []).append(i)
        for alike in by_size.values():
            for start in range(0, len(alike), self.batch):
                some = alike[start : start + self.batch]
                shown = torch.stack([pictures[i] for i in some]).to(self.device).float() / 255
                asked = [captions[i] for i in some]
                scores = rewards.score(self.scorers[name], shown, asked, self.batch)
                found[some] = scores.cpu().numpy()
        if bad := [captions[i] for i in np.flatnonzero(~np.isfinite(found))]:
            raise ValueError(
                f"rewards: expected finite scores of {name}, got others for {bad[0]!r}"
            )
        return found


_TYPES = {"best_image_uid": pa.string(), "has_label": pa.bool_(), "unlabelled": pa.string()}


def _captions_and_images(table: pa.Table) -> Iterator[tuple]:
    captions = as_bytes(table.column("caption").combine_chunks())
    return zip(captions, *(table.column(name).to_pylist() for name in IMAGES), strict=True)


def _readable(caption: Any, *encoded: Any) -> tuple[str, Tensor, Tensor] | Unusable:
    """Caption and both images of a row, or why training could not use it either."""
    try:
        decoded = (
            images.decode(image.get("bytes") if isinstance(image, dict) else image)
            for image in encoded
        )
        first, second = (torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in decoded)
        return check_caption(caption), first, second
    except Unusable as why:
        return why.with_traceback(None)  # whose frames hold the images


def _spread(values: Iterable[float], rows: Sequence[int], count: int) -> list[float | None]:
    """Values of some rows among `count`, None elsewhere."""
    found: list[float | None] = [None] * count
    for row, value in zip(rows, values, strict=True):
        found[row] = float(value)
    return found


def write_tables(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables as the row groups of a parquet file that appears whole or not at all."""
    with publish(path) as file:
        writer = None
        for table in tables:
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        writer.close()


def count(paths: Sequence[Path]) -> str:
    """How many pairs files hold, in words."""
    labels: Counter = Counter()
    reasons: Counter = Counter()
    for path in paths:
        table = pq.read_table(path, columns=["label_0", "unlabelled"])
        labels.update(table.column("label_0").to_pylist())
        reasons.update(table.column("unlabelled").drop_null().to_pylist())
    said = f"{sum(labels.values())} pairs, {labels[0.5]} tied"
    return said + f", unlabelled: {in_words(dict(reasons.most_common()))}" * bool(reasons)
