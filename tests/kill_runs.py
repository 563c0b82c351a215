"""kill -9 at random moments, then --resume auto, until the run is done; is it bit for bit the same?

    python tests/kill_runs.py --out benchmarks/results/kill.json

For each ZeRO stage and number of ranks: an uninterrupted run of the tiny model of tests/tiny.py,
then runs whose ranks are killed, every other time in the midst of a save, until so many kills. Each
finished run must agree with the uninterrupted one in every tensor of its last checkpoint, its UNet
and its log. Ranks are forked from one process that has everything loaded, so that a kill costs a
second, not ten.
"""

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
import transformers  # noqa: F401  (loaded before the ranks are forked)
from safetensors.torch import load_file
from train_runs import Folder, commit, free_port

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU cannot be forked
os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed  # noqa: E402

from dde_fast import checkpoint, train  # noqa: E402
from dde_fast.checkpoint_files import without_pickle  # noqa: E402
from dde_fast.metrics import OF_THE_MACHINE  # noqa: E402


def fork(args: list[str], ranks: int, log: Path) -> list[int]:
    """Train in a process per rank."""
    port, pids = free_port(), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
                os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
                train.main(args)
                torch.distributed.destroy_process_group()
                code = 0
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


def saving(checkpoints: Path) -> bool:
    """Whether a checkpoint is being written."""
    tags = checkpoints.glob("step-*")
    return any(not (tag / checkpoint.MARKER).exists() for tag in tags)


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(pids: list[int], checkpoints: Path, moment: float, save: int) -> bool:
    """Kill all ranks after so many seconds, or, if `save` is above 0, within the save of that
    number; whether they still ran."""
    start, seen, before = time.monotonic(), 0, False
    while True:
        if any(ended(pid) for pid in pids):
            return False
        now = saving(checkpoints)
        seen, before = seen + (now and not before), now
        if seen == save and now if save else time.monotonic() - start > moment:
            break
        time.sleep(0.0005)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return True


def wait(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def content(run: Path, steps: int) -> dict:
    """Everything that a run computed."""
    last = run / f"checkpoints/step-{steps:08d}"
    with without_pickle():
        files = {path.name: torch.load(path) for path in sorted(last.glob("*.pt"))}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "checkpoint": {name: without_paths(value) for name, value in files.items()},
        "ratios": load_file(last / "ratios.safetensors"),
        "unet": load_file(run / "unet/diffusion_pytorch_model.safetensors"),
        "metrics": [{key: line[key] for key in line.keys() - OF_THE_MACHINE} for line in lines],
    }


def without_paths(state: dict) -> dict:
    """The DeepSpeed JSON is the same, whether it comes as an object or as a path."""
    return {key: value for key, value in state.items() if key != "ds_config"}


def differences(a, b, place: str = "") -> list[str]:
    """Where two nests of containers are not equal to the last bit, tensors included."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [place]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{place}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [x for key in a for x in differences(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{place}: {len(a)} and {len(b)} long"]
        return [x for i in range(len(a)) for x in differences(a[i], b[i], f"{place}/{i}")]
    # DeepSpeed's loss scaler has no equality, and no state in fp32
    return [] if a == b or type(a).__module__.startswith("deepspeed") else [place]


def torture(folder: Folder, stage: int, ranks: int, kills: int, steps: int, seed: int) -> dict:
    """Kill one configuration's runs; what came of it."""
    choice, began = random.Random(seed), time.monotonic()
    ds = {"train_micro_batch_size_per_gpu": 4 // ranks, "zero_optimization": {"stage": stage}}
    name, log = f"zero{stage}_{ranks}", folder.path / f"zero{stage}_{ranks}.log"
    common = {"ds": ds, "steps": steps, "save_every": 2, "keep": 2}
    assert wait(fork(folder.args(name, **common), ranks, log)) == [0] * ranks, log.read_text()
    took = time.monotonic() - began
    expected = content(folder.path / name, steps)

    flags = folder.args(f"{name}_killed", **common, resume="auto")
    run, done = folder.path / f"{name}_killed", 0
    row = {"zero_stage": stage, "ranks": ranks, "kills": 0, "in_a_save": 0, "finished_runs": 0}
    row |= {"resumed": 0, "bit_identical": True}
    while row["kills"] < kills or not done:
        row["resumed"] += checkpoint.any_in(run / "checkpoints")
        pids, hit, done = fork(flags, ranks, log), False, 0
        if row["kills"] < kills:
            save = choice.randint(1, 3) if row["kills"] % 2 else 0
            hit = kill(pids, run / "checkpoints", choice.uniform(0.2, 1) * took, save)
        codes = wait(pids)
        if hit:
            row["kills"] += 1
            row["in_a_save"] += saving(run / "checkpoints")
            continue
        assert codes == [0] * ranks, log.read_text()[-4000:]
        found = differences(content(run, steps), expected)
        print(*found[:20], sep="\n", end="\n" if found else "")
        row["bit_identical"] &= not found
        row["finished_runs"] += 1
        done = 1
        shutil.rmtree(run)
    return row | {"seconds": round(time.monotonic() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Folder(Path(place))
        for stage, ranks in itertools.product(options.stages, options.ranks):
            rows.append(torture(folder, stage, ranks, options.kills, options.steps, seed=len(rows)))
            print(rows[-1], flush=True)
    versions = {module.__name__: module.__version__ for module in (torch, deepspeed, diffusers)}
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), **versions}
    result = {"commit": commit(), "steps": options.steps, "machine": machine, "runs": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not all(row["bit_identical"] for row in rows))


if __name__ == "__main__":
    main()
