"""Checkpoints that are whole or not there, and their resumption.

    OUTPUT/checkpoints/step-00000150/   DeepSpeed's files: model, optimizer, scheduler
                                        ratios.safetensors: the loss's importance ratios
                                        state.json: step, data position, identity of the run
                                        COMPLETE: every file's size, written last
    OUTPUT/checkpoints/latest           name of the newest, replaced atomically

DeepSpeed writes `latest` while other ranks may still be writing, so a rank killed in between
leaves it on a torn checkpoint. Here nothing points to a checkpoint before all ranks are done, a
tag is never written twice, and loading looks for the marker, not for `latest` (which is for
DeepSpeed's own tools).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

MARKER = "COMPLETE"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint and what it says of its run."""

    path: Path
    step: int
    """Optimizer steps done."""
    position: int
    """Pairs consumed since the start."""
    world_size: int
    identity: dict[str, Any]
    """What its continuation must share (`inputs.identity_of`, model and pairs)."""


def save(
    engine,
    loss_fn,
    directory: Path,
    *,
    step: int,
    position: int,
    identity: dict[str, Any],
) -> Path:
    """Write a checkpoint; all ranks must call. One already complete at this step is kept.

    Returns:
        the checkpoint's directory.
    """
    path = directory / f"step-{step:08d}"
    if is_complete(path):
        return path
    if dist.get_rank() == 0 and path.exists():  # torn by a run that was killed here
        shutil.rmtree(path)
    dist.barrier()
    # what is frozen is the model's own, which `identity` names
    engine.save_checkpoint(
        str(directory), tag=path.name, save_latest=False, exclude_frozen_parameters=True
    )
    if dist.get_rank() == 0:
        save_file(
            {name: value.contiguous().cpu() for name, value in loss_fn.state_dict().items()},
            path / "ratios.safetensors",
        )
        state = {
            "step": step,
            "position": position,
            "world_size": dist.get_world_size(),
            "identity": identity,
        }
        _write(path / "state.json", json.dumps(state, indent=2))
    dist.barrier()
    if dist.get_rank() == 0:
        _write(path / MARKER, json.dumps(_sizes(path), indent=2))
        _write(directory / "latest.new", path.name)
        os.replace(directory / "latest.new", directory / "latest")
    dist.barrier()
    return path


def is_complete(path: Path) -> bool:
    """Whether every file that the marker lists is there in its full size."""
    try:
        sizes = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return _sizes(path) == sizes


def find(resume: str, directory: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that `--resume` names, and the torn ones passed over on the way.

    Args:
        resume: "latest" for the newest complete one in `directory`, or a path: a checkpoint, a
            folder of checkpoints, or a run's output directory.
        directory: the run's own folder of checkpoints.

    Raises:
        ValueError: there is no complete checkpoint.
    """
    place = directory if resume == "latest" else Path(resume)
    if (place / "checkpoints").is_dir():
        place = place / "checkpoints"
    tags = [place] if place.name.startswith("step-") else sorted(place.glob("step-*"))[::-1]
    torn = []
    for path in tags:
        if is_complete(path):
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(path=path, **state), torn
        torn.append(path.name)
    found = f"only torn ones ({', '.join(torn)})" if torn and place.exists() else "none"
    raise ValueError(f"resume: expected a complete checkpoint in {str(place)!r}, got {found}")


def check_continues(
    checkpoint: Checkpoint, identity: dict[str, Any], *, stage: int, world_size: int
) -> None:
    """Refuse to continue another run.

    Raises:
        ValueError: naming the first setting that differs.
    """
    for key in sorted(checkpoint.identity.keys() | identity.keys()):  # model before pairs
        theirs, ours = checkpoint.identity.get(key), identity.get(key)
        if theirs != ours:
            raise ValueError(
                f"resume: {key}: expected {theirs!r} as in {str(checkpoint.path)!r}, got {ours!r}"
            )
    if stage > 0 and checkpoint.world_size != world_size:
        raise ValueError(
            f"resume: expected {checkpoint.world_size} ranks, among which ZeRO stage {stage} split "
            f"{str(checkpoint.path)!r}, got {world_size}"
        )


def load(engine, loss_fn, checkpoint: Checkpoint) -> None:
    """Put engine and loss where the checkpoint left them; all ranks must call."""
    whole = all(parameter.requires_grad for parameter in engine.module.parameters())
    engine.load_checkpoint(
        str(checkpoint.path.parent), tag=checkpoint.path.name, load_module_strict=whole
    )
    loss_fn.load_state_dict(load_file(checkpoint.path / "ratios.safetensors"))


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sizes(path: Path) -> dict[str, int]:
    files = (file for file in path.rglob("*") if file.is_file() and file.name != MARKER)
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in sorted(files)}
