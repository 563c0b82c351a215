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
    other = torch.tensor([[5.0], [1.0]])  # the other rank's sum and count
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda tensor: tensor.add_(other))
    meter = Meter(torch.device("cpu"))
    meter.add({"loss": torch.tensor(1.0)})
    assert meter.read() == {"loss": 3.0}


def test_values_that_are_no_numbers_do_not_hide_the_others():
    meter = Meter(torch.device("cpu"))
    for loss, norm in ((1.0, 4.0), (math.nan, math.inf), (3.0, math.inf)):
        meter.add({"loss": torch.tensor(loss)})
        meter.add({"grad_norm": norm})
    skipped = {"skipped_steps": torch.tensor(2.0)}
    assert meter.read(skipped) == {"loss": 2.0, "grad_norm": 4.0, "skipped_steps": 2.0}
    meter.add({"loss": -math.inf})
    assert math.isnan(meter.read()["loss"])


def test_a_policy_that_forgets_the_winners_is_warned_of_with_a_remedy():
    healthy = {"policy_win_error": 0.199, "reference_win_error": 0.1}
    assert metrics.winner_warning(healthy, 2.0) is None
    assert metrics.winner_warning({"loss": 1.0}, 2.0) is None  # sft has no reference
    assert metrics.winner_warning({**healthy, "policy_win_error": math.nan}, 2.0) is None
    text = metrics.winner_warning({**healthy, "policy_win_error": 0.25}, 2.0)
    assert "2.5 times" in text and "--learning_rate" in text and "--beta" in text


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
def test_a_line_without_a_number_is_json_and_a_warning_is_in_it(tmp_path, capsys, loss):
    log = log_of(tmp_path)
    log.write(1, {"loss": loss, "grad_norm": 1.0}, 1e-4, "too far")
    log.close()
    (record,) = records(tmp_path)
    assert record["loss"] is None and record["grad_norm"] == 1.0 and record["warning"] == "too far"
    assert "warning: step 1: too far" in "".join(capsys.readouterr())
