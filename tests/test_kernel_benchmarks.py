"""The benchmarks of the kernels run on their smallest shape, and their rows are what they say."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*args: str, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"BENCH_SMALL": "1"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, [*paths, ROOT, *sys.path]))
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-q", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_every_benchmark_runs_untimed():
    result = run("--benchmark-disable")
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_a_timed_row_says_what_it_is(tmp_path):
    """One row of each file: bytes, bandwidth, memory, machine, versions and commit in the JSON."""
    path = tmp_path / "rows.json"
    only = "fp32-salesforce-both or (bench_noise and fp32-diffusers) or fp32-eager-both"
    only += " or (bench_noise_cold and diffusers) or (bench_ddim_cold and eager)"
    result = run("--benchmark-only", f"--benchmark-json={path}", "-k", only)
    assert result.returncode == 0, result.stdout[-3000:]
    data = json.loads(path.read_text())
    assert len(data["benchmarks"]) == 7
    assert sum(row["extra_info"]["cache"] == "cold" for row in data["benchmarks"]) == 3
    for row in data["benchmarks"]:
        info = row["extra_info"]
        assert info["bytes"] > 0 and info["peak_extra_bytes"] > 0
        rate = info["bytes"] / row["stats"]["median"] / 1e9
        assert info["GB_per_s"] == pytest.approx(rate, rel=1e-3)
        assert info["share_of_copy"] > 0
    both = next(
        r["extra_info"] for r in data["benchmarks"] if r["extra_info"]["name"] == "salesforce"
    )
    assert both["bytes"] == 3.5 * 2 * 4 * 64 * 64 * 4  # one pair, fp32: 2½ reads and the gradient
    assert {"device", "versions", "copy_GB_per_s"} <= data["machine_info"].keys()
    assert data["commit_info"]["id"]
    assert "data" not in data["benchmarks"][0]["stats"]  # no raw times: a file to commit


GPU_CLOCK = """
import itertools, sys, torch
ticks = itertools.count()

class Event:
    def __init__(self, enable_timing):
        self.waited = False

    def record(self):
        self.at = next(ticks)

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        assert end.waited and not self.waited
        return 1e-2 * (end.at - self.at)

def pytest_collection_finish():
    torch.cuda.Event = Event
    sys.modules["conftest"].new_clock = sys.modules["conftest"].CudaClock
"""
"""A plugin under which 10 microseconds pass between any two events, and only a round's end is awaited."""


def test_a_gpu_times_by_its_events(tmp_path):
    """Rounds of several calls and of one, into the JSON, on the clock that a GPU takes."""
    (tmp_path / "gpu_clock.py").write_text(GPU_CLOCK)
    path, only = tmp_path / "rows.json", "fp32-salesforce-both or (bench_noise_cold and diffusers)"
    options = ("-p", "gpu_clock", f"--benchmark-json={path}", "-k", only)
    result = run("--benchmark-only", *options, paths=(tmp_path,))
    assert result.returncode == 0, result.stdout[-3000:]
    rows = json.loads(path.read_text())["benchmarks"]
    assert [row["extra_info"]["cache"] for row in rows] == ["warm", "cold", "cold"]
    assert rows[0]["stats"]["iterations"] > 1
    for row in rows:
        median = row["stats"]["median"] * row["stats"]["iterations"]
        assert median == pytest.approx(1e-5, rel=1e-3)


INTERRUPTED = """
import itertools
from pytest_benchmark.fixture import BenchmarkFixture

rows, pedantic = itertools.count(), BenchmarkFixture.pedantic

def interrupted(self, target, **options):
    def stop():
        raise KeyboardInterrupt

    return pedantic(self, stop if next(rows) == 1 else target, **options)

BenchmarkFixture.pedantic = interrupted
"""
"""A plugin under which the second row is interrupted before it has a time."""


def test_an_interrupted_run_keeps_the_rows_it_has(tmp_path):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    path, only = tmp_path / "rows.json", "bench_noise and diffusers"
    options = ("-p", "interrupted", f"--benchmark-json={path}", "-k", only)
    result = run("--benchmark-only", *options, paths=(tmp_path,))
    assert result.returncode, result.stdout[-3000:]
    (row,) = json.loads(path.read_text())["benchmarks"]
    assert row["extra_info"]["op"] == "add_noise"


