"""Bytes that each GPU holds whatever the micro-batch: the one place of docs/memory.md's formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class State:
    """Bytes of each trained parameter, without the optimizer's own."""

    whole: int
    """That every GPU holds."""
    shared: int
    """That the GPUs share out."""
    master: int
    """The exact weights that the optimizer steps, where they are not the UNet's own; shared out."""


STATES = {
    (2, 1): State(whole=2 + 2 + 4, shared=0, master=4),
    (2, 2): State(whole=2, shared=4, master=4),
    (2, 3): State(whole=0, shared=2 + 2 + 4, master=4),
    (4, 0): State(whole=4 + 4, shared=0, master=0),
    (4, 1): State(whole=4 + 4, shared=0, master=4),
    (4, 2): State(whole=4, shared=4, master=4),
    (4, 3): State(whole=0, shared=4 + 4, master=0),
}
"""Width of the compute dtype, ZeRO stage -> weight, gradient, gradient summed in float32. With 16
bits the gradient is gone at stage 2 when the optimizer steps; sums are as in configs/."""

MOMENTS = {"adamw": 8, "adamw8bit": 2, "lion8bit": 1, "adafactor": 0}
"""Optimizer -> bytes of its moments per trained parameter. The JSON's own counts as AdamW."""


def bytes_per_gpu(
    frozen: int,
    trained: int,
    ranks: int,
    stage: int,
    reference: int = 0,
    *,
    width: int = 2,
    moments: int = 8,
    ema: bool = False,
    offload: bool = False,
) -> int:
    """Weights, gradients, optimizer and reference; no activations.

    Args:
        frozen: parameters of the policy that are not trained.
        trained: those that are.
        ranks: GPUs.
        stage: of ZeRO; 0 with width 4 alone.
        reference: parameters of the frozen reference on this GPU.
        width: bytes of the compute dtype.
        moments: bytes of the optimizer's per trained parameter.
        ema: whether an average of the weights is kept, in float32.
        offload: whether what the optimizer steps lies in the host's memory.
    """
    state = STATES[width, stage]
    stepped = 0 if offload else state.master + moments + 4 * ema
    each = state.whole + (state.shared + stepped) / (ranks if stage else 1)
    return round(width * frozen / (ranks if stage == 3 else 1) + each * trained + width * reference)


def step_bytes(trained: int, ranks: int, stage: int, width: int = 2) -> int:
    """What the optimizer step takes for itself, when the activations are gone: ZeRO flattens its share
    of the float32 gradients. Stages 1 and 2 in 16 bits sum them flat; stage 0 needs no copy.

    Args:
        trained, ranks, stage, width: as in `bytes_per_gpu`.
    """
    return 0 if stage == 0 or (stage < 3 and width == 2) else round(4 * trained / ranks)


BUCKET, PREFETCH, REUSE = 5e8, 5e7, 1e9
"""DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_prefetch_bucket_size and
stage3_max_reuse_distance."""


def buffer_bytes(
    parameters: int,
    trained: int,
    ranks: int,
    stage: int,
    json: Mapping[str, Any],
    *,
    width: int = 2,
) -> int:
    """What DeepSpeed 0.19 communicates in: a buffer for gradients from ZeRO stage 1 on.

    Without ZeRO, and at stage 1 with bf16 summed in float32, several ranks reduce a copy instead.
    Stage 3 also keeps gathered weights that the backward pass needs again soon.

    Args:
        parameters: of the policy.
        trained: those of them that are.
        ranks, stage, width: as in `bytes_per_gpu`.
        json: DeepSpeed's.
    """
    zero = json.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size", BUCKET)
    bf16 = any(json.get(key, {}).get("enabled", False) for key in ("bf16", "bfloat16"))
    sums = json.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if stage == 0 or (stage == 1 and bf16 and sums):
        return round(4 * min(trained, bucket)) if ranks > 1 else 0
    if stage == 3:
        gathered = zero.get("stage3_max_reuse_distance", REUSE) / 2
        gathered += zero.get("stage3_prefetch_bucket_size", PREFETCH)
        return round(width * (bucket + min(parameters, gathered)))
    # one is filled while the other is on its way
    return round(width * bucket * (2 if zero.get("overlap_comm") else 1))
