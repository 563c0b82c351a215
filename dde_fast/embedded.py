"""The embedded default: a tiny Stable Diffusion and two preference sets made of emoji drawings.

`faces` asks which of two faces people use in happier tweets: human annotation (Emoji Sentiment
Ranking 1.0, 83 annotators, 70,000 tweets), read from the installed package `emoji-sentiment`. It is
the sentiment of tweets that use the emoji, not taste in pictures. `style` prefers flat colour over
line art of the same emoji; the rule is ours, and its held-out names are fixed below by hash, before
anything is trained.

Both are written as parquet in Pick-a-Pic's columns, so the embedded run goes through the loader of
the real data.
"""

import csv
import hashlib
import importlib.util
import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dde_fast.shards import publish

TINY = Path(__file__).parent / "tiny"
SPLITS = ("train", "test")
PLAIN_PROMPT = "face"
MIN_TWEETS, MIN_STANDARD_ERRORS = 20, 2.0
TEST_SHARE = {"faces": 0.1, "style": 0.3}
"""Held out for testing: of `faces` this share of emoji pairs (each in every designer), of `style`
this share of names."""

_FORMAT = 1
"""Part of the cache key: raise it when the same art gives other rows."""


class Sentiment(NamedTuple):
    """Mean sentiment of the tweets that use an emoji, in [-1, 1], with its standard error."""

    score: float
    standard_error: float
    tweets: int


def model_path() -> Path:
    """Folder of the tiny Stable Diffusion pipeline, for `StableDiffusionPipeline.from_pretrained`.

    32 x 32 px images, latents [4, 8, 8], fp16 weights. Raises FileNotFoundError when the
    installation lacks it.
    """
    path = TINY / "model"
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"the embedded model is missing: no model_index.json in {path}")
    return path


@cache
def art() -> list[dict]:
    """The drawings: rows with name, designer, role (`base`, `judge`, `other`), codepoint (hex) and
    png (bytes)."""
    return pq.read_table(TINY / "art.parquet").to_pylist()


def _ranking_file() -> Path:
    spec = importlib.util.find_spec("emoji_sentiment")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the `faces` preferences and the rewards human_score and sentiment need the package "
            "emoji-sentiment (human annotation under CC-BY-SA 4.0, not copied into this one): "
            "pip install dde-fast[demo]"
        )
    (path,) = Path(spec.origin).parent.glob("Emoji_Sentiment_Data*.csv")
    return path


@cache
def sentiment() -> dict[str, Sentiment]:
    """Human sentiment by codepoint (hex), for emojis annotated in at least 20 tweets.

    With counts n₋, n₀, n₊ of N tweets: score = (n₊ - n₋)/N, standard error = √(((n₊ + n₋)/N -
    score²)/N). Raises ImportError when the package emoji-sentiment is not installed.
    """
    ranking = {}
    with _ranking_file().open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            negative, neutral, positive = (int(row[k]) for k in ("Negative", "Neutral", "Positive"))
            tweets = negative + neutral + positive
            if tweets >= MIN_TWEETS:
                score = (positive - negative) / tweets
                variance = (positive + negative) / tweets - score**2
                code = row["Unicode codepoint"].removeprefix("0x").lower()
                ranking[code] = Sentiment(score, math.sqrt(variance / tweets), tweets)
    return ranking


