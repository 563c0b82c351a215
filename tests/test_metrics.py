"""Means over steps, ranks and parts of the schedule, and the files of a log."""

import json
import math
import sys
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dde_fast import metrics, shards
from dde_fast.loss import PreferenceOutput
from dde_fast.metrics import Meter, RunLog, tags


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank, without a process group."""
    monkeypatch.setattr(metrics.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda tensor: None)


def meter_of(length: int = 1000) -> Meter:
    return Meter(torch.device("cpu"), length)


def output(timesteps: list[int], logits: list[float], errors: list[float]) -> PreferenceOutput:
    """Policy errors as given, the reference's half of them."""
    policy = torch.tensor(errors)
    return PreferenceOutput(
        loss=torch.tensor(logits).mean(),
        logits=torch.tensor(logits),
        policy_error=policy,
        reference_error=policy / 2,
        margin=torch.zeros(len(logits)),
        timesteps=torch.tensor(timesteps),
    )


def test_means_are_per_metric_and_start_anew():
    meter = meter_of()
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value, dtype=torch.bfloat16)})
    meter.add({"grad_norm": 4.0})
    assert meter.read() == {"loss": 3.0, "grad_norm": 4.0}
    meter.add({"loss": torch.tensor(5.0)}, weight=3.0)
    meter.add({"loss": torch.tensor(1.0)})
    assert meter.read() == {"loss": 4.0}


