"""The DeepSpeed JSON: batch sizes, ZeRO, precision, clipping; read, completed and checked.

DeepSpeed ignores an unknown key silently and gets some combinations wrong; here each is a
`ValueError` naming the key, what was expected and what came.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from dde_fast.config import TrainConfig


@dataclass(frozen=True)
class EngineConfig:
    """What the DeepSpeed JSON says, completed and checked."""

    json: dict[str, Any]
    """For `deepspeed.initialize`: no "auto" left in optimizer and scheduler."""
    micro_batch: int
    """Pairs per rank in one forward."""
    accumulation: int
    """Micro-batches per optimizer step."""
    batch: int
    """Pairs per optimizer step over all ranks."""
    stage: int
    """ZeRO stage."""
    dtype: torch.dtype
    """Of the policy's and the reference's forward."""

    @property
    def ranks(self) -> int:
        """How many take part."""
        return self.batch // (self.micro_batch * self.accumulation)


KNOWN_KEYS = frozenset(
    """activation_checkpointing aio autotuning bf16 bfloat16 comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last
    disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
    log_level memory_breakdown optimizer prescale_gradients scheduler
    seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""".split()
)
"""Top-level keys DeepSpeed reads that this trainer leaves to it. It ignores others silently."""


def read_engine_config(config: TrainConfig, world_size: int, together: int = 1) -> EngineConfig:
    """Read, complete and check the DeepSpeed JSON of `config`.

    Args:
        config: of the run.
        world_size: ranks.
        together: micro-batches that belong to one optimizer step, of which accumulation is a
            multiple, and this many where the JSON does not say.

    Raises:
        ValueError: unreadable, an unknown key, batch sizes that do not multiply, or a precision
            that DeepSpeed gets wrong.
    """
    return complete(read_json(config.deepspeed_config), config, world_size, together)


def read_json(path: str) -> dict[str, Any]:
    """What a DeepSpeed JSON says.

    Raises:
        ValueError: unreadable, no object, or an unknown key.
    """
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file, object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ValueError(
            "deepspeed_config: expected a readable JSON file (ds.json and those of the presets, in "
            f"configs/, are in the repository's folder), got {path!r} in {os.getcwd()!r} "
            f"({error.strerror})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"deepspeed_config: expected JSON, got {path!r}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"deepspeed_config: expected a JSON object, got {type(raw).__name__}")
    if unknown := sorted(set(raw) - KNOWN_KEYS):
        raise ValueError(
            f"deepspeed_config: expected keys that DeepSpeed knows, got {unknown} in {path!r}"
        )
    return raw


def complete(
    raw: dict[str, Any],
    config: TrainConfig,
    world_size: int,
    together: int = 1,
    *,
    here: bool = True,
) -> EngineConfig:
    """Complete and check what a DeepSpeed JSON says.

    Args:
        raw: as `read_json` gives it.
        config, world_size, together: as in `read_engine_config`.
        here: whether this machine is to run it.

    Raises:
        ValueError: as `read_engine_config`.
    """
    ds = _fill_auto(raw, config)
    for key in ("zero_optimization", "bf16", "bfloat16", "fp16"):
        if not isinstance(ds.get(key, {}), dict):
            raise ValueError(f"deepspeed_config: {key}: expected an object, got {ds[key]!r}")
        # DeepSpeed takes "yes" for true, and the models would be in another precision than it
        if not isinstance(enabled := ds.get(key, {}).get("enabled", False), bool):
            raise ValueError(
                f"deepspeed_config: {key}.enabled: expected true or false, got {enabled!r}"
            )
    micro_batch, accumulation, batch = _batches(ds, world_size, together)
    ds |= {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
    }
    # DeepSpeed clips at 1.0 unless told, and by default waits for the device at every step
    clipping = ds.setdefault("gradient_clipping", 1.0)
    if not (isinstance(clipping, (int, float)) and 0 <= clipping < math.inf):
        raise ValueError(
            f"deepspeed_config: gradient_clipping: expected 0 (none) or more, got {clipping!r}"
        )
    ds.setdefault("timers", {"throughput": {"enabled": False}})
    for section, key in (
        ("zero_optimization", "compute_grad_norm"),
        ("bf16", "check_grad_overflow"),
        ("bfloat16", "check_grad_overflow"),
    ):
        if ds.get(section, {}).get(key, True) is not True:
            raise ValueError(
                f"deepspeed_config: {section}.{key}: expected true (else a gradient that is not "
                f"finite ends up in the weights), got {ds[section][key]!r}"
            )
    if "optimizer" not in ds:  # those of our table are tested
        ds.setdefault("zero_allow_untested_optimizer", True)
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(
            f"deepspeed_config: zero_optimization.stage: expected 0 to 3, got {stage!r}"
        )
    for key in ("bf16", "bfloat16"):
        if stage == 1 and ds.get(key, {}).get("enabled"):
            # else DeepSpeed keeps the bf16 gradients beside their float32 sums until the step
            ds[key].setdefault("immediate_grad_update", True)
    return EngineConfig(ds, micro_batch, accumulation, batch, stage, _dtype(ds, stage, here))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"key {sorted(twice)} given twice")
    return dict(pairs)


def _fill_auto(raw: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """A copy whose optimizer's and scheduler's "auto" values come from the configuration."""
    ds = json.loads(json.dumps(raw))
    values = {
        "optimizer": {
            "lr": config.learning_rate,
            "betas": [config.adam_beta1, config.adam_beta2],
            "eps": config.adam_eps,
            "weight_decay": config.weight_decay,
        },
        "scheduler": {
            "warmup_min_lr": 0.0,
            "warmup_max_lr": config.learning_rate,
            "warmup_num_steps": config.warmup_steps,
            "total_num_steps": config.steps,
        },
    }
    for section, known in values.items():
        if section in ds and not (isinstance(ds[section], dict) and "type" in ds[section]):
            raise ValueError(f"deepspeed_config: {section}: expected an object with a type")
        params = ds.get(section, {}).setdefault("params", {})
        if not isinstance(params, dict):
            raise ValueError(
                f"deepspeed_config: {section}.params: expected an object, got {params!r}"
            )
        for key, value in params.items():
            if value == "auto" and key not in known:
                raise ValueError(
                    f"deepspeed_config: {section}.params.{key}: expected a value ('auto' is for "
                    f"{sorted(known)}), got 'auto'"
                )
            params[key] = known[key] if value == "auto" else value
    kind = ds.get("optimizer", {}).get("type")
    if kind is not None and not _is_optimizer(kind):
        raise ValueError(
            f"deepspeed_config: optimizer.type: expected an optimizer of DeepSpeed (AdamW, Lion, …) "
            f"or torch.optim, got {kind!r}"
        )
    if kind is not None and kind.lower() in ("adam", "adamw"):
        params, zero = ds["optimizer"]["params"], ds.get("zero_optimization", {})
        if "offload_optimizer" not in zero and params.setdefault("torch_adam", True):
            # PyTorch's own fused Adam; DeepSpeed's would be compiled at the first use
            params.setdefault("fused", True)
    return ds


def _is_optimizer(kind: Any) -> bool:
    """Whether DeepSpeed finds an optimizer by this name."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    if not isinstance(kind, str):
        return False
    found = getattr(torch.optim, kind, None)
    own = isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
    return own or kind.lower() in DEEPSPEED_OPTIMIZERS


