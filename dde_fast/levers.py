"""What `benchmarks/bench_train_step.py` measured: one training step, lever by lever, as the cells of
a table and as a waterfall."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dde_fast.figures import COLOURS, INK, SOFT, Picture, panel

if TYPE_CHECKING:  # loaded where a chart is drawn
    from matplotlib.figure import Figure

MODELS = {"embedded": "the embedded model", "sd15": "SD 1.5", "sdxl": "SDXL"}

HEAD = (
    "",
    "pairs/s [middle half]",
    "× published",
    "share of arithmetic",
    "step + state + frozen, GiB",
    "host reads",
    "waiting for data",
)
"""Of the columns that `cells` fills."""

READING = (
    "The steps took turns, round after round. Share of arithmetic: the counted operations of the UNets, "
    "those that gradient checkpointing repeats counted once, at the rate of a matrix product measured in "
    "the same rounds. GiB: the most that a step allocates, what training keeps between steps (weights, "
    "moments, buffers of gradients), and what is held frozen. Host reads: how often a step waits for a "
    "number of the device. –: not measured."
)

PUBLISHED = "published structure"
"""The name of the row that others are compared with, the first."""
NUMBERS = ("parameters", "pairs", "rounds", "matrix_TFLOPs")
ROW = ("pairs_per_s", "share_of_arithmetic", "step_GiB", "frozen_GiB", "host_reads")
OPTIONAL = ("state_GiB", "data_wait", "times_published")
"""Of a row: older files lack the first, those of a run that was cut off the second, and the third where
the published structure does not fit a GPU."""
QUARTILES = ("lower_quartile", "median", "upper_quartile")


@dataclass(frozen=True)
class StepResult:
    """A result of `bench_train_step.py`."""

    name: str
    path: Path
    result: dict[str, Any]
    """The file's content, with its machine's commit and versions beside it as evaluations have
    them."""


def is_result(path: Path) -> bool:
    """Whether a file says that it is a result of `bench_train_step.py`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"case", "rows"} <= found.keys()


def read(path: Path) -> StepResult:
    """A result, checked.

    Raises:
        ValueError: it lacks what is shown of it.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    try:
        machine, rows = result["machine"], result["rows"]
        numbers = [result[name] for name in NUMBERS] + [*result["latent"], machine["threads"]]
        numbers += [row[name] for row in rows for name in ROW]
        numbers += [row[name] for row in rows for name in OPTIONAL if name in row]
        positive = [row["seconds"][name] for row in rows for name in QUARTILES]
        positive += [row["pairs_per_s"] for row in rows] + [micro_batches(result)]
        texts = [result["model"], result["dtype"], machine["device"], machine["commit"]]
        texts += [*machine["versions"].values(), *(row["name"] for row in rows)]
        found = {"commit": machine["commit"], "versions": machine["versions"], **result}
        whole = rows and all(isinstance(text, str) for text in texts)
        whole = whole and all(value >= 0 and math.isfinite(value) for value in numbers)
        whole = whole and all(value > 0 and math.isfinite(value) for value in positive)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "runs: expected a result of bench_train_step.py with machine and rows in "
            f"{str(path)!r}, got a missing or wrong entry: {error}"
        ) from None
    if not whole:
        raise ValueError(
            f"runs: expected rows of numbers above 0 with their names in {str(path)!r}, got others"
        )
    return StepResult(path.stem, path, found)


def model_of(result: dict[str, Any]) -> str:
    """The model's name for people."""
    return MODELS.get(result["model"], result["model"])


def micro_batches(result: dict[str, Any]) -> int:
    """Of a step; older files had one and do not say so."""
    return result.get("micro_batches", 1)


def batch_of(result: dict[str, Any]) -> str:
    """Pairs of a step, counted, and its micro-batches where it has several."""
    micro = micro_batches(result)
    pairs = result["pairs"] // micro
    return f"{f'{micro} × ' if micro > 1 else ''}{pairs} pair{'s' * (pairs != 1)}"


def subject(result: dict[str, Any]) -> str:
    """What is trained on what."""
    return (
        f"{model_of(result)} ({result['parameters'] / 1e6:,.3g} M parameters), latents "
        f"{'×'.join(map(str, result['latent']))}, {batch_of(result)}, {result['dtype']}"
    )


