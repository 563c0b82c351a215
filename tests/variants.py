"""Runs of the trainer with adapters, averages, other optimizers, recomputed blocks and the JSONs of
`configs/`.

Run once for the tests of lora, ema, optimizers, activations, forecast and export; the functions here are called by the
fixtures of conftest.py.
"""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from train_runs import BF16, HALF, ROOT, Folder, stage

from dde_fast.metrics import OF_THE_MACHINE

EMA = {"ema_decay": 0.25}  # reached after two updates
LORA = {"lora_rank": 4, "lora_alpha": 8, "beta": 100.0, **EMA}
WIDE = "to_q,to_out.0,ff.net.0.proj,ff.net.2,proj_in,conv1,time_emb_proj,conv_shortcut"
BLOCKS = "down_blocks.0,up_blocks.1"
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.json"))
QUANTISED = ["adamw8bit", "lion8bit"] if importlib.util.find_spec("bitsandbytes") else []
ON_TWO = ["multi-node"]
RESUMED = ["zero1", "zero3-offload"]  # each with an optimizer of DeepSpeed's that no other run has


def config_json(name: str, ranks: int) -> dict:
    """A JSON of `configs/` with four pairs per step, and as many ranks per node as there are."""
    ds = json.loads((ROOT / f"configs/{name}.json").read_text())
    zero = ds["zero_optimization"]
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = ranks
    return ds | {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1}


def run_alone(path: Path) -> Folder:
    folder = Folder(path)

    def run(name: str, *, resume_at: int = 0, **flags) -> list[dict]:
        if not resume_at:
            return [{"args": folder.args(name, **flags)}]
        begun = folder.args(name, **flags | {"steps": resume_at})
        return [{"args": begun}, {"args": folder.args(name, **flags, resume="latest")}]

    jobs = [
        {"args": folder.args("plain_ema", **EMA), "plain": True},
        {"args": folder.args("plain_lora", **LORA), "plain": True},
        {"args": folder.args("plain_lora_gentle", **LORA | {"beta": 1.0}), "plain": True},
        {
            "args": [
                *folder.args("lora_checkpointing", ds=stage(1), **LORA),
                "--gradient_checkpointing",
            ]
        },
        *run("lora_wide", **LORA | {"lora_targets": WIDE, "steps": 2}),
        *run("adafactor", optimizer="adafactor", steps=4),
        *run("adafactor_resumed", optimizer="adafactor", steps=4, resume_at=2),
    ]
    for name in QUANTISED:
        jobs += run(name, ds=stage(2), optimizer=name)
        jobs += run(f"{name}_resumed", ds=stage(2), optimizer=name, resume_at=3)
    # stage 3 comes last: DeepSpeed then replaces torch's linear for the rest of the process
    for n in range(4):
        jobs += run(f"lora{n}", ds=stage(n), **LORA)
        if n != 1:  # is made like stage 2
            jobs += run(f"lora{n}_resumed", ds=stage(n), **LORA, resume_at=4)
            jobs += run(f"ema{n}", ds=stage(n), **EMA)
            jobs += run(f"blocks{n}", ds=stage(n), **EMA, checkpoint_blocks=BLOCKS)
        if n == 2:  # what is recomputed is free when a run is continued
            jobs += run("blocks_resumed", ds=stage(n), **EMA, steps=4)
            more = {"checkpoint_blocks": "mid_block", "resume": "latest"}
            jobs += run("blocks_resumed", ds=stage(n), **EMA, **more)
        if n > 1:
            half = stage(n, **BF16)
            jobs += run(f"lora_bf16_{n}", ds=half, **LORA | {"beta": 1.0})
            jobs += run(f"ema_bf16_{n}", ds=half, **EMA, steps=4, save_every=1, keep=0)
    known = {"checkpoint_blocks": "down_blocks.0", "peak_tflops": 1e-3}
    jobs += run("lora_blocks", ds=stage(3), **LORA, **known)
    jobs.append({"args": folder.args("finished", "ema2", ds=stage(2), resume="latest", **EMA)})
    for name in sorted(set(CONFIGS) - set(ON_TWO)):
        ds = config_json(name, 1)
        jobs += run(f"config_{name}", ds=ds, **EMA, steps=2)
        if name in RESUMED:
            jobs += run(f"config_{name}_resumed", ds=ds, **EMA, steps=2, resume_at=1)
    folder.printed = folder.work(jobs, 1, "variants")
    return folder


def run_pair(folder: Folder) -> Folder:
    jobs = [{"args": folder.args(f"two_lora{n}", ds=stage(n, **HALF), **LORA)} for n in (0, 2, 3)]
    half = stage(2, **HALF, **BF16)
    for name, flags in (("replicated", []), ("sharded", ["--shard_reference"])):
        jobs.append({"args": [*folder.args(name, ds=half, steps=3, **EMA), *flags]})
    for name in ON_TWO:
        ds = config_json(name, 2)
        jobs.append({"args": folder.args(f"config_{name}", ds=ds, **EMA, steps=2)})
    folder.work(jobs, 2, "variants_of_two")
    return folder


def weights(folder: Folder, name: str, kind: str) -> dict[str, torch.Tensor]:
    """What a run left in `unet`, `unet_ema`, `lora` or `lora_ema`."""
    files = {"unet": "diffusion_pytorch_model", "lora": "pytorch_lora_weights"}
    state = load_file(folder.path / name / kind / f"{files[kind[:4]]}.safetensors")
    return {key.removeprefix("unet."): value for key, value in state.items()}


def distance(a: dict[str, torch.Tensor], b: dict, start: dict | None = None) -> float:
    """Largest difference, relative to what training moved: an adapter's B, which starts at 0, or
    the difference to `start`."""
    assert a.keys() == b.keys() and a
    if start is None:
        moved = max(value.abs().max() for key, value in b.items() if "lora_B" in key)
    else:
        moved = max((value - start[key]).abs().max() for key, value in b.items())
    assert moved > 1e-5
    return float(max((a[key] - b[key]).abs().max() for key in a) / moved)


def same_run(folder: Folder, a: str, b: str, *kinds: str) -> None:
    """Two runs that must be equal to the bit: what they logged and what they left."""
    for x, y in zip(folder.metrics(a), folder.metrics(b), strict=True):
        for key in x.keys() - OF_THE_MACHINE:
            assert x[key] == y[key], (x["step"], key)
    for kind in kinds:
        theirs, ours = weights(folder, a, kind), weights(folder, b, kind)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs), kind
