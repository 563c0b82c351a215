"""The trainer's configuration: a dataclass, presets and the command line.

Fields say what they are, their unit and the paper's value (arXiv 2411.14871, Sec. 8.1, for Stable
Diffusion 1.5). The DeepSpeed JSON holds what DeepSpeed owns: batch sizes, ZeRO, precision and
clipping; and, where it names them, optimizer and scheduler. Everything wrong with either is a
`ValueError` naming the argument, what was expected and what came.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dde_fast.command_line import parse_command_line
from dde_fast.objectives import get_objective


@dataclass
class TrainConfig:
    """Train a diffusion model on preference pairs."""

    preset: str = "faces"
    """Which defaults to start from: faces or style, the two embedded preference sets, or sd15 or
    sdxl, the paper's on Pick-a-Pic."""
    deepspeed_config: str = "ds.json"
    """DeepSpeed's JSON: batch sizes, ZeRO stage, precision, gradient clipping."""
    model: str = "embedded"
    """Stable Diffusion to train (1.x, 2.x or XL): "embedded", a diffusers directory, a hub name, or
    an original FILE.safetensors, with +DIRECTORY for configurations of your own or no network."""
    pairs: str = "faces"
    """Preference pairs: "faces" or "style" (embedded); a cache that `python -m dde_fast.prepare`
    made (a folder, a URL); or what is encoded into OUTPUT/cache first: parquet in Pick-a-Pic's
    columns (a file, a folder, a URL, a data set's name on the hub), a folder with w/ and l/, a CSV or
    JSONL table, or HPDv2's JSON."""
    split: str = "train"
    """Split of the pairs: of an embedded set, or the files of a folder whose name begins so."""
    limit: int = 0
    """Use only the first pairs, this many; 0 = all (paper: 851,293 pairs of Pick-a-Pic v2)."""
    output: str = ""
    """Directory of the run, new or empty; "outputs/PRESET-OBJECTIVE" if not given."""
    resume: str = ""
    """Continue a run: "latest" (of the output directory), "auto" (the same, or begin where there is
    none yet: for jobs that are queued again) or the path of a checkpoint."""
    objective: str = "dde"
    """What to optimise: on pairs dde, dde-single, dde-step, diffusion-dpo, discounted or sft; online,
    on what the policy samples for prompts and a reward ranks, tailorpo, tailorpo-g or d3po."""
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
    """First timestep trained, 0-based (paper: 0; style: 500). Online 200 unless another is given: the
    noise of later steps is so small that they would outweigh the others. Online, steps that are not
    trained are still sampled."""
    timestep_high: int | None = None
    """One past the last timestep trained; None = the schedule's length (paper: 1000)."""
    caption_dropout: float = 0.1
    """Probability that a pair is trained on the empty caption, which guidance samples against."""
    prompts: str = "faces"
    """Online: what to sample images of: "faces", "style" (the names of --split), or a file, folder
    or data set of prompts as `python -m dde_fast.evaluate` reads them."""
    reward: str = "sentiment"
    """Online: what ranks them, NAME or NAME=WEIGHTS of `dde_fast.rewards`; tailorpo-g needs a
    differentiable one."""
    sampling_steps: int = 10
    """Online: DDIM steps of a trajectory, with noise (η = 1). Each trained one is a micro-batch, so
    gradient accumulation is a multiple of their number."""
    guidance_scale: float = 2.0
    """Online: classifier-free guidance while sampling and training, 1 is none (usual for Stable
    Diffusion: 5 to 7.5)."""
    reward_target: float = 1.0
    """tailorpo-g: R_high, the reward that guidance moves winners towards, downwards from above it, so
    one that they do not reach. Of sentiment; style: 150, of colourfulness; no default for others."""
    reward_step: float = 2.0
    """tailorpo-g: η_g, how far, times the gradient of half the squared distance to it; a good one
    moves a latent by less than the step's noise. Of sentiment; style: 0.005, of colourfulness."""
    steps: int = 150
    """Optimizer steps (paper: 2000)."""
    optimizer: str = "auto"
    """adamw, adamw8bit or lion8bit (bitsandbytes), or adafactor (ZeRO stage 0 only); auto = the
    DeepSpeed JSON's own, else adamw."""
    learning_rate: float = 5e-5
    """Of the optimizer, after the warm-up constant (paper: 2.05e-5 at 2048 pairs a step; LoRA bears
    about ten times a full fine-tune's)."""
    warmup_steps: int = 10
    """Optimizer steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """Of the optimizer."""
    adam_beta1: float = 0.9
    """Of AdamW and Lion: decay of the first moment."""
    adam_beta2: float = 0.999
    """Of AdamW and Lion: decay of the second moment."""
    adam_eps: float = 1e-8
    """Of AdamW: added to the denominator."""
    ema_decay: float = 0.0
    """Of the exponential moving average of the weights, saved beside them as unet_ema or lora_ema;
    0 = none. It rises to this value over the first steps."""
    lora_rank: int = 0
    """Rank of low-rank adapters, which alone are trained; 0 = the whole UNet is (paper: 0)."""
    lora_alpha: float = 0.0
    """Adapters are scaled by alpha / rank; 0 = alpha is the rank."""
    lora_targets: str = "to_q,to_k,to_v,to_out.0"
    """Layers of the UNet that get adapters: ends of their names, with commas between."""
    shard_reference: bool = False
    """Share the frozen reference out over the ranks (a second engine at ZeRO stage 3) instead of a
    copy on each."""
    reference_scores: int = 0
    """Run no reference, but read its errors at this many draws per pair (timestep, noise, caption or
    none), which are cycled through epoch by epoch, from a prepared cache: `python -m dde_fast.prepare
    --reference_scores` computes them; 0 = run it (paper: 0)."""
    seed: int = 0
    """Of data order, noise, timesteps and caption dropout; 0 is a seed like any other."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a fifth more operations."""
    checkpoint_blocks: str = ""
    """Recompute those of these blocks of the UNet alone, by name: down_blocks.0,up_blocks.3."""
    plan: bool = False
    """Print what to use on this machine's GPUs, with memory and speed to be expected, and end."""
    plan_gpus: int = 0
    """With --plan, GPUs to plan for; 0 = this machine's."""
    plan_memory: float = 0.0
    """With --plan, GiB of each GPU to plan for; 0 = as this machine's have."""
    plan_share: float = 0.4
    """Share of the peak that predicted speed assumes; a run's last line says what it was."""
    attention: str = "sdpa"
    """Of both UNets: sdpa (PyTorch chooses the kernel), flash, cudnn or efficient (that kernel of
    PyTorch's or an error), xformers, or eager."""
    channels_last: bool = False
    """Run the convolutions of both UNets in channels_last memory order, on latents noised in it.
    ZeRO keeps weights that are trained in the default order: convolutions convert those at each
    call. What it gains, if anything, is not measured on a GPU yet."""
    compile: str = ""
    """Run both UNets through torch.compile: regional (their transformer blocks), whole, which may
    take minutes, told after the first step, or graphs: whole, replayed as CUDA graphs, refused
    where gradients are kept between micro-batches; none by default. Where ZeRO stage 3 or
    `shard_reference` shares weights out, regional."""
    backend: str = "auto"
    """Of the loss and the noise: auto, reference, triton or cpp."""
    shuffle_block: int = 0
    """0 mixes the whole set; else this many consecutive pairs stay near each other in the order,
    which a cache fetched from a URL needs: as many as a shard holds images is a good number."""
    cache_gib: float = 100.0
    """GiB of this machine's disk for shards fetched from a URL."""
    log_every: int = 10
    """Optimizer steps between log lines. Without ZeRO, or in bf16 at stage 1 with sums in float32, the
    host waits for the device there alone."""
    save_every: int = 100
    """Optimizer steps between checkpoints; 0 = only at the end."""
    validation_pairs: str = ""
    """Held-out pairs, named as in --pairs, whose loss, errors and implicit accuracy are logged; none
    by default."""
    validation_split: str = "test"
    """Split of the held-out pairs."""
    validation_limit: int = 256
    """Use only the first held-out pairs, this many; 0 = all."""
    validation_draws: int = 1
    """Timesteps and noises at which each held-out pair is looked at, the same every time."""
    validation_every: int = 50
    """Optimizer steps between two looks at the held-out pairs."""
    grid_every: int = 0
    """Optimizer steps between pictures of policy and base in OUTPUT/grids; 0 = none."""
    grid_prompts: str = ""
    """Prompts of the pictures: "faces", "style", or a text file, one prompt a line; by default those
    of embedded pairs."""
    grid_images: int = 8
    """Images in a row of a picture; image i gets prompt i modulo their number."""
    grid_steps: int = 20
    """DDIM steps of the pictures."""
    grid_guidance: float = 2.0
    """Classifier-free guidance scale of the pictures (usual for Stable Diffusion: 7.5)."""
    wandb_project: str = ""
    """Log to this project of Weights & Biases as well (pip install wandb); none by default."""
    peak_tflops: float = 0.0
    """Peak of one device, 10¹² operations per second, for MFU; 0 = of the known GPUs at 16 bits, and
    no MFU for others."""
    keep: int = 3
    """Checkpoints that stay, the newest ones; 0 = all."""
    max_skipped: int = 20
    """Optimizer steps in a row skipped because the gradient was not finite, at which the run saves
    and ends; looked at where it logs."""
    max_winner_error: float = 2.0
    """Multiple of the reference's error on winners beyond which the policy's draws a warning."""
    local_rank: int = -1
    """Set by the deepspeed launcher; not for you."""


