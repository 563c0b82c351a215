"""One optimizer step: the published structure against ours, one lever at a time.

    python benchmarks/bench_train_step.py embedded --output benchmarks/results/train-step-embedded.json

The steps take turns, round after round, in one process on one model, batch and precision. The first
is that of published scripts (`published_step.py`); each next one adds a lever, and the last ones are
the trainer itself: `train.build`, `train.stream` and `train.take_step`; with `--compile regional` or
`whole` the last two run through torch.compile. In float32 on a CPU all share one policy with one set of
moments, for there is no memory for two; else the published structure has its own, in float32 and for
bf16 under autocast. The objective is Diffusion-DPO in all of them, and a step has several micro-batches,
though fewer than a real run's. Medians over the rounds; the operations of the models are counted, and the
rate of a matrix product is measured in the same rounds. What data is waited for is measured after them,
in consecutive steps. Not in the times: logging to files, checkpoints. The result is written after each
round, and before them, without times, after the first steps of each variant. A variant for which a GPU's
memory does not suffice stands under `failed` instead; SDXL's two policies need a GPU of 140 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from conftest import commit
from full_size import machine
from published import write_pipeline, write_random_pairs
from published_step import Encoded, Encoding, Policy, PublishedStep
from step_costs import (
    Variant,
    data_wait,
    inspect,
    matrix_product,
    rounded,
    summary,
    take_turns,
    within_memory,
)

from dde_fast import embedded, models, prepare, train
from dde_fast.attention import ATTENTION
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig, read_engine_config
from dde_fast.engine import StopSignal, launch_environment, start_process
from dde_fast.flops import flops_per_pair
from dde_fast.forward import PairForward
from dde_fast.inputs import Inputs, read_inputs
from dde_fast.levers import PUBLISHED
from dde_fast.loader import Loader
from dde_fast.metrics import Meter
from dde_fast.optimizer_step import Skips
from dde_fast.shards import write_file


@dataclass(frozen=True)
class Case:
    """What is trained."""

    unet: str | None
    """Of `published.UNETS`, with random weights; None: the embedded model."""
    latent: int
    """Height and width."""
    pairs: int
    """Per micro-batch."""
    accumulation: int
    """Micro-batches per optimizer step: with one alone the optimizer would weigh more than it does
    in a run."""
    dtype: str = "float32"
    checkpointing: bool = False
    """Whether ours needs gradient checkpointing too."""
    rounds: int = 20
    attention: str = "sdpa"
    """Of the trainer, by its name for it; what comes before it keeps diffusers' own."""
    compile: str = ""
    """Of our last two variants."""


CASES = {
    "embedded": Case(None, latent=8, pairs=16, accumulation=2, rounds=40),
    "sd15-32": Case("sd15", latent=32, pairs=1, accumulation=2, rounds=4),
    "sd15": Case("sd15", latent=64, pairs=8, accumulation=4, dtype="bfloat16"),
    "sdxl": Case("sdxl", latent=128, pairs=2, accumulation=4, dtype="bfloat16", checkpointing=True),
}
"""What can be measured. `sd15-32` is for a CPU with 22 GiB free, the last two are for a GPU."""

ENOUGH = 130 * 2**30
"""Bytes of a GPU on which no case needs gradient checkpointing."""

BETA = 5000.0


def configure(case: Case, folder: Path, small: bool) -> tuple[TrainConfig, EngineConfig, Path]:
    """Model, pairs, prepared cache and reference scores in a folder, and the run's configuration."""
    model, count = "embedded", 64 if small else 256
    if case.unet is None:
        pairs = embedded.pairs_path("faces")
    else:
        model = str(write_pipeline(folder / "model", case.unet, case.latent, small))
        count = max(8, 2 * case.pairs * case.accumulation)
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
    ds |= {"gradient_accumulation_steps": case.accumulation, "zero_optimization": {"stage": 0}}
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
        attention=case.attention,
        compile=case.compile,
        **same,
    )
    return c, read_engine_config(c, 1), pairs


