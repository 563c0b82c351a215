"""Training runs and evaluations as one page, and an evaluation as a text table.

    python -m dde_fast.report runs/demo-faces
    python -m dde_fast.report runs/dde runs/sft runs/evaluation --output runs/report
    python -m dde_fast.report runs/demo-faces benchmarks/results/train-step-embedded.json

Writes index.html, which needs no other file and no network, and its charts as PNG beside it.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jinja2
import tyro

from dde_fast import against_base, credit, curves, levers
from dde_fast.command_line import parse_command_line
from dde_fast.config import TrainConfig
from dde_fast.figures import COLOURS, Picture, Style, grid, png, styles, svg
from dde_fast.levers import StepResult
from dde_fast.runs import EvaluationResult, Run, read
from dde_fast.shards import write_file

ALWAYS = ("objective", "beta", "model", "pairs", "steps", "learning_rate", "seed")
"""Settings shown of every run; others where they are not the trainer's defaults."""

UNSAID = ("output", "local_rank", "resume", "deepspeed_config")
"""Settings that say nothing of what was computed."""

SHEET = 1280
"""Largest side of a training picture on the page, pixels."""


@dataclass
class Report:
    """Training runs and evaluations as one HTML page that needs no network."""

    runs: tyro.conf.Positional[list[str]]
    """Folders of training runs and evaluations, or folders that hold such, unfinished runs too; files
    that `benchmarks/bench_train_step.py` wrote."""
    output: str = ""
    """Folder of index.html and its pictures; by default `report` in the folder that all the runs
    are in."""


