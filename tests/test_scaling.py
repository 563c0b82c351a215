"""The model of many GPUs against cases by hand, its page, and ranks that are really measured."""

import json
import subprocess
import sys

import pytest
from report_folders import write_step
from train_runs import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling_table as table  # noqa: E402  (a script's folder)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two ranks of the embedded model, two micro-batches per step."""
    path = tmp_path_factory.mktemp("scaling") / "scaling-embedded.json"
    command = [sys.executable, "benchmarks/scaling.py", "embedded", "--small", "--rounds", "2"]
    command += ["--steps", "1", "--ranks", "2", "--accumulation", "2", "--output", str(path)]
    options = {"cwd": ROOT, "env": environment(), "timeout": 300}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def test_what_ranks_send_is_what_the_model_counts(measured):
    """Bytes of DeepSpeed's collectives at each ZeRO stage with two micro-batches, and half of them
    leave each of two ranks: 2, 3 and 1 + 2 · 2 passes of the float32 weights."""
    data = json.loads(measured.read_text())
    weights = 4 * data["parameters"]
    assert [row["stage"] for row in data["rows"]] == [0, 1, 2]
    for row, passes in zip(data["rows"], (2, 3, 5), strict=True):
        assert row["sent_bytes"] == pytest.approx(passes * weights / 2, rel=1e-3)
        assert (
            table.sent_bytes(row["stage"], data["parameters"], 2, 2, item=4) == passes * weights / 2
        )


def test_measured_rates_and_shares_make_sense(measured):
    data = json.loads(measured.read_text())
    assert data["machine"]["threads"] == 1 and data["machine"]["commit"]
    for row in data["rows"]:
        rates = row["pairs_per_s"]
        assert set(rates) == {"alone", "side_by_side", "together"}
        for rate in rates.values():
            assert 0 < rate["lower_quartile"] <= rate["median"] <= rate["upper_quartile"]
        assert 0 < row["efficiency"]["median"] < 2
        assert 0 < row["share_sending_alone"] < 1 and 0 < row["share_in_collectives"] < 1
        assert row["collectives"] > 0
    lines = table.measured_table(measured.parent).splitlines()
    assert "1 and 2 ranks" in lines[0] and len(lines) == 7
    assert lines[4].startswith("| 0 | ") and lines[4].count("|") == 10


def test_nothing_measured_is_said(tmp_path):
    assert table.measured_table(tmp_path) == "Not measured yet.\n"


def test_one_gpu_sends_nothing_and_its_efficiency_is_1():
    for stage in table.PASSES:
        assert table.sent_bytes(stage, 10**9, gpus=1) == 0
        assert table.communication(stage, 10**9, gpus=1, micro_batches=4) == 0
    assert table.efficiency(3.0, 0.0) == (1, 1)


def test_a_pass_by_hand():
    """7/8 of 1.6 GB at 450 GB/s inside a node; over two nodes half of each GPU's eighth at 50 GB/s
    more, over eight nodes 7/8 of it."""
    inside = 0.875 * 1.6 / 450
    assert table.pass_seconds(1.6e9, 8) == pytest.approx(inside)
    assert table.pass_seconds(1.6e9, 16) == pytest.approx(inside + 0.5 * 0.2 / 50)
    assert table.pass_seconds(1.6e9, 64) == pytest.approx(inside + 0.875 * 0.2 / 50)
    assert table.pass_seconds(1.6e9, 2) == pytest.approx(0.5 * 1.6 / 450)


def test_bytes_by_hand():
    """100 weights of 2 bytes on 4 GPUs: 3/4 of 200 bytes per pass."""
    sent = [table.sent_bytes(stage, 100, gpus=4, micro_batches=5) for stage in (0, 1, 2, 3)]
    assert sent == [2 * 150, 3 * 150, 11 * 150, 15 * 150]


def test_efficiency_by_hand_and_falling_with_the_gpus():
    assert table.efficiency(3.0, 1.0) == (0.75, 1.0)
    assert table.efficiency(1.0, 4.0) == (0.2, 0.25)
    for name, run in table.RUNS.items():
        (_, goal, *_) = table.ways(name)
        for stage in (1, 2, 3):
            found = []
            for gpus in table.GPUS:
                compute = table.BATCH / gpus / goal.pairs_per_s()
                micro_batches = table.BATCH // (gpus * run.micro_batch)
                parameters = table.counted(name)["parameters"]
                sending = table.communication(stage, parameters, gpus, micro_batches)
                found.append(table.efficiency(compute, sending))
            low, high = zip(*found, strict=True)
            assert low[0] == high[0] == 1 and min(low) > 0
            assert all(a > b for a, b in zip(low, low[1:], strict=False))
            assert all(a <= b for a, b in zip(low, high, strict=True))


def test_the_assumptions_give_the_figures_they_are_named_by(tmp_path):
    """10 % of an A100 is what SD 1.5's published runs reach; the goal is 68 and 90 pairs/s of SD 1.5, 8 and
    10.7 of SDXL on an H200."""
    published, goal, scored = table.ways("sd15", tmp_path)
    assert published.pairs_per_s(312.0) == pytest.approx(2.96, rel=0.05)
    assert goal.pairs_per_s() == pytest.approx(68, rel=0.01)
    assert scored.pairs_per_s() == pytest.approx(90, rel=0.01)
    _, goal, scored = table.ways("sdxl", tmp_path)
    assert goal.pairs_per_s() == pytest.approx(8, rel=0.01)
    assert scored.pairs_per_s() == pytest.approx(10.7, rel=0.01)
    assert "384 |" in table.cost_table()


def test_a_measured_gpu_has_rows_of_its_own(tmp_path):
    """Its pairs per second with the reference run; a CPU's results have none."""
    assert len(table.ways("sd15", tmp_path)) == 3
    gpu = {"device": "NVIDIA H200", "threads": 8, "versions": {"torch": "2"}, "commit": "abc"}
    write_step(tmp_path / "train-step-sd15.json", "sd15", machine=gpu, dtype="bfloat16")
    write_step(tmp_path / "train-step-sd15-32.json", "sd15-32", machine=gpu)
    *_, own = table.ways("sd15", tmp_path)
    assert len(table.ways("sd15", tmp_path)) == 4
    assert own.pairs_per_s() == pytest.approx(25.0) and "H200" in own.name and "`abc`" in own.name


def test_the_page_is_what_the_script_makes():
    page = table.PAGE.read_text(encoding="utf-8")
    assert page == table.render(page)
    assert page.count("| goal, 44 % | 64 |") == 2
