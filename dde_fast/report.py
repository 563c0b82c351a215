"""What an evaluation looks like: its summary as a text table, its images as a picture."""

from __future__ import annotations

import textwrap
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def format_table(table: dict[str, dict[str, Any]]) -> str:
    """The summary as text, one line per model and reward."""
    lines = [f"{'reward':14}{'model':12}{'mean ± std':>18}{'win/tie/lose':>16}   difference [95 %]"]
    for name in table["base"]:
        for model, entries in table.items():
            e = entries[name]
            mean = f"{e['mean']:.3f} ± {e['std']:.3f}" if "std" in e else f"{e['mean']:.0f}"
            line = f"{name:14}{model:12}{mean:>18}"
            if "win" in e:
                shares = "/".join(f"{100 * e[k]:.0f}" for k in ("win", "tie", "lose"))
                low, high = e["interval"]
                line += f"{shares:>16}   {e['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            elif "difference" in e:
                line += f"{'':16}   {e['difference']:+.0f}"
            lines.append(line)
    return "\n".join(lines)


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
        pen.text((4, row * (cell + 4) + cell // 2 - 6), model[:12], fill="black", font=font)
        for column in range(columns):
            pixels = (255 * batch[column].clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (cell + 4), row * (cell + 4)))
    for column, prompt in enumerate(prompts[:columns]):
        at = (left + column * (cell + 4), len(images) * (cell + 4) + 2)
        pen.text(at, "\n".join(textwrap.wrap(prompt, 16)[:4]), fill="black", font=font)
    return sheet
