"""Running the trainer in a folder, for the tests of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from dde_fast import train

ROOT = Path(__file__).parent.parent
STEPS = 6
OBJECTIVE_STEPS = 3


def environment(gpu: bool = False, **more: str) -> dict[str, str]:
    """One thread per rank; no launcher's variables; the package from here. What one rank computes is
    compared with what two do: unless there is a GPU for each, on the CPU, or if a `gpu` is wanted."""
    if not gpu and torch.cuda.device_count() < 2:
        more["CUDA_VISIBLE_DEVICES"] = ""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


def commit() -> str:
    """Of the checkout, for the results of long checks."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def wait_for(processes: list[tuple], timeout: float) -> None:
    """Wait for (process, its open log) to end well, each within so many seconds; leave none alive."""
    try:
        for process, log in processes:
            code = process.wait(timeout=timeout)
            log.seek(0)
            assert code == 0, log.read()[-4000:]
    finally:
        for process, _ in processes:
            process.kill()


class Folder:
    """The inputs and the runs of these tests."""

    def __init__(self, path: Path):
        self.path = path
        self.model = tiny.make_model(path / "model")
        self.pairs = tiny.write_pairs(path / "train.parquet", tiny.rows())

    def args(self, name: str, output: str = "", ds: dict | None = None, **flags) -> list[str]:
        """Flags of a run called `name`."""
        ds_path = tiny.write_ds(self.path / f"{name}.json", **(ds or {}))
        flags = {
            "model": self.model,
            "pairs": self.pairs,
            "deepspeed_config": ds_path,
            "output": self.path / (output or name),
            "steps": STEPS,
            "log_every": 1,
            "save_every": 0,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "beta": 1.0,
            "caption_dropout": 0.3,
            "timestep_high": 800,
            "adam_eps": 1e-4,
            **flags,
        }
        return [part for key, value in flags.items() for part in (f"--{key}", str(value))]

    def work(self, jobs: list[dict], ranks: int, name: str, gpu: bool = False) -> str:
        """Run jobs in `ranks` processes, in an `environment`; what rank 0 printed."""
        path = self.path / f"{name}.jobs"
        path.write_text(json.dumps(jobs))
        port, processes = free_port(), []
        for rank in range(ranks):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables |= {"DDE_FAST_CACHE": str(self.path / "fetched")}
            log = open(self.path / f"{name}.{rank}.log", "w+")
            command = [sys.executable, str(ROOT / "tests/train_worker.py"), str(path)]
            process = subprocess.Popen(
                command, env=environment(gpu, **variables), stdout=log, stderr=log, text=True
            )
            processes.append((process, log))
        wait_for(processes, timeout=400)
        return (self.path / f"{name}.0.log").read_text()

    def losses(self, name: str) -> torch.Tensor:
        return torch.tensor([record["loss"] for record in self.metrics(name)])

    def metrics(self, name: str) -> list[dict]:
        lines = (self.path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def unet(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.path / name / "unet/diffusion_pytorch_model.safetensors")

    def ratios(self, name: str) -> torch.Tensor:
        path = self.path / name / f"checkpoints/step-{STEPS:08d}/ratios.safetensors"
        path = path if path.exists() else self.path / name / "ratios.safetensors"
        return load_file(path)["ratios"]

    def distance(self, a: str, b: str, model: str = "model") -> float:
        """Largest difference of two trained UNets, relative to what training changed."""
        start = load_file(self.path / model / "unet/diffusion_pytorch_model.safetensors")
        a, b = self.unet(a), self.unet(b)
        assert a.keys() == b.keys() == start.keys()
        moved = max((a[key] - start[key]).abs().max() for key in a)
        assert moved > 1e-5
        return float(max((a[key] - b[key]).abs().max() for key in a) / moved)


def stage(number: int, **more) -> dict:
    return {"zero_optimization": {"stage": number}, **more}


BF16 = {"bf16": {"enabled": True}}
HALF = {"train_micro_batch_size_per_gpu": 2}


def fails(args: list[str], capfd) -> str:
    """The one line of stderr of a run that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        train.main(args)
    assert stop.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dde_fast: error: ")
    return lines[0]
