"""What fits on which GPUs, before a run: `python -m dde_fast.train --plan`; and after it, what was.

Nothing is loaded: the UNet of the model's configuration is counted on the meta device
(`dde_fast.activations`), everything else by formula (`dde_fast.memory`). Of what fits into a GPU's
memory less `MARGIN` the planner takes, in this order,

1. ZeRO stage 3, which gathers weights in every pass, only where no lower one fits, and never where
   `compile` needs them whole; with CUDA graphs no stage that keeps gradients between micro-batches;
2. a micro-batch of at least `ENOUGH` operations in one forward pass, else half of that, …;
3. the blocks whose recomputation costs the fewest operations;
4. the lowest ZeRO stage;
5. the largest micro-batch up to `USEFUL` times the one of point 2.

Micro-batches are powers of two. Predicted speed is the GPUs' peak times `plan_share`, over the
operations of a pair with what is recomputed: that share is an assumption, and a run's last line
says what it was.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import PretrainedConfig

from dde_fast import activations, lora, models
from dde_fast.activations import Activations, Option
from dde_fast.attention import check_attention
from dde_fast.cache import Cache, is_cache
from dde_fast.compilation import (
    check_compile_settings,
    check_graphs,
    keeps_gradients,
    needs_whole_weights,
)
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig, complete, read_json, read_sizes
from dde_fast.gpus import Gpus, find_gpus
from dde_fast.memory import MOMENTS, buffer_bytes, bytes_per_gpu, step_bytes, summed_at_once
from dde_fast.objectives import get_objective
from dde_fast.optimizers import OPTIMIZERS, check_optimizer

PAIRS = 2048
"""Per optimizer step where the JSON says nothing of it: the paper's."""
MARGIN = 0.1
"""Of a GPU's memory stays free: fragmentation, the kernels' own workspace, what is not counted."""
CONTEXT = 2**30
"""Bytes assumed for the CUDA context and the libraries' handles."""
ENOUGH = 6e12
"""Operations in one forward pass of the policy that keep a GPU busy: 4 pairs of SD 1.5, one of SDXL."""
USEFUL = 8
"""Times the micro-batch that keeps a GPU busy: a larger one gains nothing."""