def configure_aside(
    case: Case, folder: Path, small: bool
) -> tuple[TrainConfig, EngineConfig, Path]:
    """The same in a process of its own: what models and pictures took there is given back."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as aside:
        aside.submit(models.quiet_libraries).result()
        return aside.submit(configure, case, folder, small).result()


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
    # fused one on the device: on a GPU they cannot share. Nor can UNets of two kinds of attention.
    alike = c.attention == Case.attention
    shared = e.dtype == torch.float32 and device.type == "cpu" and alike
    unet = engine.module if shared else models.load_unet(c.model).to(device).train()
    optimizer = torch.optim.AdamW(unet.parameters(), c.learning_rate, weight_decay=c.weight_decay)
    if shared:
        optimizer.state = engine.optimizer.state
    policy = Policy(unet, optimizer, None if e.dtype == torch.float32 else e.dtype)
    if not alike:
        reference = models.load_reference(inputs.model, e.dtype, device)
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
    first = {"unet": unet, "optimizer": optimizer, "checkpointing": True}
    old = first | {"checkpointing": c.gradient_checkpointing}
    new = old | {"unet": engine.module, "optimizer": engine.optimizer}
    trainer = "" if alike else f"{c.attention} attention, "
    trainer += "" if e.dtype == torch.float32 else f"bf16 weights, ZeRO-{e.stage}, "
    variants = [
        Variant(PUBLISHED, partial(published, encoding), encoding, **first, encoders=True),
        Variant("pairs encoded before", partial(published, Encoded(loaders[0])), loaders[0], **first),
        Variant("no gradient checkpointing", partial(published, Encoded(loaders[1])), loaders[1], **old),
        Variant("fused noise and loss", partial(plain_step, loaders[2]), loaders[2], **old),
        Variant(f"the trainer: {trainer}fused AdamW", trainer_step(ours, loaders[3]), loaders[3], **new),
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


def measure(
    name: str, case: Case, rounds: int, small: bool, folder: Path, write: Callable[[dict], None]
) -> None:
    """Measure one case, and write the result so far as it goes."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")  # the seconds of a first start
    launch_environment()
    models.quiet_libraries()
    c, e, pairs = configure_aside(case, folder, small)
    device = start_process()
    torch.manual_seed(0)
    inputs = read_inputs(c, e)
    cache = inputs.data
    pooled = cache.empty.get("pooled")
    shapes = {"latent": cache.latent_shape, "embedding": cache.empty["embeddings"].shape}
    shapes["pooled"] = None if pooled is None else len(pooled)
    count = {ran: flops_per_pair(inputs.unet, **shapes, reference=ran) for ran in (False, True)}
    parameters = sum(weight.numel() for weight in inputs.unet.parameters())

    variants = make_variants(c, e, inputs, pairs, device)
    product = matrix_product(e.dtype, device, small)
    frozen = {
        "reference": parameters * e.dtype.itemsize,
        "encoders": sum(
            tensor.nbytes for part in variants[0].source.parts for tensor in part.parameters()
        ),
    }
    about = {
        "case": name,
        "model": case.unet or "embedded",
        "parameters": parameters,
        "latent": list(cache.latent_shape),
        "pairs": e.batch,
        "micro_batches": e.accumulation,
        "pairs_per_micro_batch": e.micro_batch,
        "dtype": case.dtype,
        "attention": case.attention,
        "zero_stage": e.stage,
        "flops_per_pair": count[True],
        "machine": machine() | {"commit": commit()},
    }
    rows = look(variants, frozen, about, write)
    flops = [count[variant.reference] for variant in variants]
    waits = {"cpu": 1, "cuda": 2}[device.type] if case.unet else 5
    follow(variants, rows, flops, about, rounds, product, waits, write)
    for variant in variants[1:]:
        variant.source.close()


