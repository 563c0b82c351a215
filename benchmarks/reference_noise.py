"""How much rounding puts into a logit: reference scores at other batch sizes, and 16 bits.

    python benchmarks/reference_noise.py embedded     # minutes
    python benchmarks/reference_noise.py sd15-32      # 5 GiB, a quarter of an hour on a CPU
    python benchmarks/reference_noise.py --draw       # the tables of docs/reference-scores.md alone

Policy and reference predict the same pairs at one timestep, in each precision and with so many pairs
per forward; `PreferenceLoss` makes logits of the predictions. The policy is the reference with every
weight moved by a random number of standard deviation 2e-4, some hundred steps of AdamW. The kernels
that a library chooses for a batch size differ from machine to machine, and with them the rounding.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from conftest import ALPHAS_CUMPROD, commit
from full_size import machine
from published import make_unet, small_unet
from torch import Tensor

from dde_fast import models, prepare, schedule
from dde_fast.cache import Cache
from dde_fast.loader import Batch, InOrder, read, to_batch
from dde_fast.loss import PreferenceLoss
from dde_fast.manifest import DTYPES
from dde_fast.noising import Noised, Noising

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/reference-scores.md"
MARKERS = re.compile(r"(<!-- noise -->\n).*?(<!-- /noise -->)", re.S)
TIMESTEPS = (100, 500, 900)
OBJECTIVES = ("diffusion-dpo", "dde")
BETA, MOVED = 5000.0, 2e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """What is measured."""

    title: str
    unet: str | None
    """Of `published.UNETS`, with random weights; None: the embedded model."""
    latent: int
    """Height and width."""
    pairs: int
    training: int
    """Pairs per forward in training."""
    scoring: tuple[int, ...]
    """Pairs per forward of the reference that is run before."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")


CASES = {
    "embedded": Case("The embedded model on `faces`", None, 8, 64, 16, (1, 2, 8, 32)),
    "sd15-32": Case(
        "SD 1.5's UNet, random weights and pairs",
        "sd15",
        32,
        8,
        4,
        (1, 8),
        dtypes=("float32", "bfloat16"),  # float16 takes a CPU minutes per forward
    ),
}


class Models:
    """The same UNet again and again: one in memory at a time."""

    def __init__(self, case: Case, small: bool):
        self.case, self.small = case, small
        self.alphas_cumprod, self.prediction_type = ALPHAS_CUMPROD.float(), "epsilon"
        if case.unet is None:
            scheduler = models.load_scheduler("embedded")
            self.alphas_cumprod = schedule.alphas_cumprod_of(scheduler)
            self.prediction_type = schedule.prediction_type_of(scheduler)

    def load(self, dtype: torch.dtype, moved: bool) -> torch.nn.Module:
        """The reference, or the policy, whose weights have moved."""
        torch.manual_seed(0)
        if self.case.unet is None:
            unet = models.load_unet("embedded")
        else:
            unet = make_unet(self.case.unet, **small_unet(self.case.unet) if self.small else {})
        if moved:
            torch.manual_seed(1)
            with torch.no_grad():
                for weight in unet.parameters():
                    weight += MOVED * torch.randn_like(weight)
        return unet.to(DEVICE, dtype).eval().requires_grad_(False)


def make_batch(case: Case, folder: Path) -> Batch:
    """All pairs."""
    if case.unet is not None:
        torch.manual_seed(2)
        return Batch(
            latents=torch.randn(2 * case.pairs, 4, case.latent, case.latent, device=DEVICE),
            embeddings=torch.randn(case.pairs, 77, 768, device=DEVICE),
            captions=torch.arange(case.pairs, device=DEVICE),
            pair_ids=torch.arange(case.pairs, device=DEVICE),
            draws=torch.zeros(case.pairs, dtype=torch.int64, device=DEVICE),
        )
    c = prepare.PrepareConfig(output=str(folder / "cache"), limit=case.pairs, dtype="float32")
    prepare.start(c, DEVICE).run()
    cache = Cache(c.output)
    index, draws = InOrder(cache.pair_ids, 0)[0 : case.pairs]
    tensors = read(cache, index, draws, seed=0, caption_dropout=0.1).tensors()
    return to_batch({name: tensor.to(DEVICE) for name, tensor in tensors.items()}, seed=0)


def parts(batch: Batch, size: int) -> Iterator[Batch]:
    """So many pairs at a time."""
    wins, losses = batch.latents.chunk(2)
    for start in range(0, len(wins), size):
        own = slice(start, start + size)
        yield replace(
            batch,
            latents=torch.cat([wins[own], losses[own]]),
            captions=batch.captions[own],
            pair_ids=batch.pair_ids[own],
            draws=batch.draws[own],
        )


@torch.no_grad()
def predict(unet: torch.nn.Module, noising: Noising, batch: Batch, size: int) -> Tensor:
    """float32 [2B, …], winners first, of so many pairs per forward."""
    halves = []
    for part in parts(batch, size):
        noised = noising(part)
        halves.append(unet(*noised.inputs, **noised.conditions)[0].float().chunk(2))
    wins, losses = zip(*halves, strict=True)
    return torch.cat([*wins, *losses])


