"""The other benchmarks, small, and the tables and pictures of them all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def test_the_table_of_reading_speed():
    """One line per way of reading, pairs per second."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from results_table import reading

    speeds = {"dataloader": 1234.5, "at_once": 2000.0, "loader": 34567.8}
    data = {
        "machine_info": {"device": "x", "threads": 2, "versions": {"torch": "2"}},
        "commit_info": {"id": "abc"},
        "benchmarks": [
            {"extra_info": {"name": name, "pairs_per_s": speed, "batch": 16}}
            for name, speed in speeds.items()
        ],
    }
    lines = reading(data)
    assert lines[0].startswith(
        "**Reading a prepared cache of SD 1.5 on x, 2 threads.** Commit `abc`"
    )
    assert [line.split("|")[2].strip() for line in lines[4:7]] == ["34,568", "2,000", "1,234"]


def test_the_picture_is_drawn(tmp_path):
    """A curve per implementation in a panel per latent and dtype, and the byte limit."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from plot import draw

    rows = [
        {
            "stats": {"median": 1e-3 * pairs},
            "extra_info": {
                **{
                    "op": "loss",
                    "mode": "both",
                    "cache": "warm",
                    "shape": [4, 64, 64],
                    "dtype": dtype,
                },
                **{"name": name, "pairs": pairs, "bytes": 10**6 * pairs},
            },
        }
        for dtype in ("float32", "bfloat16")
        for name in ("salesforce", "cpp")
        for pairs in (1, 8, 32)
    ]
    machine = {"device": "x", "threads": 2, "versions": {"torch": "2"}, "copy_GB_per_s": 10.0}
    data = {"benchmarks": rows, "machine_info": machine, "commit_info": {"id": "abc"}}
    panels = draw(data).axes
    assert len(panels) == 2
    for panel in panels:
        curves = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
        assert curves["cpp"] == [1e-3, 8e-3, 32e-3]
        assert curves["bytes at the copy bandwidth"] == [1e-4, 8e-4, 32e-4]


@pytest.mark.parametrize("name", ["sd15", "sdxl-lora"])
def test_a_full_size_run_made_small_takes_its_steps(tmp_path, name):
    if name.endswith("lora"):
        pytest.importorskip("peft")
    path = tmp_path / "run.json"
    command = [sys.executable, "benchmarks/full_size.py", name, "--small", "--steps", "2"]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [*command, "--output", str(path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads(path.read_text())
    assert run["losses"][0] == pytest.approx(0.693147, abs=1e-6)
    assert run["losses"][1] != run["losses"][0]
    assert (run["trained"] < run["parameters"]) == (name == "sdxl-lora")
    assert {f"{phase} {i}" for phase in ("forward", "backward", "optimizer") for i in (1, 2)} < set(
        run["phases"]
    )
    assert run["peak_GiB"] > 0 and run["machine"]["versions"]["torch"]


def test_the_memory_table_is_counted_from_the_published_unets(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory_table
    import published

    for name, count in published.PARAMETERS.items():
        assert memory_table.parameters(name) == count
    # by hand: 3 frozen and 8 trained parameters on 4 GPUs, 5 of a reference
    counted = [memory_table.bytes_per_gpu(3, 8, 4, stage, reference=5) for stage in (1, 2, 3)]
    assert counted == [6 + 6 * 8 + 24 + 10, 6 + 16 + 32 + 10, round(1.5 + 40 + 10)]
    page = memory_table.PAGE.read_text(encoding="utf-8")
    assert page == memory_table.render(page)
    assert "✗" in page and "| 64 × 80 GB |" in page


WITHOUT_CODE = """
import functools, runpy, sys, torch
torch.compile = functools.partial(torch.compile, backend="eager")
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
"""Runs a script with a torch.compile that makes no code, which takes a minute."""


