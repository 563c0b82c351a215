"""The trainer's configuration: a dataclass, presets, the command line and the DeepSpeed JSON.

Fields say what they are, their unit and the paper's value (arXiv 2411.14871, Sec. 8.1, for Stable
Diffusion 1.5). The DeepSpeed JSON holds what DeepSpeed owns: batch sizes, ZeRO, precision and
clipping; and, where it names them, optimizer and scheduler. Everything wrong with either is a
`ValueError` naming the argument, what was expected and what came.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import tyro

from dde_fast.objectives import get_objective


@dataclass
class TrainConfig:
    """Train a diffusion model on preference pairs."""

    preset: str = "faces"
    """Which defaults to start from: faces or style, the two embedded preference sets."""
    deepspeed_config: str = "ds.json"
    """DeepSpeed's JSON: batch sizes, ZeRO stage, precision, gradient clipping."""
    model: str = "embedded"
    """Stable Diffusion pipeline to train: "embedded", a diffusers directory or a hub name."""
    pairs: str = "faces"
    """Preference pairs: "faces" or "style" (embedded), or a parquet file or a folder of them in
    Pick-a-Pic's columns."""
    split: str = "train"
    """Split of the pairs: of an embedded set, or the files of a folder whose name begins so."""
    limit: int = 0
    """Use only the first pairs, this many; 0 = all (paper: 851,293 pairs of Pick-a-Pic v2)."""
    output: str = ""
    """Directory of the run, new or empty; "outputs/PRESET-OBJECTIVE" if not given."""
    resume: str = ""
    """Continue a run: "latest" (of the output directory) or the path of a checkpoint."""
    objective: str = "dde"
    """What to optimise: dde, dde-single, dde-step, diffusion-dpo, discounted or sft."""
    beta: float = 50.0
    """DPO temperature (paper: 5000). With DDE's weight k² the embedded model wants far less: at 2000
    logits saturate and the policy leaves the reference for little gain. Style: 500."""
    link: str = "sigmoid"
    """From logit to loss: sigmoid, ipo or hinge (paper: sigmoid)."""
    label_smoothing: float = 0.0
    """Share of wrong labels assumed, 0 to below 0.5; sigmoid only (paper: 0)."""
    ratio_decay: float = 0.9
    """Share of the old value an update of the importance ratios keeps (paper: μ = 0.1, read as the
    update rate, hence 0.9)."""
    timestep_low: int = 0
    """First timestep trained, 0-based (paper: 0). Style: 500."""
    timestep_high: int | None = None
    """One past the last timestep trained; None = the schedule's length (paper: 1000)."""
    caption_dropout: float = 0.1
    """Probability that a pair is trained on the empty caption, which guidance samples against."""
    steps: int = 150
    """Optimizer steps (paper: 2000)."""
    learning_rate: float = 5e-5
    """Of AdamW, after the warm-up constant (paper: 2.05e-5 at 2048 pairs a step)."""
    warmup_steps: int = 10
    """Optimizer steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """Of AdamW."""
    adam_beta1: float = 0.9
    """Of AdamW: decay of the first moment."""
    adam_beta2: float = 0.999
    """Of AdamW: decay of the second moment."""
    adam_eps: float = 1e-8
    """Of AdamW: added to the denominator."""
    seed: int = 0
    """Of data order, noise, timesteps and caption dropout; 0 is a seed like any other."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    backend: str = "auto"
    """Of the loss and the noise: auto, reference, triton or cpp."""
    log_every: int = 10
    """Optimizer steps between log lines, the only points where the host waits for the device."""
    save_every: int = 100
    """Optimizer steps between checkpoints; 0 = only at the end."""
    local_rank: int = -1
    """Set by the deepspeed launcher; not for you."""


FREE_ON_RESUME = frozenset(
    "preset deepspeed_config model pairs split limit output resume steps gradient_checkpointing "
    "backend log_every save_every local_rank".split()
)
"""What may differ between a run and its continuation. Model and pairs are compared by content."""


def faces() -> TrainConfig:
    """Faces that people use in happier tweets, human-annotated."""
    return TrainConfig(preset="faces", pairs="faces")


def style() -> TrainConfig:
    """Flat colour over line art of the same emoji, learnt at the noisier half of the timesteps, where
    an image's colours are settled; at the others it costs the match with the prompt."""
    return TrainConfig(preset="style", pairs="style", beta=500.0, timestep_low=500)


PRESETS: dict[str, Callable[[], TrainConfig]] = {"faces": faces, "style": style}


