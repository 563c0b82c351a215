"""bf16 at ZeRO stage 1: gradients that are summed in float32 as soon as they are made, and an
optimizer step that asks the device for nothing."""

import json

import pytest
import torch
from test_faults import PLAIN_ADAM, tensors
from train_runs import BF16, HALF, Folder, stage
from variants import weights

from dde_fast.checkpoint_files import without_pickle

SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
LATE = {"bf16": {"enabled": True, "immediate_grad_update": False}}
WAYS = {"stored": {}, "recomputed": {}, "poisoned": {"poison": [0, 2, 2]}}
"""Faults of each; the last one's second step has a gradient that is not finite."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[1, 2])
def runs(request, tmp_path_factory) -> Folder:
    """Two micro-batches per optimizer step: the JSON's default, and told not to."""
    folder = Folder(tmp_path_factory.mktemp("sums"))
    ds = stage(1, **SUMS, **HALF, gradient_accumulation_steps=2)
    flags, jobs = {"ds": ds | BF16, "ema_decay": 0.9, "steps": 3}, []
    for way, faults in WAYS.items():
        more = ["--gradient_checkpointing"] if way == "recomputed" else []
        saving = {"save_every": 1, "keep": 0} if way == "poisoned" else {}
        for name, half in (("at_once", BF16), ("late", LATE)):
            args = folder.args(f"{way}_{name}", **flags | saving | {"ds": ds | half})
            jobs.append({"args": [*args, *more], "gradients": [name == "late"], **faults})
    jobs.append({"args": folder.args("resumed", **flags | {"steps": 2})})
    jobs.append({"args": folder.args("resumed", **flags, resume="latest")})
    for name, optimizer in (("begun", {}), ("begun_json", PLAIN_ADAM)):
        args = folder.args(name, ds=ds | BF16 | optimizer, save_every=1, keep=0, steps=3)
        jobs.append({"args": args, "poison": [0, 0, 0]})
    watched = folder.args("watched", **flags | {"steps": 5}, log_every=5)
    syncs = str(folder.path / "syncs.json")
    jobs.append({"args": watched, "count_syncs": syncs, "poison": [0, 4, 4]})
    folder.ranks = request.param
    folder.work(jobs, request.param, "sums")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_they_are_the_same_to_the_bit(runs, way):
    """Which of both each is, `faults.gradients` looks at in every optimizer step."""
    at_once, late = f"{way}_at_once", f"{way}_late"
    assert runs.distance(at_once, late) == 0
    norms = [[line["grad_norm"] for line in runs.metrics(name)] for name in (at_once, late)]
    assert norms[0] == norms[1] and norms[0].count(None) == (way == "poisoned")
    assert runs.metrics(at_once)[-1]["skipped_steps"] == (way == "poisoned")


def test_the_host_asks_for_nothing_in_a_step(runs):
    """Of five steps the first loads everything, the last logs and saves, the third is skipped. Two
    ranks ask each other before each of two micro-batches whether to stop, of the CPU alone."""
    counts = json.loads((runs.path / "syncs.json").read_text())
    assert counts["control"] == 1 and counts["steps"][0] > 0
    assert counts["steps"][1:-1] == [2 * (runs.ranks - 1)] * 3
    assert runs.metrics("watched")[-1]["skipped_steps"] == 1


def test_a_skipped_step_moves_nothing(runs):
    saved = [runs.path / f"poisoned_at_once/checkpoints/step-{step:08d}" for step in (1, 2, 3)]
    files = sorted(path.name for path in saved[0].glob("*.pt"))
    with without_pickle():
        before, skipped, after = (
            tensors([torch.load(path / name) for name in files]) for path in saved
        )
    # 16 bits, weights, both moments, average, step counts
    assert len(files) == 1 + runs.ranks and len(before) == len(skipped)
    assert all(torch.equal(a, b) for a, b in zip(before, skipped, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(skipped, after, strict=True))


@pytest.mark.parametrize("name", ["begun", "begun_json"])
def test_the_first_step_may_be_one(runs, name):
    """The one optimizer is told on the device, the other, of the JSON, waits to hear it."""
    records = runs.metrics(name)
    assert [record["skipped_steps"] for record in records] == [1, 1, 1]
    assert [record["learning_rate"] for record in records] == [5e-4, 1e-3, 1e-3]
    assert runs.distance(name, "begun") < 0.05


def test_it_goes_on_bit_for_bit(runs):
    assert runs.distance("resumed", "stored_at_once") == 0
    found, whole = (weights(runs, name, "unet_ema") for name in ("resumed", "stored_at_once"))
    assert all(torch.equal(found[key], whole[key]) for key in whole)
