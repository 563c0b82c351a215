"""The trainer: preference pairs in, an aligned UNet out.

    deepspeed dde_fast/train.py --deepspeed_config ds.json
    torchrun --nproc_per_node 2 dde_fast/train.py
    python -m dde_fast.train --help

Pair number p of the endless stream is pair p % n of epoch p // n's order; optimizer step s takes
pairs [s·G, (s+1)·G), of which each rank and micro-batch takes a slice. Order, noise, timesteps and
caption dropout are functions of (seed, pair id, epoch), so a run is the same on any number of
ranks, with any accumulation, and after a resume. Online objectives draw prompts in the same way, and
sample their pairs (`dde_fast.online`).
"""

from __future__ import annotations

import os
import sys

if not __package__:  # run by path: this folder would shadow other modules named config, cache, …
    _folder = os.path.dirname(os.path.abspath(__file__))
    _parent = os.path.dirname(_folder)
    sys.path[:] = [_parent if os.path.abspath(path) == _folder else path for path in sys.path]

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from dde_fast import checkpoint, config, export, flops, forecast, lora, models, planner
from dde_fast.attention import use_attention
from dde_fast.cache import Cache
from dde_fast.compilation import CompileTime, begin_micro_batch, eagerly, use_compile
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig, read_engine_config
from dde_fast.engine import (
    StopSignal,
    check_json,
    launch_environment,
    one_line_errors,
    say,
    start_engine,
    start_process,
    start_sharded_reference,
)
from dde_fast.forward import PairForward
from dde_fast.grids import Grids
from dde_fast.inputs import Inputs, describe, read_inputs
from dde_fast.loader import Loader, PairStream
from dde_fast.memory_order import use_memory_order
from dde_fast.metrics import Meter, RunLog, winner_warning
from dde_fast.online import FORWARDS, OnlineForward, reward_failure, trained_steps
from dde_fast.optimizer_step import Skips, step_optimizer
from dde_fast.prepare import Preparation
from dde_fast.prompt_stream import Prompts, PromptStream
from dde_fast.reference_scores import ReferenceScores
from dde_fast.validation import Validation


def main(args: Sequence[str] | None = None) -> None:
    """Train as a command line says. What is wrong with it ends in one line and exit code 2."""
    launch_environment()
    models.quiet_libraries()
    with one_line_errors():
        settings = config.parse(args)
        if settings.plan:
            return say(planner.report(settings))
        ranks, together = int(os.environ["WORLD_SIZE"]), trained_steps(settings)
        engine_config = read_engine_config(settings, ranks, together)
        inputs = read_inputs(settings, engine_config)
    train(settings, engine_config, inputs)


