"""Sample models with equal seeds and prompts, score their images, compare every two of them.

    python -m dde_fast.evaluate --aligned dde=runs/dde/unet sft=runs/sft/unet --prompts faces
    torchrun --nproc_per_node 8 dde_fast/evaluate.py ...    # the processes share the images

Image j of prompt p starts, for every model, from the noise of (seed, p, j). OUTPUT/images/MODEL holds
them as NNNNN.png, number p · images_per_prompt + j; those that are there are not sampled again, so
after a kill the same command continues, and other rewards cost no sampling. evaluation.json holds the
comparison, scores.json the score of every image, grid.png some images.
"""

from __future__ import annotations

import os
import sys

if not __package__:  # run by path: this folder would shadow other modules named config, cache, …
    _folder = os.path.dirname(os.path.abspath(__file__))
    _parent = os.path.dirname(_folder)
    sys.path[:] = [_parent if os.path.abspath(path) == _folder else path for path in sys.path]

import hashlib
import io
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dde_fast import models, rewards
from dde_fast.command_line import parse_command_line
from dde_fast.comparison import bootstrap_interval, compare, compare_all, summarise
from dde_fast.engine import Ranks, launch_environment, one_line_errors, say
from dde_fast.figures import grid, spread
from dde_fast.manifest import DTYPES, check_settings, write_settings
from dde_fast.prompts import read_prompts
from dde_fast.provenance import git_commit, versions
from dde_fast.relabel import relabel
from dde_fast.report import format_table
from dde_fast.samples import (
    Images,
    ddim_pipeline,
    load_pipeline,
    model_hash,
    part_of,
    sample,
    sample_batches,
)
from dde_fast.scorer import Scorer
from dde_fast.shards import write_file

__all__ = [
    "Evaluation",
    "bootstrap_interval",
    "compare",
    "compare_all",
    "ddim_pipeline",
    "evaluate",
    "git_commit",
    "load_pipeline",
    "model_hash",
    "read_prompts",
    "sample",
    "summarise",
    "versions",
]

DEFAULTS = {
    "faces": (256, ["human_score", "prompt_match", "distinct"]),
    "style": (8, ["colourfulness", "prompt_match", "distinct"]),
}
"""Images per prompt and rewards of the embedded prompt sets; other sets get one image, and need
`--rewards`."""

RELABELLING = ("relabel", "split", "rewards", "output", "batch", "device")
"""Fields that `relabel` uses; the others are of sampling."""

COLUMNS = 12
"""Of the picture."""


@dataclass
class Evaluation:
    """Sample models with equal seeds and prompts, score their images and compare them."""

    base: str = "embedded"
    """The model to compare with: "embedded", a diffusers directory or hub name, or a single
    FILE.safetensors, as in training."""
    aligned: list[str] = field(default_factory=list)
    """Models to compare, NAME=MODEL each: as `base`, or a directory of a UNet or LoRA, which is put
    into the base's pipeline."""
    prompts: str = "faces"
    """Prompts: "faces", "style" (held-out names); a text file, one a line; a CSV, TSV, JSON, JSONL or
    parquet file of them (Pick-a-Pic's, PartiPrompts', HPDv2's); a folder or a hub data set of such
    files."""
    split: str = ""
    """Of `prompts` that are a folder or hub data set: the word that the names of its files begin
    with, such as test_unique; several, separated by commas. Of "style": train or test, the default.
    Of `relabel`: as in training."""
    limit: int = 0
    """Use only the first prompts, this many; 0 = all."""
    images_per_prompt: int = 0
    """Images of each prompt and model; 0 = 256 of "faces", 8 of "style", else 1."""
    steps: int = 20
    """DDIM steps (η = 0)."""
    guidance: float = 2.0
    """Classifier-free guidance scale; 1 is none."""
    seed: int = 0
    """Of noise and bootstrap: image j of prompt p depends on it, p and j alone."""
    dtype: str = "float32"
    """Of UNet and text encoders: float32, or float16 or bfloat16 on a GPU. The VAE decodes in
    float32."""
    rewards: list[str] | None = None
    """Rewards, NAME or NAME=WEIGHTS each; by default those of the embedded prompts."""
    relabel: str = ""
    """Sample nothing: score these preference pairs (as `--pairs` in training) with the rewards and
    write them to `output` in Pick-a-Pic's columns, labelled by the first of the rewards."""
    output: Path = Path("runs/evaluation")
    """Directory of the results: new, or one that the same command began."""
    batch: int = 64
    """Images sampled, or scored, at a time."""
    device: str = "auto"
    """"auto" (this process's GPU if there is one), or a torch device."""


def parse(args: Sequence[str] | None = None) -> Evaluation:
    """The configuration of a command line. Raises ValueError with one line for what is wrong."""
    config = parse_command_line(Evaluation, args)
    check(config)
    return config


