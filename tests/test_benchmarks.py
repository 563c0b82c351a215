"""Every benchmark runs, once and untimed, on its smallest shape."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
    only = "fp32-salesforce-both or (bench_noise and fp32-diffusers) or fp32-eager-train"
    result = run("--benchmark-only", f"--benchmark-json={path}", "-k", only)
    assert result.returncode == 0, result.stdout[-3000:]
    data = json.loads(path.read_text())
    assert len(data["benchmarks"]) == 4
    for row in data["benchmarks"]:
        info = row["extra_info"]
        assert info["bytes"] > 0 and info["peak_extra_bytes"] > 0
        assert info["GB_per_s"] == info["bytes"] / row["stats"]["median"] / 1e9
        assert info["share_of_copy"] > 0
    both = next(
        r["extra_info"] for r in data["benchmarks"] if r["extra_info"]["name"] == "salesforce"
    )
    assert both["bytes"] == 5 * 2 * 4 * 64 * 64 * 4  # one pair, fp32: 2½ reads forward, 2½ backward
    assert {"device", "versions", "copy_GB_per_s"} <= data["machine_info"].keys()
    assert data["commit_info"]["id"]
