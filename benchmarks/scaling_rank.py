"""One rank of `scaling.py`: takes steps when told to on its standard input, and says how long.

An order is a line of JSON, {"do": "take" or "collectives", "stage": …, "count": …}; the answer is one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from dde_fast import models, train
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import read_engine_config
from dde_fast.engine import StopSignal, launch_environment, start_process
from dde_fast.inputs import read_inputs
from dde_fast.metrics import Meter
from dde_fast.optimizer_step import Skips

PASSES = {"all_reduce": 2, "reduce": 1, "all_gather": 1, "reduce_scatter": 1}
"""How many times (n - 1)/n of a collective's bytes leave each of n ranks."""
REPEATED = 5
"""Times that a step's collectives are repeated alone."""


@dataclass
class Call:
    """A collective that was run."""

    kind: str
    size: int
    """Bytes of its larger tensor."""
    seconds: float
    again: Callable[[], Callable]
    """Makes what runs it once more, on tensors of its own."""


class Collectives(contextlib.ExitStack):
    """Every collective of the steps taken in here, each waited for.

    DeepSpeed's own communication logger does not do: its seconds of a call hold those of all calls
    before it.
    """

    def __init__(self, synchronize: Callable[[], None]):
        import deepspeed.comm.comm as deepspeed_comm

        super().__init__()
        self.synchronize, self.calls = synchronize, []
        backend = deepspeed_comm.cdb
        for kind, place, name in (
            ("all_reduce", dist, "all_reduce"),
            ("reduce", dist, "reduce"),
            ("all_gather", backend, "all_gather_function"),
            ("reduce_scatter", backend, "reduce_scatter_function"),
        ):
            watched = self.watched(kind, getattr(place, name))
            self.enter_context(patch.object(place, name, watched))

    def watched(self, kind: str, call: Callable) -> Callable:
        """The collective, written down."""

        def collective(*args, **kwargs):
            self.synchronize()
            began = time.perf_counter()
            handle = wait(call(*args, **kwargs))
            self.synchronize()
            seconds = time.perf_counter() - began
            size = max(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            own, named = [like(x) for x in args], {name: like(x) for name, x in kwargs.items()}

            def again() -> Callable:
                made = {name: make() for name, make in named.items()}
                return functools.partial(call, *(make() for make in own), **made)

            self.calls.append(Call(kind, size, seconds, again))
            return handle

        return collective


def like(value) -> Callable:
    """Makes zeros like a tensor without keeping it; gives anything else back."""
    if not isinstance(value, Tensor):
        return lambda: value
    return functools.partial(torch.zeros, value.shape, dtype=value.dtype, device=value.device)


def wait(handle):
    """For a collective that only began."""
    if handle is not None:
        handle.wait()
    return handle


class Rank:
    """An engine for each ZeRO stage, and the next step of each."""

    def __init__(self, folder: Path):
        settings = json.loads((folder / "settings.json").read_text())
        launch_environment()
        models.quiet_libraries()
        self.device = start_process()
        cuda = self.device.type == "cuda"
        self.synchronize = torch.cuda.synchronize if cuda else lambda: None
        stop = StopSignal()
        stop.restore()
        self.loaders, self.steps = [], {}
        for stage in settings["stages"]:
            path = str(folder / f"zero{stage}.json")
            c = TrainConfig(**settings["config"] | {"deepspeed_config": path})
            e = read_engine_config(c, dist.get_world_size())
            inputs = read_inputs(c, e)
            forward = train.build(c, e, inputs, self.device)
            batches = train.stream(c, e, inputs.data, None, 0, self.device)
            meter = Meter(self.device, len(inputs.alphas_cumprod))
            skips = Skips(self.device)
            self.loaders.append(batches)
            self.steps[stage] = functools.partial(
                train.take_step, forward, e, batches, meter, skips, stop
            )

    def take(self, stage: int, count: int) -> dict[str, float]:
        """Seconds of a step until the slowest rank has taken it."""
        dist.barrier()
        self.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            self.steps[stage]()
        self.synchronize()
        dist.barrier()
        seconds = (time.perf_counter() - began) / count
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # another rank may be next on this GPU
        return {"seconds": seconds}

    def collectives(self, stage: int, count: int) -> dict:
        """What a step sends, the seconds this rank spends on it there, and alone."""
        with Collectives(self.synchronize) as seen:
            step = self.take(stage, count)["seconds"]
        ranks, one = dist.get_world_size(), seen.calls[: len(seen.calls) // count]
        again, alone = [call.again() for call in one], []
        for _ in range(REPEATED):
            dist.barrier()
            self.synchronize()
            began = time.perf_counter()
            for repeat in again:
                wait(repeat())
            self.synchronize()
            alone.append(time.perf_counter() - began)
        return {
            "seconds": step,
            "inside": sum(call.seconds for call in seen.calls) / count,
            "alone": statistics.median(alone),
            "sent": sum(PASSES[call.kind] * call.size for call in one) * (ranks - 1) / ranks,
            "calls": len(one),
        }


def main() -> None:
    """Obey until the standard input ends."""
    # DeepSpeed prints as well: what it prints goes where errors go
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rank = Rank(Path(sys.argv[1]))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        found = getattr(rank, order.pop("do"))(**order)
        print(json.dumps(found), file=answers, flush=True)
    for loader in rank.loaders:
        loader.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