def look(
    variants: list[Variant], frozen: dict[str, int], about: dict, write: Callable[[dict], None]
) -> list[dict | None]:
    """What `inspect` finds of each, written and said as it goes; None where memory does not suffice.

    Raises:
        SystemExit: it does for none.
    """
    variants[0].ready()
    within_memory(variants[0], variants[0].step)  # the optimizer's moments
    counters = {id(state["step"]) for state in variants[0].optimizer.state.values()}
    rows = []
    for variant in variants:
        rows.append(within_memory(variant, partial(inspect, variant, frozen, counters)))
        print(rows[-1], flush=True)
        found = {"rounds": 0, "rows": [row for row in rows if row]}
        write(rounded(about | found | failures(variants)))
    if not any(rows):
        raise SystemExit("no step fits into this GPU's memory")
    return rows


def failures(variants: list[Variant]) -> dict:
    """What a result says of variants that do not fit."""
    failed = {variant.name: variant.failed for variant in variants if variant.failed}
    return {"failed": failed} if failed else {}


def follow(
    variants: list[Variant],
    rows: list[dict | None],
    flops: list[int],
    about: dict,
    rounds: int,
    product: tuple[Callable, int],
    waits: int,
    write: Callable[[dict], None],
) -> None:
    """Measure the variants and write the result so far after each round, and with the waits at the end.

    Args:
        variants: what takes turns.
        rows: of `look`.
        flops: per pair, of each.
        about: what the result says beside.
        rounds: how many.
        product: of `matrix_product`.
        waits: consecutive steps in which waiting for data counts.
        write: takes the result.
    """
    multiply, operations = product
    for done, (seen, products) in enumerate(take_turns(variants, rounds, multiply), 1):
        rate = operations / statistics.median(products)
        result = about | {"rounds": done, "matrix_TFLOPs": rate / 1e12} | failures(variants)
        ran = [i for i, variant in enumerate(variants) if not variant.failed]
        result["rows"] = summary(
            [rows[i] for i in ran],
            [seen[variants[i].name] for i in ran],
            rate,
            about["pairs"],
            [flops[i] for i in ran],
            published=0 in ran,
        )
        write(rounded(result))
    for i, row in zip(ran, result["rows"], strict=True):
        call = partial(data_wait, variants[i], waits, about["micro_batches"])
        if (share := within_memory(variants[i], call)) is not None:
            row["data_wait"] = share
    write(rounded(result | failures(variants)))


def choose(args: argparse.Namespace) -> Case:
    """The case that a command line means, on this machine."""
    case = CASES[args.case]
    if args.small:
        case = replace(case, latent=8, pairs=2, accumulation=2)
    elif torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= ENOUGH:
        case = replace(case, checkpointing=False)
    pairs = args.pairs or case.pairs
    return replace(case, pairs=pairs, compile=args.compile, attention=args.attention)


def parse(args: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, help="in which each step is taken once")
    parser.add_argument("--small", action="store_true", help="tiny models, for a test")
    parser.add_argument(
        "--compile", default="", help="add torch.compile: regional, whole or graphs"
    )
    parser.add_argument("--attention", default="sdpa", choices=ATTENTION, help="of the trainer")
    parser.add_argument("--pairs", type=int, help="of a micro-batch")
    return parser.parse_args(args)


def main() -> None:
    """Measure one case and write it."""
    args = parse()
    case = choose(args)
    if case.unet is not None and not args.small and Path("/proc/self/oom_score_adj").exists():
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first to end without memory
    args.output.parent.mkdir(parents=True, exist_ok=True)

    def write(result: dict) -> None:
        write_file(args.output, f"{json.dumps(result, indent=1)}\n".encode())

    with tempfile.TemporaryDirectory() as folder:
        measure(args.case, case, args.rounds or case.rounds, args.small, Path(folder), write)
    for row in json.loads(args.output.read_text())["rows"]:
        print({key: row.get(key) for key in ("name", "pairs_per_s", "times_published", "times_published_in_work")})  # fmt: skip
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
