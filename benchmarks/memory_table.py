"""Bytes that training needs on each GPU, counted from the UNets, and what the planner makes of it.

`python benchmarks/memory_table.py` rewrites the tables of docs/memory.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from published import make_unet

from dde_fast import planner
from dde_fast.config import PRESETS
from dde_fast.deepspeed_config import read_json
from dde_fast.memory import bytes_per_gpu

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "memory.md"
RESULTS = Path(__file__).parent / "results"
MARKERS = re.compile(r"(<!-- (table|blocks|plans|measured) -->\n).*?(<!-- /\2 -->)", re.S)
GPUS = ((1, 24), (1, 48), (1, 80), (4, 24), (8, 24), (8, 80), (64, 80))
"""(number, GB each)."""
GIB = 1.073741824
"""GB."""
PHASES = ("forward", "backward", "optimizer")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers that get adapters."""
TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
SHAPES = {
    "sd15": {"latent": (4, 64, 64), "embedding": (77, 768), "pooled": None},
    "sdxl": {"latent": (4, 128, 128), "embedding": (77, 2048), "pooled": 1280},
}
"""Of a sample at 512 and 1024 pixels."""


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


def cell(size: float, memory: int) -> str:
    """GB and what is left for activations, or that it does not fit."""
    left = memory - size / 1e9
    return f"{size / 1e9:.1f}" + (f" ({left:.0f})" if left > 0 else " ✗")


def table() -> str:
    """Markdown: a row per cluster, a column per way to train."""
    counts = {name: parameters(name) for name in ("sd15", "sdxl")}
    adapters = {name: adapter_parameters(name, 64) for name in counts}
    head = ["GPUs"]
    for title in TITLES.values():
        head += [f"{title}, {how}" for how in ("LoRA", "ZeRO-1", "ZeRO-2", "ZeRO-3, shared")]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for ranks, memory in GPUS:
        row = [f"{ranks} × {memory} GB"]
        for name in TITLES:
            count = counts[name]
            sizes = [bytes_per_gpu(count, adapters[name], ranks, 1)]
            sizes += [bytes_per_gpu(0, count, ranks, stage, count) for stage in (1, 2)]
            sizes += [bytes_per_gpu(0, count, ranks, 3, count // ranks)]
            row += [cell(size, memory) for size in sizes]
        lines.append("| " + " | ".join(row) + " |")
    counted = ", ".join(
        f"{title} {counts[name]:,} parameters ({adapters[name]:,} in adapters of rank 64)"
        for name, title in TITLES.items()
    )
    return "\n".join([*lines, "", f"Counted: {counted}.", ""])


@cache
def counted(name: str, latent: tuple = (), rank: int = 0) -> planner.Model:
    """Activations in bf16, of training the whole UNet, or adapters, with DDE."""
    c = replace(PRESETS[name](), lora_rank=rank)
    shapes = SHAPES[name] | ({"latent": latent} if latent else {})
    return planner.read_model(c, unet_on_meta(name).config, torch.bfloat16, **shapes)


def blocks() -> str:
    """Markdown: a row per block that can be recomputed."""
    lines = [
        "| | block | keeps, MB | recomputed, MB | operations, 10⁹ | MB freed per 10⁹ operations |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        one = counted(name).activations
        rows = [(block, *one.of_block(block), one.operations([block])) for block in one.blocks]
        rows.append(("all", one.held(), one.held(one.blocks), one.operations(one.blocks)))
        for block, kept, again, operations in rows:
            rate = (kept - again) / 1e6 / (operations / 1e9)
            cells = [f"{kept / 1e6:.0f}", f"{again / 1e6:.0f}", f"{operations / 1e9:.0f}"]
            lines.append(f"| {title} | `{block}` | {' | '.join(cells)} | {rate:.2f} |")
    return "\n".join([*lines, ""])


def plans() -> str:
    """Markdown: a row per cluster and model, as `--plan` would choose."""
    lines = [
        "| | GPUs | ZeRO | micro-batch | recomputed | more operations | memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        c, model = PRESETS[name](), counted(name)
        raw = read_json(str(ROOT / c.deepspeed_config))
        for ranks, memory in GPUS:
            head = f"| {title} | {ranks} × {memory} GB "
            try:
                gpus = planner.Gpus(ranks, memory * 10**9, "", None)
                plan = planner.make_plan(c, raw, torch.bfloat16, model, gpus)
            except ValueError:
                lines.append(f"{head}| ✗ | | | | |")
                continue
            e, chosen = plan.engine, plan.option.blocks
            names = ", ".join(f"`{block}`" for block in chosen)
            names = "all" if chosen == model.activations.blocks else names
            more = plan.operations / model.operations() - 1
            total = sum(plan.needs.values()) + planner.CONTEXT
            lines.append(
                f"{head}| {e.stage} | {e.micro_batch} | {names} | {more:.1%} | {total / 1e9:.1f} |"
            )
    return "\n".join([*lines, ""])


def measured() -> str:
    """Markdown: the full-size runs beside what is counted for them."""
    lines = [
        "| run | latents | counted, GB | measured peak, GB "
        "| kept after forward, GB: counted, measured | forward, backward, optimizer, s |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("full-size-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        adapters = run["trained"] < run["parameters"]
        frozen = run["parameters"] - run["trained"] if adapters else 0
        # one micro-batch: no fp32 gradient beside the bf16 one, as at stage 2
        size = bytes_per_gpu(frozen, run["trained"], 1, 2, 0 if adapters else run["trained"])
        name = run["run"].removesuffix("-lora")
        one = counted(name, tuple(run["latent"]), 64 if adapters else 0).activations
        kept = 2 * one.held(one.blocks) / 1e9
        phases = [run["phases"][phase]["in_use_GiB"] for phase in ("build", "forward 1")]
        seconds = [run["phases"][f"{name} 1"]["seconds"] for name in PHASES]
        shape = "×".join(map(str, run["latent"]))
        place = run["machine"]
        lines.append(
            f"| {run['run']}, {place['device']}, {place['threads']} threads, `{place['commit']}` "
            f"| {shape} | {size / 1e9:.1f} | {run['peak_GiB'] * GIB:.1f} "
            f"| {kept:.2f}, {(phases[1] - phases[0]) * GIB:.2f} "
            f"| {', '.join(f'{value:.0f}' for value in seconds)} |"
        )
    return "\n".join([*lines, ""])


def render(page: str) -> str:
    """The page with its tables computed anew."""
    made = {"table": table, "blocks": blocks, "plans": plans, "measured": measured}
    return MARKERS.sub(lambda match: match[1] + made[match[2]]() + match[3], page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
