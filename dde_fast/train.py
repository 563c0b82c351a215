"""The trainer: preference pairs in, an aligned UNet out.

    deepspeed dde_fast/train.py --deepspeed_config ds.json
    torchrun --nproc_per_node 2 dde_fast/train.py
    python -m dde_fast.train --help

Pair number p of the endless stream is pair p % n of epoch p // n's order; optimizer step s takes
pairs [s·G, (s+1)·G), of which each rank and micro-batch takes a slice. Order, noise, timesteps and
caption dropout are functions of (seed, pair id, epoch), so a run is the same on any number of
ranks, with any accumulation, and after a resume.
"""

from __future__ import annotations

import os
import sys

if not __package__:  # run by path: this folder would shadow other modules named config, cache, …
    _folder = os.path.dirname(os.path.abspath(__file__))
    _parent = os.path.dirname(_folder)
    sys.path[:] = [_parent if os.path.abspath(path) == _folder else path for path in sys.path]

import contextlib
import copy
import functools
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from dde_fast import checkpoint, config, models, noise, schedule
from dde_fast.cache import PairStream, encode_pairs
from dde_fast.config import EngineConfig, TrainConfig
from dde_fast.loss import PreferenceLoss, PreferenceOutput
from dde_fast.metrics import Meter, RunLog
from dde_fast.pairs import PairTable, load_pairs


