"""How training scales to many GPUs: measured ranks, and a model on paper.

`python benchmarks/scaling_table.py` rewrites the tables of docs/scaling.md, where formulas and
assumptions stand.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from memory_table import unet_on_meta
from published import VAES
from torch.utils.flop_counter import FlopCounterMode

from dde_fast import levers
from dde_fast.flops import PEAK_TFLOPS, flops_per_pair, peak_tflops

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKERS = re.compile(r"(<!-- (measured|steps|cost) -->\n).*?(<!-- /\2 -->)", re.S)

CARD, NODE = "H200", 8
"""The GPU of the model on paper, and how many of them share NVLink."""
INSIDE, BETWEEN = 450e9, 400e9 / 8
"""Bytes per second and direction of each GPU: NVLink 4 within a node, InfiniBand NDR beyond."""
GPUS = (1, 8, 16, 32, 64)
BATCH = 2048
"""Pairs per optimizer step."""
ITEM = 2
"""Bytes of a weight or gradient on its way: bf16."""

PASSES = {0: (2, 0), 1: (3, 0), 2: (1, 2), 3: (0, 3)}
"""ZeRO stage -> how often all weights or all gradients pass, per optimizer step and per micro-batch.

DeepSpeed's defaults: an all-reduce (two passes) of the gradient at stages 0 to 2, at stage 2 of every
micro-batch's; after the step the new weights are gathered (one). At stage 3 weights are gathered
for the forward and again for the backward, and the gradient is scattered, in every micro-batch."""


@dataclass(frozen=True)
class Run:
    """A published run."""

    title: str
    latent: int
    embedding: tuple[int, int]
    pooled: int | None
    steps: int
    """Optimizer steps of the DDE paper."""
    micro_batch: int
    published: float
    """Pairs per second on an A100 of Diffusion-DPO's published runs."""


RUNS = {
    "sd15": Run("SD 1.5", 64, (77, 768), None, steps=2000, micro_batch=8, published=2.96),
    "sdxl": Run("SDXL", 128, (77, 2048), 1280, steps=1500, micro_batch=2, published=0.24),
}

PUBLISHED_SHARE = 0.10
GOAL_SHARE = 0.55 * 0.80
"""Of the card's peak: 55 % of a matrix product's rate, which is taken to be 80 % of the peak."""


@dataclass(frozen=True)
class Way:
    """How fast one GPU is: assumed or measured."""

    name: str
    flops: int
    """Operations per pair that its share counts."""
    share: float
    """Of the card's peak."""
    peak: float = PEAK_TFLOPS[CARD]

    def pairs_per_s(self, peak: float | None = None) -> float:
        """Of one GPU, this or another."""
        return self.share * 1e12 * (peak or self.peak) / self.flops


@cache
def counted(name: str) -> dict[str, int]:
    """Of a UNet: its parameters, and the operations of a pair: with and without the reference, and as
    the published structure runs it, with gradient checkpointing's second forward and the VAE."""
    run, unet = RUNS[name], unet_on_meta(name)
    shapes = {"latent": (4, run.latent, run.latent), "embedding": run.embedding}
    pair, scored = (
        flops_per_pair(unet, **shapes, pooled=run.pooled, reference=ran) for ran in (True, False)
    )
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            **VAES[name],
        )
        vae.encode(torch.empty(2, 3, 8 * run.latent, 8 * run.latent))
        encoding = counter.get_total_flops()
    return {
        "parameters": sum(value.numel() for value in unet.parameters()),
        "pair": pair,
        "scored": scored,
        "published": pair + (pair - scored) + encoding,
    }


def ways(name: str, results: Path = RESULTS) -> list[Way]:
    """The assumptions, then what was measured on a GPU that is known."""
    count = counted(name)
    found = [
        Way("published structure at 10 %", count["published"], PUBLISHED_SHARE),
        Way("goal, 44 %", count["pair"], GOAL_SHARE),
        Way("goal, 44 %, with reference scores", count["scored"], GOAL_SHARE),
    ]
    for path in sorted(results.glob(f"train-step-{name}*.json")):
        result = levers.read(path).result
        device = result["machine"]["device"]
        peak = peak_tflops(device, getattr(torch, result["dtype"]))
        if result["case"] == name and peak is not None:
            rows = [row for row in result["rows"] if row["frozen_GiB"] > 0]
            share = rows[-1]["pairs_per_s"] * count["pair"] / (1e12 * peak)
            said = f"measured on {device}, `{result['commit']}`, {100 * share:.0f} %"
            found.append(Way(said, count["pair"], share, peak))
    return found


def pass_seconds(size: float, gpus: int) -> float:
    """Of one pass of so many bytes, reduced or gathered within each node and then across the nodes, where
    each GPU of a node carries its share over its own adapter.

    (g - 1)/g · size/INSIDE + (m - 1)/m · size/g/BETWEEN for m nodes of g GPUs.
    """
    inside = min(gpus, NODE)
    nodes = gpus / inside
    within = (inside - 1) / inside * size / INSIDE
    return within + (nodes - 1) / nodes * size / inside / BETWEEN


def passes(stage: int, micro_batches: int) -> int:
    """How often all weights or gradients pass in an optimizer step."""
    once, each = PASSES[stage]
    return once + each * micro_batches


def sent_bytes(
    stage: int, parameters: int, gpus: int, micro_batches: int = 1, item: int = ITEM
) -> float:
    """That leave each GPU in an optimizer step: passes · (n - 1)/n · bytes of the weights."""
    return passes(stage, micro_batches) * (gpus - 1) / gpus * item * parameters


