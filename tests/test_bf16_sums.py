"""bf16 at ZeRO stage 1: gradients that are summed in float32 as soon as they are made."""

import pytest
from train_runs import BF16, HALF, Folder, stage

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
    jobs = []
    for way, faults in WAYS.items():
        flags = ["--gradient_checkpointing"] if way == "recomputed" else []
        for name, half in (("at_once", BF16), ("late", LATE)):
            args = [*folder.args(f"{way}_{name}", ds=ds | half, ema_decay=0.9, steps=3), *flags]
            jobs.append({"args": args, "gradients": [name == "late"], **faults})
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
