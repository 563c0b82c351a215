"""What a training step costs: seconds, waits for data, memory, reads by the host. For
`bench_train_step.py`."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from conftest import launches, peak_extra_bytes
from published_step import Encoding
from torch.utils._python_dispatch import TorchDispatchMode

from dde_fast.compilation import CompileTime
from dde_fast.loader import AHEAD, Loader

Seen = dict[str, list[tuple[float, float]]]
"""Variant -> (seconds, work) of its step in each round."""
Found = TypeVar("Found")


@dataclass
class Variant:
    """A way to take an optimizer step."""

    name: str
    step: Callable[[], None]
    source: Encoding | Loader
    """Where its pairs come from: knows how long it was waited for."""
    unet: torch.nn.Module
    optimizer: object
    """PyTorch's, or DeepSpeed's around it."""
    checkpointing: bool = False
    reference: bool = True
    encoders: bool = False
    stance: str = ""
    """Of torch.compile, where it has compiled something."""
    failed: str = ""
    """What CUDA says where the step ran out of memory."""

    def ready(self) -> None:
        """The policy may be shared with others that do otherwise."""
        if self.checkpointing != self.unet.is_gradient_checkpointing:
            toggle = "enable" if self.checkpointing else "disable"
            getattr(self.unet, f"{toggle}_gradient_checkpointing")()
        if self.stance:
            torch.compiler.set_stance(self.stance)


def within_memory(variant: Variant, call: Callable[[], Found]) -> Found | None:
    """What a call that takes steps of a variant gives; None where a GPU's memory does not suffice or
    did not before. What its model and optimizer got for it is given back, as others may need less;
    DeepSpeed's engine keeps what it has."""
    if variant.failed:
        return None
    try:
        return call()
    except RuntimeError as error:  # the allocator's own kind, cuBLAS's or a compiled op's
        if not any(said in str(error) for said in ("out of memory", "ALLOC_FAILED")):
            raise
        variant.failed = str(error).split("\n")[0]
    print(f"{variant.name}: {variant.failed}", flush=True)
    variant.unet.zero_grad()
    if isinstance(variant.optimizer, torch.optim.Optimizer):
        variant.optimizer.state.clear()  # it would keep the moments of some parameters
    gc.collect()
    return None


class HostReads(TorchDispatchMode):
    """Counts how often the host asks for a number that the device computes.

    Args:
        counters: numbers that live on the host: an optimizer's of its steps.
    """

    def __init__(self, counters: set[int]):
        super().__init__()
        self.counters, self.count = counters, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += id(args[0]) not in self.counters
        return func(*args, **(kwargs or {}))


def host_reads(step: Callable[[], None], counters: set[int]) -> int:
    """How often the host waits for the device in a step: on a GPU as CUDA says, else the numbers
    that it would ask a device for."""
    if not torch.cuda.is_available():
        with HostReads(counters) as reads:
            step()
        return reads.count
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # not what is said of the mode itself
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def state_bytes(unet: torch.nn.Module, optimizer: object) -> int:
    """Bytes of what training keeps between two steps.

    These are the storages, each counted once, of the UNet's parameters, and of every tensor in the
    plain attributes of the optimizer and of the one that it wraps, in lists and dictionaries too: the
    moments; of DeepSpeed's ZeRO also the flat weights, their float32 partitions and the buffers of
    gradients. Not buckets that are allocated in a step, nor gradients that are forgotten after it.
    """
    storages, visited = {}, set()
    rest = [*unet.parameters(), vars(optimizer), vars(getattr(optimizer, "optimizer", optimizer))]
    while rest:
        value = rest.pop()
        if isinstance(value, torch.Tensor):
            rest += [value.grad] if value.is_leaf and value.grad is not None else []
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple) and id(value) not in visited:
            visited.add(id(value))
            rest += value.values() if isinstance(value, dict) else value
    return sum(storages.values())


