"""What a run should take, by the planner's formulas, and what it took."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dde_fast import planner
from dde_fast.activations import recomputed_blocks
from dde_fast.cache import Cache
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.flops import peak_of
from dde_fast.metrics import peak_memory
from dde_fast.shards import write_file

RECORD = "machine.json"
"""In a run's directory: what was expected, and what was."""


@dataclass(frozen=True)
class Forecast:
    """What a run should take."""

    needs: dict[str, int]
    """Bytes on each GPU, by what they are for."""
    pairs_per_second: float | None
    """At `plan_share` of the peak; None where the peak is not known."""


def of_run(
    c: TrainConfig,
    e: EngineConfig,
    unet_config: Mapping[str, Any],
    cache: Cache,
    device: torch.device,
) -> Forecast:
    """Count what a run on pairs should take; nothing is computed.

    Args:
        c, e: of the run.
        unet_config: of its UNet, as diffusers writes it.
        cache: its pairs, whose shapes count.
        device: of this process.
    """
    model = planner.read_model(c, unet_config, e.dtype, **planner.shapes_in(cache))
    recomputed = recomputed_blocks(c, model.activations.blocks)
    peak = model.activations.peak(recomputed)
    needs = model.needs(c, e, peak, host=device.type == "cpu")
    operations = model.operations(recomputed)
    known = peak_of(c, e.dtype, device)
    return Forecast(needs, planner.speed_of(c, operations, e.ranks, known))


def outcome(
    output: Path,
    c: TrainConfig,
    expected: Forecast,
    rates: Sequence[float],
    device: torch.device,
) -> str:
    """Write OUTPUT/machine.json and say what is in it.

    Args:
        output: the run's directory.
        c: of the run.
        expected: before it.
        rates: pairs per second, between each two log points.
        device: of this process.
    """
    rate, memory = statistics.median(rates), sum(expected.needs.values()) / 2**30
    where = "of the GPU" if device.type == "cuda" else "of the whole process"
    line = f"memory: predicted {memory:.3g} GiB, peak {peak_memory():.3g} GiB {where}; pairs/s: "
    share = None
    if expected.pairs_per_second is not None:
        share = c.plan_share * rate / expected.pairs_per_second
        line += f"predicted {expected.pairs_per_second:.3g} at {c.plan_share:g} of the peak, "
    line += f"was {rate:.3g}"
    line += "" if share is None else f" (--plan_share {share:.3g})"
    record = {
        "predicted": {
            "memory_gib": {name: size / 2**30 for name, size in expected.needs.items()},
            "pairs_per_second": expected.pairs_per_second,
        },
        "measured": {
            "memory_gib": peak_memory(),
            "memory": where,
            "pairs_per_second": rate,
            "share_of_peak": share,
        },
    }
    write_file(output / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    return line
