"""Every benchmark runs, once and untimed, on its smallest shape."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*args: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"BENCH_SMALL": "1"}
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-q", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_every_benchmark_runs_untimed():
    result = run("--benchmark-disable")
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_a_timed_row_says_what_it_is(tmp_path):
    """One row of each file: bytes, bandwidth, memory, machine, versions and commit in the JSON."""
    path = tmp_path / "rows.json"
    only = "fp32-salesforce-both or (bench_noise and fp32-diffusers) or fp32-eager-both"
    result = run("--benchmark-only", f"--benchmark-json={path}", "-k", only)
    assert result.returncode == 0, result.stdout[-3000:]
    data = json.loads(path.read_text())
    assert len(data["benchmarks"]) == 5
    for row in data["benchmarks"]:
        info = row["extra_info"]
        assert info["bytes"] > 0 and info["peak_extra_bytes"] > 0
        rate = info["bytes"] / row["stats"]["median"] / 1e9
        assert info["GB_per_s"] == pytest.approx(rate, rel=1e-3)
        assert info["share_of_copy"] > 0
    both = next(
        r["extra_info"] for r in data["benchmarks"] if r["extra_info"]["name"] == "salesforce"
    )
    assert both["bytes"] == 3.5 * 2 * 4 * 64 * 64 * 4  # one pair, fp32: 2½ reads and the gradient
    assert {"device", "versions", "copy_GB_per_s"} <= data["machine_info"].keys()
    assert data["commit_info"]["id"]
    assert "data" not in data["benchmarks"][0]["stats"]  # no raw times: a file to commit


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
    assert counted == [6 + 8 * 8 + 24 + 10, 6 + 16 + 32 + 10, round(1.5 + 40 + 10)]
    page = memory_table.PAGE.read_text(encoding="utf-8")
    assert page == memory_table.render(page)
    assert "✗" in page and "| 64 × 80 GB |" in page


@pytest.mark.parametrize("case", ["sd15-32", "sdxl"])
def test_the_whole_step_lever_by_lever(tmp_path, monkeypatch, case):
    """A small run of each kind: float32 on one policy, bf16 under DeepSpeed beside autocast."""
    path = tmp_path / "train-step.json"
    command = [sys.executable, "benchmarks/bench_train_step.py", case, "--small", "--rounds", "2"]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [*command, "--output", str(path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads(path.read_text())
    rows, levers = data["rows"], ["published structure", "pairs encoded before"]
    levers += ["no gradient checkpointing"] * (case != "sdxl")
    levers += ["fused noise and loss", "the trainer: fused AdamW", "reference scores"]
    assert [row["name"] for row in rows] == levers
    # five for the published log; ours: on a CPU the loss's backward looks at its gradient
    reads = [row["host_reads"] for row in rows]
    assert reads[: len(rows) - 3] == [5] * (len(rows) - 3)
    if not torch.cuda.is_available() and data["dtype"] == "float32":
        assert reads[-3:] == [1, 1, 1]
    assert rows[0]["frozen_GiB"] > rows[1]["frozen_GiB"] > rows[-1]["frozen_GiB"] == 0
    if case != "sdxl":
        assert rows[2]["step_GiB"] > rows[1]["step_GiB"]
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
    from plot import waterfall
    from results_table import whole_step

    lines = whole_step(data)
    assert [line.split(" | ")[0] for line in lines[4:-1]] == [
        f"| {'+ ' * (i > 0)}{lever}" for i, lever in enumerate(levers)
    ]
    bars = waterfall(data).axes[0].patches
    left = [1e3 / row["pairs_per_s"] for row in rows]
    heights = [left[0], *(abs(a - b) for a, b in zip(left, left[1:], strict=False)), left[-1]]
    assert [bar.get_height() for bar in bars] == pytest.approx(heights)


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


@pytest.fixture
def noise(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "conftest")  # that of the benchmarks, for a while
    import reference_noise

    return reference_noise


def test_how_rounding_moves_a_logit(noise):
    """By hand: errors that move by δ move the logit by beta · ω_t · (δ_w - δ_l)."""
    case = noise.Case("two pairs", "sd15", 4, 2, 2, (1,), ("float32", "bfloat16"))
    made = noise.Models(case, small=True)
    batch = noise.make_batch(case, Path())
    found, asked = {}, {}
    generator = torch.Generator().manual_seed(0)
    for t in noise.TIMESTEPS:
        target = torch.randn(2, 4, 4, 4, generator=generator)
        asked[t] = noise.Noised((), {}, torch.tensor([t, t]), target)
        exact = target.repeat(2, 1, 1, 1) + torch.randn(4, 4, 4, 4, generator=generator)
        for key in ((True, "float32", 2), (False, "float32", 2), (True, "bfloat16", 2)):
            found[key + (t,)] = exact
        found[False, "float32", 1, t] = exact
        moved = target.repeat(2, 1, 1, 1) + torch.randn(4, 4, 4, 4, generator=generator)
        found[False, "bfloat16", 2, t] = moved
        found[False, "bfloat16", 1, t] = exact
    rows = {
        (row["what"], row.get("dtype"), row["timestep"]): row
        for row in noise.compare(case, made, found, asked)
    }
    for t in noise.TIMESTEPS:
        moved, exact = (
            (found[False, dtype, 2, t] - asked[t].target.repeat(2, 1, 1, 1))
            .square()
            .mean((1, 2, 3))
            for dtype in ("bfloat16", "float32")
        )
        win, lose = (moved - exact).chunk(2)
        abar = made.alphas_cumprod[t]
        for name, weight in (("diffusion-dpo", 0.5), ("dde", (1 - abar) / abar)):
            expected = float((5000 * weight * (win - lose)).std())
            for what in ("scores", "reference", "both"):
                row = rows[what, "bfloat16", t]
                assert row["logit_std"][name] == pytest.approx(expected, rel=1e-3)
                assert row["error_std"] == pytest.approx(float((moved - exact).std()), rel=1e-3)
            assert rows["scores", "float32", t]["logit_std"][name] < 1e-3 * expected
            assert rows["logits", None, t]["logit_std"][name] == 0
    parts = list(noise.parts(batch, 1))
    assert torch.equal(torch.cat([part.latents[:1] for part in parts]), batch.latents[:2])
    assert torch.equal(torch.cat([part.latents[1:] for part in parts]), batch.latents[2:])


def test_rounding_is_measured_from_forwards(noise, monkeypatch):
    """A small UNet: bf16 moves logits far more than another batch size does in float32."""
    case = noise.Case("four pairs", "sd15", 8, 4, 2, (1, 4), ("float32", "bfloat16"))
    monkeypatch.setitem(noise.CASES, "small", case)
    result = noise.measure("small", case, small=True)
    worst = {
        (what, dtype): max(
            row["logit_std"]["diffusion-dpo"]
            for row in result["rows"]
            if (row["what"], row.get("dtype")) == (what, dtype)
        )
        for what, dtype in (("scores", "float32"), ("reference", "bfloat16"), ("logits", None))
    }
    assert 0 < 10 * worst["scores", "float32"] < worst["reference", "bfloat16"]
    assert worst["logits", None] > 0
    lines = noise.table(result).splitlines()
    assert len(lines) == 4 + 1 + 2 + 1 + 1 and all(line.count("|") == 5 for line in lines[2:])
    assert "made at 1, 4 pairs" in lines[5] and result["machine"]["commit"]


def test_the_page_on_rounding_is_made_from_the_committed_results(noise):
    page = noise.PAGE.read_text(encoding="utf-8")
    assert page == noise.render(page)
    for case in noise.CASES.values():
        assert f"**{case.title}**" in page
