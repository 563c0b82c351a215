"""The processes of a run and DeepSpeed's engine around the policy."""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import os
import signal
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dde_fast import activations, ema, optimizer_step
from dde_fast.checkpoint_files import Failures
from dde_fast.compilation import gather_blocks_whole
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.optimizers import load_optimizer


@contextlib.contextmanager
def one_line_errors(own: bool = False) -> Iterator[None]:
    """Bad input is one line on stderr and exit code 2: from one process per machine, or from each
    where the error may be its `own`, for the others know nothing of it."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if own or os.environ["LOCAL_RANK"] == "0":
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


def device_of_process() -> torch.device:
    """The device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def start_process() -> torch.device:
    """Join the other ranks; the device of this one."""
    device = device_of_process()
    if device.type == "cuda":
        import deepspeed

        torch.cuda.set_device(device)
        deepspeed.init_distributed("nccl")
        return device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one, and warns
    import deepspeed

    # its shared-memory collectives would be compiled, for a minute, at the first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "OMP_NUM_THREADS" not in os.environ:  # ranks with a thread per core get in each other's way
        # torchrun's name, deepspeed's name
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    deepspeed.init_distributed("gloo")
    atexit.register(_leave)
    return device


def _leave() -> None:
    """Gloo's threads must not still run when the process is torn down: it would abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
    """DeepSpeed's engine around the policy: the configuration's optimizer with linear warm-up unless
    the JSON names its own optimizer or scheduler.

    Raises:
        ValueError: the JSON's optimizer or scheduler cannot be made with the values it gives them.
    """
    import deepspeed

    activations.recompute(unet, activations.recomputed_blocks(c, activations.blocks_of(unet)))
    if e.stage == 3:
        gather_blocks_whole(unet, c.compile)
    unet.train()
    scheduler = functools.partial(
        torch.optim.lr_scheduler.LambdaLR,
        lr_lambda=lambda step: min(1.0, (step + 1) / max(1, c.warmup_steps)),
    )
    try:
        engine, *_ = deepspeed.initialize(
            model=unet,
            model_parameters=[weight for weight in unet.parameters() if weight.requires_grad],
            optimizer=load_optimizer(c, e),
            lr_scheduler=None if "scheduler" in e.json else scheduler,
            config=e.json,
        )
    except (TypeError, ValueError, AssertionError) as error:  # theirs, each in its own words
        if not e.json.keys() & {"optimizer", "scheduler"}:
            raise
        raise ValueError(f"deepspeed_config: optimizer or scheduler: {error}") from error
    if e.stage == 0:
        # one rank's gradients are their mean already: DeepSpeed would copy them there and back
        engine.enable_backward_allreduce = dist.get_world_size() > 1
    optimizer_step.take_over(engine)
    if c.ema_decay:
        ema.attach(engine, c.ema_decay)
    return engine


def start_sharded_reference(c: TrainConfig, e: EngineConfig, unet: torch.nn.Module):
    """DeepSpeed's engine around a frozen model: each rank holds its share of the weights."""
    import deepspeed

    kept = ("bf16", "bfloat16", "fp16", "train_batch_size", "train_micro_batch_size_per_gpu")
    json = {key: e.json[key] for key in kept if key in e.json}
    json |= {"zero_optimization": {"stage": 3}, "timers": e.json["timers"]}
    json["gradient_accumulation_steps"] = e.accumulation
    gather_blocks_whole(unet, c.compile)
    engine, *_ = deepspeed.initialize(model=unet, config=json)
    engine.eval()
    return engine


class StopSignal:
    """SIGINT or SIGTERM asks for a last checkpoint, and so does a rank whose data cannot be read any
    more; a second signal ends the process at once.

    The ranks agree before every micro-batch, over the host's network: the state of the last whole
    optimizer step is being saved at most one micro-batch after the signal.
    """

    def __init__(self):
        self.received, self.failures = False, Failures()
        # on the CPU, so that asking makes no rank wait for its GPU
        self.group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self.before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _handle(self, number: int, frame) -> None:
        self.received = True
        signal.signal(number, signal.SIG_DFL)

    @contextlib.contextmanager
    def on_errors(self) -> Iterator[None]:
        """What is raised in here on this rank asks all to stop; `failures` tells them of it."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.failures.first, self.received = error, True

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


class Ranks:
    """The processes of an evaluation, each with a share of the work: one, or as many as a launcher
    started."""

    def __init__(self):
        self.rank, self.count = (
            int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        if self.count > 1 and not dist.is_initialized():
            # on the CPU, and patient: one of them may sample for hours longer than the others
            dist.init_process_group("gloo", timeout=timedelta(days=30))
            atexit.register(_leave)

    def gather(self, own: Any) -> list[Any]:
        """What each of them has; all must call."""
        found = [own]
        if self.count > 1:
            found = [None] * self.count
            dist.all_gather_object(found, own)
        return found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """They leave this together. What one of them raises in here ends all, and one tells."""
        error = None
        try:
            yield
        except Exception as caught:  # whatever it is, the others must not wait for this one
            error = caught
        failed = self.gather(error is not None)
        if error is not None and failed.index(True) == self.rank:
            raise error
        if any(failed):
            raise SystemExit(2)