def main(args: Sequence[str] | None = None) -> None:
    """Train as a command line says. What is wrong with it ends in one line and exit code 2."""
    launch_environment()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    with one_line_errors():
        settings = config.parse(args)
        engine_config = config.read_engine_config(settings, int(os.environ["WORLD_SIZE"]))
        inputs = read_inputs(settings, engine_config)
    train(settings, engine_config, inputs)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input is one line on stderr, from one process per machine, and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ["LOCAL_RANK"] == "0":
            print("dde_fast: error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(2)


def launch_environment() -> None:
    """What deepspeed and torchrun set, for a single process started without either."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@dataclass
class Inputs:
    """Everything the user named, read and checked before anything is started."""

    model: str
    table: PairTable
    loss_fn: PreferenceLoss
    alphas_cumprod: Tensor
    """[T]."""
    timesteps: Tensor
    """float64 [T], the distribution they are drawn from."""
    unet: torch.nn.Module
    identity: dict[str, Any]
    start: checkpoint.Checkpoint | None


def read_inputs(c: TrainConfig, e: EngineConfig) -> Inputs:
    """Read pairs, model and checkpoint.

    Raises:
        ValueError, OSError: one of them is missing, broken, or not what the others need.
    """
    # The place of the run: new, or one to continue
    output, start = Path(c.output), None
    if c.resume:
        start, torn = checkpoint.find(c.resume, output / "checkpoints")
        for tag in torn:
            say(f"resume: skipped {tag}, which is torn; continuing from {start.path.name}")
        if start.step > c.steps:
            raise ValueError(f"steps: expected at least the {start.step} done, got {c.steps}")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"output: expected a new or empty directory, got {c.output!r}; continue the run it "
            "holds with --resume latest, or choose another --output"
        )

    # The pairs
    model, pairs = c.model, c.pairs
    if model == "embedded" or pairs in config.PRESETS:
        from dde_fast import embedded

        model = str(embedded.model_path()) if model == "embedded" else model
        pairs = str(embedded.pairs_path(pairs, c.split)) if pairs in config.PRESETS else pairs
    table = load_pairs(pairs, c.split, c.limit)
    say(f"pairs: {table}")

    # The loss and the policy
    models.check_model(model)
    scheduler = models.load_scheduler(model)
    loss_fn = PreferenceLoss.from_scheduler(
        scheduler,
        c.objective,
        beta=c.beta,
        link=c.link,
        label_smoothing=c.label_smoothing,
        ratio_decay=c.ratio_decay,
        backend=c.backend,
    )
    loss_fn.auto_update = False  # once per optimizer step, over all micro-batches and ranks
    timesteps = loss_fn.timestep_probabilities(c.timestep_low, c.timestep_high)
    unet = models.load_unet(model)

    # What a continuation must share with its beginning
    identity = config.identity(c, e) | {
        "model": f"weights {models.fingerprint(unet)[:16]}",
        "pairs": f"content {table.fingerprint()[:16]}",
    }
    if start is not None:
        ranks = int(os.environ["WORLD_SIZE"])
        checkpoint.check_continues(start, identity, stage=e.stage, world_size=ranks)
    alphas_cumprod = schedule.alphas_cumprod_of(scheduler)
    return Inputs(model, table, loss_fn, alphas_cumprod, timesteps, unet, identity, start)


def train(c: TrainConfig, e: EngineConfig, inputs: Inputs) -> None:
    """Encode, train, log, save."""
    device = start_process()
    with one_line_errors():
        check_json(e)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    output, saved = Path(c.output), None

    # Policy, frozen reference and loss; a continuation takes its state from the checkpoint
    forward = build(c, e, inputs, device)
    engine, loss_fn = forward.engine, forward.loss_fn
    if inputs.start is not None:
        checkpoint.load(engine, loss_fn, inputs.start)
        saved = inputs.start.path
    done = start = inputs.start.step if inputs.start else 0
    settings = config.describe(c, e)
    log = RunLog(output, settings, steps=c.steps, start=start, batch=e.batch)
    meter, stop = Meter(device), StopSignal()

    # The loop
    for step in range(start, c.steps):
        for micro in range(e.accumulation):
            first = step * e.batch + (micro * world_size + rank) * e.micro_batch
            out = forward(first, first + e.micro_batch)
            engine.backward(out.loss)
            meter.add({"loss": out.loss.detach(), **out.metrics()})
            if micro < e.accumulation - 1:
                engine.step()  # counts the micro-batch only
        learning_rate, norm = engine.get_lr()[0], gradient_norm_without_zero(engine)
        engine.step()
        norm = engine.get_global_grad_norm() if norm is None else norm
        if norm is not None:  # the JSON can switch it off
            meter.add({"grad_norm": norm})
        loss_fn.update_ratios()

        # The host waits for the device where it logs or saves, and nowhere else
        done = step + 1
        last = stop.agreed() or done == c.steps
        saving = last or (c.save_every > 0 and done % c.save_every == 0)
        if saving or done % c.log_every == 0:
            log.write(done, meter.read(), learning_rate)
        log.advance()
        if saving:
            saved = checkpoint.save(
                engine,
                loss_fn,
                output / "checkpoints",
                step=done,
                position=done * e.batch,
                identity=inputs.identity,
            )
        if last:
            break

    # The result: a UNet that diffusers loads, in exact float32
    stop.restore()
    log.close()
    if done < c.steps:
        say(f"stopped by a signal and saved {saved}; continue with --resume latest")
    elif rank == 0:
        models.save_unet(engine, saved, output / "unet")
        say(f"trained UNet: {output / 'unet'}")
    dist.barrier()


def build(c: TrainConfig, e: EngineConfig, inputs: Inputs, device: torch.device) -> PairForward:
    """Everything that an optimizer step needs, on the device."""
    # Every image and caption is encoded once; the encoders are freed again
    encoders = models.Encoders.load(inputs.model, device)
    latent_size = inputs.unet.config.sample_size
    data = encode_pairs(inputs.table.pairs, encoders, latent_size=latent_size)
    inputs.table.pairs.clear()
    del encoders

    engine = start_engine(c, e, inputs.unet)
    loss_fn = inputs.loss_fn.to(device).train()
    reference = None
    if loss_fn.objective.needs_reference:
        reference = models.load_reference(inputs.model, e.dtype, device)
    return PairForward(c, e, inputs, PairStream(data, c.seed), engine, reference, loss_fn)


def start_process() -> torch.device:
    """Join the other ranks; the device of this one."""
    if torch.cuda.is_available():
        import deepspeed

        local_rank = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local_rank)
        deepspeed.init_distributed("nccl")
        return torch.device("cuda", local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one, and warns
    import deepspeed

    # its shared-memory collectives would be compiled, for a minute, at the first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "OMP_NUM_THREADS" not in os.environ:  # ranks with a thread per core get in each other's way
        # torchrun's name, deepspeed's name
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    deepspeed.init_distributed("gloo")
    return torch.device("cpu")


def check_json(e: EngineConfig) -> None:
    """Let DeepSpeed read its JSON: what stands inside its sections, it checks itself.

    Raises:
        ValueError: it refuses it.
    """
    import deepspeed

    try:
        deepspeed.DeepSpeedConfig(copy.deepcopy(e.json))
    except Exception as error:  # assertions, validation errors, a class of its own
        raise ValueError(f"deepspeed_config: {error}") from None


def start_engine(c: TrainConfig, e: EngineConfig, unet: torch.nn.Module):
    """DeepSpeed's engine around the policy: AdamW with linear warm-up unless the JSON names its
    own optimizer or scheduler."""
    import deepspeed

    if c.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = functools.partial(
        torch.optim.AdamW,
        lr=c.learning_rate,
        betas=(c.adam_beta1, c.adam_beta2),
        eps=c.adam_eps,
        weight_decay=c.weight_decay,
        fused=True,
    )
    scheduler = functools.partial(
        torch.optim.lr_scheduler.LambdaLR,
        lr_lambda=lambda step: min(1.0, (step + 1) / max(1, c.warmup_steps)),
    )
    engine, *_ = deepspeed.initialize(
        model=unet,
        model_parameters=list(unet.parameters()),
        optimizer=None if "optimizer" in e.json else optimizer,
        lr_scheduler=None if "scheduler" in e.json else scheduler,
        config=e.json,
    )
    return engine


def gradient_norm_without_zero(engine) -> Tensor | None:
    """L2 norm of the averaged gradient before clipping; under ZeRO None, its step computes it."""
    if engine.zero_optimization_stage() > 0:
        return None
    gradients = (parameter.grad for parameter in engine.module.parameters())
    return torch.nn.utils.get_total_norm([grad for grad in gradients if grad is not None])


class PairForward:
    """Noise a slice of the stream and run policy, reference and loss on it."""

    def __init__(self, c, e, inputs: Inputs, stream: PairStream, engine, reference, loss_fn):
        device = stream.data.latents.device
        self.c, self.dtype, self.stream = c, e.dtype, stream
        self.engine, self.reference, self.loss_fn = engine, reference, loss_fn
        self.alphas_cumprod = inputs.alphas_cumprod.to(device)
        self.timesteps = inputs.timesteps.to(device)

    def __call__(self, start: int, stop: int) -> PreferenceOutput:
        index, epochs = self.stream[start:stop]
        data = self.stream.data
        key = {"seed": self.c.seed, "pair_ids": data.pair_ids[index], "draw": epochs}
        key["backend"] = self.c.backend

        # What the pair sees: its caption or none, one timestep and one noise for both images
        dropout = noise.pair_uniform(noise.CAPTION_DROPOUT, **key)
        latents, embeddings = data.take(index, dropout <= self.c.caption_dropout)
        timesteps = noise.sample_timesteps(self.timesteps, **key)
        noisy, eps = noise.add_noise(latents, timesteps, self.alphas_cumprod, **key)
        target = self.target(latents, eps, timesteps)

        # One forward of each model for winners and losers together
        inputs = (
            noisy.to(self.dtype),
            torch.cat([timesteps, timesteps]),
            torch.cat([embeddings, embeddings]).to(self.dtype),
        )
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(*inputs, return_dict=False)[0]
        policy = self.engine(*inputs, return_dict=False)[0]
        return self.loss_fn(policy, reference, target, timesteps)

    def target(self, latents: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """What the models should predict: [B, …] shared by the pair (ε), or [2B, …]."""
        abar = self.alphas_cumprod[timesteps].repeat(2).reshape(-1, 1, 1, 1)
        signal, sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
        return {
            "epsilon": lambda: eps,
            "v_prediction": lambda: signal * eps.repeat(2, 1, 1, 1) - sigma * latents,
            "sample": lambda: latents,
        }[self.loss_fn.prediction_type]()


class StopSignal:
    """SIGINT or SIGTERM asks for a last checkpoint; a second one ends the process at once."""

    def __init__(self):
        self.received = False
        # on the CPU, so that asking makes no rank wait for its GPU
        self.group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self.before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _handle(self, number: int, frame) -> None:
        self.received = True
        signal.signal(number, signal.SIG_DFL)

    def restore(self) -> None:
        """Give the signals back to who handled them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks must call."""
        if self.group is not None:
            flag = torch.tensor([int(self.received)])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            self.received = bool(flag.item())
        return self.received


def say(message: str) -> None:
    """Print on one rank."""
    if os.environ["RANK"] == "0":
        print(message, flush=True)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
