"""Folders as the trainer and the evaluation leave them, without their minutes of work."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file

from dde_fast import checkpoint
from dde_fast.config import TrainConfig
from dde_fast.objectives import OBJECTIVES

PARTS = [f"{100 * i:03d}-{100 * i + 99:03d}" for i in range(10)]
VERSIONS = {"dde_fast": "0.1.0", "torch": "2.13.0", "machine": "x86_64, 2 threads"}


def record(step: int, objective: str = "dde", reward: float | None = None) -> dict:
    """A line of metrics.jsonl; numbers move with the step."""
    rise = 1 + step / 100
    pairs = {"policy_win_error": 0.02 * rise, "policy_lose_error": 0.02 * rise**2}
    if objective != "sft":
        pairs |= {"implicit_accuracy": min(0.5 * rise, 1.0), "logit": rise - 1}
        pairs |= {"logit_size": rise - 0.9, "margin": -1e-6 * step}
        pairs |= {"reference_win_error": 0.02, "reference_lose_error": 0.02}
    table = {name: {part: value for part in PARTS} for name, value in pairs.items()}
    found = {"step": step, "loss": 0.69 * rise, "grad_norm": 5.0, "skipped_steps": 0.0, **pairs}
    found["by_timestep"] = {"pairs": {part: 4 for part in PARTS}} | table
    if reward is not None:
        found |= {"reward": reward * rise, "reward_win": 1.1 * rise, "reward_lose": 0.9 * rise}
        for half in ("win", "lose"):
            found["by_timestep"][f"reward_{half}"] = dict.fromkeys(PARTS, found[f"reward_{half}"])
    return found | {
        "learning_rate": 5e-5,
        "pairs_per_second": 20.0,
        "data_wait": 0.001,
        "memory_gib": 0.9,
    }


def write_run(folder: Path, objective: str = "dde", steps: int = 12, **config) -> Path:
    """A finished run with held-out looks, two checkpoints and one picture."""
    folder.mkdir(parents=True)
    c = asdict(TrainConfig(objective=objective, steps=steps)) | config
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )
    data = "prompts" if OBJECTIVES[objective].online else "pairs"
    settings = {
        "config": c,
        "deepspeed": {"train_batch_size": 16, "zero_optimization": {"stage": 1}},
        "content": {"model": "weights 0123", data: "content 4567"},
        "scheduler": json.loads(scheduler.to_json_string()),
        "versions": VERSIONS,
        "commit": "c0ffee",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    records = [record(step, objective) for step in range(1, steps + 1)]
    for look in records[steps // 2 - 1 :: steps // 2]:
        look["validation"] = {k: v for k, v in record(look["step"], objective).items() if "_" in k}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for step in (steps // 2, steps):
        write_checkpoint(folder, step)
    (folder / "grids").mkdir()
    Image.new("RGB", (880, 256), "orange").save(folder / f"grids/step-{steps:08d}.png")
    return folder


def write_checkpoint(run: Path, step: int) -> Path:
    """A complete checkpoint that holds nothing but ratios."""
    path = run / f"checkpoints/step-{step:08d}"
    path.mkdir(parents=True)
    ratios = torch.rand(4, 1000, generator=torch.Generator().manual_seed(1)) * step
    save_file({"ratios": ratios}, path / "ratios.safetensors")
    (path / checkpoint.MARKER).write_text(json.dumps(checkpoint._contents(path)))
    return path


def write_evaluation(
    folder: Path, models: dict[str, str], side: int = 32, count: int = 30, prompt: str = "face"
) -> Path:
    """An evaluation of these models (name -> path) with images, and every two compared."""
    folder.mkdir(parents=True)
    score = {"mean": 0.1, "std": 0.3}
    against = {"win": 0.5, "tie": 0.3, "lose": 0.2, "difference": 0.2, "interval": [0.1, 0.3]}
    results = {"base": {"human_score": score, "distinct": {"mean": 12.0}}}
    for name in models:
        results[name] = {
            "human_score": score | against,
            "distinct": {"mean": 10.0, "difference": -2.0},
        }
    names = [*models, "base"]
    pairs = [
        {"a": a, "b": b, "win_interval": [0.55, 0.75], **against}
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    ]
    paths = {"base": "embedded", **models}
    result = {
        "options": {"samples": count, "prompts": "faces", "steps": 20, "guidance": 2.0, "seed": 0},
        "models": {name: {"path": path, "sha256": "beef"} for name, path in paths.items()},
        "rewards": {"human_score": "human sentiment", "distinct": "different emojis"},
        "scorers": {"human_score": {"model": "judge", "sha256": "feed"}},
        "prompts": [f"{prompt} {i}" for i in range(count)],
        "results": results,
        "pairs": {"human_score": pairs},
        "sampling_seconds": 1.5,
        "versions": VERSIONS,
        "commit": "c0ffee",
    }
    (folder / "evaluation.json").write_text(json.dumps(result))
    for shade, name in enumerate(results):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((side, side, 3), 40 * shade + i, np.uint8)
            Image.fromarray(pixels).save(folder / f"images/{name}/{i:05d}.png")
    return folder


def step_result(case: str = "embedded", commit: str = "c0ffee", **changes) -> dict:
    """What `bench_train_step.py` writes: four steps of which the third costs and the last reads
    scores."""
    names = (
        "published structure",
        "pairs encoded before",
        "a lever that costs",
        "reference scores",
    )
    rows = []
    for number, (name, rate) in enumerate(zip(names, (20.0, 32.0, 25.0, 40.0), strict=True)):
        rows.append(
            {
                "name": name,
                "host_reads": 5 - number,
                "step_GiB": 0.125 * (number + 1),
                "state_GiB": 1.5,
                "frozen_GiB": 0.0 if number == 3 else 0.25,
                "seconds": {
                    "median": 16 / rate,
                    "lower_quartile": 16 / (1.25 * rate),
                    "upper_quartile": 16 / (0.8 * rate),
                },
                "work_seconds": 16 / rate,
                "pairs_per_s": rate,
                "data_wait": 0.0025 * number,
                "share_of_arithmetic": rate / 100,
                "times_published": rate / 20,
                "times_published_in_work": rate / 20,
            }
        )
    machine = {"device": "a CPU", "threads": 2, "versions": {"torch": "2.13.0"}, "commit": commit}
    return {
        "case": case,
        "model": "sdxl" if case == "sdxl" else "sd15" if case.startswith("sd15") else case,
        "parameters": 3_500_000,
        "latent": [4, 8, 8],
        "pairs": 16,
        "dtype": "float32",
        "zero_stage": 0,
        "flops_per_pair": 10**9,
        "rounds": 12,
        "matrix_TFLOPs": 0.1,
        "rows": rows,
        "machine": machine,
        **changes,
    }


def write_step(path: Path, *args, **changes) -> Path:
    """The same in a file."""
    path.write_text(json.dumps(step_result(*args, **changes)))
    return path
