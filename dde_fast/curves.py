"""The metrics of training runs as charts: one row of a table for each."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dde_fast.figures import Picture, Series, Style, heat_map, lines
from dde_fast.runs import Run

SMOOTHED = 20
"""Records from which on a running mean is drawn as well."""

COLUMNS = 15
"""Of a heat map at most: records are pooled, as few pairs of one fall into one part."""

GROUPS = {
    "learning": "Is it learning?",
    "reward": "Reward while training",
    "details": "Behind it",
    "machine": "Throughput and memory",
}


def _share(half: str) -> Callable[[dict], float | None]:
    """Of a record: the policy's error as a multiple of the reference's."""

    def read(record: dict[str, Any]) -> float | None:
        policy, reference = (record.get(f"{who}_{half}_error") for who in ("policy", "reference"))
        return policy / reference if policy is not None and reference else None

    return read


def _reward_gap(record: dict[str, Any]) -> float | None:
    """Of a record: the winners' reward less the losers'."""
    win, lose = (record.get(f"reward_{half}") for half in ("win", "lose"))
    return win - lose if win is not None and lose is not None else None


@dataclass(frozen=True)
class Metric:
    """One chart."""

    name: str
    title: str
    group: str
    caption: str
    level: float | None = None
    """To compare with."""
    log: bool = False
    of: Callable[[dict], float | None] | None = None
    """From a record; by default its entry of that name."""
    smooth: bool = True
    """Of pairs, which are others in every record: a running mean says more."""

    def __call__(self, record: dict[str, Any]) -> float | None:
        value = record.get(self.name) if self.of is None else self.of(record)
        return value if isinstance(value, float | int) else None


METRICS = (
    Metric("implicit_accuracy", "Implicit accuracy", "learning", "Share of pairs whose winner the policy prefers. From 0.5 to 0.6 or 0.8; held-out (dots) near training. Below 0.5: the labels may be the wrong way round.", 0.5),
    Metric("win_ratio", "Winner's error, × reference", "learning", "Does it still denoise good pictures? Staying below 2 is healthy; far above, images degrade however good the accuracy looks.", 1.0, of=_share("win")),
    Metric("lose_ratio", "Loser's error, × reference", "learning", "Rises faster than the winner's in a healthy run. Both rising alike: the policy is leaving the reference for nothing.", 1.0, of=_share("lose")),
    Metric("logit_size", "Size of the logit", "learning", "0.1 to a few. Near 0: nothing has moved yet. Far above: beta is too large, and the loss is a coin with a high stake.", log=True),
    Metric("preference_loss", "Loss", "learning", "With the sigmoid link it begins at log 2 (dotted) and may hover there in the best of runs: read the others first.", math.log(2), of=lambda record: record.get("loss") if "logit" in record else None),
    Metric("sft_loss", "Loss of sft", "learning", "Mean square error on winners, at other timesteps in each record.", of=lambda record: None if "logit" in record else record.get("loss")),
    Metric("reward", "Reward of the final images", "reward", "Mean over the trajectories trained on; it should rise."),
    Metric("reward_win", "Reward of the chosen candidates", "reward", "Mean stepwise reward of the winners."),
    Metric("reward_lose", "Reward of the other candidates", "reward", "Mean stepwise reward of the losers. The distance to the winners is what a step can learn from."),
    Metric("reward_ties", "Ties of the reward", "reward", "Share of pairs whose candidates score the same: they teach nothing."),
    Metric("reward_failures", "Failures of the reward", "reward", "Share of pairs whose reward is no finite number; their optimizer steps are skipped: 0 is healthy.", smooth=False),
    Metric("logit", "Logit", "details", "Its mean: above 0, winners are preferred on the whole.", 0.0),
    Metric("margin", "Correction m_t", "details", "Mean of the correction term over the pairs; small beside logit / beta.", 0.0),
    Metric("policy_win_error", "Policy's error on winners", "details", "Mean square error of its prediction."),
    Metric("policy_lose_error", "Policy's error on losers", "details", "Mean square error of its prediction."),
    Metric("reference_win_error", "Reference's error on winners", "details", "Constant but for which pairs and timesteps were drawn."),
    Metric("reference_lose_error", "Reference's error on losers", "details", "Constant but for which pairs and timesteps were drawn."),
    Metric("grad_norm", "Norm of the gradient", "details", "Before clipping; no steady growth.", log=True),
    Metric("learning_rate", "Learning rate", "details", "Of the last step.", smooth=False),
    Metric("skipped_steps", "Skipped steps", "details", "Optimizer steps skipped so far because the gradient was not finite: 0 is healthy.", smooth=False),
    Metric("pairs_per_second", "Pairs per second", "machine", "Training alone, without validation, pictures and checkpoints. The first point holds the start.", smooth=False),
    Metric("mfu", "MFU", "machine", "Share of the devices' peak arithmetic.", smooth=False),
    Metric("data_wait", "Waiting for data", "machine", "Share of the time. Above a few percent: storage is slower than the model.", smooth=False),
    Metric("memory_gib", "Peak memory, GiB", "machine", "Constant after the first steps.", smooth=False),
)  # fmt: skip

BY_TIMESTEP = (
    ("implicit_accuracy", "accuracy", None, {"centre": 0.5}, "Above ½ at the noisy end only (top): layout and colour are learnt but no detail; the other way round at the bottom."),
    ("win_ratio", "winner's error, × reference", _share("win"), {"centre": 1.0, "log": True}, "One part that runs away while the others stay says where not to train."),
    ("lose_ratio", "loser's error, × reference", _share("lose"), {"centre": 1.0, "log": True}, "Where the policy leaves the reference to put losers off."),
    ("logit_size", "size of the logit", None, {"log": True}, "Where the objective puts its weight: a part far brighter than the others decides alone."),
    ("reward_gap", "winner's reward less loser's", _reward_gap, {}, "How far apart a step's candidates are; near 0, the order of the two is chance."),
    ("margin", "correction m_t", None, {"centre": 0.0}, "How the correction builds up over training."),
)  # fmt: skip
"""Name, title, how to read it, how to draw it, caption."""


def metrics_of(runs: Sequence[Run]) -> list[Metric]:
    """The table's rows, then one for every other number that the runs log."""
    known = {metric.name for metric in METRICS} | {"step", "loss"}
    numbers = {
        name: None
        for run in runs
        for record in run.records
        for name, value in record.items()
        if isinstance(value, float | int)
    }
    return [*METRICS, *(Metric(n, n, "details", "") for n in numbers if n not in known)]


