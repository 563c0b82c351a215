"""README's tables of the whole training step, from what `bench_train_step.py` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dde_fast import levers
from dde_fast.levers import StepResult


@dataclass(frozen=True)
class Aim:
    """A case of `bench_train_step.py`, and what is aimed at."""

    what: str
    trainer: str
    """With the reference run."""
    scored: str
    """With reference scores."""


KEPT = (
    "On a CPU fused noise and loss gain little time, fewer host reads and some memory, and `--compile` "
    "gains the embedded model nothing. They are kept for GPUs, where they spare launches and the host's "
    "waits, and where alone `--compile` can be judged."
)
AIMS = {
    "embedded": Aim("the embedded model", "1.35×", "1.8×"),
    "sd15-32": Aim("SD 1.5, latents 32×32", "1.35×", "1.8×"),
    "sd15": Aim("SD 1.5 on a GPU", "3×; one H200: 68 pairs/s", "one H200: 90 pairs/s"),
    "sdxl": Aim("SDXL on a GPU", "3×; one H200: 8 pairs/s", "one H200: 10.7 pairs/s"),
}


def committed(results: Path) -> dict[str, list[StepResult]]:
    """Case -> its results; of one case there may be some from several commits."""
    found: dict[str, list[StepResult]] = {case: [] for case in AIMS}
    for path in sorted(results.glob("train-step-*.json")):
        one = levers.read(path)
        found.setdefault(one.result["case"], []).append(one)
    return found


def whole_steps(results: Path) -> list[str]:
    """All cases as Markdown: what was reached beside what is aimed at, then a table for each case."""
    found = committed(results)
    lines = [*overview(found), ""]
    for case, several in found.items():
        if several:
            lines += levers_table(case, several)
    return lines


def overview(found: dict[str, list[StepResult]]) -> list[str]:
    """A row per result, and one for each case that has none."""
    lines = [
        "**The whole training step against the published structure**, which encodes images and prompts "
        "in the step, recomputes activations, runs eagerly and reads its log's numbers on the host: same "
        "model, batch and precision, one process. In the tables below each row is the step above it with "
        f"one lever more. {levers.READING} {KEPT}",
        "",
        "| step of | the trainer | aim | with reference scores | aim |",
        "|---|---|---|---|---|",
    ]
    for case, several in found.items():
        aim = AIMS.get(case, Aim(case, "", ""))
        if not several:
            lines.append(
                f"| {aim.what} | not measured | {aim.trainer} | not measured | {aim.scored} |"
            )
        for one in several:
            place = f"{one.result['machine']['device']}, `{one.result['commit']}`"
            trainer, scored = (reached(one.result, scored=scored) for scored in (False, True))
            lines.append(
                f"| {aim.what}: {place} | {trainer} | {aim.trainer} | {scored} | {aim.scored} |"
            )
    return lines


def reached(result: dict, scored: bool) -> str:
    """By the last lever with the reference run, or with its scores read."""
    rows = [row for row in result["rows"] if (row["frozen_GiB"] == 0) == scored]
    if not rows or rows[-1]["name"] == levers.PUBLISHED:
        return ""
    return f"{levers.times_published(rows[-1])}×, {rows[-1]['pairs_per_s']:.3g} pairs/s"


def levers_table(case: str, several: list[StepResult]) -> list[str]:
    """One case as Markdown: every lever of every result, each row with its commit; pictures below."""
    subject = levers.subject(several[0].result)
    places = [f"`{one.result['commit']}`: {levers.place(one.result)}." for one in several]
    lines = [
        f"**One optimizer step of {subject}.** {' '.join(places)}",
        "",
        "| " + " | ".join((*levers.HEAD, "commit")) + " |",
        "|---" * (len(levers.HEAD) + 1) + "|",
    ]
    for one in several:
        for cells in levers.cells(one.result):
            lines.append("| " + " | ".join((*cells, f"`{one.result['commit']}`")) + " |")
    lines.append("")
    for one in several:
        picture = one.path.with_suffix(".png")
        if picture.exists():
            what = AIMS[case].what if case in AIMS else case
            lines += [
                f"![one step of {what}, lever by lever](benchmarks/results/{picture.name})",
                "",
            ]
    return lines
