"""What benchmarks/run_gpu.sh runs on a GPU machine and says of it."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/run_gpu.sh"

STUB = """#!/bin/sh
echo "$*" >>"$CALLED"
case "$*" in
    *find_spec*) echo "$MISSING" ;;
    *device_count*) echo "$GPUS" ;;
    *"$BREAK"*) exit 3 ;;
    *"test_cuda.py -v"* | *"test_cuda_ops.py -v"*) echo "one of them failed"; echo "$OF_CUDA in 1 s" ;;
esac
"""
GIVEN = {"GPUS": "1", "MISSING": "", "OF_CUDA": "9 passed", "BREAK": "nothing of the kind"}


def run(folder: Path, **given: str) -> tuple[subprocess.CompletedProcess, str]:
    """The script, and what it asked of a python and of GPU tools that only write that down."""
    (folder / "bin").mkdir()
    for name in ("python3", "nvidia-smi"):
        (folder / "bin" / name).write_text(STUB)
        (folder / "bin" / name).chmod(0o755)
    env = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLED": str(folder / "called")}
    command = ["bash", str(SCRIPT), str(folder / "out")]
    done = subprocess.run(
        command, env=env | GIVEN | given, capture_output=True, text=True, timeout=120
    )
    return done, (folder / "called").read_text() if (folder / "called").exists() else ""


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "train-step-sdxl: done"),
        ({"GPUS": "8", "BREAK": "bench_train_step.py sdxl"}, "failed (3): train-step-sdxl"),
        ({"BREAK": "compiled.why_not"}, "failed (3): built"),
        ({"OF_CUDA": "9 skipped"}, "failed (1): cuda"),
        ({"MINUTES": "0"}, "skipped, no time left: train-step-sd15"),
    ],
)
def test_what_a_gpu_machine_runs_and_says(tmp_path, given, said):
    """All its parts in their budgets, what nothing else can do first; the logs in one file."""
    done, called = run(tmp_path, **given)
    good = not given
    assert done.returncode == (not good) and said in done.stdout, done.stdout + done.stderr
    left = (tmp_path / "out/not-done.txt").read_text()
    assert bool(left) != good
    with tarfile.open(tmp_path / "out/logs.tar.gz") as logs:
        names = logs.getnames()
        cuda = logs.extractfile("logs/cuda.log").read().decode() if "logs/cuda.log" in names else ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"logs.tar.gz", "not-done.txt"}
    if "MINUTES" in given:
        assert "bench_" not in called and left.count("skipped") == 19
        return
    assert "one of them failed\n" in cuda  # whole, though its last line is looked for
    tests = [path.stem for path in (ROOT / "tests").glob("test_*.py")]
    assert {"logs/cuda.log", "logs/cuda_ops.log", "not-done.txt", *(f"logs/tests/{name}.log" for name in tests)} <= set(names)  # fmt: skip
    assert called.count(" tests/test_") == len(tests) + 2
    order = ["setup.py build_ext", "test_cuda.py", "bench_noise.py", "bench_loss.py"]
    order += ["tests/test_run_gpu.py", "unet_levers.py sdxl"]
    steps = ("sd15", "sdxl", "sd15 --compile regional", "sdxl --compile regional", "embedded")
    order += [f"bench_train_step.py {case} " for case in steps]
    where = [called.index(command) for command in order]
    assert where == sorted(where)
    assert ("benchmarks/scaling.py sd15" in called) == (given.get("GPUS") == "8")


def test_a_part_of_it(tmp_path):
    done, called = run(tmp_path, PARTS="kernels")
    assert done.returncode == 0 and called.count("benchmarks/bench_") == 6
    assert " tests/test_" not in called and "setup.py" not in called


@pytest.mark.parametrize(
    "given, said",
    [
        ({"MISSING": "deepspeed"}, "not installed: deepspeed"),
        ({"PARTS": "kernel"}, "no such part: kernel"),
    ],
)
def test_what_cannot_start_is_said_at_once(tmp_path, given, said):
    done, called = run(tmp_path, **given)
    assert done.returncode == 2 and said in done.stdout
    assert "-m pytest" not in called and "setup.py" not in called


def test_levers_and_steps_fit_their_minutes():
    script = SCRIPT.read_text()
    for part, count in (("levers", 2), ("steps", 5)):
        (body,) = re.findall(rf"^if wanted {part}; then\n(.*?)^fi", script, re.M | re.S)
        budgets = list(map(int, re.findall(r"^    script \S+ (\d+)", body, re.M)))
        (minutes,) = re.findall(rf"`{part}` (\d+)", script)
        assert len(budgets) == count and sum(budgets) <= 60 * int(minutes)
