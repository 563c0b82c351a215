"""Clock, machine and inputs of the benchmarks: `pytest benchmarks/ --benchmark-only`.

Every row is timed on random data, in one process with its baselines. `BENCH_SMALL=1` keeps the
smallest shape alone (the test suite runs that once, untimed).
"""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dde_fast import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = os.environ.get("BENCH_SMALL") == "1"
SECONDS = 0.3 if DEVICE.type == "cpu" else 0.1
"""Timed per row, at least five rounds; a GPU's clock varies less."""
FLUSH_BYTES = 256 * 2**20

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


class CudaClock:
    """Seconds by CUDA events: pytest-benchmark's own clock times launches only."""

    def __init__(self):
        self.seconds, self.last = 0.0, None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:
            self.seconds += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.seconds


def pytest_configure(config):
    if DEVICE.type == "cuda" and hasattr(config.option, "benchmark_timer"):
        from pytest_benchmark.utils import NameWrapper

        config.option.benchmark_timer = NameWrapper(CudaClock())


def commit() -> str:
    """The checkout's commit, with a + if the tree differs from it."""
    root = Path(__file__).parent.parent
    try:
        run = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DDE_FAST_COMMIT", "unknown")


def pytest_benchmark_update_machine_info(config, machine_info):
    packages = ("torch", "triton", "diffusers", "pytest-benchmark")
    machine_info.clear()
    machine_info |= {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
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
        clock = CudaClock() if DEVICE.type == "cuda" else time.perf_counter
        times = []
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
        clock = benchmark._timer if DEVICE.type == "cuda" else time.perf_counter

        def call():
            return next(rotation)()

        for _ in functions:
            call()
        start = clock()
        call()
        once = max(clock() - start, 1e-7)
        extra = peak_extra_bytes(call)
        if cache == "cold":
            other = torch.empty(FLUSH_BYTES // 4, device=DEVICE)

            def flush():
                other.fill_(1.0)

            rounds = min(max(int(SECONDS / 4 / once), 5), 30)
            benchmark.pedantic(call, setup=flush, rounds=rounds, iterations=1)
        else:
            iterations = max(1, min(int(2e-4 / once), 50))
            rounds = min(max(int(SECONDS / (once * iterations)), 5), 200)
            benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=2)
        benchmark.extra_info.update(info, cache=cache, bytes=bytes, peak_extra_bytes=extra)
        if DEVICE.type == "cuda":
            benchmark.extra_info["launches"] = launches(call)
        if benchmark.stats is not None:
            rate = bytes / benchmark.stats.stats.median
            benchmark.extra_info["GB_per_s"] = rate / 1e9
            benchmark.extra_info["share_of_copy"] = rate / copy_bandwidth()

    return run


def peak_extra_bytes(call) -> int:
    """Most memory allocated at once during a call, beyond what was there before."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    total = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def launches(call) -> int:
    """Kernels and copies that a call puts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profiler.events())
