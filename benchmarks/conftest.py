"""Clock, machine and inputs of the benchmarks: `pytest benchmarks/ --benchmark-only`.

Every row is timed on random data, in one process with its baselines. `BENCH_SMALL=1` keeps the
smallest shape alone (the test suite runs that once, untimed), `BENCH_BATCHES="1 128"` these batches,
`BENCH_SECONDS` are timed per row.

A warm row's round is as many calls as last `ROUND_SECONDS`, one after another. A cold row's is one
call behind a write that fills the caches. On a GPU, where events time what is between them in its
queue, nobody waits between that write and the call: the host queues the call while the GPU writes, so
that the row holds the GPU's time alone, unlike a warm one, whose calls may well wait for the host.
"""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from dde_fast import backends, provenance, recycled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = os.environ.get("BENCH_SMALL") == "1"
SECONDS = float(os.environ.get("BENCH_SECONDS") or (0.3 if DEVICE.type == "cpu" else 0.1))
"""Timed per row, at least five rounds; a GPU's clock varies less."""
ROUND_SECONDS, MOST_CALLS = (2e-4, 50) if DEVICE.type == "cpu" else (5e-3, 1000)
"""Of a warm round. A GPU's begins with the host's way to its first kernel, some ten microseconds."""
FLUSH_BYTES, FLUSHES = 256 * 2**20, 1 if DEVICE.type == "cpu" else 10
"""Written before a cold call. Ten times take a GPU a millisecond, in which the host queues the call."""

# Triton's interpreter is no backend to time
BACKENDS = [name for name in backends.BACKENDS if backends.why_not(name, DEVICE) is None]
if DEVICE.type == "cpu":
    BACKENDS = [name for name in BACKENDS if name != "triton"]

SETS = 3
"""Different inputs that a row goes through in turn."""
ALPHAS_CUMPROD = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0)
"""Stable Diffusion's schedule."""

SHAPES = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128), "sd3": (16, 128, 128)}
BATCHES = (1, 8, 16, 32, 128)
if SMALL:
    SHAPES, BATCHES = {"sd15": (4, 64, 64)}, (1,)
elif "BENCH_BATCHES" in os.environ:
    BATCHES = tuple(map(int, os.environ["BENCH_BATCHES"].split()))

COLD = [("sd15", 1)] if SMALL else [("sd15", 16), ("sdxl", 128)]
"""The (shape, batch) of cold rows but the loss's, which has them for all."""
COLD = [case for case in COLD if case[1] in BATCHES]


class CudaClock:
    """Seconds by CUDA events, read in pairs: pytest-benchmark's own clock times launches only.

    The first reading of a pair puts an event into the GPU's queue and does not wait, the second waits
    for its own: their difference is the GPU's time from the one to the other.
    """

    def __init__(self):
        self.first = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self.first is None:
            self.first = event
            return 0.0
        event.synchronize()
        first, self.first = self.first, None
        return first.elapsed_time(event) / 1e3


def new_clock():
    """A function whose readings before and after something differ by the device's seconds."""
    return CudaClock() if DEVICE.type == "cuda" else time.perf_counter


def commit() -> str:
    """DDE_FAST_COMMIT, for a tree without .git, else the checkout's, with a + if the tree differs."""
    if os.environ.get("DDE_FAST_COMMIT"):
        return os.environ["DDE_FAST_COMMIT"]
    root = Path(__file__).parent.parent
    try:
        run = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def pytest_benchmark_update_machine_info(config, machine_info):
    packages = ("torch", "triton", "diffusers", "pytest-benchmark")
    machine_info.clear()
    machine_info |= {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: provenance.version(name) for name in packages},
        "copy_GB_per_s": copy_bandwidth() / 1e9,
    }


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.clear()
    commit_info["id"] = commit()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """What `--benchmark-compare` reads, small enough to commit: no raw times, five digits."""
    for row in output_json["benchmarks"]:
        row.pop("options", None)
        row["stats"].pop("data", None)
        for values in (row["stats"], row["extra_info"]):
            values |= {k: float(f"{v:.5g}") for k, v in values.items() if isinstance(v, float)}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


_bandwidth: dict[str, float] = {}


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy far larger than the caches; best of several."""
    if "copy" not in _bandwidth:
        size = 2**22 if SMALL else 2**28 if DEVICE.type == "cpu" else 2**31
        source = torch.randn(size // 4, device=DEVICE)
        target = torch.empty_like(source)
        clock, times = new_clock(), []
        for _ in range(7):
            start = clock()
            target.copy_(source)
            times.append(clock() - start)
        _bandwidth["copy"] = 2 * size / min(times[2:])
    return _bandwidth["copy"]


@pytest.fixture
def measure(benchmark):
    """measure(functions, bytes=…, cache=…): time a rotation of equal calls on different inputs."""

    def run(functions, *, bytes: int, cache: str = "warm", **info):
        rotation = itertools.cycle(functions)
        benchmark.has_error = True  # until its row is whole: an interrupted one is not written
        # set here: what --benchmark-timer takes is the name of a function
        clock = benchmark._timer = new_clock()

        def call():
            return next(rotation)()

        def seconds(calls: int) -> float:
            start = clock()
            for _ in range(calls):
                call()
            return max((clock() - start) / calls, 1e-7)

        for _ in functions:
            call()
        once = seconds(1)
        if once < 1e-3:  # then the way of one call to the GPU, or a hiccup, is much of that
            once = seconds(10)
        extra = peak_extra_bytes(call)
        if cache == "cold":
            other = torch.empty(FLUSH_BYTES // 4, device=DEVICE)

            def flush():
                for _ in range(FLUSHES):
                    other.fill_(1.0)

            # a few beforehand: a virtual machine's host may have taken unused memory away
            rounds, warmup = min(max(int(SECONDS / 4 / once), 9), 30), 0 if SMALL else 5
            benchmark.pedantic(call, setup=flush, rounds=rounds, iterations=1, warmup_rounds=warmup)
        else:
            iterations = max(1, min(int(ROUND_SECONDS / once), MOST_CALLS))
            rounds = min(max(int(SECONDS / (once * iterations)), 5), 200)
            warmup = 2 if rounds > 5 else 0  # long calls: those above have warmed it up
            benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=warmup)
        benchmark.extra_info.update(info, cache=cache, bytes=bytes, peak_extra_bytes=extra)
        if benchmark.stats is not None:
            rate = bytes / benchmark.stats.stats.median
            benchmark.extra_info["GB_per_s"] = rate / 1e9
            benchmark.extra_info["share_of_copy"] = rate / copy_bandwidth()
        if DEVICE.type == "cuda":
            benchmark.extra_info["launches"] = launches(call)
        benchmark.has_error = False

    return run


def peak_extra_bytes(call) -> int:
    """Most memory allocated at once during a call, beyond what was there before; on a CPU as if it
    had no earlier gradient's memory to use again."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with (
        patch.object(recycled, "FROM_BYTES", sys.maxsize),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        kept = call()
    del kept
    total = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def launches(call) -> int | None:
    """Kernels and copies that a call makes the GPU run; those of a replayed graph count each. None
    where the profiler saw nothing, as where it may not use CUPTI."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    # the raw ones: `profiler.events()` takes seconds to sort those of a whole training step
    events = profiler.profiler.kineto_results.events()
    return sum(event.device_type() == on_gpu for event in events) or None
