"""One rank of a process that trains several times in a row, for test_train.py.

    python tests/train_worker.py JOBS.json

Each job has `args` for `dde_fast.train.main` and optionally: `plain`, to train with PyTorch alone
instead ("online": TailorPO); `stop`, [rank, step] at which that rank gets a SIGTERM; `tear`, a file
to cut in half first; `no_reference`, to fail where a reference model is loaded; `count_syncs`, a
file for the steps at which the host waited for the device; `no_waiting`, to fail on a GPU where it
does, and a file for the number of steps that were watched; `backend`, of torch.compile in place of
its default; `steady`, to fail where something is compiled after the first optimizer step; `exit`,
the code that it must end with; or a fault of `faults.FAULTS` with its arguments.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import caches
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from faults import FAULTS
from online_plain import plain_online
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from dde_fast import config, lora, metrics, models, noise, ops, train
from dde_fast.cache import Cache
from dde_fast.inputs import open_pairs
from dde_fast.loss import PreferenceLoss


def plain(args: list[str]) -> None:
    """The same training with PyTorch and diffusers alone: one process, one micro-batch, fp32."""
    c = config.parse(args)
    batch = json.loads(Path(c.deepspeed_config).read_text())["train_micro_batch_size_per_gpu"]
    scheduler = DDPMScheduler.from_pretrained(c.model, subfolder="scheduler")
    policy = UNet2DConditionModel.from_pretrained(c.model, subfolder="unet").train()
    reference = UNet2DConditionModel.from_pretrained(c.model, subfolder="unet").requires_grad_(
        False
    )
    loss_fn = PreferenceLoss.from_scheduler(scheduler, c.objective, beta=c.beta)
    preparation = open_pairs(c, c.pairs, c.split, c.limit)
    preparation.run()
    data = Cache(preparation.folder)
    everything = caches.stored(data, torch.arange(len(data)))
    mean, std, sizes = (
        x.float().chunk(2) for x in (everything.mean, everything.std, everything.sizes)
    )
    if c.lora_rank:
        lora.add_adapters(policy, c)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    average = EMAModel(trained, decay=c.ema_decay)
    optimizer = torch.optim.AdamW(trained, lr=c.learning_rate, eps=c.adam_eps)
    probabilities, losses = loss_fn.timestep_probabilities(0, c.timestep_high), []
    stream = []
    for epoch in range(c.steps * batch // len(data) + 1):
        places = noise.pair_uniform(2, seed=c.seed, pair_ids=data.pair_ids, draw=epoch)
        stream += [(int(i), epoch) for i in places.argsort(stable=True)]
    for step in range(c.steps):
        pairs, epochs = torch.tensor(stream[step * batch : (step + 1) * batch]).T.contiguous()
        key = {"seed": c.seed, "pair_ids": data.pair_ids[pairs], "draw": epochs}
        drop = noise.pair_uniform(1, **key) <= c.caption_dropout
        draws = noise.pair_noise((3, 4, 4, 4), **key)
        latents = torch.cat([mean[i][pairs] + std[i][pairs] * draws[:, 1 + i] for i in (0, 1)])
        t = noise.sample_timesteps(probabilities, **key)
        noisy, eps = noise.add_noise(latents, t, scheduler.alphas_cumprod, **key)
        both = torch.cat([eps, eps])
        target = {
            "epsilon": both,
            "v_prediction": scheduler.get_velocity(latents, both, torch.cat([t, t])),
            "sample": latents,
        }[scheduler.config.prediction_type]
        texts = {
            name: torch.where(
                drop.view(-1, *[1] * empty.dim()), empty, getattr(everything, name)[pairs]
            )
            for name, empty in data.empty.items()
        }
        texts = {name: torch.cat([rows, rows]).float() for name, rows in texts.items()}
        inputs = {"sample": noisy, "timestep": torch.cat([t, t])}
        inputs["encoder_hidden_states"] = texts["embeddings"]
        if "pooled" in texts:
            sides = torch.full((2 * len(pairs), 2), 8.0)
            ids = torch.cat([torch.cat([half[pairs] for half in sizes]), sides], dim=1)
            inputs["added_cond_kwargs"] = {"text_embeds": texts["pooled"], "time_ids": ids}
        out = loss_fn(policy(**inputs).sample, reference(**inputs).sample, target, t)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = c.learning_rate * min(1, (step + 1) / c.warmup_steps)
        optimizer.step()
        average.step(trained)
        optimizer.zero_grad()
        losses.append(out.loss.item())
    for ending in ("", "_ema"):
        if c.lora_rank:
            policy.save_lora_adapter(f"{c.output}/lora{ending}")
        else:
            policy.save_pretrained(f"{c.output}/unet{ending}")
        average.copy_to(trained)
    save_file({"ratios": loss_fn.ratios}, Path(c.output) / "ratios.safetensors")
    (Path(c.output) / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i + 1, "loss": loss}) + "\n" for i, loss in enumerate(losses))
    )


class Syncs(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host: item(), float(), bool(), as an index."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def count_syncs(args: list[str], path: Path) -> None:
    """Train, writing how often the host waited within each optimizer step, logging included."""
    counts: list[int] = []
    advance, tolist = metrics.RunLog.advance, torch.Tensor.tolist
    looks = ops._check_timesteps, ops._is_one

    def counting_advance(log, step):
        advance(log, step)
        counts.append(syncs.count)
        syncs.count = 0

    def counting_tolist(tensor):  # not dispatched; the loader's thread has tensors of the CPU alone
        syncs.count += threading.current_thread() is threading.main_thread()
        return tolist(tensor)

    metrics.RunLog.advance, torch.Tensor.tolist = counting_advance, counting_tolist
    # both look at values on a CPU only, never on a GPU
    ops._check_timesteps, ops._is_one = (lambda *_: None), (lambda _: False)
    try:
        with Syncs() as syncs:
            float(torch.ones(()))
            control, syncs.count = syncs.count, 0
            train.main(args)
    finally:
        metrics.RunLog.advance, torch.Tensor.tolist = advance, tolist
        ops._check_timesteps, ops._is_one = looks
    path.write_text(json.dumps({"control": control, "steps": counts}))


@contextlib.contextmanager
def no_waits():
    """On a GPU the host's waits for it are errors."""

    def synchronize(*_):  # which PyTorch's own mode does not see
        raise RuntimeError("torch.cuda.synchronize: the host waits for the device")

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with patch.object(torch.cuda, "synchronize", synchronize):
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def without_waiting(args: list[str], path: Path) -> None:
    """Train on a GPU, every step but the first two under the condition that the host waits for
    nothing; writes how many steps that were."""
    take_step, steps = train.take_step, 0

    def watched(*args):
        nonlocal steps
        steps += 1
        with no_waits() if steps > 2 else contextlib.nullcontext():
            return take_step(*args)

    with patch.object(train, "take_step", watched):
        train.main(args)
    path.write_text(json.dumps(steps - 2))