def faces() -> TrainConfig:
    """Faces that people use in happier tweets, human-annotated."""
    return TrainConfig(preset="faces", pairs="faces")


def style() -> TrainConfig:
    """Flat colour over line art of the same emoji, learnt at the noisier half of the timesteps, where
    an image's colours are settled; at the others it costs the match with the prompt."""
    return TrainConfig(
        preset="style",
        pairs="style",
        prompts="style",
        reward="colourfulness",
        reward_target=150.0,
        reward_step=0.005,
        beta=500.0,
        timestep_low=500,
    )


def sd15() -> TrainConfig:
    """Stable Diffusion 1.5 on Pick-a-Pic v2 as in the paper: beta 5000, 2000 steps of 2048 pairs,
    learning rate 2.05e-5. The warm-up, which the paper does not give, is that of Diffusion-DPO's
    published launch."""
    return TrainConfig(
        preset="sd15",
        deepspeed_config="configs/zero1.json",
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pairs="yuvalkirstain/pickapic_v2",
        prompts="",
        reward="",
        sampling_steps=20,
        guidance_scale=5.0,
        beta=5000.0,
        steps=2000,
        learning_rate=2.05e-5,
        warmup_steps=500,
        gradient_checkpointing=True,
    )


def sdxl() -> TrainConfig:
    """SDXL on Pick-a-Pic v2 as in the paper: as `sd15`, 1500 steps."""
    return replace(
        sd15(),
        preset="sdxl",
        deepspeed_config="configs/zero2.json",
        model="stabilityai/stable-diffusion-xl-base-1.0",
        steps=1500,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "faces": faces,
    "style": style,
    "sd15": sd15,
    "sdxl": sdxl,
}

