"""One optimizer step of DDE at full size, with random weights: time and memory, by hand.

    python benchmarks/full_size.py sd15 --output benchmarks/results/full-size-sd15.json
    python benchmarks/full_size.py sdxl-lora --output benchmarks/results/full-size-sdxl-lora.json

The UNets have the published configurations and the steps go through the trainer's own engine,
forward and loss; bf16 and ZeRO stage 1 by DeepSpeed, gradient checkpointing, one pair. The process
asks to be the first that ends where memory runs out: on a CPU `sd15` takes about 20 GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import ALPHAS_CUMPROD, commit, cpu_name
from diffusers import UNet2DConditionModel
from published import PARAMETERS, make_unet, small_unet

from dde_fast import lora
from dde_fast.attention import use_attention
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig, read_engine_config
from dde_fast.engine import launch_environment, start_engine, start_process
from dde_fast.forward import PairForward
from dde_fast.loader import Batch
from dde_fast.loss import PreferenceLoss
from dde_fast.provenance import version


@dataclass(frozen=True)
class Run:
    """What is measured."""

    unet: str
    latent: int
    """Height and width."""
    lora_rank: int = 0


RUNS = {
    "sd15": Run("sd15", latent=64),
    "sdxl-lora": Run("sdxl", latent=32, lora_rank=64),
}


def random_batch(unet: UNet2DConditionModel, latent: int, device: torch.device) -> Batch:
    """One pair."""
    torch.manual_seed(0)
    width, xl = unet.config.cross_attention_dim, unet.config.addition_embed_type is not None
    ids = unet.config.addition_time_embed_dim
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * ids if xl else 0
    side = 8.0 * latent
    return Batch(
        latents=torch.randn(2, 4, latent, latent, device=device),
        embeddings=torch.randn(1, 77, width, device=device),
        captions=torch.zeros(1, dtype=torch.int64, device=device),
        pooled=torch.randn(1, pooled, device=device) if xl else None,
        time_ids=torch.tensor([[side, side, 0, 0, side, side]] * 2, device=device) if xl else None,
        pair_ids=torch.zeros(1, dtype=torch.int64, device=device),
        draws=torch.zeros(1, dtype=torch.int64, device=device),
    )


def engine_config(c: TrainConfig) -> EngineConfig:
    """bf16, ZeRO stage 1, one pair."""
    ds = {"train_batch_size": 1, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(ds, file)
        file.flush()
        return read_engine_config(replace(c, deepspeed_config=file.name), 1)


def measure(name: str, run: Run, steps: int, **changes) -> dict:
    """Take optimizer steps; seconds and peak memory of each phase."""
    c = TrainConfig(objective="dde", beta=5000.0, learning_rate=2.05e-5, lora_rank=run.lora_rank)
    c = replace(c, gradient_checkpointing=True, warmup_steps=0)
    e = engine_config(c)
    launch_environment()
    device = start_process()
    clock = Phases(device)

    with clock("build"):
        with device:
            unet = make_unet(run.unet, **changes)
        count = sum(parameter.numel() for parameter in unet.parameters())
        assert changes or count == PARAMETERS[run.unet]
        use_attention(unet, c.attention, e.dtype, device)
        if run.lora_rank:
            lora.add_adapters(unet, c)
            engine = start_engine(c, e, unet)
            reference = lora.AdaptersOff(engine)
        else:
            with device:
                reference = make_unet(run.unet, **changes).to(e.dtype).requires_grad_(False)
            reference.load_state_dict(unet.state_dict())
            engine = start_engine(c, e, unet)
            use_attention(reference, c.attention, e.dtype, device)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    loss_fn = PreferenceLoss("dde", alphas_cumprod=ALPHAS_CUMPROD, beta=c.beta).to(device).train()
    loss_fn.auto_update = False
    inputs = SimpleNamespace(
        alphas_cumprod=ALPHAS_CUMPROD.float(),
        timesteps=loss_fn.timestep_probabilities(c.timestep_low, c.timestep_high),
    )
    forward = PairForward(c, e, inputs, engine, reference, loss_fn)
    batch, losses = random_batch(unet, run.latent, device), []
    for step in range(1, steps + 1):
        with clock(f"forward {step}"):
            out = forward(batch)
        with clock(f"backward {step}"):
            engine.backward(out.loss)
        with clock(f"optimizer {step}"):
            engine.step()
            loss_fn.update_ratios()
        losses.append(out.loss.item())
    return {
        "run": name,
        "parameters": count,
        "trained": trained,
        "pairs": 1,
        "latent": [4, run.latent, run.latent],
        "dtype": "bfloat16",
        "zero_stage": 1,
        "gradient_checkpointing": True,
        "losses": losses,
        "phases": clock.phases,
        "peak_GiB": peak_memory(device),
    }


class Phases:
    """Seconds, and the memory in use and at its peak, of each phase."""

    def __init__(self, device: torch.device):
        self.device, self.phases = device, {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.phases[name] = {
            "seconds": round(seconds, 3),
            "in_use_GiB": memory_in_use(self.device),
            "peak_GiB": peak_memory(self.device),
        }
        print(name, self.phases[name], flush=True)


def memory_in_use(device: torch.device) -> float:
    """GiB: allocated on a GPU, else resident of this process."""
    if device.type == "cuda":
        return round(torch.cuda.memory_allocated() / 2**30, 3)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**30, 3)


def peak_memory(device: torch.device) -> float:
    """GiB so far: allocated on a GPU, else resident of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def machine() -> dict:
    """Where it ran, and with what."""
    cuda = torch.cuda.is_available()
    packages = ("torch", "diffusers", "deepspeed", "peft")
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: known for name in packages if (known := version(name))},
        "commit": commit(),
    }


def main() -> None:
    """Measure one run and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="blocks a tenth as wide, for a test")
    args = parser.parse_args()
    run, changes = RUNS[args.run], {}
    if args.small:
        run = replace(run, latent=8, lora_rank=min(run.lora_rank, 4))
        changes = small_unet(run.unet)
    elif Path("/proc/self/oom_score_adj").exists():
        Path("/proc/self/oom_score_adj").write_text("1000")
    result = measure(args.run, run, args.steps, **changes) | {"machine": machine()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