SIZES = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")


def read_sizes(ds: dict[str, Any]) -> list[int | None]:
    """Micro-batch, accumulation and pairs per optimizer step as a JSON gives them, None where not.

    Raises:
        ValueError: one of them is no number above 0.
    """
    for name in SIZES:
        value = ds.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"deepspeed_config: {name}: expected a number above 0, got {value!r}")
    return [ds.get(name) for name in SIZES]


def _batches(ds: dict[str, Any], world_size: int, together: int) -> tuple[int, int, int]:
    """(micro-batch, accumulation, pairs per optimizer step), as DeepSpeed completes them."""
    (micro, accumulation, batch), names = read_sizes(ds), SIZES
    if micro is None and batch is None:
        raise ValueError(f"deepspeed_config: {names[0]}: expected a number of pairs, got none")
    if micro is None:
        accumulation = accumulation or together
        micro = batch // (accumulation * world_size)
    elif accumulation is None:
        accumulation = batch // (micro * world_size) if batch is not None else together
    product = micro * accumulation * world_size
    if product == 0 or batch not in (None, product):
        raise ValueError(
            f"deepspeed_config: train_batch_size: expected {names[0]} x {names[1]} x ranks = "
            f"{micro} x {accumulation} x {world_size} = {product}, got {batch}"
        )
    if accumulation % together:
        raise ValueError(
            f"deepspeed_config: {names[1]}: expected a multiple of the {together} trained steps of a "
            f"trajectory, got {accumulation}; {together * -(-accumulation // together)} would do"
        )
    return micro, accumulation, product


def _dtype(ds: dict[str, Any], stage: int, here: bool) -> torch.dtype:
    """The engine's dtype; refuses the combinations that DeepSpeed gets wrong."""
    bf16 = any(ds.get(key, {}).get("enabled", False) is True for key in ("bf16", "bfloat16"))
    fp16 = ds.get("fp16", {}).get("enabled", False) is True
    if bf16 and fp16:
        raise ValueError("deepspeed_config: expected bf16 or fp16, got both enabled")
    if (bf16 or fp16) and stage == 0:
        raise ValueError(
            "deepspeed_config: zero_optimization.stage: expected 1, 2 or 3 with 16 bits (stage 0 "
            "takes one optimizer step before the first and keeps no exact fp32 weights), got 0"
        )
    if fp16 and here and not torch.cuda.is_available():
        raise ValueError("deepspeed_config: fp16: expected bf16 or fp32 on a CPU, got fp16")
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
