"""Every benchmark runs, once and untimed, on its smallest shape."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*args: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"BENCH_SMALL": "1"}
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
    result = run("--benchmark-only", f"--benchmark-json={path}", "-k", only)
    assert result.returncode == 0, result.stdout[-3000:]
    data = json.loads(path.read_text())
    assert len(data["benchmarks"]) == 5
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


def test_the_picture_is_drawn(tmp_path):
    """A curve per implementation in a panel per latent and dtype, and the byte limit."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from plot import draw

    rows = [
        {
            "stats": {"median": 1e-3 * pairs},
            "extra_info": {
                **{
                    "op": "loss",
                    "mode": "both",
                    "cache": "warm",
                    "shape": [4, 64, 64],
                    "dtype": dtype,
                },
                **{"name": name, "pairs": pairs, "bytes": 10**6 * pairs},
            },
        }
        for dtype in ("float32", "bfloat16")
        for name in ("salesforce", "cpp")
        for pairs in (1, 8, 32)
    ]
    machine = {"device": "x", "threads": 2, "versions": {"torch": "2"}, "copy_GB_per_s": 10.0}
    data = {"benchmarks": rows, "machine_info": machine, "commit_info": {"id": "abc"}}
    panels = draw(data).axes
    assert len(panels) == 2
    for panel in panels:
        curves = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
        assert curves["cpp"] == [1e-3, 8e-3, 32e-3]
        assert curves["bytes at the copy bandwidth"] == [1e-4, 8e-4, 32e-4]


@pytest.mark.parametrize("name", ["sd15", "sdxl-lora"])
def test_a_full_size_run_made_small_takes_its_steps(tmp_path, name):
    if name.endswith("lora"):
        pytest.importorskip("peft")
    path = tmp_path / "run.json"
    command = [sys.executable, "benchmarks/full_size.py", name, "--small", "--steps", "2"]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [*command, "--output", str(path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads(path.read_text())
    assert run["losses"][0] == pytest.approx(0.693147, abs=1e-6)
    assert run["losses"][1] != run["losses"][0]
    assert (run["trained"] < run["parameters"]) == (name == "sdxl-lora")
    assert {f"{phase} {i}" for phase in ("forward", "backward", "optimizer") for i in (1, 2)} < set(
        run["phases"]
    )
    assert run["peak_GiB"] > 0 and run["machine"]["versions"]["torch"]


def test_the_memory_table_is_counted_from_the_published_unets(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory_table
    import published

    for name, count in published.PARAMETERS.items():
        assert memory_table.parameters(name) == count
    # by hand: 3 frozen and 8 trained parameters on 4 GPUs, 5 of a reference
    counted = [memory_table.bytes_per_gpu(3, 8, 4, stage, reference=5) for stage in (1, 2, 3)]
    assert counted == [6 + 8 * 8 + 24 + 10, 6 + 16 + 32 + 10, round(1.5 + 40 + 10)]
    page = memory_table.PAGE.read_text(encoding="utf-8")
    assert page == memory_table.render(page)
    assert "✗" in page and "| 64 × 80 GB |" in page
