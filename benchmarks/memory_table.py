"""Bytes that training needs on each GPU, counted from the UNets' parameters.

`python benchmarks/memory_table.py` rewrites the tables of docs/memory.md.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import torch
from published import make_unet

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
RESULTS = Path(__file__).parent / "results"
MARKERS = re.compile(r"(<!-- (table|measured) -->\n).*?(<!-- /\2 -->)", re.S)
GPUS = ((1, 24), (1, 48), (1, 80), (4, 24), (8, 24), (8, 80), (64, 80))
"""(number, GB each)."""
PHASES = ("forward", "backward", "optimizer")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers that get adapters."""


@cache
def unet_on_meta(name: str) -> torch.nn.Module:
    """A UNet without memory for its weights."""
    with torch.device("meta"):
        return make_unet(name)


def parameters(name: str) -> int:
    """Of a UNet."""
    return sum(value.numel() for value in unet_on_meta(name).parameters())


def adapter_parameters(name: str, rank: int) -> int:
    """Of adapters on the attention layers: rank · (inputs + outputs) of each."""
    return sum(
        rank * (layer.in_features + layer.out_features)
        for path, layer in unet_on_meta(name).named_modules()
        if path.endswith(ATTENTION)
    )


WHOLE, SHARED = {1: 8, 2: 2, 3: 0}, {1: 12, 2: 16, 3: 20}
"""Bytes of each trained parameter that every GPU holds, and that the GPUs share out, by ZeRO stage.
In all: bf16 weight 2 and gradient 2 (at stage 2 gone when the optimizer steps), fp32 gradient 4,
weight 4 and two moments 8."""


def bytes_per_gpu(frozen: int, trained: int, ranks: int, stage: int, reference: int = 0) -> int:
    """Weights, gradients, optimizer and reference with configs/zero*.json; no activations.

    Args:
        frozen: parameters of the policy that are not trained.
        trained: those that are.
        ranks: GPUs.
        stage: of ZeRO, 1 to 3.
        reference: parameters of the frozen reference on this GPU.
    """
    policy = 2 * frozen / (ranks if stage == 3 else 1)
    return round(policy + (WHOLE[stage] + SHARED[stage] / ranks) * trained + 2 * reference)


def cell(size: float, memory: int) -> str:
    """GB and what is left for activations, or that it does not fit."""
    left = memory - size / 1e9
    return f"{size / 1e9:.1f}" + (f" ({left:.0f})" if left > 0 else " ✗")


def table() -> str:
    """Markdown: a row per cluster, a column per way to train."""
    counts = {name: parameters(name) for name in ("sd15", "sdxl")}
    adapters = {name: adapter_parameters(name, 64) for name in counts}
    ways = [("sd15", "SD 1.5"), ("sdxl", "SDXL")]
    head = ["GPUs"]
    for _, title in ways:
        head += [f"{title}, {how}" for how in ("LoRA", "ZeRO-1", "ZeRO-2", "ZeRO-3, shared")]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for ranks, memory in GPUS:
        row = [f"{ranks} × {memory} GB"]
        for name, _ in ways:
            count = counts[name]
            sizes = [bytes_per_gpu(count, adapters[name], ranks, 1)]
            sizes += [bytes_per_gpu(0, count, ranks, stage, count) for stage in (1, 2)]
            sizes += [bytes_per_gpu(0, count, ranks, 3, count // ranks)]
            row += [cell(size, memory) for size in sizes]
        lines.append("| " + " | ".join(row) + " |")
    counted = ", ".join(
        f"{title} {counts[name]:,} parameters ({adapters[name]:,} in adapters of rank 64)"
        for name, title in ways
    )
    return "\n".join([*lines, "", f"Counted: {counted}.", ""])


def measured() -> str:
    """Markdown: the full-size runs beside what is counted for them."""
    lines = [
        "| run | latents | counted, GB | measured peak, GB | forward, backward, optimizer, s |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("full-size-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        adapters = run["trained"] < run["parameters"]
        frozen = run["parameters"] - run["trained"] if adapters else 0
        # one micro-batch: no fp32 gradient beside the bf16 one, as at stage 2
        counted = bytes_per_gpu(frozen, run["trained"], 1, 2, 0 if adapters else run["trained"])
        seconds = [run["phases"][f"{name} 1"]["seconds"] for name in PHASES]
        shape = "×".join(map(str, run["latent"]))
        place = run["machine"]
        lines.append(
            f"| {run['run']}, {place['device']}, {place['threads']} threads, `{place['commit']}` "
            f"| {shape} | {counted / 1e9:.1f} | {run['peak_GiB'] * 1.073741824:.1f} "
            f"| {', '.join(f'{value:.0f}' for value in seconds)} |"
        )
    return "\n".join([*lines, ""])


def render(page: str) -> str:
    """The page with its tables computed anew."""
    made = {"table": table, "measured": measured}
    return MARKERS.sub(lambda match: match[1] + made[match[2]]() + match[3], page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
