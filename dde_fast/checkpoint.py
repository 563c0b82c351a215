"""Checkpoints that are whole or not there, and their resumption.

    OUTPUT/checkpoints/step-00000150/   DeepSpeed's files: model, optimizer, scheduler
                                        ratios.safetensors: the loss's importance ratios
                                        state.json: step, data position, identity of the run
                                        COMPLETE: every file's size, the small ones' SHA-256,
                                        written last
    OUTPUT/checkpoints/latest           name of the newest, replaced atomically

DeepSpeed writes `latest` while other ranks may still be writing, so a rank killed in between
leaves it on a torn checkpoint. Here nothing points to a checkpoint before all ranks are done, a
tag is never written twice, and loading looks for the marker, not for `latest` (which is for
DeepSpeed's own tools). A large file's checksum is the CRC-32 within it, verified when it is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist

from dde_fast.checkpoint_files import (
    RESHARDED,
    Failures,
    collect_errors,
    damaged,
    reshard,
    without_pickle,
)
from dde_fast.shards import sweep, write_file

MARKER = "COMPLETE"
SMALL = 2**20
"""Bytes up to which a file's content stands in the marker, not only its size."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint and what it says of its run."""

    path: Path
    step: int
    """Optimizer steps done."""
    position: int
    """Pairs consumed since the start."""
    world_size: int
    skipped: int
    """Optimizer steps without an update, their gradient not being finite."""
    identity: dict[str, Any]
    """What its continuation must share (`inputs.identity_of`, model and pairs)."""


def save(
    engine,
    loss_fn,
    directory: Path,
    *,
    keep: int = 0,
    step: int,
    position: int,
    skipped: int = 0,
    identity: dict[str, Any],
) -> Path:
    """Write a checkpoint, then remove old ones; all ranks must call. One already complete at this
    step is kept.

    Args:
        keep: how many of the newest complete ones stay, this one included; 0 = all.

    Returns:
        the checkpoint's directory.

    Raises:
        OSError: on every rank, where any could not write. What was written of this checkpoint is
            removed; earlier ones are untouched.
    """
    path, first = directory / f"step-{step:08d}", dist.get_rank() == 0
    if is_complete(path):
        return path
    failures = Failures()
    collect_errors(engine, failures)
    if first:  # what a run that was killed here left
        shutil.rmtree(path, ignore_errors=True)
        with failures.kept():
            sweep(directory)
    dist.barrier()
    try:
        # what is frozen is the model's own, which `identity` names
        engine.save_checkpoint(
            str(directory), tag=path.name, save_latest=False, exclude_frozen_parameters=True
        )
    except OSError as error:
        # raised past its files, at the copy of a script: the others wait in its last barrier
        failures.first = error
        dist.barrier()
    if first:
        state = {
            "step": step,
            "position": position,
            "world_size": dist.get_world_size(),
            "skipped": skipped,
            "identity": identity,
        }
        tensors = {name: value.contiguous().cpu() for name, value in loss_fn.state_dict().items()}
        with failures.kept():
            write_file(path / "ratios.safetensors", safetensors.torch.save(tensors))
            write_file(path / "state.json", _json(state))
    errors = failures.of_all_ranks()
    if first and not errors:
        with failures.kept():
            write_file(path / MARKER, _json(_contents(path)))
            write_file(directory / "latest", path.name.encode())
    if errors := errors or failures.of_all_ranks():
        if first:
            _remove(path)
        dist.barrier()
        raise OSError(
            f"output: expected to write the checkpoint {str(path)!r}, got {errors[0]}; "
            f"{_what_is_left(directory)}"
        )
    if first and keep:
        _prune(directory, keep, newest=path)
    dist.barrier()
    return path


def is_complete(path: Path) -> bool:
    """Whether every file that the marker lists is there in its full size, the small ones in their
    very content."""
    try:
        listed = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return _contents(path) == listed


def any_in(directory: Path) -> bool:
    """Whether a run has a complete checkpoint."""
    return any(is_complete(tag) for tag in directory.glob("step-*"))


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
            return _read_state(path), torn
        torn.append(path.name)
    found = f"only torn ones ({', '.join(torn)})" if torn and place.exists() else "none"
    raise ValueError(f"resume: expected a complete checkpoint in {str(place)!r}, got {found}")