def stop_at(rank: int, step: int, args: list[str]) -> None:
    """Train, with a SIGTERM to one rank after a step."""
    advance = metrics.RunLog.advance

    def stopping_advance(log, done):
        if done == step and os.environ["RANK"] == str(rank) and not hasattr(log, "stopped"):
            log.stopped = True
            os.kill(os.getpid(), signal.SIGTERM)
        advance(log, done)

    metrics.RunLog.advance = stopping_advance
    try:
        train.main(args)
    finally:
        metrics.RunLog.advance = advance


@contextlib.contextmanager
def backend(name: str):
    """torch.compile with another backend."""
    with patch.object(torch, "compile", functools.partial(torch.compile, backend=name)):
        yield


@contextlib.contextmanager
def steady():
    """Nothing is compiled any more once an optimizer step has been taken."""
    advance = metrics.RunLog.advance

    def setting(log, done):
        advance(log, done)
        torch.compiler.set_stance("fail_on_recompile")

    with patch.object(metrics.RunLog, "advance", setting):
        yield
    torch.compiler.set_stance("default")


@contextlib.contextmanager
def gathered():
    """Blocks run as one compiled piece each, without a break, and of weights that ZeRO-3 gathered for
    the forward pass nothing is kept but the parameters, which it takes back: no view of them."""
    unet = UNet2DConditionModel.forward

    def watched(self, *args, **kwargs):
        weights, kept = list(self.parameters()), []
        if weights[0].is_meta:  # where operations are counted
            return unet(self, *args, **kwargs)

        def keep(saved: torch.Tensor) -> torch.Tensor:
            whole = [weight for weight in weights if weight.data.numel()]
            places = {weight.data.untyped_storage().data_ptr() for weight in whole}
            if saved.untyped_storage().data_ptr() in places:
                kept.append(isinstance(saved, torch.nn.Parameter))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            out = unet(self, *args, **kwargs)
        assert all(kept) and len(kept) >= 9 * torch.is_grad_enabled()
        return out

    with patch.object(UNet2DConditionModel, "forward", watched):
        yield
    assert not torch._dynamo.utils.counters["graph_break"]


@contextlib.contextmanager
def channels_last():
    """All latents that a UNet is asked of, its predictions and targets must be in that order, but
    where operations are counted."""
    unet, loss = UNet2DConditionModel.forward, PreferenceLoss.forward

    def check(**tensors: torch.Tensor | None) -> None:
        for name, value in tensors.items():
            if value is not None and value.dim() == 4 and not value.is_meta:
                assert not value.is_contiguous(), name
                assert value.is_contiguous(memory_format=torch.channels_last), name

    def asked(self, sample, *args, **kwargs):
        check(sample=sample)
        return unet(self, sample, *args, **kwargs)

    def judged(self, policy, reference, target, timesteps):
        check(policy=policy, reference=reference, target=target)
        return loss(self, policy, reference, target, timesteps)

    with (
        patch.object(UNet2DConditionModel, "forward", asked),
        patch.object(PreferenceLoss, "forward", judged),
    ):
        yield


FAULTS = FAULTS | {
    "backend": backend,
    "steady": steady,
    "gathered": gathered,
    "channels_last": channels_last,
}


def tear(path: Path) -> None:
    """Leave a file as a process killed while writing would."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def run(job: dict) -> None:
    """Do one job."""
    if "exit" in job:
        try:
            run({key: value for key, value in job.items() if key != "exit"})
        except SystemExit as stop:
            assert stop.code == job["exit"], stop.code
            return
        raise AssertionError(f"{job['args']} did not end with exit code {job['exit']}")
    for name in job.keys() & FAULTS.keys():
        with FAULTS[name](*job[name]):
            run({key: value for key, value in job.items() if key != name})
        return
    if "tear" in job:
        tear(Path(job["tear"]))
    if job.get("no_reference"):
        with patch.object(models, "load_reference", side_effect=AssertionError("loaded")):
            return run({key: value for key, value in job.items() if key != "no_reference"})
    if job.get("plain") == "online":
        plain_online(job["args"])
    elif job.get("plain"):
        plain(job["args"])
    elif "stop" in job:
        stop_at(*job["stop"], job["args"])
    elif "no_waiting" in job:
        without_waiting(job["args"], Path(job["no_waiting"]))
    elif "count_syncs" in job:
        count_syncs(job["args"], Path(job["count_syncs"]))
    else:
        train.main(job["args"])


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    torch.distributed.destroy_process_group()
