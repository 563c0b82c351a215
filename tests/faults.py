"""Faults that a test injects into a run, as context managers around `train.main`."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import resource
import signal
import zipfile
from pathlib import Path

import torch

from dde_fast import checkpoint, train
from dde_fast.forward import PairForward
from dde_fast.judges import Colourfulness
from dde_fast.loader import Loader
from dde_fast.optimizer_step import averaged_gradient


@contextlib.contextmanager
def instead(owner, name: str, value):
    """Set an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def here(rank: int) -> bool:
    return os.environ["RANK"] == str(rank)


def poison(rank: int, first: int, last: int):
    """The loss, and hence the gradient, of one rank is nan in its forwards first to last, from 0."""
    forward, calls = PairForward.__call__, itertools.count()

    def poisoned(self, batch):
        out, call = forward(self, batch), next(calls)
        if here(rank) and first <= call <= last:
            return dataclasses.replace(out, loss=out.loss * math.nan)
        return out

    return instead(PairForward, "__call__", poisoned)


def full(rank: int, at: int, size: int):
    """One rank's disk is full while it saves after step `at`: no file can grow beyond `size`."""
    save = checkpoint.save

    def saving(*args, **kwargs):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if here(rank) and kwargs["step"] == at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            return save(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return instead(checkpoint, "save", saving)


def interrupt(rank: int, call: int):
    """One rank gets a SIGTERM within its forward of that number, from 0."""
    forward, calls = PairForward.__call__, itertools.count()

    def interrupted(self, batch):
        if here(rank) and next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    return instead(PairForward, "__call__", interrupted)


def unplug(rank: int, call: int):
    """The network of one rank fails for good at its batch of that number, from 0."""
    following, calls = Loader.__next__, itertools.count()

    def failing(self):
        if here(rank) and next(calls) >= call:
            raise OSError("pairs: expected to fetch a shard, got none")
        return following(self)

    return instead(Loader, "__next__", failing)


def spoil(first: int):
    """The reward is nan in its calls from that number on, counted from 0; the first is its trial."""
    each, calls = Colourfulness.each, itertools.count()

    def spoiled(self, images, prompts):
        scores = each(self, images, prompts)
        return scores * math.nan if next(calls) >= first else scores

    return instead(Colourfulness, "each", spoiled)


def gradients(kept: bool):
    """No fault: whether the parameters still have theirs when the optimizer steps is looked at, and
    the norm that it takes of its few buffers is compared with that of all tensors."""
    step = train.step_optimizer

    def looking(engine):
        weights = [weight for weight in engine.module.parameters() if weight.requires_grad]
        assert {weight.grad is not None for weight in weights} == {kept}
        groups = engine.optimizer.fp32_groups_gradients
        assert len(averaged_gradient(engine)[0]) == len(groups) < len(weights)
        tensors = [gradient.clone() for group in groups for gradient in group]
        norm = step(engine)
        expected = torch.nn.utils.get_total_norm(tensors)
        if norm.isfinite() or expected.isfinite():
            torch.testing.assert_close(norm, expected)
        assert not any(buffer.any() for buffer in engine.optimizer.fp32_groups_gradients_flat)
        return norm

    return instead(train, "step_optimizer", looking)


def norms():
    """No fault: the norm of what the ranks share out is compared with DeepSpeed's own of it."""
    step = train.step_optimizer

    def looking(engine):
        theirs = type(engine.optimizer).scaled_global_norm(engine.optimizer)
        norm = step(engine)
        assert engine.optimizer.scaled_global_norm() == 1.0  # not asked for it any more
        assert norm.isfinite() == theirs.isfinite()
        if norm.isfinite():
            torch.testing.assert_close(norm, theirs)
        return norm

    return instead(train, "step_optimizer", looking)


@contextlib.contextmanager
def tamper(path: str, change):
    """A checkpoint's model file is changed, and the marker with it."""
    folder = Path(path)
    file = folder / "mp_rank_00_model_states.pt"
    change(file)
    (folder / checkpoint.MARKER).write_text(json.dumps(checkpoint._contents(folder)))
    yield


def flip(path: str):
    """One bit of a weight."""

    def change(file: Path):
        content = bytearray(file.read_bytes())
        with zipfile.ZipFile(file) as archive:
            largest = max(archive.infolist(), key=lambda record: record.file_size)
        content[largest.header_offset + largest.file_size // 2] ^= 1
        file.write_bytes(content)

    return tamper(path, change)


def with_pickle(path: str):
    """An object of a class that no trainer saves."""

    def change(file: Path):
        state = torch.load(file, weights_only=True)
        torch.save(state | {"more": Path("/")}, file)

    return tamper(path, change)


FAULTS = {
    "flip": flip,
    "pickle": with_pickle,
    "poison": poison,
    "spoil": spoil,
    "full": full,
    "gradients": gradients,
    "norms": norms,
    "interrupt": interrupt,
    "unplug": unplug,
}
