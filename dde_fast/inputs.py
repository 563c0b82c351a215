"""Everything a user named, read and checked before anything is started."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dde_fast import checkpoint, embedded, lora, models, prepare, schedule
from dde_fast.activations import blocks_of, recomputed_blocks
from dde_fast.attention import use_attention
from dde_fast.cache import Cache, is_cache
from dde_fast.compilation import check_compile
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.engine import device_of_process, say
from dde_fast.loss import PreferenceLoss
from dde_fast.metrics import check_wandb
from dde_fast.objectives import get_objective
from dde_fast.online import check_reward
from dde_fast.optimizers import load_optimizer, unsplittable
from dde_fast.prepare import Preparation, PrepareConfig
from dde_fast.prompt_stream import Prompts
from dde_fast.prompts import read_prompts
from dde_fast.provenance import git_commit, versions
from dde_fast.reference_scores import ReferenceScores, settings_of
from dde_fast.shards import PARTIAL
from dde_fast.trajectories import DDIMSteps

FREE_ON_RESUME = frozenset(
    "preset deepspeed_config model pairs split limit output resume steps gradient_checkpointing "
    "checkpoint_blocks plan plan_gpus plan_memory plan_share backend attention shard_reference "
    "cache_gib log_every save_every local_rank validation_pairs validation_split validation_limit "
    "validation_draws validation_every grid_every grid_prompts grid_images grid_steps "
    "grid_guidance prompts reward wandb_project peak_tflops keep max_skipped max_winner_error".split()
)
"""What may differ between a run and its continuation. Model, pairs, prompts and reward are
compared by content."""


@dataclass
class Inputs:
    """Everything the user named, read and checked before anything is started."""

    model: str
    source: models.Source
    """Where the model is."""
    data: Cache | Preparation | Prompts
    """What is trained on."""
    held_out: Cache | Preparation | None
    """Pairs for validation."""
    grid_prompts: list[str]
    """One per image of a grid; none where none is wanted."""
    loss_fn: PreferenceLoss
    steps: DDIMSteps | None
    """Of an online objective's sampler."""
    alphas_cumprod: Tensor
    """[T]."""
    timesteps: Tensor
    """float64 [T], the distribution they are drawn from."""
    scheduler: dict[str, Any]
    """Configuration of the noise schedule, as diffusers writes it."""
    unet: torch.nn.Module
    scores: ReferenceScores | None
    """Of the reference, where it is not to be run."""
    identity: dict[str, Any]
    start: checkpoint.Checkpoint | None


def read_inputs(c: TrainConfig, e: EngineConfig) -> Inputs:
    """Read pairs, model and checkpoint.

    Raises:
        ValueError, OSError: one of them is missing, broken, or not what the others need.
    """
    load_optimizer(c, e)  # whether there is one
    check_compile(c, e, device_of_process())
    if c.lora_rank:
        lora.require_peft()
    start = place_of_run(c)

    # The data
    data, content = open_data(c)

    # What shows how it goes
    check_wandb(c.wandb_project)
    held_out, grid_prompts = None, []
    if c.validation_pairs:
        asked = (c.validation_pairs, c.validation_split, c.validation_limit)
        try:
            held_out = open_pairs(c, *asked, folder="cache-validation")
        except ValueError as error:  # it begins with the argument: pairs, split, …
            raise ValueError(f"validation_{error}") from None
        say(f"validation_pairs: {held_out}")
    if c.grid_every:
        own = c.prompts if isinstance(data, Prompts) else c.pairs * (c.pairs in embedded.SETS)
        prompts = c.grid_prompts or own
        grid_prompts = read_prompts(prompts, c.grid_images, "grid_prompts")

    # The loss and the policy
    source = models.locate(c.model)
    scheduler = models.load_scheduler(c.model)
    named = ("beta", "link", "label_smoothing", "ratio_decay", "backend")
    options, steps = {name: getattr(c, name) for name in named}, None
    if isinstance(data, Prompts):
        steps = DDIMSteps(scheduler, c.sampling_steps)
        loss_fn = steps.loss(c.objective, **options)
    else:
        loss_fn = PreferenceLoss.from_scheduler(scheduler, c.objective, **options)
    loss_fn.auto_update = False  # once per optimizer step, over all micro-batches and ranks
    timesteps = loss_fn.timestep_probabilities(c.timestep_low, c.timestep_high)
    unet = models.load_unet(c.model)
    use_attention(unet, c.attention, e.dtype, device_of_process())
    recomputed_blocks(c, blocks_of(unet))  # whether it has them

    # What a continuation must share with its beginning
    weights = models.fingerprint(unet)
    identity = identity_of(c, e) | {
        "model": f"weights {weights[:16]}",
        **content,
    }
    if start is not None:
        checkpoint.check_continues(start, identity, asdict(TrainConfig()))
        check_ranks(c, e, start)
    if c.lora_rank:  # after the model's fingerprint was taken
        lora.add_adapters(unet, c)
    say(f"{next(iter(content))}: {data}")  # reads a source's rows
    alphas_cumprod = schedule.alphas_cumprod_of(scheduler)
    scores = None
    if c.reference_scores:
        scores = open_scores(c, e, data, weights, alphas_cumprod, loss_fn.prediction_type)
    return Inputs(
        model=c.model,
        source=source,
        data=data,
        held_out=held_out,
        grid_prompts=grid_prompts,
        loss_fn=loss_fn,
        steps=steps,
        alphas_cumprod=alphas_cumprod,
        timesteps=timesteps,
        scheduler=json.loads(scheduler.to_json_string()),
        unet=unet,
        scores=scores,
        identity=identity,
        start=start,
    )