def predictions(case: Case, made: Models, batch: Batch) -> tuple[dict, dict[int, Noised]]:
    """(moved, dtype, pairs per forward, t) -> predictions; t -> what they should be."""
    found, asked = {}, {}
    for name in case.dtypes:
        for moved in (False, True):
            unet = made.load(DTYPES[name], moved)
            for t in TIMESTEPS:
                chosen = torch.zeros(len(made.alphas_cumprod), dtype=torch.float64, device=DEVICE)
                chosen[t] = 1
                alphas_cumprod = made.alphas_cumprod.to(DEVICE)
                noising = Noising(
                    alphas_cumprod, chosen, made.prediction_type, seed=0, dtype=DTYPES[name]
                )
                asked[t] = noising(batch)
                for size in {case.training, *(case.scoring if not moved else ())}:
                    found[moved, name, size, t] = predict(unet, noising, batch, size)
            del unet
    return found, asked


def digits(value: Tensor) -> float:
    """Four of them."""
    return float(f"{float(value):.4g}")


def compare(case: Case, made: Models, found: dict, asked: dict[int, Noised]) -> list[dict]:
    """A row for each way of rounding: what it does to the errors and to the logits."""
    rows = []
    table = {"alphas_cumprod": made.alphas_cumprod, "prediction_type": made.prediction_type}
    losses = {
        name: PreferenceLoss(name, beta=BETA, **table).to(DEVICE).eval() for name in OBJECTIVES
    }

    def add(what: str, t: int, changed: tuple, usual: tuple, **more) -> None:
        """Compare two pairs (policy, reference) of predictions, or errors for the reference."""
        row = {"what": what, "timestep": t, **more, "logit_std": {}}
        for name, loss_fn in losses.items():
            a, b = (
                loss_fn(*given, asked[t].target, asked[t].timesteps) for given in (changed, usual)
            )
            row["logit_std"][name] = digits((a.logits - b.logits).double().std())
            row["error_std"] = digits((a.reference_error - b.reference_error).double().std())
            row["error"] = digits(b.reference_error.double().mean())
        rows.append(row)

    for t in TIMESTEPS:
        full = [found[moved, "float32", case.training, t] for moved in (True, False)]
        error_of = losses["dde"]
        for dtype in case.dtypes:
            policy, reference = (found[m, dtype, case.training, t] for m in (True, False))
            for size in case.scoring:
                scores = found[False, dtype, size, t]
                errors = error_of(scores, scores, asked[t].target, asked[t].timesteps)
                changed = (policy, errors.reference_error)
                add("scores", t, changed, (policy, reference), dtype=dtype, pairs=size)
            if dtype != "float32":
                add("reference", t, (full[0], reference), full, dtype=dtype)
                add("both", t, (policy, reference), full, dtype=dtype)
        add("logits", t, full, (full[1], full[1]))  # equal models have none
    return rows


def measure(name: str, case: Case, small: bool = False) -> dict:
    """The result of one case."""
    made = Models(case, small)
    with tempfile.TemporaryDirectory() as folder:
        batch = make_batch(case, Path(folder))
    rows = compare(case, made, *predictions(case, made, batch))
    result = {"case": name, "pairs": case.pairs, "training": case.training, "beta": BETA}
    return result | {"rows": rows, "machine": machine() | {"commit": commit()}}


WHAT = {
    "logits": "the logits themselves, in float32",
    "scores": "{dtype} throughout, reference scores made at {sizes} pairs per forward",
    "both": "policy and reference in {dtype} instead of float32",
    "reference": "the reference alone in {dtype} instead of float32",
}


def table(result: dict) -> str:
    """Markdown: standard deviation of the change in a logit, a row per way of rounding; of the
    batch sizes of reference scores the one that changes most."""
    case, place = CASES[result["case"]], result["machine"]
    lines = [
        f"**{case.title}**, {result['pairs']} pairs, training at {result['training']} pairs per "
        f"forward. Commit `{place['commit']}`, {place['device']}, torch {place['versions']['torch']}.",
        "",
        "| | " + " | ".join(f"t = {t}" for t in TIMESTEPS) + " |",
        "|---" * (1 + len(TIMESTEPS)) + "|",
    ]
    sizes = ", ".join(map(str, case.scoring))
    for what, text in WHAT.items():
        rows = [row for row in result["rows"] if row["what"] == what]
        for dtype in dict.fromkeys(row.get("dtype") for row in rows):
            cells = []
            for t in TIMESTEPS:
                own = [r for r in rows if r.get("dtype") == dtype and r["timestep"] == t]
                most = [max(row["logit_std"][name] for row in own) for name in OBJECTIVES]
                cells.append(", ".join(f"{value:.2g}" for value in most))
            lines.append(f"| {text.format(dtype=dtype, sizes=sizes)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def render(page: str, results: Path = RESULTS) -> str:
    """The page with its tables made anew."""
    files = sorted(results.glob("reference-noise-*.json"))
    tables = "\n".join(table(json.loads(file.read_text(encoding="utf-8"))) for file in files)
    return MARKERS.sub(lambda match: match[1] + tables + match[2], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES, nargs="?")
    parser.add_argument("--draw", action="store_true", help="the page's tables alone")
    args = parser.parse_args()
    if (args.case is None) != args.draw:
        parser.error("expected a case, or --draw")
    if args.case is not None:
        path = RESULTS / f"reference-noise-{args.case}.json"
        result = measure(args.case, CASES[args.case])
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