def format_table(table: dict[str, dict[str, Any]]) -> str:
    """The summary as text, one line per reward and model."""
    head = ["reward", "model", "mean ± std", "win / tie / lose", "difference [95 %]"]
    rows = [head, *against_base.table(table)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def write(folders: Sequence[str | Path], output: str | Path = "") -> Path:
    """Write the report of these folders and measured steps; what was there is replaced only when it
    is whole.

    Returns:
        the page.

    Raises:
        ValueError: one of them is no run, no evaluation and no measured step, or damaged.
    """
    if not folders:
        raise ValueError("runs: expected at least one folder, got none")
    measured = [path for path in map(Path, folders) if levers.is_result(path)]
    others = [path for path in map(Path, folders) if path not in measured]
    steps = [levers.read(path) for path in measured]
    runs, evaluations = read(others)
    folder = Path(output) if output else default_output(others or measured)
    page, files = render(runs, evaluations, steps)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_file(folder / name, data)
    write_file(folder / "index.html", page.encode())
    return folder / "index.html"


def default_output(folders: Sequence[str | Path]) -> Path:
    """`report` in the folder itself, or in the one that holds them all."""
    places = [Path(os.path.abspath(folder)) for folder in folders]
    places = [place.parent if place.is_file() else place for place in places]
    return Path(os.path.relpath(os.path.commonpath(places))) / "report"


def render(
    runs: list[Run], evaluations: list[EvaluationResult], steps: Sequence[StepResult] = ()
) -> tuple[str, dict[str, bytes]]:
    """The page, and the files beside it by name."""
    look = styles({run.name: run.config["objective"] for run in runs})
    glances = [glance(run, look[run.name]) for run in runs]
    content: dict[str, Any] = {
        "title": ", ".join([entry.name for entry in (*runs, *evaluations, *steps)]),
        "runs": glances,
        "numbers": list(
            dict.fromkeys(n for one in glances for n, v in one["numbers"].items() if v)
        ),
        "evaluations": [],
        "curves": {curves.GROUPS[k]: v for k, v in curves.pictures(runs, look).items()},
        "by_timestep": curves.heat_maps(runs),
        "credit": credit.pictures(runs, look),
        "unscheduled": [run.name for run in runs if not run.settings.get("scheduler")],
        "smoothed": any(len(run.records) >= curves.SMOOTHED for run in runs),
        "measured": [step_part(one, number) for number, one in enumerate(steps, start=1)],
        "reading": levers.READING,
        "settings": settings_table(runs),
        "made_with": [made_with(entry) for entry in (*runs, *evaluations, *steps)],
    }
    files: dict[str, bytes] = {}
    for number, one in enumerate(evaluations, start=1):
        content["evaluations"].append(evaluation_part(one, number, runs))
        if chosen := against_base.chosen(one):
            sheet = {
                model: against_base.tensors([images[i] for i in chosen])
                for model, images in one.images.items()
            }
            prompts = [against_base.prompt(one, i) for i in chosen]
            buffer = io.BytesIO()
            grid(sheet, prompts).save(buffer, "png")
            files[f"evaluation-{number}-samples.png"] = buffer.getvalue()

    def chart(picture: Picture) -> str:
        files[f"{picture.name}.png"] = png(picture)
        return svg(picture)

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = environment.from_string(template).render(**content, colours=COLOURS, chart=chart)
    return page, files


def glance(run: Run, style: Style) -> dict[str, Any]:
    """What the page says of a run at first."""
    late = run.records[-(-len(run.records) * 2 // 3) :] if len(run.records) > 2 else run.records
    last_look = run.held_out[-1] if run.held_out else None

    def mean(name: str, records: list[dict] = late) -> float | None:
        metric = next(m for m in curves.METRICS if m.name == name)
        values = [value for record in records if (value := metric(record)) is not None]
        return sum(values) / len(values) if values else None

    looks = [last_look] if last_look else late
    numbers = {
        "accuracy": (mean("implicit_accuracy"), "{:.2f}"),
        "held-out accuracy": (mean("implicit_accuracy", looks) if last_look else None, "{:.2f}"),
        "winner's error, × reference": (mean("win_ratio", looks), "{:.2f}"),
        "reward": (mean("reward"), "{:.3f}"),
        "pairs per second": (mean("pairs_per_second"), "{:.3g}"),
        "memory, GiB": (mean("memory_gib"), "{:.3g}"),
    }
    return {
        "name": run.name,
        "style": style,
        "objective": run.config["objective"],
        "data": run.config["prompts" if "prompts" in run.settings.get("content", {}) else "pairs"],
        "step": run.step,
        "steps": run.config.get("steps"),
        "numbers": {k: f.format(v) if v is not None else "" for k, (v, f) in numbers.items()},
        "warnings": warnings(run),
        "pictures": [
            (step, against_base.data_uri(run.grids[step], SHEET))
            for step in some(sorted(run.grids))
        ],
    }


def some(steps: list[int]) -> list[int]:
    """The first, the one in the middle and the last."""
    return [steps[i] for i in sorted({0, len(steps) // 2, len(steps) - 1})] if steps else []


def warnings(run: Run) -> list[str]:
    """What went wrong: the warnings that the run logged, and skipped steps."""
    logged = [(record["step"], record["warning"]) for record in run.records if "warning" in record]
    found = []
    if logged:
        often = f", and {len(logged) - 1} times before, first at step {logged[0][0]}"
        found = [f"step {logged[-1][0]}{often if len(logged) > 1 else ''}: {logged[-1][1]}"]
    skipped = run.records[-1].get("skipped_steps") if run.records else None
    if skipped:
        found.append(f"{skipped:.0f} optimizer steps skipped: their gradient was not finite")
    return found


def evaluation_part(one: EvaluationResult, number: int, runs: list[Run]) -> dict[str, Any]:
    """What the page says of an evaluation."""
    objectives = {run.path.resolve(): run.config["objective"] for run in runs}
    models = {}
    for model in one.result["results"]:
        path = str(one.result.get("models", {}).get(model, {}).get("path", ""))
        models[model] = objectives.get(Path(path).resolve().parent, model)
    look = styles(models)
    options = one.result.get("options", {})
    whole = None
    if not one.images and (one.path / "grid.png").is_file():
        whole = against_base.data_uri(one.path / "grid.png", SHEET)
    facts = ("samples", "prompts", "images_per_prompt", "steps", "guidance", "seed")
    images = {"images": len(one.result["prompts"])} if "prompts" in one.result else {}
    return {
        "name": one.name,
        "options": images | {name: options[name] for name in facts if name in options},
        "models": look,
        "rewards": against_base.pictures(one, number, look),
        "table": against_base.table(one.result["results"]),
        "duels": against_base.duels(one),
        "samples": against_base.samples(one),
        "sheet": whole,
    }


def step_part(one: StepResult, number: int) -> dict[str, Any]:
    """What the page says of a measured step."""
    subject = levers.subject(one.result)
    return {
        "name": one.name,
        "about": f"{subject[:1].upper()}{subject[1:]}. {levers.place(one.result)}.",
        "commit": one.result["commit"],
        "picture": levers.picture(one, f"step-{number}"),
        "head": levers.HEAD,
        "rows": levers.cells(one.result),
    }


def settings_table(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Name and the value of each run: always the most important, others where they matter."""
    if not runs:
        return []
    usual = {field.name: field.default for field in fields(TrainConfig)}
    names = dict.fromkeys([*ALWAYS, *(name for run in runs for name in run.config)])
    rows = []
    for name in names:
        values = [run.config.get(name) for run in runs]
        if name in ALWAYS or name not in UNSAID and any(v != usual.get(name) for v in values):
            rows.append((name, [_say(value) for value in values]))
    deepspeed = [run.settings.get("deepspeed", {}) for run in runs]
    stages = [ds.get("zero_optimization", {}).get("stage", 0) for ds in deepspeed]
    rows.append(("pairs per step", [_say(ds.get("train_batch_size")) for ds in deepspeed]))
    rows.append(("ZeRO stage", [_say(stage) for stage in stages]))
    content = [run.settings.get("content", {}) for run in runs]
    for name in dict.fromkeys(name for one in content for name in one):
        rows.append((f"content of {name}", [_say(one.get(name)) for one in content]))
    return rows


def _say(value: Any) -> str:
    return "" if value is None else str(value)


KINDS = {Run: "Training", EvaluationResult: "Evaluation", StepResult: "Benchmark"}


def made_with(entry: Run | EvaluationResult | StepResult) -> dict[str, Any]:
    """Commit, versions, hashes and every setting."""
    said = entry.settings if isinstance(entry, Run) else entry.result
    models = said.get("models", {})
    long = ("results", "pairs", "prompts") if isinstance(entry, EvaluationResult) else ()
    return {
        "name": entry.name,
        "kind": KINDS[type(entry)],
        "commit": said.get("commit"),
        "versions": said.get("versions", {}),
        "models": {name: models[name].get("sha256", "") for name in models},
        "scorers": {
            name: ", ".join(f"{key} {value}" for key, value in identity.items())
            for name, identity in said.get("scorers", {}).items()
        },
        "sampled": said.get("sampled"),
        "seconds": said.get("sampling_seconds"),
        "json": json.dumps(
            {key: value for key, value in said.items() if key not in long},
            indent=1,
            ensure_ascii=False,
        ),
    }


def main(args: Sequence[str] | None = None) -> None:
    """`python -m dde_fast.report`: wrong input gives one line and exit code 2."""
    try:
        c = parse_command_line(Report, args)
        page = write(c.runs, c.output)
    except (ValueError, OSError) as error:
        print(f"dde_fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(page)


if __name__ == "__main__":
    main()