def train(c: TrainConfig, e: EngineConfig, inputs: Inputs) -> None:
    """Encode, train, log, save."""
    device, start, output = start_process(), inputs.start, Path(c.output)
    settings = describe(c, e, inputs)
    more = checkpoint.universal(start, stage=e.stage, world_size=dist.get_world_size())
    e = replace(e, json=e.json | more)
    with one_line_errors():
        check_json(e)
    with one_line_errors(own=True):
        # what planned and encoded a cache is let go
        data = inputs.data = prepared(inputs.data)
        if inputs.held_out is not None:
            inputs.held_out = prepared(inputs.held_out)

    # Policy, frozen reference and loss; a continuation takes its state from the checkpoint
    grids = None
    if inputs.grid_prompts:  # the base is sampled before the policy takes its memory
        grids = Grids(inputs.model, inputs.grid_prompts, c, e.dtype, device)
    pairs_at_peak = flops.pairs_at_peak(c, e, inputs.unet, data, device)
    expected = None
    with one_line_errors():
        if dist.get_rank() == 0 and isinstance(data, Cache):
            expected = forecast.of_run(c, e, inputs.unet.config, data, device)
        forward = build(c, e, inputs, device)
        if start is not None:
            checkpoint.load(forward.engine, forward.loss_fn, start, output / "checkpoints")
    done, saved = (start.step, start.path) if start else (0, None)
    skips = Skips(device, start.skipped if start else 0)
    validation = None
    if inputs.held_out is not None:
        with one_line_errors():
            validation = Validation(inputs.held_out, forward, c, e.micro_batch)
    progress = {"steps": c.steps, "start": done, "batch": e.batch, "pairs_at_peak": pairs_at_peak}
    with one_line_errors():
        log = RunLog(output, settings, **progress, wandb_project=c.wandb_project)
    meter, stop = Meter(device, len(inputs.alphas_cumprod)), StopSignal()
    batches, stopped, diverged = stream(c, e, data, inputs.scores, done, device), False, False
    compiling = CompileTime()

    if device.type == "cuda":  # what encoding took is not training's
        torch.cuda.reset_peak_memory_stats()

    # The loop: the host waits for the device where it logs or saves, and where DeepSpeed does: in
    # every optimizer step in fp16, at stage 3, with offloading or another optimizer than AdamW, and
    # with stage 3, `overlap_comm` or offloading in micro-batches as well
    while done < c.steps and not (stopped or diverged):
        learning_rate = forward.engine.get_lr()[0]
        stopped = not take_step(forward, e, batches, meter, skips, stop)
        done += not stopped
        log.compiled(compiling.lately())
        saving = stopped or done == c.steps or (c.save_every > 0 and done % c.save_every == 0)
        looking = validation is not None and not stopped and due(c.validation_every, done, c.steps)
        if done > log.last_step and (saving or looking or done % c.log_every == 0):
            record = meter.read({"skipped_steps": skips.total, "in_a_row": skips.in_a_row})
            diverged = record.pop("in_a_row") >= c.max_skipped
            if looking:
                with one_line_errors(own=True), log.aside(), eagerly(c):
                    record["validation"] = validation()
            failure = reward_failure(record, c.reward)
            warning = failure or winner_warning(record, c.max_winner_error)
            log.write(done, record, learning_rate, batches.waited, warning)
        log.advance(done)
        if done > 0 and (saving or diverged):
            with one_line_errors(), log.aside():
                saved = save(c, e, inputs, forward, done, skips)
        if grids is not None and not stopped and due(c.grid_every, done, c.steps):
            with log.aside(), eagerly(c):
                log.picture(done, "grids", grids(forward.engine, f"step {done}"))

    # The result: weights that diffusers loads, in exact float32
    stop.restore()
    log.close()
    batches.close()
    if diverged:
        with one_line_errors():
            raise ValueError(
                f"gradient: expected finite numbers, got none in the last {c.max_skipped} or more "
                f"optimizer steps, all skipped; saved {saved}; "
                + (
                    failure
                    or "if data and machine are sound, start again with a lower learning_rate "
                    "or a larger beta"
                )
            )
    if stopped:
        what = f"and saved {saved}; continue with --resume latest" if saved else "at its beginning"
        if errors := stop.failures.of_all_ranks():
            with one_line_errors():
                raise OSError(f"{errors[0]}; stopped {what}")
        say(f"stopped by a signal {what}")
    else:
        folders = export.save_results(forward.engine, c, inputs.source, inputs.identity)
        say(f"trained: {', '.join(map(str, folders))}")
    with one_line_errors(own=True):
        if expected is not None and log.rates:
            say(forecast.outcome(output, c, expected, log.rates, device))
    dist.barrier()


def due(every: int, done: int, steps: int) -> bool:
    """Whether what is done every so many steps, and at the end, is to be done now."""
    return done % every == 0 or done == steps


def prepared(data: Cache | Preparation | Prompts) -> Cache | Prompts:
    """The data; a cache is encoded now unless it is there. All ranks must call, and share the
    work."""
    if not isinstance(data, Preparation):
        return data
    if data.manifest() is None:
        data.encode(dist.get_rank(), dist.get_world_size())
        dist.barrier()
        if dist.get_rank() == 0:
            say(f"cache: {data.finish()}")
        dist.barrier()
    return Cache(data.folder)


