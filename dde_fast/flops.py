"""How much of the devices' arithmetic a run uses: counted operations over a known peak."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from dde_fast.cache import Cache
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.objectives import get_objective

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 836.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A40": 150.0,
    "RTX A6000": 155.0,
    "MI300X": 1307.0,
}
"""Words of a device's name -> dense 16-bit matrix arithmetic with float32 sums, from the vendors'
data sheets. The first that fits counts."""


def peak_tflops(device_name: str, dtype: torch.dtype) -> float | None:
    """What a device could do in that dtype, 10¹² operations per second; None where not known."""
    if dtype not in (torch.bfloat16, torch.float16) or "MIG" in device_name:  # a slice of a device
        return None
    known = PEAK_TFLOPS.items()
    return next((peak for name, peak in known if re.search(rf"\b{name}\b", device_name)), None)


def peak_of(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> float | None:
    """A run's peak per device, 10¹² operations per second: the one it gives, else the known one; None
    where there is none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return c.peak_tflops or peak_tflops(name, dtype)


def pairs_at_peak(
    c: TrainConfig, e: EngineConfig, unet: torch.nn.Module, data: Cache | Any, device: torch.device
) -> float | None:
    """Pairs per second if all devices did nothing but a run's arithmetic at their peak.

    Args:
        unet: the policy, before DeepSpeed splits it and gradient checkpointing repeats some of it.
        data: the cache of the pairs, whose shapes count.
        device: of this process; the others' are like it.

    Returns:
        None where the device's peak is not known, and for online objectives: what their rewards
        cost is not counted.
    """
    if get_objective(c.objective).online:
        return None
    peak = peak_of(c, e.dtype, device)
    if peak is None:
        return None
    pooled = data.empty.get("pooled")
    flops = flops_per_pair(
        unet,
        latent=data.latent_shape,
        embedding=data.empty["embeddings"].shape,
        pooled=None if pooled is None else len(pooled),
        reference=get_objective(c.objective).needs_reference and not c.reference_scores,
    )
    return 1e12 * peak * dist.get_world_size() / flops


def flops_per_pair(
    unet: torch.nn.Module,
    *,
    latent: Sequence[int],
    embedding: Sequence[int],
    pooled: int | None = None,
    reference: bool = True,
) -> int:
    """Operations of training on one pair, counted on the meta device: nothing is computed.

    Policy forward and backward for winner and loser, and the reference's forward. What gradient
    checkpointing computes twice counts once, as usual for MFU.

    Args:
        unet: the policy, before DeepSpeed splits it; frozen parameters cost no gradient.
        latent: (C, H, W).
        embedding: (L, D).
        pooled: size of the pooled embedding of a model that takes one (SDXL).
        reference: whether a reference of the policy's size is run as well.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    state = {name: empty(*buffer.shape) for name, buffer in unet.named_buffers()}
    for name, parameter in unet.named_parameters():
        state[name] = empty(*parameter.shape).requires_grad_(parameter.requires_grad)
    options: dict = {"return_dict": False}
    if pooled is not None:
        added = {"text_embeds": empty(2, pooled), "time_ids": empty(2, 6)}
        options["added_cond_kwargs"] = added
    inputs = (empty(2, *latent), empty(2, dtype=torch.int64), empty(2, *embedding))
    with FlopCounterMode(display=False) as counter:
        prediction = torch.func.functional_call(unet, state, inputs, options)[0]
        forward = counter.get_total_flops()
        prediction.sum().backward()
        return counter.get_total_flops() + reference * forward
