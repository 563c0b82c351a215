"""What benchmarks/run_gpu.sh runs on a GPU machine and says of it."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

STUB = """#!/bin/sh
echo "$*" >>"$CALLED"
case "$*" in *device_count*) echo "$GPUS" ;; *"$BREAK"*) exit 3 ;; esac
"""


@pytest.mark.parametrize(
    "given, code, said",
    [
        ({"GPUS": "1"}, 0, "scaling: skipped, it wants two GPUs"),
        ({"GPUS": "8", "BREAK": "bench_train_step.py sdxl"}, 1, "failed (3): train-step-sdxl"),
        ({"GPUS": "1", "MINUTES": "0"}, 1, "skipped, no time left: train-step-sd15"),
    ],
)
def test_what_a_gpu_machine_runs_and_says(tmp_path, given, code, said):
    """Its parts in their budgets, python and the GPU's tools replaced by one that writes down what is
    asked of it."""
    (tmp_path / "bin").mkdir()
    for name in ("python3", "nvidia-smi"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLED": str(tmp_path / "called")}
    env |= {"BREAK": "nothing of the kind", **given}
    command = ["bash", str(ROOT / "benchmarks/run_gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and said in done.stdout, done.stdout + done.stderr
    called = (tmp_path / "called").read_text()
    left = (tmp_path / "out/not-done.txt").read_text()
    if "MINUTES" in given:
        assert "bench_train_step" not in called and left.count("skipped") == 11
        return
    for case in ("sd15", "sdxl", "embedded", "sd15 --compile regional", "sd15 --compile whole"):
        assert f"benchmarks/bench_train_step.py {case} " in called
    assert ("benchmarks/scaling.py sd15" in called) == (given["GPUS"] == "8")
    assert called.count(" tests/test_") == len(list((ROOT / "tests").glob("test_*.py"))) + 1
    assert bool(left) == bool(code)