def pictures(runs: Sequence[Run], look: dict[str, Style]) -> dict[str, list[Picture]]:
    """Charts by group, those that any run has numbers for."""
    made: dict[str, list[Picture]] = {}
    for metric in metrics_of(runs):
        series = [line for run in runs for line in _series(run, metric, look[run.name])]
        if series:
            figure = lines(metric.title, series, level=metric.level, log=metric.log)
            name = file_name(metric.name, {p.name for of in made.values() for p in of})
            picture = Picture(name, metric.title, metric.caption, figure)
            made.setdefault(metric.group, []).append(picture)
    return {group: made[group] for group in GROUPS if group in made}


def file_name(metric: str, taken: set[str]) -> str:
    """Of a metric's chart: a metric may be called anything, a file and an element's id may not."""
    name = "curve-" + re.sub(r"[^A-Za-z0-9]+", "-", metric).strip("-")
    return next(n for i in itertools.count(1) if (n := name + f"-{i}" * (i > 1)) not in taken)


def _series(run: Run, metric: Metric, style: Style) -> list[Series]:
    """What was logged, its running mean where there is enough of it, and the held-out pairs."""
    found = [(r["step"], value) for r in run.records if (value := metric(r)) is not None]
    series = []
    if found:
        steps, values = zip(*found, strict=True)
        smooth = metric.smooth and len(found) >= SMOOTHED
        faint = {"alpha": 0.3, "width": 1.0} if smooth else {}
        series.append(Series("" if smooth else run.name, steps, values, style, **faint))
        if smooth:
            series.append(Series(run.name, steps, running_mean(values), style))
    looks = [(r["step"], value) for r in run.held_out if (value := metric(r)) is not None]
    if looks and metric.smooth:
        steps, values = zip(*looks, strict=True)
        # no label: the run's colour, and the page says what dots are
        series.append(Series("", steps, values, style, mark=True, width=1.0))
    return series


def running_mean(values: Sequence[float]) -> list[float]:
    """Of a tenth of the values, centred, fewer at the ends."""
    half = max(1, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [float(np.mean(window)) for window in windows]


def heat_maps(runs: Sequence[Run]) -> dict[str, list[Picture]]:
    """By run: its metrics over steps and parts of the schedule."""
    made = {}
    for number, run in enumerate(runs, start=1):
        records = [r for r in run.records if r.get("by_timestep")]
        found = []
        for name, title, of, how, caption in BY_TIMESTEP:
            steps, parts, values = _by_timestep(records, name, of)
            if how.get("log"):
                values[~(values > 0)] = np.nan
            if np.isfinite(values).any() and (name != "margin" or np.nanmax(np.abs(values)) > 0):
                figure = heat_map(f"{run.name}: {title}", steps, parts, values, **how)
                place = f"timestep-{number}-{name.replace('_', '-')}"
                found.append(Picture(place, f"{run.name}: {title}", caption, figure))
        if found:
            made[run.name] = found
    return made


def _by_timestep(
    records: Sequence[dict], name: str, of: Callable | None
) -> tuple[list[int], list[str], np.ndarray]:
    """Steps, parts of the schedule, and the metric [parts, steps], nan where it is not known."""
    size = -(-len(records) // COLUMNS) if records else 1
    blocks = [records[i : i + size] for i in range(0, len(records), size)]
    tables = [_pooled([record["by_timestep"] for record in block]) for block in blocks]
    parts = sorted({part for table in tables for part in table})
    values = np.full((len(parts), len(tables)), np.nan)
    for column, table in enumerate(tables):
        for row, part in enumerate(parts):
            here = table.get(part, {})
            value = here.get(name) if of is None else of(here)
            values[row, column] = np.nan if value is None else value
    return [block[-1]["step"] for block in blocks], parts, values


def _pooled(tables: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Part of the schedule -> metric -> mean over the pairs of several records."""
    sums: dict[str, dict[str, list[float]]] = {}
    for table in tables:
        pairs = table.get("pairs", {})
        for metric, parts in table.items():
            for part, mean in parts.items():
                if metric != "pairs" and mean is not None:
                    total = sums.setdefault(part, {}).setdefault(metric, [0.0, 0.0])
                    total[0] += pairs[part] * mean
                    total[1] += pairs[part]
    return {p: {m: total / n for m, (total, n) in of.items() if n} for p, of in sums.items()}