def conftest_of_benchmarks():
    spec = importlib.util.spec_from_file_location("clock", ROOT / "benchmarks/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_launches_are_what_ran_on_the_gpu(monkeypatch):
    """Counted in the profiler's raw events; where it saw none, the number is not known."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    kinds = torch.autograd.DeviceType
    for seen, expected in (([kinds.CUDA, kinds.CPU, kinds.CUDA], 2), ([kinds.CPU], None)):
        events = [SimpleNamespace(device_type=lambda kind=kind: kind) for kind in seen]
        results = SimpleNamespace(events=lambda events=events: events)
        profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
        context = contextlib.nullcontext(profiler)
        monkeypatch.setattr(torch.profiler, "profile", lambda activities, c=context: c)
        assert conftest_of_benchmarks().launches(lambda: None) == expected


def test_a_tree_without_git_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("DDE_FAST_COMMIT", "abc+")
    assert conftest_of_benchmarks().commit() == "abc+"


LOSS_ROWS = """
import bench_loss, torch
from conftest import ALPHAS_CUMPROD, BACKENDS, DEVICE
from dde_fast import PreferenceLoss, ops

ran, found = [], ops.implementation
ops.implementation = lambda backend, name: ran.append(name) or found(backend, name)
sets = [bench_loss.inputs(2, (4, 8, 8), torch.float32, repeat=False)]
for name in BACKENDS:
    options = {"alphas_cumprod": ALPHAS_CUMPROD, "beta": 5000.0, "backend": name}
    loss = PreferenceLoss("diffusion-dpo", **options).to(DEVICE)
    modes = ("forward", "backward", "both")
    forward, backward, both = (bench_loss.calls(loss, mode, sets)[0] for mode in modes)
    torch.testing.assert_close(backward(), both()[0])
    assert not forward().requires_grad
    for call, wanted in ((forward, ["preference_loss"]), (backward, ["preference_loss_backward"])):
        ran.clear()
        call()
        assert ran == wanted, (name, ran)
"""


def test_rows_of_the_loss_do_what_they_are_called():
    """The cpp backend's forward makes no gradient, and its backward makes one."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), *sys.path])
    command = [sys.executable, "-c", LOSS_ROWS]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def row(name: str, median: float, **info) -> dict:
    info = {"name": name, "share_of_copy": 0.5, "dtype": "float32", "cache": "warm", **info}
    return {"stats": {"median": median}, "extra_info": info}


def test_the_table_of_kernels(tmp_path, monkeypatch):
    """Cold rows are marked, the files of a GPU are one table, and a GPU not measured is said."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from kernel_table import kernels

    loss = {"op": "loss", "mode": "both", "pairs": 16, "shape": [4, 64, 64]}
    rows = [row("salesforce", 2e-3, **loss), row("cpp", 1e-3, **loss)]
    rows += [row(*of, cache="cold", **loss) for of in (("salesforce", 6e-3), ("cpp", 4e-3))]

    def write(name: str, rows: list[dict], **machine) -> None:
        machine = {"threads": 2, "versions": {"torch": "2"}, "copy_GB_per_s": 9.0, **machine}
        data = {"machine_info": machine, "commit_info": {"id": "abc"}, "benchmarks": rows}
        (tmp_path / f"kernels-{name}.json").write_text(json.dumps(data))

    write("a-cpu", rows, device="a CPU")
    text = "\n".join(kernels(tmp_path))
    tail = "16 × 4×64×64 float32 | salesforce"
    assert f"| loss, forward + backward | {tail} 2.00 | cpp 1.00 | 2.0 | 50 % |" in text
    assert f"| loss, forward + backward, cold | {tail} 6.00 | cpp 4.00 | 1.5 | 50 % |" in text
    assert "No kernel has been measured on a GPU" in text
    ddim = {"op": "ddim_step", "mode": "both", "pairs": 16, "shape": [4, 64, 64], "launches": 3}
    write("gpu-loss", rows, device="a GPU")
    write("gpu-ddim", [row("eager", 2e-3, **ddim), row("triton", 1e-3, **ddim)], device="a GPU")
    text = "\n".join(kernels(tmp_path))
    assert text.count("**a GPU") == 1 and text.count("loss, forward + backward, cold") == 2
    assert "| ddim_step, forward + backward |" in text and "No kernel" not in text
