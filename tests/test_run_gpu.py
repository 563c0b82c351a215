"""What benchmarks/run_gpu.sh runs on a GPU machine and says of it."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/run_gpu.sh"

STUB = """#!/bin/sh
case "$0" in */git) exit "$GIT" ;; esac
echo "$*" >>"$CALLED"
case "$*" in
    -) [ -z "$PYTHON" ] || exec "$PYTHON" - ;;
    *device_count*) echo "$GPUS" ;;
    *"$BREAK"*) exit 3 ;;
    *"test_cuda.py -v"* | *"test_cuda_ops.py -v"*) echo "one of them failed"; echo "$OF_CUDA in 1 s" ;;
    *"$SLOW"*) trap 'echo interrupted; exit 2' INT; sleep 100 ;;
esac
"""
GIVEN = {"GPUS": "1", "PYTHON": "", "OF_CUDA": "9 passed", "BREAK": "nothing of the kind"}
GIVEN |= {"SLOW": "nor this", "GIT": "1", "DDE_FAST_COMMIT": "c0ffee"}


def run(
    folder: Path, script: Path = SCRIPT, **given: str
) -> tuple[subprocess.CompletedProcess, str]:
    """The script, and what it asked of a python and of GPU tools that only write that down."""
    (folder / "bin").mkdir()
    for name in ("python3", "nvidia-smi", "git"):
        (folder / "bin" / name).write_text(STUB)
        (folder / "bin" / name).chmod(0o755)
    env = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLED": str(folder / "called")}
    command = ["bash", str(script), str(folder / "out")]
    done = subprocess.run(
        command, env=env | GIVEN | given, capture_output=True, text=True, timeout=120
    )
    return done, (folder / "called").read_text() if (folder / "called").exists() else ""


def changed(folder: Path, old: str, new: str) -> Path:
    """A copy of the script that differs in one place, in a repository of its own."""
    text = SCRIPT.read_text()
    assert old in text
    (folder / "benchmarks").mkdir()
    path = folder / "benchmarks/changed.sh"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "train-step-sdxl-regional: done"),
        ({"GPUS": "8", "BREAK": "bench_train_step.py sdxl"}, "failed (3): train-step-sdxl"),
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
        assert "bench_" not in called and left.count("skipped") == 17
        return
    assert "one of them failed\n" in cuda  # whole, though its last line is looked for
    tests = [path.stem for path in (ROOT / "tests").glob("test_*.py")]
    assert {"logs/cuda.log", "logs/cuda_ops.log", "not-done.txt", *(f"logs/tests/{name}.log" for name in tests)} <= set(names)  # fmt: skip
    assert called.count(" tests/test_") == len(tests) + 2
    order = ["setup.py build_ext", "compiled.why_not", "test_cuda.py", "bench_noise.py"]
    # six tests run at a time, so that the first is before the last but not its neighbour
    order += ["bench_loss.py", "tests/test_strides.py", "tests/test_weights.py"]
    order += ["unet_levers.py sdxl"]
    steps = ("sd15 --compile regional", "sdxl --compile regional", "embedded")
    order += [f"bench_train_step.py {case} " for case in steps]
    where = [called.index(command) for command in order]
    assert where == sorted(where)
    assert ("benchmarks/scaling.py sd15" in called) == (given.get("GPUS") == "8")


def test_a_part_of_it(tmp_path):
    """In a tree with .git too. What was built goes with it: a later machine may begin bare."""
    done, called = run(tmp_path, PARTS="kernels", GIT="0", DDE_FAST_COMMIT="")
    assert done.returncode == 0 and called.count("benchmarks/bench_") == 6, done.stderr
    assert " tests/test_" not in called and "setup.py" not in called
    with tarfile.open(tmp_path / "out/logs.tar.gz") as logs:
        built = {path.name for path in (ROOT / "dde_fast").glob("_c*.so")}
        assert {Path(name).name for name in logs.getnames() if name.endswith(".so")} == built


@pytest.mark.parametrize("broken", ["setup.py", "compiled.why_not"])
def test_nothing_is_measured_without_the_compiled_kernels(tmp_path, broken):
    done, called = run(tmp_path, PARTS="build steps", BREAK=broken)
    assert done.returncode == 2 and "failed (3): buil" in done.stdout
    assert "bench_" not in called and (tmp_path / "out/logs.tar.gz").is_file()


def test_what_is_cut_off_may_write_what_it_has(tmp_path):
    """By an interruption, also where it runs in a shell's background, which would ignore it."""
    script = changed(tmp_path, '--kill-after=10 "$budget"', "--kill-after=10 2")
    script.write_text("trap '' INT\n" + script.read_text())
    done, _ = run(tmp_path, script, PARTS="kernels", SLOW="bench_ddim.py")
    assert re.search(r"cut off after \d+ s: kernels-ddim", done.stdout), done.stderr
    with tarfile.open(tmp_path / "out/logs.tar.gz") as logs:
        assert logs.extractfile("logs/kernels-ddim.log").read() == b"interrupted\n"