def check_continues(
    checkpoint: Checkpoint, identity: dict[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Refuse to continue another run.

    Args:
        checkpoint: to continue from.
        identity: of the run that would.
        defaults: what settings were that the checkpoint's writer did not know yet.

    Raises:
        ValueError: naming the first setting that differs.
    """
    for key in sorted(checkpoint.identity.keys() | identity.keys()):  # model before pairs
        theirs, ours = checkpoint.identity.get(key, defaults.get(key)), identity.get(key)
        if theirs != ours:
            raise ValueError(
                f"resume: {key}: expected {theirs!r} as in {str(checkpoint.path)!r}, got {ours!r}"
            )


def load(engine, loss_fn, checkpoint: Checkpoint, directory: Path) -> None:
    """Put engine and loss where the checkpoint left them; all ranks must call.

    Under ZeRO the checkpoint of another number of ranks is first split anew, into a temporary
    folder of `directory`; the engine's JSON must have said so (`universal`).

    Raises:
        ValueError: a file's content is damaged or holds what no trainer writes.
    """
    path = checkpoint.path
    if broken := damaged(path):
        raise ValueError(
            f"resume: expected the files of {str(path)!r} as they were written, got damaged ones: "
            f"{', '.join(broken)}; continue from another one with --resume PATH"
        )
    universal = engine.load_universal_checkpoint()
    source = reshard(path, directory) if universal else path
    whole = all(parameter.requires_grad for parameter in engine.module.parameters())
    failures = Failures()
    try:
        with without_pickle():
            found, _ = engine.load_checkpoint(
                str(source.parent), tag=source.name, load_module_strict=whole
            )
        if found is None:
            raise ValueError("none that DeepSpeed can load")
        loss_fn.load_state_dict(safetensors.torch.load_file(path / "ratios.safetensors"))
    except Exception as error:  # whatever the libraries raise where something else was saved
        failures.first = ValueError(f"{type(error).__name__}: {error}")
    if errors := failures.of_all_ranks():
        raise ValueError(f"resume: expected a checkpoint in {str(path)!r}, got {errors[0]}")
    if universal and dist.get_rank() == 0:
        shutil.rmtree(directory / RESHARDED, ignore_errors=True)


def universal(checkpoint: Checkpoint | None, *, stage: int, world_size: int) -> dict[str, Any]:
    """What the engine's JSON needs to load a checkpoint that another number of ranks wrote."""
    if checkpoint is None or stage == 0 or checkpoint.world_size == world_size:
        return {}
    return {"checkpoint": {"load_universal": True}}


def _read_state(path: Path) -> Checkpoint:
    try:
        found = Checkpoint(path=path, **json.loads((path / "state.json").read_text("utf-8")))
        numbers = (found.step, found.position, found.world_size, found.skipped)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"steps, position, ranks and skipped steps {numbers}")
        if not isinstance(found.identity, dict):
            raise ValueError(f"identity {found.identity!r:.80}")
        return found
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"resume: expected a checkpoint of this trainer in {str(path)!r}, got {error}"
        ) from None


def _prune(directory: Path, keep: int, newest: Path) -> None:
    """Remove all but the `keep` newest complete checkpoints, and torn ones older than the newest."""
    tags = sorted(directory.glob("step-*"), reverse=True)
    complete = [tag for tag in tags if tag == newest or is_complete(tag)]
    for tag in tags:
        if tag not in {newest, *complete[:keep]} and tag.name < newest.name:
            _remove(tag)


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed midway it is torn, not complete with files missing unseen."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _what_is_left(directory: Path) -> str:
    whole = [tag.name for tag in sorted(directory.glob("step-*")) if is_complete(tag)]
    if not whole:
        return "there is no earlier checkpoint"
    return f"{whole[-1]} is whole: make room, then continue with --resume latest"


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def _contents(path: Path) -> dict[str, Any]:
    """Size of every file; [size, SHA-256] of the small ones."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != MARKER)
    return {file.relative_to(path).as_posix(): _content(file) for file in sorted(files)}


def _content(file: Path) -> int | list[Any]:
    size = file.stat().st_size
    return size if size > SMALL else [size, hashlib.sha256(file.read_bytes()).hexdigest()]