@dataclass(frozen=True)
class Model:
    """What a run holds and computes."""

    frozen: int
    """Parameters of the policy that are not trained."""
    trained: int
    reference: int
    """Parameters of a reference of its own."""
    runs_reference: bool
    """Whether there is one, of its own or within the policy."""
    activations: Activations

    def needs(
        self, c: TrainConfig, e: EngineConfig, peak: float, *, host: bool = False
    ) -> dict[str, int]:
        """Bytes on each GPU, by what they are for.

        Args:
            c, e: of the run.
            peak: bytes of a sample's activations.
            host: whether the GPU is a CPU, where memory that is not written to costs nothing.
        """
        zero = e.json.get("zero_optimization", {})
        width = torch.finfo(e.dtype).bits // 8
        at_once = summed_at_once(e.stage, e.json)
        kept = {"ranks": e.ranks, "stage": e.stage, "width": width, "at_once": at_once}
        offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        kept |= {"moments": MOMENTS.get(c.optimizer, MOMENTS["adamw"]), "offload": offload}
        state = bytes_per_gpu(self.frozen, self.trained, **kept)
        ema = bytes_per_gpu(self.frozen, self.trained, **kept, ema=bool(c.ema_decay)) - state
        buffers = buffer_bytes(self.frozen + self.trained, e.stage, e.json, width=width)
        activations = round(2 * e.micro_batch * peak)
        step = step_bytes(self.trained, e.ranks, e.stage, e.json, width=width)
        return {
            "weights, gradients, optimizer": state,
            "average of the weights": ema,
            "reference": width * (self.reference // (e.ranks if c.shard_reference else 1)),
            "activations": activations,
            "more in the optimizer step": max(0, step - activations),
            "DeepSpeed's buffers": min(buffers, width * self.trained) if host else buffers,
        }

    def operations(self, recomputed: Sequence[str] = ()) -> float:
        """Of training on a pair: policy forward and backward, what is recomputed, reference."""
        a = self.activations
        one = a.forward + a.backward + a.operations(recomputed) + self.runs_reference * a.forward
        return 2 * one


@dataclass(frozen=True)
class Plan:
    """How to train on GPUs, and what that is predicted to take."""

    engine: EngineConfig
    option: Option
    needs: dict[str, int]
    """Bytes on each GPU, by what they are for."""
    operations: float
    """Of a pair."""
    pairs_per_second: float | None
    """None where the GPU's peak is not known."""


def read_model(
    c: TrainConfig,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    latent: Sequence[int],
    embedding: Sequence[int],
    pooled: int | None,
) -> Model:
    """Count a run's model from the configuration of its UNet.

    Args:
        c: of the run.
        config: of the UNet, as diffusers writes it.
        dtype: of the engine.
        latent, embedding, pooled: shapes of a sample, as in `activations.count`.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        if c.lora_rank:
            lora.add_adapters(unet, c)
    torch.nn.Module.to(unet, dtype).train()  # diffusers' own warns of exceptions, even of none
    counts = {True: 0, False: 0}
    for weight in unet.parameters():
        counts[weight.requires_grad] += weight.numel()
    runs = get_objective(c.objective).needs_reference and not c.reference_scores
    shapes = {"latent": latent, "embedding": embedding, "pooled": pooled}
    return Model(
        frozen=counts[False],
        trained=counts[True],
        reference=counts[True] if runs and not c.lora_rank else 0,
        runs_reference=runs,
        activations=activations.count(unet, **shapes, attention=c.attention),
    )


def shapes_of(c: TrainConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of a sample: of a prepared cache, else those that the model was made for.

    Args:
        c: of the run.
        config: of its UNet.
    """
    if "://" not in c.pairs and is_cache(c.pairs):
        return shapes_in(Cache(c.pairs))
    source = models.locate(c.model)
    encoder = models.FAMILIES[source.pipeline].text[0][1]
    text, _ = PretrainedConfig.get_config_dict(source.configs, subfolder=encoder)
    ids = config.get("addition_time_embed_dim")
    pooled = config["projection_class_embeddings_input_dim"] - 6 * ids if ids else None
    width = config["cross_attention_dim"]
    return {
        "latent": models.latent_shape(config),
        "embedding": (text["max_position_embeddings"], width),
        "pooled": pooled,
    }


def shapes_in(cache: Cache) -> dict[str, Any]:
    """Shapes of a cache's samples."""
    pooled = cache.empty.get("pooled")
    return {
        "latent": cache.latent_shape,
        "embedding": tuple(cache.empty["embeddings"].shape),
        "pooled": None if pooled is None else len(pooled),
    }


def make_plan(
    c: TrainConfig, raw: dict[str, Any], dtype: torch.dtype, model: Model, gpus: Gpus
) -> Plan:
    """The first choice in the planner's order that fits.

    Args:
        c: of the run.
        raw: the DeepSpeed JSON; its ZeRO stage and the parts of its batch are free.
        dtype: that it asks for.
        model: what is trained.
        gpus: on what.

    Raises:
        ValueError: nothing fits, saying how much is missing, or the batch cannot be split; as
            `stages_of`, and as `check_graphs` where no choice is left.
    """
    (batch, _), forward = batch_of(c, raw, gpus.count), 2 * model.activations.forward
    if batch % gpus.count:
        raise ValueError(
            f"plan_gpus: expected a divisor of train_batch_size = {batch}, got {gpus.count}"
        )
    each = batch // gpus.count
    sizes = [2**n for n in reversed(range(each.bit_length())) if each % 2**n == 0]
    busy = min((size for size in sizes if size * forward >= ENOUGH), default=sizes[0])
    stages, options = stages_of(c, dtype), model.activations.options()
    least_needed = math.inf
    for some, least in itertools.product(stages, (size for size in sizes if size <= busy)):
        sensible = [size for size in sizes if least <= size <= USEFUL * busy]
        for option, stage, micro in itertools.product(options, some, sensible):
            choice = with_choice(raw, batch, micro, gpus.count, stage)
            e = complete(choice, c, gpus.count, here=False)
            if c.compile == "graphs" and keeps_gradients(e):
                continue
            needs = model.needs(c, e, option.peak)
            total = sum(needs.values()) + CONTEXT
            if total <= (1 - MARGIN) * gpus.memory:
                operations = model.operations(option.blocks)
                speed = speed_of(c, operations, gpus.count, gpus.peak)
                return Plan(e, option, needs, operations, speed)
            least_needed = min(least_needed, total / (1 - MARGIN))
    if math.isinf(least_needed):
        check_graphs(c, e)
    raise ValueError(
        f"plan_memory: expected at least {least_needed / 2**30:.3g} GiB on each of {gpus.count} GPUs, "
        f"{MARGIN:.0%} of it to stay free, got {gpus.memory / 2**30:.3g}; more GPUs take less each, and "
        "so do --lora_rank, --reference_scores, --shard_reference and --optimizer adamw8bit"
    )


def batch_of(c: TrainConfig, raw: dict[str, Any], ranks: int) -> tuple[int, str]:
    """Pairs per optimizer step, and why so many.

    Args:
        c: of the run.
        raw: its DeepSpeed JSON.
        ranks: to train on.

    Raises:
        ValueError: the JSON gives something else than numbers.
    """
    micro, accumulation, batch = read_sizes(raw)
    if batch is not None:
        return batch, f"train_batch_size of {c.deepspeed_config!r}"
    if micro is None:
        return PAIRS, f"the paper's, as {c.deepspeed_config!r} gives no micro-batch and no batch"
    accumulation = accumulation or 1
    each = f"micro-batch {micro} × accumulation {accumulation} of {c.deepspeed_config!r}"
    return micro * accumulation * ranks, f"{each} × {ranks} GPU{'s' * (ranks > 1)}"


def stages_of(c: TrainConfig, dtype: torch.dtype) -> list[range]:
    """ZeRO stages that a run may have; those of a later range where none of an earlier one fits.

    Args:
        c: of the run.
        dtype: of the engine.

    Raises:
        ValueError: there is none for its optimizer.
    """
    row, sixteen = OPTIMIZERS.get(c.optimizer), dtype != torch.float32
    if row and not row.partitions:
        if sixteen:
            raise ValueError(
                "optimizer: expected one that works on the flat slices of ZeRO, which 16 bits need, "
                f"got {c.optimizer!r}; use another, or a JSON for fp32"
            )
        return [range(1)]
    lower = range(1 if sixteen else 0, 3)
    return [lower] if needs_whole_weights(c) else [lower, range(3, 4)]


def with_choice(
    raw: dict[str, Any], batch: int, micro: int, ranks: int, stage: int
) -> dict[str, Any]:
    """The DeepSpeed JSON with another ZeRO stage and micro-batch."""
    zero = dict(raw.get("zero_optimization", {})) | {"stage": stage}
    if stage < 3:
        zero.pop("offload_param", None)
    return raw | {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": max(1, batch // (micro * ranks)),
        "zero_optimization": zero,
    }


def speed_of(c: TrainConfig, operations: float, ranks: int, peak: float | None) -> float | None:
    """Pairs per second, of so many operations each."""
    return None if peak is None else 1e12 * peak * ranks * c.plan_share / operations


def report(c: TrainConfig) -> str:
    """The plan for a configuration, for people.

    Raises:
        ValueError: as `make_plan` and `find_gpus`; what training would refuse on any machine; an
            objective that samples its pairs; blocks that are already chosen.
    """
    if get_objective(c.objective).online:
        raise ValueError(
            "plan: expected an objective that trains on pairs, as what sampling and rewards take is "
            f"not counted, got {c.objective!r}"
        )
    if c.checkpoint_blocks:
        raise ValueError(
            "checkpoint_blocks: expected none beside --plan, which chooses them, got "
            f"{c.checkpoint_blocks!r}"
        )
    check_attention(c.attention)
    check_compile_settings(c, 0)  # the stage is free
    raw = read_json(c.deepspeed_config)
    read_sizes(raw)
    zero = raw.get("zero_optimization", {})
    free = with_choice(raw, 1, 1, 1, 1) if isinstance(zero, dict) else raw
    e = complete(free, c, 1, here=False)
    dtype = e.dtype
    check_optimizer(c, e.json)
    stages_of(c, dtype)  # whether there are any
    gpus = find_gpus(c, dtype)
    config = models.load_unet_config(c.model)
    model = read_model(c, config, dtype, **shapes_of(c, config))
    return describe(c, model, gpus, make_plan(c, raw, dtype, model, gpus), raw)


def describe(c: TrainConfig, model: Model, gpus: Gpus, plan: Plan, raw: dict[str, Any]) -> str:
    """A plan as text, ending with the flags and the DeepSpeed JSON."""
    e, blocks, gib = plan.engine, plan.option.blocks, 2**30
    more = plan.operations / model.operations() - 1
    everything = blocks == model.activations.blocks
    recomputed = "none" if not blocks else "all" if everything else ", ".join(blocks)
    total = sum(plan.needs.values()) + CONTEXT
    adapters = f" in adapters of rank {c.lora_rank}" if c.lora_rank else ""
    rows = [
        ("GPUs", f"{gpus.count} × {gpus.memory / gib:.1f} GiB {gpus.name}".strip()),
        ("model", f"{c.model}, {model.trained:,} trained parameters{adapters}, {c.objective}"),
        ("ZeRO stage", f"{e.stage}"),
        ("micro-batch", f"{e.micro_batch} pairs per GPU, {e.accumulation} per step of {e.batch}"),
        ("batch", f"{e.batch} pairs per step: {batch_of(c, raw, gpus.count)[1]}"),
        ("recomputed blocks", f"{recomputed} ({more:+.1%} operations)"),
        ("memory per GPU", f"{total / gib:.2f} GiB predicted; {MARGIN:.0%} is to stay free"),
        *((f"  {name}", f"{size / gib:.2f} GiB") for name, size in plan.needs.items() if size),
        ("  CUDA context", f"{CONTEXT / gib:.2f} GiB, assumed"),
        ("operations", f"{plan.operations / 1e12:.4g} · 10¹² per pair"),
        ("speed", _speed(c, gpus, plan)),
    ]
    width = max(len(name) for name, _ in rows) + 2
    flags = "--no-gradient_checkpointing"
    if blocks:
        chosen = ",".join(blocks)
        flags = "--gradient_checkpointing" if everything else f"--checkpoint_blocks {chosen}"
    ds = with_choice(raw, e.batch, e.micro_batch, gpus.count, e.stage)
    lines = [f"{name:<{width}}{value}" for name, value in rows]
    return "\n".join([*lines, "", f"flags: {flags}", "ds.json:", json.dumps(ds, indent=2)])


def _speed(c: TrainConfig, gpus: Gpus, plan: Plan) -> str:
    if plan.pairs_per_second is None:
        return "unknown without the GPU's peak: --peak_tflops (16 bits: A100 312, H100 989)"
    return (
        f"{plan.pairs_per_second:.3g} pairs/s at {c.plan_share:g} of {gpus.peak:g} · 10¹² operations "
        "per second and GPU: an assumption (--plan_share) until measured, which a run's last line does"
    )
