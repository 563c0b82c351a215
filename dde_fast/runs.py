"""What training runs and evaluations left in their folders, read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dde_fast import checkpoint

EVALUATION = "evaluation.json"


@dataclass
class Run:
    """A training run, finished or not."""

    name: str
    path: Path
    settings: dict[str, Any]
    """Its config.json."""
    records: list[dict[str, Any]]
    """Its metrics.jsonl."""
    ratios: dict[int, Tensor] = field(default_factory=dict)
    """Optimizer step -> the ratio table [4, T] of the checkpoint there."""
    grids: dict[int, Path] = field(default_factory=dict)
    """Optimizer step -> picture."""

    @property
    def config(self) -> dict[str, Any]:
        """The trainer's fields."""
        return self.settings["config"]

    @property
    def step(self) -> int:
        """Optimizer steps logged."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """The records' looks at the held-out pairs, each with its step."""
        looks = (r for r in self.records if isinstance(r.get("validation"), dict))
        return [r["validation"] | {"step": r["step"]} for r in looks]


@dataclass
class EvaluationResult:
    """An evaluation of a base and other models."""

    name: str
    path: Path
    """The folder of evaluation.json."""
    result: dict[str, Any]
    """Its content."""
    images: dict[str, list[Path]] = field(default_factory=dict)
    """Model -> its images, in the order of the prompts."""


def read(folders: Sequence[str | Path]) -> tuple[list[Run], list[EvaluationResult]]:
    """Every training run and evaluation in the folders, or in folders directly inside them.

    A run that is still being written is read as far as it is. An evaluation may be named by its
    JSON file as well.

    Raises:
        ValueError: a folder holds neither, or a file of it is damaged.
    """
    trained: dict[Path, None] = {}  # in the order given, each once
    evaluated: dict[Path, None] = {}
    for folder in map(Path, folders):
        inside = sorted(path for path in folder.glob("*") if path.is_dir())
        places = [folder, *inside, *(path / "evaluation" for path in inside if _is_run(path))]
        own = [place for place in places if _is_run(place)]
        files = [place / EVALUATION for place in places if (place / EVALUATION).is_file()]
        files += [folder] if folder.is_file() else []
        if not own and not files:
            raise ValueError(
                "runs: expected folders of a training run (config.json, metrics.jsonl) or of an "
                f"evaluation ({EVALUATION}), or a file of bench_train_step.py, got {str(folder)!r}"
            )
        trained |= dict.fromkeys(map(Path.resolve, own))
        evaluated |= dict.fromkeys(map(Path.resolve, files))
    runs = [_read_run(path) for path in trained]
    evaluations = [_read_evaluation(path) for path in evaluated]
    for entries in (runs, evaluations):
        for entry, name in zip(entries, _names(entry.path for entry in entries), strict=True):
            entry.name = name
    return runs, evaluations


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()


def _names(paths: Iterable[Path]) -> list[str]:
    """The paths' ends, as long as it takes for them to differ."""
    parts = [path.parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        sizes = range(1, len(own) + 1)
        size = next((n for n in sizes if all(o[-n:] != own[-n:] for o in others)), len(own))
        names.append("/".join(own[-size:]))
    return names


def _read_run(folder: Path) -> Run:
    settings = _json(folder / "config.json")
    config = settings.get("config")
    if not isinstance(config, dict) or not {"objective", "beta", "pairs", "steps"} <= config.keys():
        raise ValueError(f"runs: expected a training run's config.json in {str(folder)!r}")
    run = Run("", folder, settings, _records(folder / "metrics.jsonl"))
    for tag in sorted((folder / "checkpoints").glob("step-*")):
        if checkpoint.is_complete(tag):
            try:
                table = load_file(tag / "ratios.safetensors").get("ratios")
            except FileNotFoundError:  # the run has just removed it for a newer one
                continue
            except (SafetensorError, OSError) as error:
                raise ValueError(f"runs: expected a ratio table in {str(tag)!r}, got {error}") from None  # fmt: skip
            if table is not None and bool(table.any()):
                run.ratios[_step(tag)] = table
    run.grids = {_step(path): path for path in sorted((folder / "grids").glob("step-*.png"))}
    return run


def _step(path: Path) -> int:
    try:
        return int(path.stem.removeprefix("step-"))
    except ValueError:
        raise ValueError(f"runs: expected step-NUMBER, got {str(path)!r}") from None


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; the last may be half written."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            table = record.get("by_timestep", {"pairs": {}})
            if type(record["step"]) is not int or not all(
                isinstance(part, dict) for part in (table["pairs"], *table.values())
            ):
                raise TypeError("no step, or no table by timestep")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"runs: expected a record of the trainer in line {number} of {str(path)!r}, got "
                f"{line!r:.60} ({error})"
            ) from None
        records.append(record)
    return records


def _read_evaluation(path: Path) -> EvaluationResult:
    result = _json(path)
    table = result.get("results")
    if not isinstance(table, dict) or not isinstance(table.get("base"), dict):
        raise ValueError(f"runs: expected an evaluation with results of base in {str(path)!r}")
    for model, entries in table.items():
        for reward in table["base"]:
            if not (isinstance(entries, dict) and _is_score(entries.get(reward))):
                raise ValueError(
                    f"runs: expected scores of {model!r} by {reward!r} in {str(path)!r}, got "
                    f"{entries if not isinstance(entries, dict) else entries.get(reward)!r:.60}"
                )
    images = {
        # by number: 100000.png comes after 99999.png
        model: sorted(
            (path.parent / "images" / model).glob("*.png"), key=lambda p: (len(p.name), p)
        )
        for model in table
    }
    return EvaluationResult("", path.parent, result, images if all(images.values()) else {})


def _is_score(entry: Any) -> bool:
    """Whether it holds what an evaluation says of a model and a reward."""
    if not isinstance(entry, dict):
        return False
    names = ["mean", *(["win", "tie", "lose", "difference"] if "win" in entry else [])]
    interval = entry.get("interval", None if "win" in entry else [0, 0])
    numbers = [entry.get(name) for name in names]
    numbers += interval if isinstance(interval, list) and len(interval) == 2 else [None]
    return all(isinstance(number, float | int) for number in numbers)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"runs: expected JSON in {str(path)!r}, got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"runs: expected a JSON object in {str(path)!r}, got {found!r:.60}")
    return found