def _fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on the words alone: the seeded choice behind slots and
    splits."""
    digest = hashlib.sha256("/".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@cache
def style_names(split: str) -> list[str]:
    """Emoji names of one split of `style`: the 30 % with the smallest hash are held out for
    `test`."""
    names = sorted(
        {row["name"] for row in art() if row["role"] == "base"}, key=lambda n: _fraction("style", n)
    )
    held_out = round(TEST_SHARE["style"] * len(names))
    return sorted(names[:held_out] if split == "test" else names[held_out:])


def _face_pairs(split: str) -> list[tuple[str, dict, dict]]:
    """(caption, winner, loser): same designer, sentiments more than 2 standard errors of the
    difference apart."""
    scores = sentiment()
    drawings = [row for row in art() if row["role"] == "base" and row["codepoint"] in scores]
    pairs = []
    for winner in drawings:
        for loser in drawings:
            high, low = scores[winner["codepoint"]], scores[loser["codepoint"]]
            error = math.hypot(high.standard_error, low.standard_error)
            if winner["designer"] != loser["designer"] or winner["png"] == loser["png"]:
                continue  # the line art of "angry face" and "pouting face" is one drawing
            if high.score - low.score <= MIN_STANDARD_ERRORS * error:
                continue
            held_out = _fraction("faces", winner["name"], loser["name"]) < TEST_SHARE["faces"]
            if held_out == (split == "test"):
                pairs.append((PLAIN_PROMPT, winner, loser))
    return pairs


def _style_pairs(split: str) -> list[tuple[str, dict, dict]]:
    """(caption, winner, loser): the name, its flat drawing, its line drawing."""
    drawings = {(row["designer"], row["name"]): row for row in art() if row["role"] == "base"}
    return [(name, drawings["flat", name], drawings["line", name]) for name in style_names(split)]


_PAIRS: dict[str, Callable[[str], list[tuple[str, dict, dict]]]] = {
    "faces": _face_pairs,
    "style": _style_pairs,
}
SETS = tuple(_PAIRS)


def _uid(row: dict) -> str:
    return f"{row['designer']}-{row['codepoint']}"


def _row(name: str, index: int, caption: str, winner: dict, loser: dict, count: int) -> dict:
    """One Pick-a-Pic row; a hash of the pair decides which slot the winner takes."""
    swapped = _fraction("slot", name, _uid(winner), _uid(loser)) < 0.5
    first, second = (loser, winner) if swapped else (winner, loser)
    return {
        "are_different": True,
        "best_image_uid": _uid(winner),
        "caption": caption,
        "has_label": True,
        "image_0_uid": _uid(first),
        "image_1_uid": _uid(second),
        "jpg_0": first["png"],
        "jpg_1": second["png"],
        "label_0": 0.0 if swapped else 1.0,
        "label_1": 1.0 if swapped else 0.0,
        "model_0": first["designer"],
        "model_1": second["designer"],
        "ranking_id": index,
        "user_id": 0,
        "num_example_per_prompt": count,
    }


def cache_folder() -> Path:
    """`$DDE_FAST_CACHE`, or `~/.cache/dde_fast`."""
    return Path(os.environ.get("DDE_FAST_CACHE") or Path.home() / ".cache" / "dde_fast")


def _content_key(name: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {name} {TEST_SHARE[name]}".encode())
    digest.update((TINY / "art.parquet").read_bytes())
    if name == "faces":
        digest.update(_ranking_file().read_bytes())
    return digest.hexdigest()[:12]


def _check(name: str, split: str) -> None:
    if name not in SETS:
        raise ValueError(f"name: expected one of {', '.join(SETS)}, got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")


def pairs_path(name: str, split: str = "train") -> Path:
    """Parquet file of a preference set in Pick-a-Pic's columns, written into the cache folder on
    first use.

    `jpg_0` and `jpg_1` hold PNG bytes, `label_0` and `label_1` are 1 for the winner and 0 for the
    loser. The file's name carries a hash of what it was made from, and it appears whole or not at
    all. Raises ValueError for an unknown name or split, and ImportError when `faces` is asked for
    without the package emoji-sentiment.
    """
    _check(name, split)
    path = cache_folder() / f"{name}-{split}-{_content_key(name)}.parquet"
    if path.exists():
        return path
    pairs = _PAIRS[name](split)
    counts: dict[str, int] = {}
    for caption, _, _ in pairs:
        counts[caption] = counts.get(caption, 0) + 1
    rows = [_row(name, i, *pair, counts[pair[0]]) for i, pair in enumerate(pairs)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with publish(path) as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return path


def prompts(name: str, split: str = "test") -> list[str]:
    """Prompts of a set, by default those on which it is evaluated: "face" for `faces`, the split's
    names for `style`, of which the others are held out."""
    _check(name, split)
    return {"faces": [PLAIN_PROMPT], "style": style_names(split)}[name]
