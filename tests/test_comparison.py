"""Statistics of an evaluation, by hand and against the normal distribution."""

import math

import numpy as np
import pytest

from dde_fast import comparison
from dde_fast.comparison import bootstrap_interval, compare, compare_all, summarise


def test_comparison_by_hand():
    result = compare(np.array([1.0, 2, 3, 4]), np.array([1.0, 1, 5, 3]), seed=0)
    assert (result["win"], result["tie"], result["lose"]) == (0.5, 0.25, 0.25)
    assert result["difference"] == 0.0
    assert result["interval"][0] < 0 < result["interval"][1]
    low, high = result["win_interval"]
    assert low < 0.5 + 0.25 / 2 < high and 0 <= low and high <= 1


def test_bootstrap_interval_is_seeded_and_agrees_with_the_normal_one():
    differences = np.random.default_rng(3).normal(0.2, 1.0, 400)
    low, high = bootstrap_interval(differences, seed=7)
    assert (low, high) == bootstrap_interval(differences, seed=7)
    assert (low, high) != bootstrap_interval(differences, seed=8)
    half = 1.96 * differences.std() / math.sqrt(400)
    assert low == pytest.approx(differences.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.05 * half)
    assert bootstrap_interval(np.full(9, 0.25), seed=0) == (0.25, 0.25)


def test_images_of_a_prompt_are_drawn_together():
    """Twenty prompts whose images agree: the interval is that of 20 numbers, not of 400."""
    by_prompt = np.random.default_rng(1).normal(0.0, 1.0, 20)
    scores, other = np.repeat(by_prompt, 20), np.zeros(400)
    together = compare(scores, other, seed=0, images_per_prompt=20)
    assert together["interval"] == pytest.approx(bootstrap_interval(by_prompt, seed=0))
    alone = compare(scores, other, seed=0)["interval"]
    widths = [high - low for low, high in (together["interval"], alone)]
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(20), rel=0.1)
    assert together["win_interval"][1] - together["win_interval"][0] > 0.3


def test_of_a_single_prompt_images_are_drawn():
    scores = np.random.default_rng(1).normal(0.0, 1.0, 40)
    one = compare(scores, np.zeros(40), seed=0, images_per_prompt=40)
    assert one == compare(scores, np.zeros(40), seed=0)
    assert one["interval"][0] < one["interval"][1]


SCORES = {
    "base": {"colour": np.array([1.0, 2.0, 3.0]), "distinct": 7.0, "inception": (2.5, 0.5)},
    "first": {"colour": np.array([2.0, 2.0, 2.0]), "distinct": 5.0, "inception": (3.0, 0.25)},
    "second": {"colour": np.array([2.0, 3.0, 4.0]), "distinct": 8.0, "inception": (2.0, 1.0)},
}


def test_every_two_models_are_compared():
    pairs = compare_all(SCORES, seed=0)
    assert list(pairs) == ["colour"]  # the others are one number of the whole set
    found = {(entry["a"], entry["b"]): entry for entry in pairs["colour"]}
    assert list(found) == [("first", "base"), ("second", "base"), ("second", "first")]
    entry = found["second", "first"]
    assert (entry["win"], entry["tie"], entry["lose"]) == pytest.approx((2 / 3, 1 / 3, 0))
    assert entry["difference"] == 1.0
    # better everywhere by the same number
    assert found["second", "base"]["interval"] == [1.0, 1.0]
    assert found["second", "base"]["win_interval"] == [1.0, 1.0]


def test_the_summary_compares_with_the_first_model():
    table = summarise(SCORES, compare_all(SCORES, seed=0))
    assert table["base"]["colour"] == {"mean": 2.0, "std": pytest.approx(math.sqrt(2 / 3))}
    for model in ("first", "second"):
        entry = dict(table[model]["colour"])
        assert entry.pop("mean") == SCORES[model]["colour"].mean()
        assert entry.pop("std") == SCORES[model]["colour"].std()
        assert entry == compare(SCORES[model]["colour"], SCORES["base"]["colour"], seed=0)
    assert table["base"]["distinct"] == {"mean": 7.0}
    assert table["first"]["distinct"] == {"mean": 5.0, "difference": -2.0}
    assert table["first"]["inception"] == {"mean": 3.0, "std": 0.25, "difference": 0.5}


def test_every_comparison_is_resampled_once(monkeypatch):
    """Two intervals of each of three pairs; the summary repeats those with the base."""
    drawn, interval = [], comparison.bootstrap_interval

    def noting(values, **options):
        drawn.append(len(values))
        return interval(values, **options)

    monkeypatch.setattr(comparison, "bootstrap_interval", noting)
    summarise(SCORES, compare_all(SCORES, seed=0))
    assert drawn == [3] * 6
