"""DeepSpeed's checkpoint files: written so that an error reaches every rank, read without pickle,
split anew for another number of ranks."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

RESHARDED = "resharded"
"""Folder, beside a run's checkpoints, of the one that is being split anew; removed when read."""


@contextlib.contextmanager
def without_pickle() -> Iterator[None]:
    """Whoever calls `torch.load` in here gets tensors, plain values and the four small classes that
    DeepSpeed saves beside them; anything else in a file raises `pickle.UnpicklingError`."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # DeepSpeed itself asks for weights_only=False
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


class Failures:
    """Errors of this rank, kept until all ranks can hear of them: a rank that raised alone would
    leave the others waiting for it."""

    def __init__(self):
        self.first: Exception | None = None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what is raised in here; after a first failure the rest is pointless, yet harmless."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            # torch's zip writer hides the reason behind an error of its own
            causes = [error]
            while causes[-1].__context__ is not None:
                causes.append(causes[-1].__context__)
            reasons = [cause for cause in causes if isinstance(cause, OSError)]
            self.first = self.first or (reasons or causes)[0]

    def of_all_ranks(self) -> list[str]:
        """What went wrong, on any rank; all ranks must call."""
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, None if self.first is None else str(self.first))
        return [message for message in found if message is not None]


def collect_errors(engine, failures: Failures) -> None:
    """Let the engine write through files that keep their errors and reach the disk."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class Files(TorchCheckpointEngine):
        def makedirs(self, path, exist_ok=False):
            with failures.kept():
                super().makedirs(path, exist_ok)

        def save(self, state_dict, path):
            with failures.kept(), open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())  # else a complete checkpoint may not survive the machine

    engine.checkpoint_engine = Files(engine._config)


def damaged(path: Path) -> list[str]:
    """The checkpoint's files whose content is not what was written, and why; each rank reads its
    share of them, and all must call.

    The checksums are the CRC-32 that `torch.save` puts into its zip archive.
    """
    found, files = [], sorted(path.rglob("*.pt"))
    for file in files[dist.get_rank() :: dist.get_world_size()]:
        try:
            with zipfile.ZipFile(file) as archive:
                wrong = archive.testzip()
            with without_pickle():
                unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError):
            wrong, unknown = "all", []
        if wrong or unknown:
            found.append(f"{file.name} ({f'pickled {unknown}' if unknown else 'checksum'})")
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, found)
    return sorted(name for share in shares for name in share)


def reshard(path: Path, directory: Path) -> Path:
    """Write the checkpoint in DeepSpeed's universal form, which any number of ranks reads.

    Rank 0 writes; all must call.

    Args:
        path: a checkpoint of ZeRO stage 1 to 3.
        directory: the run's own folder of checkpoints.

    Returns:
        the folder to load, under `directory`/`RESHARDED`.

    Raises:
        ValueError: it cannot be converted: an optimizer without Adam's two moments, a full disk.
    """
    from deepspeed.checkpoint import ds_to_universal

    target, failure = directory / RESHARDED / path.name, None
    if dist.get_rank() == 0:
        talk = io.StringIO()  # it prints what it does and draws progress bars
        try:
            shutil.rmtree(target.parent, ignore_errors=True)  # of a run killed here
            target.mkdir(parents=True)
            with without_pickle(), contextlib.redirect_stdout(talk):
                with contextlib.redirect_stderr(talk):
                    ds_to_universal.main(
                        argparse.Namespace(
                            input_folder=str(path),
                            output_folder=str(target),
                            num_extract_workers=1,  # more are processes without `without_pickle`
                            num_merge_workers=1,
                            keep_temp_folder=False,
                            strict=True,
                            inject_missing_state=True,
                        )
                    )
        except Exception as error:  # assertions, missing keys, a full disk
            failure = f"{type(error).__name__}: {error}"
            shutil.rmtree(target.parent, ignore_errors=True)
    told = [failure]
    dist.broadcast_object_list(told)
    if told[0] is not None:
        raise ValueError(
            f"resume: expected the number of ranks that wrote {str(path)!r}, or an Adam-like "
            f"optimizer whose state can be split anew and room for it, got {told[0]}"
        )
    return target