def inspect(variant: Variant, frozen: dict[str, int], counters: set[int]) -> dict:
    """What a step needs beside time, of steps that nobody measures."""
    variant.ready()
    compiling = CompileTime()
    variant.step()  # an engine's first step is unlike the others
    seconds = compiling.lately()
    held = variant.reference * frozen["reference"] + variant.encoders * frozen["encoders"]
    found = {
        "name": variant.name,
        "host_reads": host_reads(variant.step, counters),
        "step_GiB": peak_extra_bytes(variant.step) / 2**30,
        "state_GiB": state_bytes(variant.unet, variant.optimizer) / 2**30,
        "frozen_GiB": held / 2**30,
    }
    if seconds:
        found["compile_seconds"] = seconds
        found["name"] += f" ({seconds:.0f} s to compile)"
    if torch.cuda.is_available():
        found["launches"] = launches(variant.step)
    return found


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of this process's work on all its cores."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    wall, work = time.perf_counter(), time.process_time()
    call()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - work


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def matrix_product(dtype: torch.dtype, device: torch.device, small: bool) -> tuple[Callable, int]:
    """A product of square matrices, and its operations."""
    n = 64 if small else 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, dtype=dtype, device=device)
    return lambda: a @ a, 2 * n**3


def take_turns(
    variants: list[Variant], rounds: int, product: Callable
) -> Iterator[tuple[Seen, list[float]]]:
    """After each round: what was seen of every variant's step so far, and seconds of the product."""
    seen: Seen = {variant.name: [] for variant in variants}
    times = 10 if torch.cuda.is_available() else 1  # a GPU is done before a single one counts
    products = []
    timed(product)
    for turn in range(rounds):
        first = turn % len(variants)  # what comes first in a round has no advantage by it
        for variant in variants[first:] + variants[:first]:
            variant.ready()
            products.append(timed(lambda: repeat(product, times))[0] / times)
            if times_of_step := within_memory(variant, partial(timed, variant.step)):
                seen[variant.name].append(times_of_step)
        yield seen, products


def data_wait(variant: Variant, steps: int, accumulation: int) -> float:
    """Share of consecutive steps that is waiting for data. Between two turns of a variant others take
    so long that everything is ready; it is used up before the steps that count.

    Args:
        variant: whose steps.
        steps: how many count.
        accumulation: micro-batches of a step.
    """
    variant.ready()
    ahead = AHEAD + 1  # the thread holds one more, until there is a place for it
    if isinstance(variant.source, Encoding):
        ahead = variant.source.ahead
    repeat(variant.step, -(-ahead // accumulation))
    waited = variant.source.waited
    seconds, _ = timed(lambda: repeat(variant.step, steps))
    return (variant.source.waited - waited) / seconds


def summary(
    rows: list[dict],
    seen: list[list[tuple[float, float]]],
    rate: float,
    pairs: int,
    flops: list[int],
    published: bool = True,
) -> list[dict]:
    """The rows with medians.

    Args:
        rows: what `inspect` found.
        seen: of each row.
        rate: operations per second of a matrix product.
        pairs: of a step.
        flops: per pair, of each row.
        published: whether the first row is the published structure, which the others are compared with.
    """
    found = []
    for row, times, operations in zip(rows, seen, flops, strict=True):
        seconds, work = zip(*times, strict=True)
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
        medians = {
            "seconds": {"median": median, "lower_quartile": low, "upper_quartile": high},
            "work_seconds": statistics.median(work),
            "pairs_per_s": pairs / median,
            "share_of_arithmetic": operations * pairs / median / rate,
        }
        found.append(row | medians)
    if not published:
        return found
    first = found[0]
    for row in found:
        row["times_published"] = first["seconds"]["median"] / row["seconds"]["median"]
        row["times_published_in_work"] = first["work_seconds"] / row["work_seconds"]
    return found


def rounded(value):
    """Five digits of every float."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