def check(config: Evaluation) -> None:
    """Refuse what cannot be evaluated, before anything is sampled."""
    c = config
    for name, valid, expected in (
        ("limit", c.limit >= 0, "0 (all) or a number of prompts"),
        ("images_per_prompt", c.images_per_prompt >= 0, "0 (the default) or more"),
        ("steps", 1 <= c.steps <= 1000, "1 to 1000"),
        ("guidance", 1 <= c.guidance < math.inf, "at least 1"),
        ("seed", 0 <= c.seed < 2**63, "0 or more, below 2**63"),
        ("dtype", c.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        ("batch", c.batch >= 1, "at least 1"),
        ("rewards", c.rewards is None or c.rewards, "at least one name"),
        ("rewards", c.rewards or not c.relabel, "the one to label by, first"),
    ):
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {getattr(c, name)}")
    for option in fields(c) if c.relabel else ():
        given = getattr(c, option.name)
        if option.name not in RELABELLING and given != Evaluation.__dict__.get(option.name, []):
            raise ValueError(f"{option.name}: expected its default with --relabel, got {given}")
    for spec in c.rewards or []:
        rewards.find(spec)
    try:
        torch.zeros((), device=_device(c.device)).item()
    except (RuntimeError, AssertionError) as error:  # unknown; without numbers; torch without CUDA
        raise ValueError(
            f"device: expected auto or a torch device, got {c.device!r} ({error})"
        ) from None
    if c.relabel:
        return
    if c.rewards is None and c.prompts not in DEFAULTS:
        raise ValueError("rewards: expected names, as a file of prompts has no default rewards")
    if part_of(c.base):
        raise ValueError(f"base: expected a whole model, got the {part_of(c.base)} {c.base!r}")
    for argument, model in [
        ("base", c.base),
        *(("aligned", m) for m in aligned_models(c).values()),
    ]:
        try:
            if not part_of(model):
                models.locate(model)
        except ValueError as error:
            raise ValueError(f"{argument}{str(error).removeprefix('model')}") from None


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def aligned_models(config: Evaluation) -> dict[str, str]:
    """The `aligned` option as name to path, in the order given."""
    named: dict[str, str] = {}
    for item in config.aligned:
        name, separator, path = item.partition("=")
        if not (separator and path and re.fullmatch(r"[\w+-][\w.+-]*", name)):
            raise ValueError(
                f"aligned: expected NAME=MODEL, the name of letters, digits and . _ + -, got {item!r}"
            )
        if name in named or name == "base":
            raise ValueError(f"aligned: expected different names, none of them base, got {name!r}")
        named[name] = path
    return named


def sample_model(
    c: Evaluation, images: Images, model: str, prompts: list[str], ranks: Ranks
) -> int:
    """Sample this rank's share of what is missing; how many images that was."""
    pipeline = None
    with ranks.together():
        pipeline = load_pipeline(c.base, model, _device(c.device), DTYPES[c.dtype])
        if ranks.rank == 0:
            images.claim({"path": model, "sha256": model_hash(pipeline)})
    with ranks.together():
        own = range(ranks.rank, len(prompts), ranks.count)
        missing = images.missing(own)
        batches = sample_batches(
            pipeline,
            [prompts[n] for n in missing],
            seed=c.seed,
            steps=c.steps,
            guidance=c.guidance,
            batch=c.batch,
            indices=[n // c.images_per_prompt for n in missing],
            draws=[n % c.images_per_prompt for n in missing],
        )
        name = images.folder.name
        bar = {"desc": name, "unit": "image", "disable": ranks.rank != 0 or None}
        with tqdm(total=len(own), initial=len(own) - len(missing), **bar) as progress:
            for start, batch in zip(range(0, len(missing), c.batch), batches, strict=True):
                for n, image in zip(missing[start:], batch, strict=False):
                    images.write(n, image)
                progress.update(len(batch))
    return len(missing)


def score_model(
    c: Evaluation, scorer: Scorer, images: Images, prompts: list[str], ranks: Ranks
) -> Any:
    """A model's scores: float32 [N]; of a whole set one number, or (number, its std)."""
    device, own, parts = _device(c.device), range(ranks.rank, len(prompts), ranks.count), []
    with ranks.together(), torch.no_grad():
        for start in range(0, len(own), c.batch):
            numbers = own[start : start + c.batch]
            shown, asked = images.read(numbers).to(device), [prompts[n] for n in numbers]
            values = scorer.values(shown, asked, c.batch).cpu()
            finite = values.isfinite().reshape(len(values), -1).all(1).tolist()
            if not all(finite):
                path = str(images.path(numbers[finite.index(False)]))
                raise ValueError(
                    f"rewards: expected finite scores of {scorer.name}, got others for {path!r}"
                )
            parts.append(values)
    shares = ranks.gather(torch.cat(parts) if parts else None)
    values = shares[0].new_empty(len(prompts), *shares[0].shape[1:])
    for rank, share in enumerate(shares):
        if share is not None:
            values[rank :: ranks.count] = share
    if scorer.per == "image":
        return values.numpy()
    with ranks.together():
        if hasattr(scorer, "with_std"):
            return tuple(map(float, scorer.with_std(values.to(device))))
        return float(scorer.whole(values.to(device)))


def evaluate(config: Evaluation) -> dict[str, Any]:
    """Run the evaluation and write its results into `output`; all ranks must call.

    Returns:
        the content of evaluation.json: `options`, `models` (path and sha256 of the weights), `rewards`
        and `scorers` (about and identity of each), `prompts` (of each image), `seeds`, `results` and
        `pairs` (as `comparison.summarise` and `compare_all` give them), `sampled` images in
        `sampling_seconds` by this run, `versions`, `commit`.
    """
    c, ranks = config, Ranks()
    with ranks.together():
        check(c)
        asked = read_prompts(c.prompts, split=c.split)[: c.limit or None]
        per_prompt, specs = DEFAULTS.get(c.prompts, (1, None))
        c = replace(c, images_per_prompt=c.images_per_prompt or per_prompt)
        specs = c.rewards or specs
        prompts = [prompt for prompt in asked for _ in range(c.images_per_prompt)]
        named = {"base": c.base, **aligned_models(c)}
        scorers = {spec: rewards.load_reward(spec) for spec in specs}
        for scorer in scorers.values():
            scorer.check(asked)
        names = ("images_per_prompt", "seed", "steps", "guidance", "dtype")
        settings = {name: getattr(c, name) for name in names} | {
            "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
            "models": sorted(named),
        }
        if ranks.rank == 0:
            check_settings(c.output, settings, "an evaluation")
            write_settings(c.output, settings)
    folders = {name: Images(c.output / "images" / name, len(prompts)) for name in named}

    start = time.perf_counter()
    sampled = [sample_model(c, folders[n], named[n], prompts, ranks) for n in named]
    seconds = time.perf_counter() - start

    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # scorers may be other processes' size
    scores: dict[str, dict[str, Any]] = {name: {} for name in named}
    for spec, scorer in scorers.items():
        for name, images in folders.items():
            scores[name][spec] = score_model(c, scorer, images, prompts, ranks)
        scorer.to("cpu")  # makes room for the next one

    options = {"seed": c.seed, "images_per_prompt": c.images_per_prompt}
    pairs = compare_all(scores, **options)
    result = {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(c).items()},
        "models": {name: images.model() for name, images in folders.items()},
        "rewards": {spec: rewards.find(spec)[1].about for spec in scorers},
        "scorers": {spec: scorer.identity() for spec, scorer in scorers.items()},
        "prompts": prompts,
        "seeds": options | {"image": "n = p * images_per_prompt + j has the noise of (seed, p, j)"},
        "results": summarise(scores, pairs),
        "pairs": pairs,
        "sampled": sum(map(sum, ranks.gather(sampled))),
        "sampling_seconds": round(seconds, 2),
        "versions": versions(),
        "commit": git_commit(),
    }
    with ranks.together():
        if ranks.rank == 0:
            write_results(c.output, result, scores, folders)
    return result


def write_results(
    output: Path, result: dict[str, Any], scores: dict[str, Any], folders: dict[str, Images]
) -> None:
    """Write scores.json, grid.png and, last, evaluation.json."""
    prompts = result["prompts"]
    per_image = {
        model: {spec: list(map(float, v)) for spec, v in found.items() if isinstance(v, np.ndarray)}
        for model, found in scores.items()
    }
    shown = spread(len(prompts), COLUMNS)
    picture, file = {name: images.read(shown) for name, images in folders.items()}, io.BytesIO()
    grid(picture, [prompts[n] for n in shown], columns=COLUMNS).save(file, "png")
    write_file(output / "scores.json", (json.dumps(per_image) + "\n").encode())
    write_file(output / "grid.png", file.getvalue())
    write_file(output / "evaluation.json", (json.dumps(result, indent=1) + "\n").encode())


def main(args: Sequence[str] | None = None) -> None:
    """`python -m dde_fast.evaluate`: wrong input gives one line and exit code 2."""
    launch_environment()
    models.quiet_libraries()
    with one_line_errors():
        c = parse(args)
    with one_line_errors(own=True):
        if c.relabel:
            where = c.output, c.batch, _device(c.device)
            print(relabel(c.relabel, c.split or "train", c.rewards, *where), flush=True)
            return
        result = evaluate(c)
    say(format_table(result["results"]))
    say(f"{c.output / 'evaluation.json'}\n{c.output / 'grid.png'}")


if __name__ == "__main__":
    main()
