"""Means over steps and ranks, and the files of a log."""

import json
import math

import pytest
import torch

from dde_fast import metrics
from dde_fast.metrics import Meter, RunLog


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank, without a process group."""
    monkeypatch.setattr(metrics.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(metrics.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda tensor: None)


def test_means_are_per_metric_and_start_anew():
    meter = Meter(torch.device("cpu"))
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value, dtype=torch.bfloat16)})
    meter.add({"grad_norm": 4.0})
    assert meter.read() == {"loss": 3.0, "grad_norm": 4.0}
    meter.add({"loss": torch.tensor(5.0)})
    assert meter.read() == {"loss": 5.0}


def test_means_are_over_ranks(monkeypatch):
    monkeypatch.setattr(metrics.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda tensor: tensor.add_(3.0))
    meter = Meter(torch.device("cpu"))
    meter.add({"loss": torch.tensor(1.0)})
    assert meter.read() == {"loss": 2.0}


def log_of(path, start: int = 0) -> RunLog:
    return RunLog(path, {"config": {}}, steps=9, start=start, batch=4)


def records(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_continued_log_forgets_what_is_done_again(tmp_path):
    log = log_of(tmp_path)
    for step in (2, 4, 6):
        log.write(step, {"loss": float(step)}, 1e-4)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    log = log_of(tmp_path, start=4)
    log.write(6, {"loss": 60.0}, 1e-4)
    log.close()
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(2, 2.0), (4, 4.0), (6, 60.0)]
    assert records(tmp_path)[0]["learning_rate"] == 1e-4
    assert all(r["pairs_per_second"] > 0 and r["memory_gib"] > 0 for r in records(tmp_path))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_after_its_line(tmp_path, loss):
    log = log_of(tmp_path)
    with pytest.raises(FloatingPointError, match="loss: expected a finite number"):
        log.write(1, {"loss": loss, "grad_norm": 1.0}, 1e-4)
    assert len(records(tmp_path)) == 1
    log.close()
