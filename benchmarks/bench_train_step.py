"""One optimizer step: the published structure against ours, one lever at a time.

    python benchmarks/bench_train_step.py embedded --output benchmarks/results/train-step-embedded.json

The steps take turns, round after round, in one process on one model, batch and precision. The first
is that of published scripts (`published_step.py`); each next one adds a lever, and the last ones are
the trainer itself: `train.build`, `train.stream` and `train.take_step`; with `--compile regional` or
`whole` the last two run through torch.compile. In float32 on a CPU all share one policy with one set of
moments, for there is no memory for two; else the published structure has its own, in float32 and for
bf16 under autocast. The objective is Diffusion-DPO in all of them. Medians over the rounds; the
operations of the models are counted, and the rate of a matrix product is measured in the same rounds.
Not in the times: logging to files, checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from conftest import commit, launches, peak_extra_bytes
from full_size import machine
from published import write_pipeline, write_random_pairs
from published_step import Encoded, Encoding, Policy, PublishedStep
from torch.utils._python_dispatch import TorchDispatchMode

from dde_fast import embedded, models, prepare, train
from dde_fast.compilation import CompileTime
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig, read_engine_config
from dde_fast.engine import Skips, StopSignal, launch_environment, start_process
from dde_fast.flops import flops_per_pair
from dde_fast.forward import PairForward
from dde_fast.inputs import Inputs, read_inputs
from dde_fast.loader import Loader
from dde_fast.metrics import Meter


@dataclass(frozen=True)
class Case:
    """What is trained."""

    unet: str | None
    """Of `published.UNETS`, with random weights; None: the embedded model."""
    latent: int
    """Height and width."""
    pairs: int
    """Per micro-batch and optimizer step."""
    dtype: str = "float32"
    checkpointing: bool = False
    """Whether ours needs gradient checkpointing too."""
    rounds: int = 20


CASES = {
    "embedded": Case(None, latent=8, pairs=16, rounds=40),
    "sd15-32": Case("sd15", latent=32, pairs=1, rounds=4),
    "sd15": Case("sd15", latent=64, pairs=8, dtype="bfloat16"),
    "sdxl": Case("sdxl", latent=128, pairs=2, dtype="bfloat16", checkpointing=True),
}
"""What can be measured. `sd15-32` is for a CPU with 22 GiB free, the last two are for a GPU."""

BETA = 5000.0


@dataclass
class Variant:
    """A way to take an optimizer step."""

    name: str
    step: Callable[[], None]
    source: Encoding | Loader
    """Where its pairs come from: knows how long it was waited for."""
    unet: torch.nn.Module
    checkpointing: bool = False
    reference: bool = True
    encoders: bool = False
    stance: str = ""
    """Of torch.compile, where it has compiled something."""

    def ready(self) -> None:
        """The policy may be shared with others that do otherwise."""
        if self.checkpointing != self.unet.is_gradient_checkpointing:
            toggle = "enable" if self.checkpointing else "disable"
            getattr(self.unet, f"{toggle}_gradient_checkpointing")()
        if self.stance:
            torch.compiler.set_stance(self.stance)


def configure(
    case: Case, folder: Path, small: bool, compile: str = ""
) -> tuple[TrainConfig, EngineConfig, Path]:
    """Model, pairs, prepared cache and reference scores in a folder, and the run's configuration."""
    model, count = "embedded", 64 if small else 256
    if case.unet is None:
        pairs = embedded.pairs_path("faces")
    else:
        model = str(write_pipeline(folder / "model", case.unet, case.latent, small))
        count = max(8, 2 * case.pairs)
        size = 8 * case.latent
        pairs = write_random_pairs(folder / "p.parquet", size=size, pairs=count, images=count // 2)
    same = {"model": model, "seed": 0, "objective": "diffusion-dpo"}
    cache = prepare.PrepareConfig(
        pairs=str(pairs), output=str(folder / "cache"), dtype=case.dtype, limit=count, **same
    )
    device = prepare.device_of_process()
    print(prepare.start(cache, device).run())
    scores = {"reference_scores": 1, "precision": case.dtype, "score_batch": case.pairs}
    print(prepare.reference_scoring.run(replace(cache, **scores), device))
    ds = {"train_micro_batch_size_per_gpu": case.pairs, "gradient_clipping": 1.0}
    ds["zero_optimization"] = {"stage": 0}
    if case.dtype == "bfloat16":
        ds |= {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
        ds["data_types"] = {"grad_accum_dtype": "fp32"}
    (folder / "ds.json").write_text(json.dumps(ds))
    c = TrainConfig(
        deepspeed_config=str(folder / "ds.json"),
        pairs=cache.output,
        output=str(folder / "run"),
        reference_scores=1,
        beta=BETA,
        steps=10**6,
        gradient_checkpointing=case.checkpointing,
        compile=compile,
        **same,
    )
    return c, read_engine_config(c, 1), pairs


def make_variants(
    c: TrainConfig, e: EngineConfig, inputs: Inputs, pairs: Path, device: torch.device
) -> list[Variant]:
    """The published step, then with one lever more each."""
    ours = train.build(c, e, replace(inputs, scores=None), device)
    engine, loss_fn, reference = ours.engine, ours.loss_fn, ours.reference
    scored = PairForward(c, e, inputs, engine, None, loss_fn)

    def stream(scores=None) -> Loader:
        return train.stream(c, e, inputs.data, scores, 0, device)

    # The published structure's policy. PyTorch's AdamW as it comes counts its steps on the host, the
    # fused one on the device: on a GPU they cannot share.
    shared = e.dtype == torch.float32 and device.type == "cpu"
    unet = engine.module if shared else models.load_unet(c.model).to(device).train()
    optimizer = torch.optim.AdamW(unet.parameters(), c.learning_rate, weight_decay=c.weight_decay)
    if shared:
        optimizer.state = engine.optimizer.state
    policy = Policy(unet, optimizer, None if e.dtype == torch.float32 else e.dtype)
    published = PublishedStep(
        policy,
        reference,
        models.load_scheduler(c.model),
        beta=BETA,
        accumulation=e.accumulation,
        dtype=e.dtype,
    )
    plain = PairForward(c, e, inputs, policy, reference, loss_fn)

    def plain_step(batches: Loader) -> None:
        for _ in range(e.accumulation):
            (plain(next(batches)).loss / e.accumulation).backward()
        loss_fn.update_ratios()
        policy.update()

    def trainer_step(forward: PairForward, batches: Loader) -> Callable[[], None]:
        meter, skips, stop = Meter(device, len(inputs.alphas_cumprod)), Skips(device), StopSignal()
        stop.restore()
        return partial(train.take_step, forward, e, batches, meter, skips, stop)

    encoders = models.Encoders.load(c.model, device)
    size = inputs.data.manifest.settings["height"]
    encoding = Encoding(encoders, pairs, size=size, pairs=e.micro_batch, dtype=e.dtype)
    loaders = [stream() for _ in range(4 + bool(c.compile))] + [stream(inputs.scores)]
    old, new = {"unet": unet, "checkpointing": c.gradient_checkpointing}, {"unet": engine.module}
    new["checkpointing"] = c.gradient_checkpointing
    variants = [
        Variant("published structure", partial(published, encoding), encoding, unet, True, encoders=True),
        Variant("pairs encoded before", partial(published, Encoded(loaders[0])), loaders[0], unet, True),
        Variant("no gradient checkpointing", partial(published, Encoded(loaders[1])), loaders[1], **old),
        Variant("fused noise and loss", partial(plain_step, loaders[2]), loaders[2], **old),
        Variant("the trainer: fused AdamW", trainer_step(ours, loaders[3]), loaders[3], **new),
        Variant("reference scores", trainer_step(scored, loaders[-1]), loaders[-1], **new, reference=False),
    ]  # fmt: skip
    if c.gradient_checkpointing:
        variants.pop(2)
    if c.compile:  # in place: the others must not use it
        for variant in variants[:-1]:
            variant.stance = "force_eager"
        variants[-1].stance, name = "default", f"torch.compile, {c.compile}"
        step = trainer_step(ours, loaders[4])
        variants.insert(-1, Variant(name, step, loaders[4], **new, stance="default"))
    return variants


class HostReads(TorchDispatchMode):
    """Counts how often the host asks for a number that the device computes.

    Args:
        counters: numbers that live on the host: an optimizer's of its steps.
    """

    def __init__(self, counters: set[int]):
        super().__init__()
        self.counters, self.count = counters, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += id(args[0]) not in self.counters
        return func(*args, **(kwargs or {}))


def inspect(variant: Variant, frozen: dict[str, int], counters: set[int]) -> dict:
    """What a step needs beside time, of steps that nobody measures."""
    variant.ready()
    compiling = CompileTime()
    if variant.stance == "default":
        variant.step()
    seconds = compiling.lately()
    with HostReads(counters) as reads:
        variant.step()
    held = variant.reference * frozen["reference"] + variant.encoders * frozen["encoders"]
    found = {
        "name": variant.name,
        "host_reads": reads.count,
        "step_GiB": peak_extra_bytes(variant.step) / 2**30,
        "frozen_GiB": held / 2**30,
    }
    if seconds:
        found["compile_seconds"] = seconds
    if torch.cuda.is_available():
        found["launches"] = launches(variant.step)
    return found


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of this process's work on all its cores."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    wall, work = time.perf_counter(), time.process_time()
    call()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - work


def matrix_product(dtype: torch.dtype, device: torch.device, small: bool) -> tuple[Callable, int]:
    """A product of square matrices, and its operations."""
    n = 64 if small else 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, dtype=dtype, device=device)
    return lambda: a @ a, 2 * n**3


def take_turns(variants: list[Variant], rounds: int, product: Callable) -> tuple[dict, list[float]]:
    """Name -> seconds, work and waits of its step in each round; seconds of the product."""
    seen: dict[str, list[tuple[float, float, float]]] = {v.name: [] for v in variants}
    products = []
    timed(product)
    for turn in range(rounds):
        first = turn % len(variants)  # what comes first in a round has no advantage by it
        for variant in variants[first:] + variants[:first]:
            variant.ready()
            products.append(timed(product)[0])
            waited = variant.source.waited
            seconds = timed(variant.step)
            seen[variant.name].append((*seconds, variant.source.waited - waited))
    return seen, products


def summary(rows: list[dict], seen: dict, rate: float, pairs: int, flops: dict[str, int]) -> None:
    """Add medians to the rows."""
    for row in rows:
        seconds, work, waits = zip(*seen[row["name"]], strict=True)
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
        row["seconds"] = {"median": median, "lower_quartile": low, "upper_quartile": high}
        row["work_seconds"] = statistics.median(work)
        row["pairs_per_s"] = pairs / median
        row["data_wait"] = sum(waits) / sum(seconds)
        row["share_of_arithmetic"] = flops[row["name"]] * pairs / median / rate
    first = rows[0]
    for row in rows:
        row["times_published"] = first["seconds"]["median"] / row["seconds"]["median"]
        row["times_published_in_work"] = first["work_seconds"] / row["work_seconds"]


def measure(
    name: str, case: Case, rounds: int, small: bool, folder: Path, compile: str = ""
) -> dict:
    """The result of one case."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")  # the seconds of a first start
    launch_environment()
    models.quiet_libraries()
    device = start_process()
    torch.manual_seed(0)
    c, e, pairs = configure(case, folder, small, compile)
    inputs = read_inputs(c, e)
    cache = inputs.data
    pooled = cache.empty.get("pooled")
    shapes = {"latent": cache.latent_shape, "embedding": cache.empty["embeddings"].shape}
    shapes["pooled"] = None if pooled is None else len(pooled)
    count = {ran: flops_per_pair(inputs.unet, **shapes, reference=ran) for ran in (False, True)}
    parameters = sum(weight.numel() for weight in inputs.unet.parameters())

    variants = make_variants(c, e, inputs, pairs, device)
    product, operations = matrix_product(e.dtype, device, small)
    frozen = {
        "reference": parameters * e.dtype.itemsize,
        "encoders": sum(
            tensor.nbytes for part in variants[0].source.parts for tensor in part.parameters()
        ),
    }
    variants[0].ready()
    variants[0].step()  # the optimizer's moments
    counters = {
        id(state["step"]) for state in variants[0].step.func.policy.optimizer.state.values()
    }
    rows = [inspect(variant, frozen, counters) for variant in variants]
    seen, products = take_turns(variants, rounds, product)
    rate = operations / statistics.median(products)
    flops = {variant.name: count[variant.reference] for variant in variants}
    summary(rows, seen, rate, e.batch, flops)
    for row in rows:
        if "compile_seconds" in row:
            row["name"] += f" ({row['compile_seconds']:.0f} s to compile)"
    for variant in variants[1:]:
        variant.source.close()
    result = {
        "case": name,
        "model": case.unet or "embedded",
        "parameters": parameters,
        "latent": list(cache.latent_shape),
        "pairs": e.batch,
        "dtype": case.dtype,
        "zero_stage": e.stage,
        "flops_per_pair": count[True],
        "rounds": rounds,
        "matrix_TFLOPs": rate / 1e12,
        "rows": rows,
        "machine": machine() | {"commit": commit()},
    }
    return rounded(result)


def rounded(value):
    """Five digits of every float."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    """Measure one case and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, help="in which each step is taken once")
    parser.add_argument("--small", action="store_true", help="tiny models, for a test")
    parser.add_argument("--compile", default="", help="add torch.compile, regional or whole")
    args = parser.parse_args()
    case = CASES[args.case]
    if args.small:
        case = replace(case, latent=8, pairs=2)
    elif case.unet is not None and Path("/proc/self/oom_score_adj").exists():
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first to end without memory
    with tempfile.TemporaryDirectory() as folder:
        rounds = args.rounds or case.rounds
        result = measure(args.case, case, rounds, args.small, Path(folder), args.compile)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        print({key: row[key] for key in ("name", "pairs_per_s", "times_published", "times_published_in_work")})  # fmt: skip
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
