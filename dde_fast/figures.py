"""Every picture: charts as SVG that follow a page's colours, and sheets of images.

A chart is drawn once, in the colours of `COLOURS` for white paper. `svg` names them instead of
spelling them out (`var(--dde)`), so that a page can give others for dark; `png` keeps them.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:  # loaded where a chart is drawn
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = {
    # name: on white, on black; told apart with any colour vision by lightness or hue
    "dde": ("#0b5fa5", "#6cb6f2"),
    "dde-single": ("#3f97b8", "#9ad7ea"),
    "dde-step": ("#0a7f6b", "#4fc9b0"),
    "diffusion-dpo": ("#c4500c", "#f79256"),
    "discounted": ("#9a7200", "#e3bd4f"),
    "sft": ("#77787a", "#a9abae"),
    "tailorpo": ("#7d3c98", "#c792ea"),
    "tailorpo-g": ("#b8336a", "#f28ab2"),
    "d3po": ("#5c7a14", "#b5d15c"),
    "other": ("#5a4a3f", "#c8b6a8"),
}
"""Colour of each objective."""

INK, RULE, SOFT, PAPER = "#24282d", "#d8dbde", "#e6e8ea", "#fffffe"
ROLES = {INK: "ink", RULE: "rule", SOFT: "soft", PAPER: "paper"}
"""Text and axes, the lines behind the curves, a quiet fill, the page."""

DASHES = {
    "solid": "-",
    "dashed": (0, (4, 1.6)),
    "dotted": (0, (1.2, 1.2)),
    "double": (0, (6, 1.5, 1.2, 1.5)),
}
"""Runs of one objective share its colour and differ by these: CSS's name of what comes near ->
matplotlib's dashes."""

FONT = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a run may be named $x
    "svg.fonttype": "none",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 4),
}


@dataclass(frozen=True)
class Style:
    """How everything of one run or model is drawn."""

    colour: str
    name: str
    """Of the colour: a key of `COLOURS`."""
    dash: str = "solid"
    """A key of `DASHES`."""


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style
    mark: bool = False
    """A dot at each point."""
    width: float = 1.6
    alpha: float = 1.0


@dataclass(frozen=True)
class Picture:
    """A chart with what a page says of it."""

    name: str
    """Of its file; letters, digits and hyphens."""
    title: str
    caption: str
    figure: Figure


def styles(objectives: dict[str, str]) -> dict[str, Style]:
    """A style for each name: its objective's colour, and a dash of its own among its like."""
    found, used = {}, {}
    for name, objective in objectives.items():
        key = objective if objective in COLOURS else "other"
        used[key] = used.get(key, 0) + 1
        dash = list(DASHES)[(used[key] - 1) % len(DASHES)]
        found[name] = Style(COLOURS[key][0], key, dash)
    return found


def lines(
    title: str,
    series: Iterable[Series],
    xlabel: str = "optimizer step",
    *,
    level: float | None = None,
    log: bool = False,
) -> Figure:
    """Lines over steps or timesteps; `level` is drawn across, to compare with."""
    figure, axes = panel(title)
    shown: dict[str, object] = {}
    for s in series:
        y = np.array([np.nan if value is None else value for value in s.y], dtype=float)
        if log:
            y[y <= 0] = np.nan
        alone = np.isfinite(y).sum() == 1
        (line,) = axes.plot(
            s.x,
            y,
            color=s.style.colour,
            ls=DASHES[s.style.dash],
            lw=s.width,
            alpha=s.alpha,
            marker="o" if s.mark or alone else None,
            ms=4,
        )
        if s.label and s.label not in shown:
            shown[s.label] = line
    if level is not None:
        axes.axhline(level, color=INK, lw=0.8, ls=(0, (1, 2)))
    axes.set_xlabel(xlabel)
    if log:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    else:
        axes.margins(y=0.08)
    if len(shown) > 1:
        _legend(figure, shown)
    return figure