def open_data(c: TrainConfig) -> tuple[Cache | Preparation | Prompts, dict[str, str]]:
    """What is trained on, and what identifies its content, by name.

    Raises:
        ValueError, ImportError: as `open_pairs`, `Prompts` and `check_reward`.
    """
    if not get_objective(c.objective).online:
        pairs = open_pairs(c, c.pairs, c.split, c.limit)
        return pairs, {"pairs": f"content {pairs.fingerprint[:16]}"}
    prompts = Prompts(c.prompts, c.split)
    content = {"prompts": f"content {prompts.fingerprint[:16]}"}
    return prompts, content | {"reward": check_reward(c, prompts)}


def open_pairs(
    c: TrainConfig, pairs: str, split: str, limit: int, folder: str = "cache"
) -> Cache | Preparation:
    """A prepared cache, or the preparation of one in the run's own folder.

    Args:
        c: of the run.
        pairs, split, limit: as in `TrainConfig`.
        folder: in the run's, where a source that is no cache is encoded.

    Raises:
        ValueError: neither; a cache that is damaged, or made with another model's encoders.
    """
    if is_cache(pairs):
        local, size = embedded.cache_folder() / "shards", int(c.cache_gib * 2**30)
        cache = Cache(pairs, folder=local, limit=size)
        if "://" in pairs and not c.shuffle_block and sum(cache.sizes()) > size:
            raise ValueError(
                f"shuffle_block: expected above 0 for a cache of {sum(cache.sizes()) / 2**30:.3g} GiB "
                f"fetched into cache_gib = {c.cache_gib:g}: the whole of it would be fetched again "
                f"and again, got 0; {cache.shard_size // 2} would do"
            )
        cache.check_model(c.model)
        return cache
    options = PrepareConfig(
        output=str(Path(c.output) / folder),
        model=c.model,
        pairs=pairs,
        split=split,
        limit=limit,
        # the demonstration is small, and exact
        dtype="float32" if pairs in embedded.SETS else "float16",
    )
    return prepare.start(options, device_of_process())


def open_scores(
    c: TrainConfig,
    e: EngineConfig,
    pairs: Cache | Preparation,
    reference: str,
    alphas_cumprod: Tensor,  # [T]
    prediction_type: str,
) -> ReferenceScores:
    """The reference scores of a run.

    Raises:
        ValueError: its pairs are no prepared cache, or hold none that fit.
    """
    if not isinstance(pairs, Cache):
        raise ValueError(
            f"reference_scores: expected pairs in a prepared cache, which holds them, got {c.pairs!r}"
        )
    settings = settings_of(
        pairs,
        reference=reference,
        alphas_cumprod=alphas_cumprod,
        prediction_type=prediction_type,
        seed=c.seed,
        objective=c.objective,
        timestep_low=c.timestep_low,
        timestep_high=c.timestep_high,
        caption_dropout=c.caption_dropout,
        dtype=e.dtype,
    )
    scores = ReferenceScores.open(pairs, settings, c.reference_scores, scoring_command(c, e))
    say(
        f"reference scores: {scores.draws} draws per pair, cycled through; training runs no reference"
    )
    return scores