def test_a_test_that_hangs_is_said_and_leaves_its_log(tmp_path):
    script = changed(tmp_path, "part tests 540", "part tests 22")
    (tmp_path / "tests").mkdir()
    for name in ("ops", "strides", "weights"):
        (tmp_path / f"tests/test_{name}.py").touch()
    earlier = tmp_path / "out/logs/tests/earlier.xml"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("a line of a million characters: 1 failed in it")
    given = {"PARTS": "tests", "SLOW": "test_ops.py", "PYTHONPATH": str(ROOT)}
    done, _ = run(tmp_path, script, **given)
    assert "failed (123): tests" in done.stdout, done.stdout + done.stderr
    assert "a million" not in done.stdout
    with tarfile.open(tmp_path / "out/logs.tar.gz") as logs:
        assert logs.extractfile("logs/tests/test_ops.log").read() == b"interrupted\n"
        assert "logs/tests/test_weights.log" in logs.getnames()


@pytest.mark.parametrize(
    "given, said",
    [
        ({"PARTS": "kernel"}, "no such part: kernel"),
        ({"MINUTES": "9.5"}, "MINUTES: expected a whole number from 0 to 9, got 9.5"),
        ({"MINUTES": "10"}, "MINUTES: expected a whole number from 0 to 9, got 10"),
        ({"DDE_FAST_COMMIT": ""}, "the commit is not known"),
    ],
)
def test_what_cannot_start_is_said_at_once(tmp_path, given, said):
    done, called = run(tmp_path, **given)
    assert done.returncode == 2 and said in done.stdout
    assert "-m pytest" not in called and "setup.py" not in called


def test_what_is_missing_is_imported_to_know_it(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ImportError('half\\nof it')")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done, called = run(tmp_path, PYTHON=sys.executable, PYTHONPATH=paths, HOME=str(tmp_path))
    assert done.returncode == 2 and "missing: tyro (half of it)" in done.stdout, done.stdout
    assert ("a GPU that torch sees" in done.stdout) != torch.cuda.is_available()
    assert called == "-\n"


def test_the_rows_that_are_selected_are_there():
    """By the names that pytest gives them; triton's are those of the reference, which is everywhere."""
    script = SCRIPT.read_text()
    found = re.findall(
        r'^(?:kernels|tuned)\(\).* rows \w+ "\$1" "\$2" .*?"?([\w ]+)"; }$', script, re.M
    )
    assert len(found) == 2 and "triton" in found[1]
    for which in found:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k"]
        command += [which.replace("triton", "reference")]
        command += [f"benchmarks/bench_{op}.py" for op in ("noise", "ddim", "loss")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        rows = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True).stdout
        for op in ("noise", "ddim", "loss"):
            assert f"bench_{op}[sdxl-16-bf16-reference" in rows, rows[-3000:]
        assert "sd3" not in rows and ("cold" in rows) != ("triton" in which)


def test_levers_and_steps_fit_a_call():
    script = SCRIPT.read_text()
    (built,) = map(int, re.findall(r"^part built (\d+)", script, re.M))
    for part, count in (("levers", 2), ("steps", 3)):
        (body,) = re.findall(rf"^if wanted {part}; then.*?\n(.*?)^fi", script, re.M | re.S)
        budgets = list(map(int, re.findall(r"^    script \S+ (\d+)", body, re.M)))
        assert len(budgets) == count and built + sum(budgets) <= 60 * 9