OFFLINE = (
    "pairs limit caption_dropout shuffle_block cache_gib validation_pairs validation_split "
    "validation_limit validation_draws validation_every reference_scores"
).split()
ONLINE = "prompts reward sampling_steps guidance_scale".split()
GUIDED = "reward_target reward_step".split()
"""Fields that some objectives alone use."""


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
    given = {arg.lstrip("-").replace("-", "_") for arg in args}
    config = parse_command_line(TrainConfig, args, default=PRESETS[preset]())
    if "timestep_low" not in given:
        least = get_objective(config.objective).timestep_low
        config.timestep_low = max(config.timestep_low, least)
    check(config)
    check_guidance(config, given)
    config.output = config.output or f"outputs/{config.preset}-{config.objective}"
    return config


def check_guidance(config: TrainConfig, given: set[str]) -> None:
    """Refuse to guide towards the target of another reward, of another scale: away from a better one.

    Raises:
        ValueError: the reward is not the preset's, and the flags `given` leave one of `GUIDED` out.
    """
    usual = PRESETS[config.preset]()
    if not get_objective(config.objective).guided or config.reward == usual.reward:
        return
    for name in GUIDED:
        if name not in given:
            whose = f"of {usual.reward!r}" if usual.reward else "of no reward in particular"
            raise ValueError(
                f"{name}: expected one for the reward {config.reward!r}, got the default "
                f"{getattr(config, name)}, which is {whose}"
            )


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
        ("adam_eps", 0 < c.adam_eps < math.inf, "above 0"),
        ("ema_decay", 0 <= c.ema_decay < 1, "0 (none) or more, below 1"),
        ("lora_rank", c.lora_rank >= 0, "0 (the whole UNet) or more"),
        ("lora_alpha", 0 <= c.lora_alpha < math.inf, "0 (the rank) or more"),
        ("lora_alpha", c.lora_rank or not c.lora_alpha, "0 where lora_rank is 0: no adapters"),
        ("lora_targets", c.lora_targets.strip(" ,"), "names of layers"),
        ("seed", 0 <= c.seed < 2**63, "0 or more, below 2**63"),
        ("caption_dropout", 0 <= c.caption_dropout <= 1, "a probability"),
        ("timestep_low", c.timestep_low >= 0, "0 or more"),
        ("reference_scores", c.reference_scores >= 0, "0 (none) or a number of draws"),
        ("shuffle_block", c.shuffle_block >= 0, "0 (the whole set) or a number of pairs"),
        ("cache_gib", 0 < c.cache_gib < math.inf, "above 0"),
        ("log_every", c.log_every >= 1, "at least 1"),
        ("save_every", c.save_every >= 0, "0 (only at the end) or more"),
        ("validation_limit", c.validation_limit >= 0, "0 (all) or a number of pairs"),
        ("validation_draws", c.validation_draws >= 1, "at least 1"),
        ("validation_every", c.validation_every >= 1, "at least 1"),
        ("grid_every", c.grid_every >= 0, "0 (none) or more"),
        ("grid_images", 1 <= c.grid_images <= 16, "1 to 16"),
        ("grid_steps", 1 <= c.grid_steps <= 1000, "1 to 1000"),
        ("grid_guidance", 1 <= c.grid_guidance < math.inf, "at least 1"),
        ("peak_tflops", 0 <= c.peak_tflops < math.inf, "0 (of the known GPUs) or more"),
        ("plan_gpus", c.plan_gpus >= 0, "0 (this machine's) or more"),
        ("plan_memory", 0 <= c.plan_memory < math.inf, "0 (as this machine's) or more"),
        ("plan_gpus", c.plan or not c.plan_gpus, "none without --plan"),
        ("plan_memory", c.plan or not c.plan_memory, "none without --plan"),
        ("plan_share", 0 < c.plan_share <= 1, "above 0, at most 1"),
        ("keep", c.keep >= 0, "0 (all) or a number of checkpoints"),
        ("max_skipped", c.max_skipped >= 1, "at least 1"),
        ("max_winner_error", c.max_winner_error > 1, "above 1"),
        ("sampling_steps", c.sampling_steps >= 1, "at least 1"),
        ("guidance_scale", 1 <= c.guidance_scale < math.inf, "at least 1"),
        ("reward_target", math.isfinite(c.reward_target), "a finite number"),
        ("reward_step", 0 < c.reward_step < math.inf, "above 0"),
    ):
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {getattr(c, name)}")
    if c.timestep_high is not None and c.timestep_high <= c.timestep_low:
        raise ValueError(
            f"timestep_high: expected above timestep_low = {c.timestep_low}, got {c.timestep_high}"
        )
    objective = get_objective(c.objective)
    usual = PRESETS[c.preset]()
    for names, used, whose in (
        (OFFLINE, not objective.online, "of objectives that train on pairs"),
        (ONLINE, objective.online, "of objectives that sample: tailorpo, tailorpo-g, d3po"),
        (GUIDED, objective.guided, "of tailorpo-g"),
    ):
        for name in names:
            if not used and getattr(c, name) != getattr(usual, name):
                raise ValueError(
                    f"{name}: expected none with objective {c.objective!r}, as it is {whose}, "
                    f"got {getattr(c, name)!r}"
                )
    if c.reference_scores and not objective.needs_reference:
        raise ValueError(
            f"reference_scores: expected 0 for {c.objective}, which has no reference, got "
            f"{c.reference_scores}"
        )
    if c.shard_reference and (c.lora_rank or c.reference_scores or not objective.needs_reference):
        why = "lora_rank: the reference is the policy's base" if c.lora_rank else c.objective
        why = "reference_scores" if c.reference_scores else why
        raise ValueError(f"shard_reference: expected a model of its own to share, got {why}")