def test_means_are_over_all_pairs_and_parts_of_the_schedule():
    meter = meter_of()
    meter.observe(output([5, 99, 100], [1.0, -1.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    meter.observe(output([999], [3.0], [7.0, 8.0]))
    meter.observe(output([500], [9.0], [9.0, 9.0]), weight=0.0)  # a rank without a batch of its own
    means = meter.read()
    parts = means.pop("by_timestep")
    assert parts["pairs"] == {"000-099": 2, "100-199": 1, "900-999": 1}
    assert parts["policy_win_error"] == {"000-099": 1.5, "100-199": 3.0, "900-999": 7.0}
    assert parts["reference_lose_error"] == {"000-099": 2.25, "100-199": 3.0, "900-999": 4.0}
    assert parts["implicit_accuracy"] == {"000-099": 0.5, "100-199": 0.5, "900-999": 1.0}
    assert means == {
        "loss": 0.75,
        "implicit_accuracy": 0.625,
        "logit": 0.75,
        "logit_size": 1.25,
        "margin": 0.0,
        "policy_win_error": 3.25,
        "policy_lose_error": 5.75,
        "reference_win_error": 1.625,
        "reference_lose_error": 2.875,
    }
    meter.observe(output([1], [1.0], [1.0, 1.0]))
    assert meter.read()["by_timestep"]["pairs"] == {"000-099": 1}


def test_every_timestep_has_one_part_and_no_number_stays_in_its_own():
    for length in (10, 13, 50, 999, 1000):
        meter = meter_of(length)
        for label in meter.labels:
            low, high = map(int, label.split("-"))
            assert low <= high
            for t in (low, high):
                meter.observe(output([t], [1.0], [float(t), 0.0]))
            assert list(meter.read()["by_timestep"]["pairs"]) == [label]
        lows = [int(label.split("-")[0]) for label in meter.labels]
        highs = [int(label.split("-")[1]) for label in meter.labels]
        assert lows[0] == 0 and highs[-1] == length - 1
        assert [high + 1 for high in highs[:-1]] == lows[1:]


def test_what_is_not_finite_hides_nothing_else():
    meter = meter_of()
    meter.observe(output([0, 5, 999], [1.0, 1.0, 1.0], [math.nan, 3.0, 1.0, math.inf, 1.0, 1.0]))
    meter.observe(output([0], [math.inf], [2.0, 2.0]))
    meter.add({"grad_norm": math.nan})
    means = meter.read()
    assert means["policy_win_error"] == 2.0 and means["policy_lose_error"] == pytest.approx(4 / 3)
    assert means["loss"] == 1.0 and math.isnan(means["grad_norm"])
    assert means["by_timestep"]["policy_win_error"] == {"000-099": 2.5, "900-999": 1.0}


def test_means_are_over_ranks(monkeypatch):
    other = torch.tensor([[5.0], [1.0]])  # the other rank's sum and count
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda tensor: tensor.add_(other))
    meter = meter_of()
    meter.add({"loss": torch.tensor(1.0)})
    assert meter.read() == {"loss": 3.0}


def test_values_that_are_no_numbers_do_not_hide_the_others():
    meter = meter_of()
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


def log_of(path, start: int = 0, **more) -> RunLog:
    return RunLog(path, {"config": {}}, steps=9, start=start, batch=4, **more)


def records(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


NESTED = {
    "loss": 0.5,
    "by_timestep": {"logit": {"000-099": 1.0}},
    "validation": {"loss": 0.25, "by_timestep": {"logit": {"900-999": 2.0}}},
}
TAGS = {
    "train/loss": 0.5,
    "logit_by_timestep/000-099": 1.0,
    "validation/loss": 0.25,
    "validation_logit_by_timestep/900-999": 2.0,
}


def test_tags_group_what_belongs_together():
    assert tags({"step": 3, **NESTED, "mfu": 0.5}) == TAGS | {"machine/mfu": 0.5}


def test_a_continued_log_forgets_what_is_done_again(tmp_path):
    log = log_of(tmp_path)
    for step in (2, 4, 6):
        log.write(step, NESTED | {"loss": float(step)}, 1e-4)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    log = log_of(tmp_path, start=4)
    log.write(6, NESTED | {"loss": 60.0}, 1e-4)
    log.close()
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(2, 2.0), (4, 4.0), (6, 60.0)]
    assert records(tmp_path)[0]["learning_rate"] == 1e-4
    assert records(tmp_path)[2]["validation"] == NESTED["validation"]
    assert all(r["pairs_per_second"] > 0 and r["memory_gib"] > 0 for r in records(tmp_path))
    assert not any("mfu" in record for record in records(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert TAGS.keys() < set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 2), (4, 4), (6, 60)]


def test_a_log_that_is_killed_while_it_begins_again_loses_nothing(tmp_path, monkeypatch):
    log = log_of(tmp_path)
    log.write(2, NESTED, 1e-4)
    log.close()
    names = ("config.json", "metrics.jsonl")
    before, real = [(tmp_path / name).read_bytes() for name in names], shards.os.replace
    for moment in (0, 1):
        left = iter(range(moment))

        def killed(*args, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(shards.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            log_of(tmp_path, start=2)
        assert [(tmp_path / name).read_bytes() for name in names] == before
        monkeypatch.setattr(shards.os, "replace", real)
    (tmp_path / "config.json.0a1b2c3d.partial").touch()  # of a kill that nothing could tidy after
    log_of(tmp_path, start=2).close()
    assert not list(tmp_path.glob("*.partial")) and records(tmp_path)[0]["loss"] == 0.5


def test_throughput_leaves_out_what_is_done_aside(tmp_path):
    log = log_of(tmp_path, pairs_at_peak=1000.0)
    with log.aside():
        time.sleep(0.5)
    log.write(1, {"loss": 1.0}, 1e-4)
    time.sleep(0.2)
    log.write(2, {"loss": 1.0}, 1e-4, waited=0.1)
    log.write(3, {"loss": 1.0}, 1e-4, waited=0.1)
    log.close()
    first, second, third = records(tmp_path)
    assert first["pairs_per_second"] > 4 / 0.4
    assert first["mfu"] == pytest.approx(first["pairs_per_second"] / 1000.0)
    # 0.1 s waited of the 0.2 s and more that the step took
    assert second["data_wait"] == pytest.approx(0.1 * second["pairs_per_second"] / 4)
    assert 0 < second["data_wait"] <= 0.5 and first["data_wait"] == third["data_wait"] == 0


def test_a_picture_is_kept_and_shown(tmp_path):
    log = log_of(tmp_path)
    picture = Image.fromarray(np.full((6, 5, 3), 7, np.uint8))
    log.picture(3, "grids", picture)
    log.close()
    assert [file.name for file in (tmp_path / "grids").iterdir()] == ["step-00000003.png"]
    with Image.open(tmp_path / "grids/step-00000003.png") as found:
        assert np.array_equal(np.array(found), np.array(picture))
    (shown,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("grids")
    assert (shown.step, shown.height, shown.width) == (3, 6, 5)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_line_without_a_number_is_json_and_a_warning_is_in_it(tmp_path, capsys, loss):
    log = log_of(tmp_path)
    bad = {"loss": loss, "grad_norm": 1.0, "validation": {"loss": loss}}
    log.write(1, bad, 1e-4, warning="too far")
    log.close()
    (record,) = records(tmp_path)
    assert record["loss"] is None and record["grad_norm"] == 1.0 and record["warning"] == "too far"
    assert "warning: step 1: too far" in "".join(capsys.readouterr())
    assert record["validation"] == {"loss": None}


class FakeRun:
    """What a W&B run is told."""

    def __init__(self, **settings):
        self.settings, self.logged, self.axes, self.finished = settings, [], {}, False

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, record):
        self.logged.append(record)

    def finish(self):
        self.finished = True


def test_weights_and_biases_get_the_same_and_a_resumed_run_is_one_run(tmp_path, monkeypatch):
    fake = types.SimpleNamespace(init=FakeRun, Image=lambda path: f"picture {path}")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    metrics.check_wandb("faces")
    log = log_of(tmp_path, wandb_project="faces")
    log.write(2, NESTED, 1e-4)
    log.picture(2, "grids", Image.new("RGB", (2, 2)))
    log.close()
    run = log.wandb
    assert run.settings["project"] == "faces" and run.settings["config"] == {"config": {}}
    assert run.axes == {"step": None, "*": "step"} and run.finished
    scalars, picture = run.logged
    assert TAGS.items() < scalars.items() and scalars["step"] == 2
    assert picture == {"grids": f"picture {tmp_path / 'grids/step-00000002.png'}", "step": 2}
    again = log_of(tmp_path, start=2, wandb_project="faces")
    again.close()
    assert again.wandb.settings["id"] == run.settings["id"]
    assert again.wandb.settings["resume"] == "allow"
    other = log_of(tmp_path / "other", wandb_project="faces")
    other.close()
    assert other.wandb.settings["id"] != run.settings["id"]


def test_weights_and_biases_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics.check_wandb("")
    with pytest.raises(ValueError, match="wandb_project: expected the package wandb .pip install"):
        metrics.check_wandb("faces")