def communication(stage: int, parameters: int, gpus: int, micro_batches: int) -> float:
    """Seconds of an optimizer step."""
    return passes(stage, micro_batches) * pass_seconds(ITEM * parameters, gpus)


def efficiency(compute: float, sending: float) -> tuple[float, float]:
    """Share of n times one GPU's pairs per second: nothing overlapped, and all that can be."""
    return compute / (compute + sending), compute / max(compute, sending)


def steps_table() -> str:
    """Markdown: a table per model, a row per assumption and number of GPUs."""
    lines = []
    for name, run in RUNS.items():
        size = counted(name)["parameters"] * ITEM
        lines += [
            f"**{run.title}**: {size / 1e9:.2f} GB of weights, as many of gradients; micro-batches of "
            f"{run.micro_batch} pairs.",
            "",
            "| one GPU | GPUs | micro-batches | computing, s | "
            + " | ".join(f"ZeRO-{stage}: sending, s; efficiency, %" for stage in (1, 2, 3))
            + " |",
            "|---|---|---|---|---|---|---|",
        ]
        for way in ways(name):
            for gpus in GPUS:
                micro_batches = -(-BATCH // (gpus * run.micro_batch))
                compute = BATCH / gpus / way.pairs_per_s()
                seconds = f"{compute:.3g}" if compute < 1000 else f"{compute:,.0f}"
                cells = [way.name, gpus, micro_batches, seconds]
                for stage in (1, 2, 3):
                    sending = communication(stage, counted(name)["parameters"], gpus, micro_batches)
                    low, high = (100 * share for share in efficiency(compute, sending))
                    cells.append(f"{sending:.3g}; {low:.1f} to {high:.0f}")
                lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def cost_table() -> str:
    """Markdown: GPU-hours of one full run."""
    lines = [
        "| run | one GPU | TFLOP per pair | pairs/s: A100, H200 | A100-hours | H200-hours on 8, on 64 |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in RUNS.items():
        pairs = run.steps * BATCH
        title = f"{run.title}, {pairs / 1e6:.2f} M pairs"
        hours = pairs / run.published / 3600
        lines.append(
            f"| {title} | Diffusion-DPO, as published | | {run.published:g}, | {hours:,.0f} | |"
        )
        for way in ways(name):
            assumed = way.share in (PUBLISHED_SHARE, GOAL_SHARE)
            rates = [way.pairs_per_s(PEAK_TFLOPS["A100"]) if assumed else None, way.pairs_per_s()]
            on_a100 = f"{pairs / rates[0] / 3600:,.0f}" if assumed else ""
            clusters = []
            for gpus in (8, 64):
                compute = BATCH / gpus / rates[1]
                micro_batches = BATCH // (gpus * run.micro_batch)
                sending = communication(1, counted(name)["parameters"], gpus, micro_batches)
                share, _ = efficiency(compute, sending)
                clusters.append(f"{pairs / rates[1] / 3600 / share:,.1f}")
            lines.append(
                f"| {title} | {way.name} | {way.flops / 1e12:.2f} | "
                f"{', '.join(f'{rate:.3g}' for rate in rates if rate)} | {on_a100} | "
                f"{', '.join(clusters)} |"
            )
    return "\n".join([*lines, ""])


def measured_table(results: Path = RESULTS) -> str:
    """Markdown: what `scaling.py` measured."""
    paths = sorted(results.glob("scaling-*.json"))
    if not paths:
        return "Not measured yet.\n"
    lines = []
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        place, ranks = found["machine"], found["ranks"]
        model = levers.MODELS.get(found["model"], found["model"])
        lines += [
            f"**{model[:1].upper()}{model[1:]}, 1 and {ranks} ranks** on {place['device']}, one thread "
            f"each, commit `{place['commit']}`, torch {place['versions']['torch']}: {found['pairs']} "
            f"pairs per micro-batch and rank, {found['accumulation']} of them per step, "
            f"{found['dtype']}; {found['rounds']} rounds of {found['steps']} steps [middle half].",
            "",
            f"| ZeRO | pairs/s: one alone | {ranks} that share nothing | {ranks} together | efficiency | "
            "beside those that share nothing | sent per rank and step, MB (counted) | in collectives | "
            "sending alone |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        item = 4 if found["dtype"] == "float32" else 2
        for row in found["rows"]:
            rates = [f"{row['pairs_per_s'][way]['median']:.3g}" for way in row["pairs_per_s"]]
            shares = [
                f"{100 * row[name]['median']:.0f} % [{100 * row[name]['lower_quartile']:.0f}, "
                f"{100 * row[name]['upper_quartile']:.0f}]"
                for name in ("efficiency", "efficiency_to_side_by_side")
            ]
            counted_bytes = sent_bytes(
                row["stage"], found["parameters"], ranks, found["accumulation"], item
            )
            cells = [row["stage"], *rates, *shares]
            cells.append(f"{row['sent_bytes'] / 1e6:.1f} ({counted_bytes / 1e6:.1f})")
            cells += [
                f"{100 * row[name]:.1f} %"
                for name in ("share_in_collectives", "share_sending_alone")
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with its tables computed anew."""
    made = {"measured": measured_table, "steps": steps_table, "cost": cost_table}
    return MARKERS.sub(lambda match: match[1] + made[match[2]]() + match[3], page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