def heat_map(
    title: str,
    steps: Sequence[int],
    parts: Sequence[str],
    values: np.ndarray,  # [parts, steps]
    *,
    centre: float | None = None,
    log: bool = False,
) -> Figure:
    """A metric over optimizer steps (across) and parts of the schedule (up); empty where no pair
    was drawn. With `centre` two colours part there, as far in both directions."""
    from matplotlib.colors import LogNorm, Normalize

    figure, axes = panel(title, grid=False)
    kind, colours = (LogNorm, "PuOr_r") if log else (Normalize, "PuOr_r")
    low, high = np.nanmin(values), np.nanmax(values)
    if centre is None:
        colours = "cividis"
        norm = kind(low, high if high > low else low + 1)
    elif log:
        reach = max(high / centre, centre / low, 1.05)
        norm = kind(centre / reach, centre * reach)
    else:
        reach = max(high - centre, centre - low, 1e-12)
        norm = kind(centre - reach, centre + reach)
    image = axes.imshow(
        values, norm=norm, cmap=colours, aspect="auto", origin="lower", interpolation="none"
    )
    places = np.unique(np.linspace(0, len(steps) - 1, 5).round().astype(int))
    axes.set_xticks(places, [str(steps[i]) for i in places])
    every = range(0, len(parts), max(1, len(parts) // 5))
    axes.set_yticks(list(every), [parts[i] for i in every])
    axes.set(xlabel="optimizer step", ylabel="timestep")
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=14)
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, length=2)
    bar.ax.minorticks_off()
    if log:  # between two powers of ten there is no tick
        ticks = np.geomspace(norm.vmin, norm.vmax, 5)
        bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    return figure


def shares(title: str, rows: dict[str, dict], look: dict[str, Style]) -> Figure:
    """Win, tie and lose of each model as a bar, with the share won (a tie counts half) and its
    interval where `rows` has a `win_interval`."""
    figure, axes = panel(title, height=0.5 * len(rows) + 0.9, grid=False)
    for place, (model, row) in enumerate(rows.items()):
        left = 0.0
        fills = ((look[model].colour, PAPER, 1.0), (SOFT, INK, 1.0), (look[model].colour, INK, 0.3))
        for kind, (fill, ink, alpha) in zip(("win", "tie", "lose"), fills, strict=True):
            share = 100 * row[kind]
            axes.barh(place, share, left=left, color=fill, alpha=alpha, height=0.62, lw=0)
            if share >= 7:
                text = f"{kind} {share:.0f}" if share >= 20 else f"{share:.0f}"
                axes.text(left + share / 2, place, text, color=ink, ha="center", va="center", fontsize=9)  # fmt: skip
            left += share
        low, high = (100 * value for value in row.get("win_interval", (np.nan, np.nan)))
        axes.plot([low, high], [place + 0.41] * 2, color=INK, lw=1.4, solid_capstyle="butt")
        half = 100 * (row["win"] + row["tie"] / 2)
        axes.plot(half, place + 0.41, "D", color=INK, ms=4, clip_on=False)
    axes.axvline(50, color=INK, lw=0.8, ls=(0, (1, 2)))
    axes.set_xlim(0, 100)
    _rows(axes, list(rows))
    axes.set_xlabel("% of the images")
    return figure


def intervals(title: str, rows: dict[str, dict], look: dict[str, Style]) -> Figure:
    """The mean difference to the base of each model with its interval."""
    figure, axes = panel(title, height=0.5 * len(rows) + 0.9)
    for place, (model, row) in enumerate(rows.items()):
        low, high = row["interval"]
        axes.plot([low, high], [place, place], color=look[model].colour, lw=2.2)
        axes.plot(row["difference"], place, "o", color=look[model].colour, ms=6)
    axes.axvline(0, color=INK, lw=0.8, ls=(0, (1, 2)))
    axes.margins(x=0.12)
    _rows(axes, list(rows))
    axes.set_xlabel("mean difference to the base, 95 %")
    return figure


