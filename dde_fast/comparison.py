"""Statistics of an evaluation: means, shares of wins, bootstrap intervals.

Image i of every model has the same prompt and noise, so scores are compared in pairs. What the
bootstrap draws anew are prompts, each with all its images; of a single prompt it is the images.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

RESAMPLES = 10_000
"""Bootstrap resamples behind each interval."""

Scores = Mapping[str, Mapping[str, Any]]
"""By model and reward: an array [N], one score per image; or of the whole set one number, or
(number, its std)."""


def bootstrap_interval(values: np.ndarray, *, seed: int) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean of values [N]: 10,000 resamples."""
    generator = np.random.default_rng(seed)
    count = len(values)
    rows = max(1, 4_000_000 // count)
    means = [
        values[generator.integers(0, count, (min(rows, RESAMPLES - done), count))].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def compare(
    scores: np.ndarray, other: np.ndarray, *, seed: int, images_per_prompt: int = 1
) -> dict[str, Any]:
    """Paired comparison of per-image scores [N] with another model's.

    Args:
        scores, other: [N], the images of a prompt beside each other.
        seed: of the bootstrap.
        images_per_prompt: N is a multiple of it.

    Returns:
        win, tie, lose: shares of the images; win_interval of win + tie/2; difference of the means
        and its interval.
    """
    differences = scores.astype(np.float64) - other.astype(np.float64)

    def interval(values: np.ndarray) -> list[float]:
        by_prompt = values.reshape(-1, images_per_prompt)
        resampled = values if len(by_prompt) == 1 else by_prompt.mean(axis=1)
        return list(bootstrap_interval(resampled, seed=seed))

    return {
        "win": float((differences > 0).mean()),
        "tie": float((differences == 0).mean()),
        "lose": float((differences < 0).mean()),
        "win_interval": interval((np.sign(differences) + 1) / 2),
        "difference": float(differences.mean()),
        "interval": interval(differences),
    }


def compare_all(
    scores: Scores, *, seed: int, images_per_prompt: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """By reward, the comparison of every two models: `a`, the one named later, with `b`."""
    options = {"seed": seed, "images_per_prompt": images_per_prompt}
    models = list(scores)
    return {
        reward: [
            {"a": a, "b": b} | compare(scores[a][reward], scores[b][reward], **options)
            for b, a in itertools.combinations(models, 2)
        ]
        for reward, values in scores[models[0]].items()
        if np.ndim(values) and not isinstance(values, tuple)
    }


def summarise(
    scores: Scores, pairs: Mapping[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """By model and reward: mean, std (of the images, or what a set's scorer says), and the comparison
    with the first model, out of the `pairs` that `compare_all` gives."""
    first, *_ = scores
    against = {(reward, p["a"]): p for reward in pairs for p in pairs[reward] if p["b"] == first}
    table: dict[str, dict[str, Any]] = {model: {} for model in scores}
    for model, by_reward in scores.items():
        for reward, values in by_reward.items():
            if reward in pairs:
                entry = {"mean": float(values.mean()), "std": float(values.std())}
                compared = against.get((reward, model), {})
                entry |= {name: compared[name] for name in compared if name not in ("a", "b")}
            else:
                entry = dict(zip(("mean", "std"), map(float, np.atleast_1d(values)), strict=False))
                if model != first:
                    entry["difference"] = entry["mean"] - table[first][reward]["mean"]
            table[model][reward] = entry
    return table
