"""The kernels' part of README's results (`results_table.py`)."""

from __future__ import annotations

import json
from pathlib import Path

SMALL, LARGE = {"pairs": 16, "shape": [4, 64, 64]}, {"pairs": 128, "shape": [4, 128, 128]}
WARM, COLD = {"cache": "warm"}, {"cache": "cold", "dtype": "float32"}
LOSS, NOISE, DDIM = {"op": "loss", "mode": "both"}, {"op": "add_noise"}, {"op": "ddim_step", "mode": "both"}  # fmt: skip
PLAIN, CHANNELS_LAST = {"layout": "contiguous_format"}, {"layout": "channels_last"}
SHOWN = [
    ("loss, forward + backward", LOSS | WARM | SMALL),
    ("loss, forward + backward", LOSS | WARM | LARGE),
    ("loss, forward + backward, cold", LOSS | COLD | SMALL),
    ("loss, forward + backward, cold", LOSS | COLD | LARGE),
    ("add_noise", NOISE | PLAIN | WARM | SMALL),
    ("add_noise, channels_last", NOISE | CHANNELS_LAST | WARM | SMALL),
    ("add_noise, cold", NOISE | PLAIN | COLD | SMALL),
    ("add_noise, cold", NOISE | PLAIN | COLD | LARGE),
    ("ddim_step, forward + backward", DDIM | WARM | SMALL),
    ("ddim_step, forward + backward, cold", DDIM | COLD | SMALL),
    ("ddim_step, forward + backward, cold", DDIM | COLD | LARGE),
]
"""Rows of the README's table: (what, the extra_info that selects it)."""

BASELINES = ("salesforce", "compiled", "diffusers", "eager")


def kernel_table(data: dict) -> list[str]:
    """One machine's benchmarks as a Markdown table: milliseconds and how often faster."""
    machine = data["machine_info"]
    lines = [
        f"**{machine['device']}, {machine['threads']} threads.** Commit "
        f"`{data['commit_info']['id']}`, torch {machine['versions']['torch']}, copy bandwidth "
        f"{machine['copy_GB_per_s']:.1f} GB/s. Medians in milliseconds of one run; `salesforce` is "
        "the published Diffusion-DPO formula, `compiled` that under torch.compile, `diffusers` "
        "torch.randn and its `add_noise`. A row's calls follow one another on three sets of inputs; "
        "before each call of a cold row 256 MiB are written, so that it reads from "
        "memory.",
        "",
        "| op | latents | baselines | dde_fast | times faster | share of copy bandwidth |",
        "|---|---|---|---|---|---|",
    ]
    for what, wanted in SHOWN:
        for dtype in [wanted["dtype"]] if "dtype" in wanted else ("float32", "bfloat16"):
            rows, named = {}, (wanted | {"dtype": dtype}).items()
            for row in data["benchmarks"]:
                if named <= row["extra_info"].items():
                    rows[row["extra_info"]["name"]] = row
            ours = [name for name in rows if name not in (*BASELINES, "reference")]
            if not ours:
                continue
            best = min(ours, key=lambda name: rows[name]["stats"]["median"])
            seconds = {name: row["stats"]["median"] for name, row in rows.items()}
            theirs = [name for name in rows if name in BASELINES]
            lines.append(
                f"| {what} | {wanted['pairs']} × {'×'.join(map(str, wanted['shape']))} {dtype} | "
                + ", ".join(f"{name} {1e3 * seconds[name]:.2f}" for name in theirs)
                + f" | {best} {1e3 * seconds[best]:.2f} | "
                + ", ".join(f"{seconds[name] / seconds[best]:.1f}" for name in theirs)
                + f" | {100 * rows[best]['extra_info']['share_of_copy']:.0f} % |"
            )
    return [*lines, ""]


def kernel_runs(paths: list[Path]) -> list[tuple[list[Path], dict]]:
    """The benchmarks of a machine at a commit, with their files: a GPU's come in one per op."""
    runs = {}
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        machine = data["machine_info"]
        key = machine["device"], machine["threads"], data["commit_info"]["id"]
        files, run = runs.setdefault(key, ([], data | {"benchmarks": []}))
        files.append(path)
        run["benchmarks"] += data["benchmarks"]
    return list(runs.values())


def kernels(results: Path) -> list[str]:
    """A table for each machine and its picture, and that a GPU is not among them."""
    runs, lines = kernel_runs(sorted(results.glob("kernels-*.json"))), []
    for files, data in runs:
        lines += kernel_table(data)
        for picture in (path.with_suffix(".png") for path in files):
            if picture.exists():
                lines += [f"![loss, forward and backward](benchmarks/results/{picture.name})", ""]
    if not any("launches" in row["extra_info"] for _, data in runs for row in data["benchmarks"]):
        lines += ["No kernel has been measured on a GPU: there are no rows of one.", ""]
    return lines