def svg(picture: Picture) -> str:
    """The chart as an element of an HTML page: its colours are the page's `var(--NAME)`, its text
    the page's font, its ids its own."""
    buffer = io.StringIO()
    with _settings({"svg.hashsalt": picture.name}):
        picture.figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    box = re.search(r'viewBox="([^"]*)"', text)[1]
    text = text[text.index(">", text.index("<svg")) + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{picture.name}-", text)
    text = re.sub(r"font: (?:(bold) )?([\d.]+)px [^;\"]*", _font, text)
    for colour, name in [*ROLES.items(), *((pair[0], name) for name, pair in COLOURS.items())]:
        text = text.replace(colour, f"var(--{name})")
    label = html.escape(f"{picture.title}. {picture.caption}")
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{text}'


def png(picture: Picture) -> bytes:
    """The chart on white."""
    buffer = io.BytesIO()
    with _settings():
        picture.figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def _font(match: re.Match) -> str:
    return f"font-weight: {match[1] or 'normal'}; font-size: {match[2]}px"


def _settings(more: dict | None = None):
    import matplotlib

    return matplotlib.rc_context(FONT | (more or {}))


def panel(title: str, height: float = 2.75, grid: bool = True) -> tuple[Figure, Axes]:
    """An empty chart in the page's look, and its axes; height in inches."""
    from matplotlib.figure import Figure

    with _settings():
        figure = Figure(figsize=(4.4, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", color=INK)
        axes.tick_params(colors=INK, length=3)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
            spine.set_linewidth(0.7)
        if grid:
            axes.grid(color=RULE, lw=0.6)
            axes.set_axisbelow(True)
    return figure, axes


def _rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [_short(name, 18) for name in names])  # fmt: skip
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _plain_numbers(axis: Axis) -> None:
    """Log ticks as 0.01 and 1e-06: 10 with an exponent would need mathtext."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axis.get_view_interval()
    if high / low < 30:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())
    axis.axes.tick_params(which="minor", color=INK, length=2)


def _short(name: str, size: int) -> str:
    """The name, without its middle if it is too long: names of runs differ at either end."""
    head = (size - 1) // 2
    return name if len(name) <= size else f"{name[:head]}…{name[head + 1 - size :]}"


def _legend(figure: Figure, shown: dict[str, object]) -> None:
    """Below the chart, which grows by its rows."""
    labels = [_short(label, 44) for label in shown]
    columns = max(1, min(len(labels), 54 // (max(map(len, labels)) + 7)))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.19 * -(-len(labels) // columns))
    with _settings():
        legend = figure.legend(
            list(shown.values()),
            labels,
            loc="outside lower left",
            ncols=columns,
            frameon=False,
            handlelength=1.8,
            columnspacing=1.2,
            borderaxespad=0.1,
            labelspacing=0.25,
        )
        for text in legend.get_texts():
            text.set_color(INK)


def spread(count: int, shown: int) -> list[int]:
    """Numbers of `shown` of `count` things, evenly spaced over all; of fewer all."""
    shown = min(shown, count)
    return [i * count // shown for i in range(shown)]


def grid(
    images: dict[str, Tensor], prompts: list[str], columns: int = 12, cell: int = 96
) -> Image.Image:
    """A picture of the first samples: one row per model, base on top, the prompt below each
    column."""
    columns = min(columns, len(prompts))
    font, left = ImageFont.load_default(11), 80
    sheet = Image.new("RGB", (left + columns * (cell + 4), len(images) * (cell + 4) + 56), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (model, batch) in enumerate(images.items()):
        pen.text((4, row * (cell + 4) + cell // 2 - 6), _short(model, 12), fill="black", font=font)
        for column in range(columns):
            pixels = (255 * batch[column].clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (cell + 4), row * (cell + 4)))
    for column, prompt in enumerate(prompts[:columns]):
        at = (left + column * (cell + 4), len(images) * (cell + 4) + 2)
        pen.text(at, "\n".join(textwrap.wrap(prompt, 16)[:4]), fill="black", font=font)
    return sheet