def parse_command_line(kind: type, args: Sequence[str] | None, **options: Any) -> Any:
    """`tyro.cli` whose complaint is one line.

    Raises:
        ValueError: what tyro says of an unknown flag or a value of the wrong kind.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=args, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro explains in a box of several lines; its first row says what is wrong
        rows = [row.strip(" │") for row in box.getvalue().splitlines()[1:]]
        message = " ".join(rows[: next(i for i, row in enumerate(rows) if set(row) <= set("─╰╯"))])
        raise ValueError(f"command line: {message}; --help lists every flag") from None


def parse(args: Sequence[str] | None = None) -> TrainConfig:
    """The configuration of a command line, checked.

    Raises:
        ValueError: an unknown flag or a value that is wrong or contradicts another.
    """
    args = list(sys.argv[1:] if args is None else args)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?", default="faces")
    preset = first.parse_known_args(args)[0].preset
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {list(PRESETS)}, got {preset!r}")
    args = [part for arg in args for part in (arg.split("=", 1) if arg[:2] == "--" else [arg])]
    config = parse_command_line(TrainConfig, args, default=PRESETS[preset]())
    check(config)
    config.output = config.output or f"outputs/{config.preset}-{config.objective}"
    return config


def check(config: TrainConfig) -> None:
    """Refuse values that are out of range or contradict each other.

    What concerns the loss alone (link, label smoothing, beta, …) `PreferenceLoss` checks.
    """
    c = config
    for name, valid, expected in (
        ("limit", c.limit >= 0, "0 (all) or a number of pairs"),
        ("steps", c.steps >= 1, "at least 1"),
        ("learning_rate", 0 < c.learning_rate < 1, "a number above 0 and below 1"),
        ("warmup_steps", c.warmup_steps >= 0, "0 or more"),
        ("weight_decay", 0 <= c.weight_decay < 1, "0 or more, below 1"),
        ("adam_beta1", 0 <= c.adam_beta1 < 1, "0 or more, below 1"),
        ("adam_beta2", 0 <= c.adam_beta2 < 1, "0 or more, below 1"),
        ("adam_eps", c.adam_eps > 0, "above 0"),
        ("seed", 0 <= c.seed < 2**63, "0 or more, below 2**63"),
        ("caption_dropout", 0 <= c.caption_dropout <= 1, "a probability"),
        ("timestep_low", c.timestep_low >= 0, "0 or more"),
        ("log_every", c.log_every >= 1, "at least 1"),
        ("save_every", c.save_every >= 0, "0 (only at the end) or more"),
    ):
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {getattr(c, name)}")
    if c.timestep_high is not None and c.timestep_high <= c.timestep_low:
        raise ValueError(
            f"timestep_high: expected above timestep_low = {c.timestep_low}, got {c.timestep_high}"
        )
    get_objective(c.objective)


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


KNOWN_KEYS = frozenset(
    """activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
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


def read_engine_config(config: TrainConfig, world_size: int) -> EngineConfig:
    """Read, complete and check the DeepSpeed JSON of `config`.

    Raises:
        ValueError: unreadable, an unknown key, batch sizes that do not multiply, or a precision
            that DeepSpeed gets wrong.
    """
    path = config.deepspeed_config
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file, object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ValueError(
            f"deepspeed_config: expected a readable JSON file, got {path!r} ({error.strerror})"
        ) from None
    except ValueError as error:
        raise ValueError(f"deepspeed_config: expected JSON, got {path!r}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"deepspeed_config: expected a JSON object, got {type(raw).__name__}")
    if unknown := sorted(set(raw) - KNOWN_KEYS):
        raise ValueError(
            f"deepspeed_config: expected keys that DeepSpeed knows, got {unknown} in {path!r}"
        )
    ds = _fill_auto(raw, config)
    for key in ("zero_optimization", "bf16", "bfloat16", "fp16"):
        if not isinstance(ds.get(key, {}), dict):
            raise ValueError(f"deepspeed_config: {key}: expected an object, got {ds[key]!r}")
    micro_batch, accumulation, batch = _batches(ds, world_size)
    ds |= {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
    }
    # DeepSpeed clips at 1.0 unless told, and by default waits for the device at every step
    ds.setdefault("gradient_clipping", 1.0)
    ds.setdefault("timers", {"throughput": {"enabled": False}})
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(
            f"deepspeed_config: zero_optimization.stage: expected 0 to 3, got {stage!r}"
        )
    return EngineConfig(ds, micro_batch, accumulation, batch, stage, _dtype(ds, stage))


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


def _batches(ds: dict[str, Any], world_size: int) -> tuple[int, int, int]:
    """(micro-batch, accumulation, pairs per optimizer step), as DeepSpeed completes them."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    for name in names:
        value = ds.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"deepspeed_config: {name}: expected a number above 0, got {value!r}")
    micro, accumulation, batch = (ds.get(name) for name in names)
    if micro is None and batch is None:
        raise ValueError(f"deepspeed_config: {names[0]}: expected a number of pairs, got none")
    if micro is None:
        accumulation = accumulation or 1
        micro = batch // (accumulation * world_size)
    elif accumulation is None:
        accumulation = batch // (micro * world_size) if batch is not None else 1
    product = micro * accumulation * world_size
    if product == 0 or batch not in (None, product):
        raise ValueError(
            f"deepspeed_config: train_batch_size: expected {names[0]} x {names[1]} x ranks = "
            f"{micro} x {accumulation} x {world_size} = {product}, got {batch}"
        )
    return micro, accumulation, product


def _dtype(ds: dict[str, Any], stage: int) -> torch.dtype:
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
    if fp16 and not torch.cuda.is_available():
        raise ValueError("deepspeed_config: fp16: expected bf16 or fp32 on a CPU, got fp16")
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def describe(config: TrainConfig, engine: EngineConfig) -> dict[str, Any]:
    """What `config.json` of a run holds."""
    return {"config": asdict(config), "deepspeed": engine.json}


def identity(config: TrainConfig, engine: EngineConfig) -> dict[str, Any]:
    """Everything that a run and its continuation must share, by name."""
    same = {key: value for key, value in asdict(config).items() if key not in FREE_ON_RESUME}
    for key in ("optimizer", "scheduler", "gradient_clipping"):
        same[f"deepspeed_config: {key}"] = engine.json.get(key)
    same["deepspeed_config: ZeRO stage"] = engine.stage
    same["deepspeed_config: precision"] = str(engine.dtype).removeprefix("torch.")
    same["deepspeed_config: pairs per optimizer step"] = engine.batch
    return same
