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

from collections.abc import Iterator, Sequence
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers

from dde_fast import checkpoint, config, flops, models
from dde_fast.attention import use_attention
from dde_fast.cache import Cache
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig, read_engine_config
from dde_fast.engine import (
    StopSignal,
    check_json,
    gradient_norm_without_zero,
    launch_environment,
    one_line_errors,
    say,
    start_engine,
    start_process,
)
from dde_fast.forward import PairForward
from dde_fast.grids import Grids
from dde_fast.inputs import Inputs, describe, read_inputs
from dde_fast.loader import Loader, PairStream
from dde_fast.metrics import Meter, RunLog
from dde_fast.prepare import Preparation
from dde_fast.validation import Validation


def main(args: Sequence[str] | None = None) -> None:
    """Train as a command line says. What is wrong with it ends in one line and exit code 2."""
    launch_environment()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # else it reports image processors we lack
    transformers.utils.logging.set_verbosity_error()  # else it reports image processors we lack
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # else it reports casts that change nothing
    with one_line_errors():
        settings = config.parse(args)
        engine_config = read_engine_config(settings, int(os.environ["WORLD_SIZE"]))
        inputs = read_inputs(settings, engine_config)
    train(settings, engine_config, inputs)


def train(c: TrainConfig, e: EngineConfig, inputs: Inputs) -> None:
    """Encode, train, log, save."""
    device = start_process()
    with one_line_errors():
        check_json(e)
        cache = prepared(inputs.pairs)
        held_out = None if inputs.held_out is None else prepared(inputs.held_out)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    output, saved = Path(c.output), None

    # Policy, frozen reference and loss; a continuation takes its state from the checkpoint
    grids = None
    if inputs.grid_prompts:  # the base is sampled before the policy takes its memory
        grids = Grids(inputs.model, inputs.grid_prompts, c, e.dtype, device)
    pairs_at_peak = flops.pairs_at_peak(c, e, inputs.unet, cache, device)
    forward = build(c, e, inputs, device)
    engine, loss_fn = forward.engine, forward.loss_fn
    validation = None if held_out is None else Validation(held_out, forward, c, e.micro_batch)
    if inputs.start is not None:
        checkpoint.load(engine, loss_fn, inputs.start)
        saved = inputs.start.path
    done = start = inputs.start.step if inputs.start else 0
    settings = describe(c, e)
    log = RunLog(
        output,
        settings,
        steps=c.steps,
        start=start,
        batch=e.batch,
        pairs_at_peak=pairs_at_peak,
        wandb_project=c.wandb_project,
    )
    meter, stop = Meter(device, len(inputs.alphas_cumprod)), StopSignal()
    batches = Loader(
        cache,
        PairStream(cache.pair_ids, c.seed, c.shuffle_block),
        slices(e, range(start, c.steps), rank, world_size),
        seed=c.seed,
        caption_dropout=c.caption_dropout,
        device=device,
        backend=c.backend,
    )

    # The loop
    for step in range(start, c.steps):
        for micro in range(e.accumulation):
            out = forward(next(batches))
            engine.backward(out.loss)
            meter.observe(out)
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
        validating = validation is not None and due(c.validation_every, done, c.steps)
        if saving or validating or done % c.log_every == 0:
            metrics = meter.read()
            if validating:
                with log.aside():
                    metrics["validation"] = validation()
            log.write(done, metrics, learning_rate, batches.waited)
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
        if grids is not None and due(c.grid_every, done, c.steps):
            with log.aside():
                log.picture(done, "grids", grids(engine, f"step {done}"))
        if last:
            break

    # The result: a UNet that diffusers loads, in exact float32
    stop.restore()
    log.close()
    batches.close()
    if done < c.steps:
        say(f"stopped by a signal and saved {saved}; continue with --resume latest")
    elif rank == 0:
        models.save_unet(engine, saved, output / "unet")
        say(f"trained UNet: {output / 'unet'}")
    dist.barrier()


def due(every: int, done: int, steps: int) -> bool:
    """Whether what is done every so many steps, and at the end, is to be done now."""
    return done % every == 0 or done == steps


def prepared(pairs: Cache | Preparation) -> Cache:
    """The cache, encoded now unless it is there; all ranks must call, and share the work."""
    if isinstance(pairs, Cache):
        return pairs
    if pairs.manifest() is None:
        pairs.encode(dist.get_rank(), dist.get_world_size())
        dist.barrier()
        if dist.get_rank() == 0:
            say(f"cache: {pairs.finish()}")
        dist.barrier()
    pairs.encoders = None  # they have done their work
    return Cache(pairs.folder)


def slices(e: EngineConfig, steps: range, rank: int, world_size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) in the stream of each micro-batch of a rank."""
    for step in steps:
        for micro in range(e.accumulation):
            first = step * e.batch + (micro * world_size + rank) * e.micro_batch
            yield first, first + e.micro_batch


def build(c: TrainConfig, e: EngineConfig, inputs: Inputs, device: torch.device) -> PairForward:
    """Everything that an optimizer step needs, on the device."""
    engine = start_engine(c, e, inputs.unet)
    loss_fn = inputs.loss_fn.to(device).train()
    reference = None
    if loss_fn.objective.needs_reference:
        reference = models.load_reference(inputs.model, e.dtype, device)
        use_attention(reference, c.attention, e.dtype, device)
    return PairForward(c, e, inputs, engine, reference, loss_fn)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
