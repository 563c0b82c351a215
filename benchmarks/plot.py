"""A picture of a benchmark JSON: `python benchmarks/plot.py benchmarks/results/NAME.json`.

Writes NAME.png beside it. Of the kernels: seconds of the loss forward and backward over the number of
pairs, a panel per latent and dtype, with the time that the bytes alone would take at the copy
bandwidth. Of a training step: the waterfall of `dde_fast.levers`, from the published structure to ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a display-less backend)

from dde_fast import levers  # noqa: E402
from dde_fast.figures import png  # noqa: E402

COLOURS = {
    "salesforce": "tab:red",
    "compiled": "tab:orange",
    "reference": "tab:gray",
    "triton": "tab:green",
    "cpp": "tab:blue",
}
LABELS = {"salesforce": "published formula, eager", "compiled": "published formula, compiled"}


def loss_rows(data: dict) -> dict[tuple, dict[str, dict[int, dict]]]:
    """(latent, dtype) -> implementation -> pairs -> row, of forward and backward, warm cache."""
    panels: dict[tuple, dict[str, dict[int, dict]]] = {}
    for row in data["benchmarks"]:
        info = row["extra_info"]
        if (info["op"], info.get("mode"), info["cache"]) == ("loss", "both", "warm"):
            panel = panels.setdefault((tuple(info["shape"]), info["dtype"]), {})
            panel.setdefault(info["name"], {})[info["pairs"]] = row
    return panels


def draw(data: dict) -> plt.Figure:
    """One panel per latent (columns) and dtype (rows)."""
    panels, machine = loss_rows(data), data["machine_info"]
    shapes, dtypes = (sorted({key[i] for key in panels}) for i in (0, 1))
    size = (4 * len(shapes), 3.4 * len(dtypes) + 0.6)
    figure, axes = plt.subplots(len(dtypes), len(shapes), figsize=size, squeeze=False, sharex=True)
    for (shape, dtype), names in panels.items():
        axis = axes[dtypes.index(dtype), shapes.index(shape)]
        for name, rows in names.items():
            pairs = sorted(rows)
            seconds = [rows[b]["stats"]["median"] for b in pairs]
            axis.plot(pairs, seconds, "o-", ms=3, color=COLOURS.get(name), label=LABELS.get(name, name))  # fmt: skip
        limit = [rows[b]["extra_info"]["bytes"] / machine["copy_GB_per_s"] / 1e9 for b in pairs]
        axis.plot(pairs, limit, "k:", label="bytes at the copy bandwidth")
        axis.set(xscale="log", yscale="log", title=f"{'×'.join(map(str, shape))} {dtype}")
        axis.set_xticks(pairs, map(str, pairs), minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("pairs")
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds, forward + backward")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=6, fontsize=8)
    figure.suptitle(f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}, commit {data['commit_info']['id']}", fontsize=9)  # fmt: skip
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    path = Path(sys.argv[1])
    target = path.with_suffix(".png")
    if levers.is_result(path):
        target.write_bytes(png(levers.picture(levers.read(path), "step")))
    else:
        draw(json.loads(path.read_text(encoding="utf-8"))).savefig(target, dpi=110)
    print(target)


if __name__ == "__main__":
    main()