def place(result: dict[str, Any]) -> str:
    """Where it was measured, how often, and at which rate a matrix product ran there."""
    machine = result["machine"]
    failed = "".join(f"; {name} failed: {why}" for name, why in result.get("failed", {}).items())
    return (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}; "
        f"{result['rounds']} rounds; matrix product {1e3 * result['matrix_TFLOPs']:,.0f} GFLOP/s"
        f"{failed}"
    )


def times_published(row: dict[str, Any]) -> str:
    """As often as the published structure; a dash where that did not run."""
    return f"{row['times_published']:.2f}" if "times_published" in row else "–"


def middle_half(result: dict[str, Any], row: dict[str, Any]) -> tuple[float, float]:
    """Pairs per second at the quartiles of a step's seconds."""
    return tuple(result["pairs"] / row["seconds"][f"{end}_quartile"] for end in ("upper", "lower"))


def cells(result: dict[str, Any]) -> list[list[str]]:
    """The rows of the table, under `HEAD`."""
    rows = []
    for number, row in enumerate(result["rows"]):
        low, high = middle_half(result, row)
        launches = f", {row['launches']:,} launches" if row.get("launches") else ""
        state = f"{row['state_GiB']:.3g}" if "state_GiB" in row else "–"
        rows.append(
            [
                f"{'+ ' * (number > 0)}{row['name']}",
                f"{row['pairs_per_s']:.3g} [{low:.3g}, {high:.3g}]",
                times_published(row),
                f"{100 * row['share_of_arithmetic']:.0f} %",
                f"{row['step_GiB']:.3g} + {state} + {row['frozen_GiB']:.3g}",
                f"{row['host_reads']}{launches}",
                f"{100 * row['data_wait']:.2g} %" if "data_wait" in row else "–",
            ]
        )
    return rows


def waterfall(result: dict[str, Any]) -> Figure:
    """Pairs per second: a bar per lever, what it adds or costs in colour, the middle half of the
    rounds as a line, the share of arithmetic beside it."""
    rows, machine = result["rows"], result["machine"]
    figure, axes = panel(
        f"One step of {model_of(result)}", height=0.42 * len(rows) + 1.2, grid=False
    )
    before, farthest = 0.0, 0.0
    for number, row in enumerate(rows):
        rate, (low, high) = row["pairs_per_s"], middle_half(result, row)
        kept, kind = min(before, rate), "dde" if rate >= before else "diffusion-dpo"
        colour = COLOURS["other" if number == 0 else kind][0]
        axes.barh(number, kept, color=SOFT, height=0.62, lw=0)
        axes.barh(number, abs(rate - before), left=kept, color=colour, height=0.62, lw=0)
        axes.plot([low, high], [number, number], color=INK, lw=1.4, solid_capstyle="butt")
        end = max(before, rate, high)
        share = f"{100 * row['share_of_arithmetic']:.0f} %"
        said = f"{rate:.3g}, {times_published(row)}×, {share}"
        beside = {"xytext": (4, 0), "textcoords": "offset points"}
        axes.annotate(said, (end, number), color=INK, va="center", fontsize=9, **beside)
        before, farthest = rate, max(farthest, end)
    names = [f"{'+ ' * (i > 0)}{row['name']}" for i, row in enumerate(rows)]
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 20) for name in names])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.6 * farthest)
    what = f"latents {'×'.join(map(str, result['latent']))}, {batch_of(result)}, {result['dtype']}"
    where = f"{machine['device']}, {machine['threads']} threads, commit {machine['commit']}"
    read = "pairs per second, × published, share of arithmetic"
    axes.set_xlabel("\n".join((read, what, textwrap.shorten(where, 64))))
    return figure


def picture(one: StepResult, name: str) -> Picture:
    """The waterfall as a chart of a page.

    Args:
        one: the result.
        name: of the chart's file.
    """
    caption = (
        "Each bar is the one above with one lever more: what it adds is "
        "blue, what it costs orange; the line is the middle half of the rounds; beside it the "
        "rate, how many times the published structure's it is, and the share of arithmetic."
    )
    title = f"One step of {model_of(one.result)}"
    return Picture(name, title, caption, waterfall(one.result))
