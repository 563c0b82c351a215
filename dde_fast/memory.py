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
    (2, 1): State(whole=2 + 4, shared=0, master=4),
    (2, 2): State(whole=2, shared=4, master=4),
    (2, 3): State(whole=0, shared=2 + 2 + 4, master=4),
    (4, 0): State(whole=4 + 4, shared=0, master=0),
    (4, 1): State(whole=4 + 4, shared=0, master=4),
    (4, 2): State(whole=4, shared=4, master=4),
    (4, 3): State(whole=0, shared=4 + 4, master=0),
}
"""Width of the compute dtype, ZeRO stage -> weight, gradient, gradient summed in float32. With 16
bits the gradient is gone when the optimizer steps at stage 2, and at stage 1 as soon as it is made,
where it is `summed_at_once`; sums are as in configs/."""

MOMENTS = {"adamw": 8, "adamw8bit": 2, "lion8bit": 1, "adafactor": 0}
"""Optimizer -> bytes of its moments per trained parameter. The JSON's own counts as AdamW."""


BUCKET, PREFETCH, REUSE = 5e8, 5e7, 1e9
"""DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_prefetch_bucket_size and
stage3_max_reuse_distance."""
REDUCED = 5e8
"""Elements that it reduces at once without buckets, whatever `reduce_bucket_size` says."""


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
    at_once: bool = True,
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
        at_once: `summed_at_once`; else 16-bit gradients stay beside their sums at stage 1.
    """
    state = STATES[width, stage]
    beside = width if (width, stage) == (2, 1) and not at_once else 0
    stepped = 0 if offload else state.master + moments + 4 * ema
    each = state.whole + beside + (state.shared + stepped) / (ranks if stage else 1)
    return round(width * frozen / (ranks if stage == 3 else 1) + each * trained + width * reference)


def step_bytes(
    trained: int, ranks: int, stage: int, json: Mapping[str, Any], *, width: int = 2
) -> int:
    """What comes and goes between backward pass and next forward pass, when the activations are gone.

    bf16 with float32 sums at ZeRO stage 1: DeepSpeed 0.19 reduces one flat float32 buffer, on one rank
    as well, which it casts whole to what it communicates in. Stage 0 reduces copies of the gradients,
    `REDUCED` of them at once; on one rank it is told not to. Otherwise ZeRO flattens its share of the
    float32 gradients for the optimizer; in 16 bits stages 1 and 2 sum them flat.

    Args:
        trained, ranks, stage, width: as in `bytes_per_gpu`.
        json: DeepSpeed's.
    """
    whole = sums_whole(stage, json)
    sent = json.get("communication_data_type") or ("bf16" if whole else "fp32")
    cast = 0 if sent.lower() == "fp32" else 2
    if whole:
        return cast * trained
    if stage == 0:
        return round((4 + cast) * min(trained, REDUCED)) if ranks > 1 else 0
    return 0 if stage < 3 and width == 2 else round(4 * trained / ranks)


def sums_whole(stage: int, json: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed sums bf16 gradients in one flat float32 buffer on each rank."""
    bf16 = any(json.get(key, {}).get("enabled", False) for key in ("bf16", "bfloat16"))
    sums = json.get("data_types", {}).get("grad_accum_dtype") in ("fp32", "float32", "float")
    offload = json.get("zero_optimization", {}).get("offload_optimizer") or {}
    return stage == 1 and bf16 and sums and offload.get("device") != "cpu"


def summed_at_once(stage: int, json: Mapping[str, Any]) -> bool:
    """Whether such a sum takes each bf16 gradient as soon as it is made, and frees it."""
    on = any(json.get(key, {}).get("immediate_grad_update") for key in ("bf16", "bfloat16"))
    return on and sums_whole(stage, json)


def buffer_bytes(parameters: int, stage: int, json: Mapping[str, Any], *, width: int = 2) -> int:
    """What DeepSpeed 0.19 keeps to communicate in beside the activations: ZeRO's buckets of gradients.

    There are none without ZeRO and where bf16 is summed whole: what these reduce in is `step_bytes`'.
    Stage 3 also keeps gathered weights that the backward pass needs again soon.

    Args:
        parameters: of the policy.
        stage, width: as in `bytes_per_gpu`.
        json: DeepSpeed's.
    """
    if stage == 0 or sums_whole(stage, json):
        return 0
    zero = json.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size", BUCKET)
    if stage == 3:
        gathered = zero.get("stage3_max_reuse_distance", REUSE) / 2
        gathered += zero.get("stage3_prefetch_bucket_size", PREFETCH)
        return round(width * (bucket + min(parameters, gathered)))
    # one is filled while the other is on its way
    return round(width * bucket * (2 if zero.get("overlap_comm") else 1))