def stream(
    c: TrainConfig,
    e: EngineConfig,
    data: Cache | Prompts,
    scores: ReferenceScores | None,
    done: int,
    device: torch.device,
) -> Loader | PromptStream:
    """This rank's micro-batches from optimizer step `done` on."""
    rank, world_size, todo = dist.get_rank(), dist.get_world_size(), range(done, c.steps)
    if isinstance(data, Prompts):  # a group of trajectories stays for a micro-batch per step
        steps = trained_steps(c)
        groups = replace(e, accumulation=e.accumulation // steps, batch=e.batch // steps)
        spans = slices(groups, todo, rank, world_size)
        return PromptStream(data, spans, steps, seed=c.seed, device=device)
    return Loader(
        data,
        PairStream(data.pair_ids, c.seed, c.shuffle_block),
        slices(e, todo, rank, world_size),
        scores=scores,
        seed=c.seed,
        caption_dropout=c.caption_dropout,
        device=device,
        backend=c.backend,
    )


def slices(e: EngineConfig, steps: range, rank: int, world_size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) in the stream of each micro-batch of a rank."""
    for step in steps:
        for micro in range(e.accumulation):
            first = step * e.batch + (micro * world_size + rank) * e.micro_batch
            yield first, first + e.micro_batch


def take_step(
    forward: PairForward | OnlineForward,
    e: EngineConfig,
    batches: Loader | PromptStream,
    meter: Meter,
    skips: Skips,
    stop: StopSignal,
) -> bool:
    """One optimizer step on the next batches; False if between two of its micro-batches a signal
    came or the data ended on any rank, and then nothing has changed."""
    engine, loss_fn, observed = forward.engine, forward.loss_fn, []
    for micro in range(e.accumulation):
        with stop.on_errors():
            batch = next(batches)
        if stop.agreed():
            return False
        begin_micro_batch(forward.c)
        out = forward(batch)
        engine.backward(out.loss)
        observed.append(out.detach())
        if micro < e.accumulation - 1:
            engine.step()  # counts the micro-batch only
    norm = step_optimizer(engine)
    skipped = ~norm.isfinite()
    loss_fn.update_ratios(skipped=skipped)
    skips.add(skipped)
    for out in observed:
        meter.observe(out)
    meter.add({"grad_norm": norm})
    return True


def save(
    c: TrainConfig,
    e: EngineConfig,
    inputs: Inputs,
    forward: PairForward | OnlineForward,
    done: int,
    skips: Skips,
) -> Path:
    """Write a checkpoint after `done` optimizer steps."""
    return checkpoint.save(
        forward.engine,
        forward.loss_fn,
        Path(c.output) / "checkpoints",
        keep=c.keep,
        step=done,
        position=done * e.batch,
        skipped=int(skips.total),
        identity=inputs.identity,
    )


def build(
    c: TrainConfig, e: EngineConfig, inputs: Inputs, device: torch.device
) -> PairForward | OnlineForward:
    """Everything that an optimizer step needs, on the device."""
    engine = start_engine(c, e, inputs.unet)
    use_memory_order(engine.module, c, e.stage)
    use_compile(engine.module, c.compile)
    loss_fn = inputs.loss_fn.to(device).train()
    reference = None
    runs_reference = loss_fn.objective.needs_reference and inputs.scores is None
    if runs_reference and c.lora_rank:
        reference = lora.AdaptersOff(engine)
    elif runs_reference:
        reference = models.load_reference(inputs.model, e.dtype, device)
        use_memory_order(reference, c, 3 if c.shard_reference else 0)
        use_attention(reference, c.attention, e.dtype, device)
        use_compile(reference, c.compile)
        if c.shard_reference:
            reference = start_sharded_reference(c, e, reference)
    return FORWARDS.get(c.objective, PairForward)(c, e, inputs, engine, reference, loss_fn)


if __name__ == "__main__":
    main()
    if dist.is_initialized():  # a plan starts nothing
        dist.destroy_process_group()