def scoring_command(c: TrainConfig, e: EngineConfig) -> str:
    """The command line that computes a run's reference scores."""
    # scores are written into a folder; a cache behind a URL is to be copied
    flags = {"output": "LOCAL_COPY" if "://" in c.pairs else c.pairs, "model": c.model}
    flags["reference_scores"] = c.reference_scores
    names = ("objective", "timestep_low", "timestep_high", "caption_dropout", "seed")
    given = {name: getattr(c, name) for name in names}
    given["precision"] = str(e.dtype).removeprefix("torch.")
    flags |= {k: value for k, value in given.items() if value != getattr(PrepareConfig, k)}
    parts = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items()]
    return " ".join(["python -m dde_fast.prepare", *parts])


def _is_free(output: Path) -> bool:
    """Whether nothing is there but what a killed run had begun to encode or to write."""
    names = [path.name for path in output.glob("*")]
    begun = all(name.startswith("cache") or name.endswith(PARTIAL) for name in names)
    return output.is_dir() and begun


def place_of_run(c: TrainConfig) -> checkpoint.Checkpoint | None:
    """The checkpoint to continue from; None for a run that begins, in a place of its own.

    Raises:
        ValueError: nothing to continue, or a place that holds something else.
    """
    output = Path(c.output)
    used = output.exists() and not _is_free(output)
    if c.resume == "auto":
        if used and not any((output / name).exists() for name in ("config.json", "cache")):
            raise ValueError(
                f"output: expected a run to continue, or a new or empty directory, got {c.output!r}"
            )
        if not checkpoint.any_in(output / "checkpoints"):
            return None
    elif not c.resume:
        if used:
            raise ValueError(
                f"output: expected a new or empty directory, got {c.output!r}; continue the run it "
                "holds with --resume latest, or choose another --output"
            )
        return None
    resume = "latest" if c.resume == "auto" else c.resume
    start, torn = checkpoint.find(resume, output / "checkpoints")
    for tag in torn:
        say(f"resume: skipped {tag}, which is torn; continuing from {start.path.name}")
    if start.step > c.steps:
        raise ValueError(f"steps: expected at least the {start.step} done, got {c.steps}")
    return start


def check_ranks(c: TrainConfig, e: EngineConfig, start: checkpoint.Checkpoint) -> None:
    """Refuse another number of ranks than wrote a ZeRO checkpoint where its states would be lost.

    Raises:
        ValueError: naming what would be.
    """
    lost = unsplittable(c, e)
    if e.stage > 0 and start.world_size != e.ranks and lost is not None:
        raise ValueError(
            f"resume: expected {start.world_size} ranks, as many as wrote {str(start.path)!r}, got "
            f"{e.ranks}: of a checkpoint of ZeRO stage {e.stage} DeepSpeed splits the weights and "
            f"Adam's moments anew, but not {lost}"
        )


def describe(config: TrainConfig, engine: EngineConfig, inputs: Inputs) -> dict[str, Any]:
    """What `config.json` of a run holds."""
    settings = identity_of(config, engine)
    content = {key: value for key, value in inputs.identity.items() if settings.get(key) != value}
    return {
        "config": asdict(config),
        "deepspeed": engine.json,
        "content": content,
        "scheduler": inputs.scheduler,
        "versions": versions(),
        "commit": git_commit(),
    }


def identity_of(config: TrainConfig, engine: EngineConfig) -> dict[str, Any]:
    """Everything that a run and its continuation must share, by name."""
    same = {key: value for key, value in asdict(config).items() if key not in FREE_ON_RESUME}
    for key in ("optimizer", "scheduler", "gradient_clipping"):
        same[f"deepspeed_config: {key}"] = engine.json.get(key)
    same["deepspeed_config: ZeRO stage"] = engine.stage
    same["deepspeed_config: precision"] = str(engine.dtype).removeprefix("torch.")
    same["deepspeed_config: pairs per optimizer step"] = engine.batch
    return same