@pytest.mark.parametrize(("case", "kind"), [("sd15-32", ""), ("sdxl", "regional")])
def test_the_whole_step_lever_by_lever(tmp_path, monkeypatch, case, kind):
    """A small run of each kind: float32 on one policy; bf16 under DeepSpeed beside autocast, and
    compiled."""
    path = tmp_path / "train-step.json"
    script = str(ROOT / "benchmarks/bench_train_step.py")
    command = [sys.executable, "-c", WITHOUT_CODE, script] if kind else [sys.executable, script]
    command += [case, "--small", "--rounds", "2", "--compile", kind]
    paths = [str(ROOT), str(ROOT / "benchmarks"), *sys.path]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*command, "--output", str(path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads(path.read_text())
    rows, levers = data["rows"], ["published structure", "pairs encoded before"]
    levers += ["no gradient checkpointing"] * (case != "sdxl")
    ours = "" if case != "sdxl" else "bf16 weights, ZeRO-1, "  # which come with it, in 16 bits
    levers += ["fused noise and loss", f"the trainer: {ours}fused AdamW"]
    if kind:
        compiled = rows[len(levers)]
        levers.append(f"torch.compile, {kind} ({compiled['compile_seconds']:.0f} s to compile)")
        assert compiled["compile_seconds"] > 0
    levers.append("reference scores")
    assert [row["name"] for row in rows] == levers
    # two micro-batches: five each for the published log; ours: on a CPU the loss's backward looks at
    # its gradient
    reads = [row["host_reads"] for row in rows]
    published = levers.index("fused noise and loss")
    assert (data["pairs"], data["micro_batches"], data["pairs_per_micro_batch"]) == (4, 2, 2)
    if not torch.cuda.is_available():
        assert reads[:published] == [10] * published
        assert reads[-3:] == [2, 2, 2]
    assert rows[0]["frozen_GiB"] > rows[1]["frozen_GiB"] > rows[-1]["frozen_GiB"] == 0
    if case != "sdxl":
        assert rows[2]["step_GiB"] > rows[1]["step_GiB"]
    # weights and two moments in float32; in 16 bits ours has weights twice, and gradients in float32
    bytes_each = [2**30 * row["state_GiB"] / data["parameters"] for row in rows]
    own = len(levers) if case != "sdxl" else levers.index("fused noise and loss") + 1
    assert bytes_each[:own] == pytest.approx([12] * own, rel=0.01)
    assert bytes_each[own:] == pytest.approx([18] * (len(levers) - own), rel=0.01)
    assert data["rounds"] == 2
    rate = 1e12 * data["matrix_TFLOPs"]
    for row in rows:
        low, high = (row["seconds"][f"{end}_quartile"] for end in ("lower", "upper"))
        assert 0 < low <= row["seconds"]["median"] <= high
        share = row["pairs_per_s"] * data["flops_per_pair"] / rate
        share *= 1 if row["frozen_GiB"] else 6 / 8  # two forwards fewer of eight
        assert row["share_of_arithmetic"] == pytest.approx(share, rel=0.02)
        ratio = row["pairs_per_s"] / rows[0]["pairs_per_s"]
        assert row["times_published"] == pytest.approx(ratio, rel=1e-3)
        assert 0 <= row["data_wait"] < 1
    assert data["machine"]["commit"] and data["machine"]["versions"]["torch"]

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plot
    from step_table import levers_table

    from dde_fast.levers import read, waterfall

    lines = levers_table(case, [read(path)])
    shown = [line.split(" | ") for line in lines[4:-1]]
    assert [cells[0] for cells in shown] == [
        f"| {'+ ' * (i > 0)}{lever}" for i, lever in enumerate(levers)
    ]
    assert {cells[-1] for cells in shown} == {f"`{data['machine']['commit']}` |"}
    bars = waterfall(data).axes[0].patches
    rates = [row["pairs_per_s"] for row in rows]
    steps = [abs(b - a) for a, b in zip([0, *rates], rates, strict=False)]
    assert [bar.get_width() for bar in bars[1::2]] == pytest.approx(steps)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(path)])
    plot.main()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_published_step_is_diffusion_dpo(tmp_path, monkeypatch):
    """Its loss is that of the package on the same noise, and its step is AdamW's, clipped."""
    import tiny

    from dde_fast import models
    from dde_fast.loss import PreferenceLoss

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from published_step import Inputs, Policy, PublishedStep

    model = str(tiny.make_model(tmp_path / "model"))
    scheduler = models.load_scheduler(model)
    policy, reference = models.load_unet(model), models.load_unet(model).requires_grad_(False)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in policy.parameters():
            value += 0.05 * torch.randn_like(value)
    before = [value.detach().clone() for value in policy.parameters()]
    batch = Inputs(torch.randn(6, 4, 4, 4), torch.randn(3, tiny.LENGTH, tiny.WIDTH), None, None)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    options = {"beta": 10.0, "accumulation": 2, "dtype": torch.float32}
    step = PublishedStep(Policy(policy, optimizer, None), reference, scheduler, **options)

    torch.manual_seed(2)
    noise = torch.randn(6, 4, 4, 4)[:3]
    timesteps = torch.randint(0, 1000, (6,))[:3]
    noisy = scheduler.add_noise(batch.latents, noise.repeat(2, 1, 1, 1), timesteps.repeat(2))
    asked = (noisy, timesteps.repeat(2), batch.embeddings.repeat(2, 1, 1))
    loss_fn = PreferenceLoss.from_scheduler(scheduler, "diffusion-dpo", beta=10.0)
    out = loss_fn(policy(*asked).sample, reference(*asked).sample, noise, timesteps)
    torch.manual_seed(2)
    step.micro_batch(batch)
    assert step.log["step_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    accuracy = out.metrics()["implicit_accuracy"].item()
    assert step.log["implicit_accuracy"] == pytest.approx(accuracy)
    assert step.log["train_loss"] == pytest.approx(step.log["step_loss"] / 2)
    expected = torch.autograd.grad(out.loss / 2, [p for p in policy.parameters()])
    for value, grad in zip(policy.parameters(), expected, strict=True):
        torch.testing.assert_close(value.grad, grad, rtol=1e-3, atol=1e-6)
    step(lambda: batch)
    assert all(value.grad is None for value in policy.parameters())
    assert not any(map(torch.equal, policy.parameters(), before))


def test_readme_shows_every_committed_step_and_says_which_are_missing(tmp_path, monkeypatch):
    """A row per lever with its commit, also of one case at two commits; no GPU's result, no figure."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from report_folders import write_step
    from step_table import whole_steps

    for name, commit in (("embedded", "aaaa"), ("embedded-older", "bbbb")):
        write_step(tmp_path / f"train-step-{name}.json", commit=commit)
    (tmp_path / "train-step-embedded.png").touch()
    lines = whole_steps(tmp_path)
    rows = [line for line in lines if line.startswith("|")]
    overview = {row.split(" | ")[0]: row for row in rows[2:7]}
    own = "| the embedded model: a CPU, `aaaa` | 1.25×, 25 pairs/s | 1.35× | 2.00×, 40 pairs/s | 1.8× |"
    assert overview["| the embedded model: a CPU, `aaaa`"] == own
    for case in ("SD 1.5, latents 32×32", "SD 1.5 on a GPU", "SDXL on a GPU"):
        assert overview[f"| {case}"].count("| not measured |") == 2
    for commit in ("aaaa", "bbbb"):
        assert [row.split(" | ")[1] for row in rows[7:] if row.endswith(f"`{commit}` |")] == [
            "20 [16, 25]",
            "32 [25.6, 40]",
            "25 [20, 31.2]",
            "40 [32, 50]",
        ]
    text = "\n".join(lines)
    assert text.count("12 rounds; matrix product 100 GFLOP/s") == 2
    assert text.count("latents 4×8×8, 16 pairs, float32") == 1
    assert "results/train-step-embedded.png" in text and "embedded-older.png" not in text


def test_every_committed_step_has_its_picture():
    results = ROOT / "benchmarks" / "results"
    steps = sorted(results.glob("train-step-*.json"))
    assert steps and all(path.with_suffix(".png").is_file() for path in steps)
