"""The trainer, whole: configurations that must give one trajectory are compared with each other.

One process trains with one rank in every way, another two with two ranks; the tests look at what
the runs left behind.
"""

import json
import subprocess
import sys

import caches
import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from train_runs import (
    BF16,
    HALF,
    OBJECTIVE_STEPS,
    ROOT,
    STEPS,
    Folder,
    environment,
    fails,
    free_port,
    stage,
)

from dde_fast import evaluate, noise
from dde_fast.cache import Cache
from dde_fast.loss import PreferenceLoss
from dde_fast.metrics import OF_THE_MACHINE, tags
from dde_fast.objectives import OBJECTIVES

OFFLINE = [name for name, row in OBJECTIVES.items() if not row.online]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    return Folder(tmp_path_factory.mktemp("train"))


def watching(folder: Folder) -> dict:
    """Flags that log everything there is."""
    prompts = folder.path / "prompts.txt"
    prompts.write_text("sad\nhappy\n")
    pairs = tiny.write_pairs(folder.path / "held_out.parquet", tiny.rows(20)[15:])
    validation = {"validation_pairs": pairs, "validation_draws": 2, "validation_every": 2}
    grids = {"grid_every": 3, "grid_prompts": prompts, "grid_images": 3, "grid_steps": 2}
    return validation | grids | {"peak_tflops": 1e-3}


def counted(folder: Folder, name: str, **flags) -> dict:
    """A run that notes how often the host waits in each step."""
    syncs = str(folder.path / f"syncs_{name}.json")
    return {"args": folder.args(name, **flags), "count_syncs": syncs}


@pytest.fixture(scope="module")
def alone(folder) -> Folder:
    """Everything that one rank can be asked to do."""
    v_model = tiny.make_v_model(folder.path / "v_model", rescale_betas_zero_snr=True)
    xl_model = tiny.make_sdxl_model(folder.path / "xl_model")
    x_model = tiny.make_model(folder.path / "x_model", "sample")
    adamw = {
        "type": "AdamW",
        "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
    }
    torn = folder.path / "zero1_resumed/checkpoints/step-00000004/mp_rank_00_model_states.pt"
    jobs = [
        {"args": folder.args("plain"), "plain": True},
        {"args": folder.args("plain_v", model=v_model), "plain": True},
        {"args": folder.args("plain_x", model=x_model), "plain": True},
        {"args": folder.args("plain_xl", model=xl_model), "plain": True},
        {"args": folder.args("v", model=v_model)},
        {"args": folder.args("x", model=x_model)},
        {"args": [*folder.args("xl", ds=stage(2), model=xl_model), "--gradient_checkpointing"]},
        {"args": [*folder.args("checkpointing", ds=stage(1)), "--gradient_checkpointing"]},
        counted(folder, "split", ds=stage(1, **HALF, gradient_accumulation_steps=2)),
        {"args": folder.args("json", ds=stage(1, optimizer=adamw))},
        counted(folder, "syncs", log_every=3),
        {"args": folder.args("watched1", ds=stage(1), **watching(folder))},
        {"args": folder.args("watched_sft", objective="sft", steps=2, **watching(folder))},
    ]
    # a cache instead of what it was made from, taken up in the middle; then the same behind a URL
    cache = folder.path / "prepared/cache"
    jobs += [
        {"args": folder.args("prepared", ds=stage(1), steps=4, save_every=2)},
        {"args": folder.args("prepared", ds=stage(1), pairs=cache, resume="latest")},
        {"args": folder.args("streamed", ds=stage(1), pairs=cache.as_uri())},
        {"args": folder.args("blocks", ds=stage(1), pairs=cache, shuffle_block=2)},
    ]
    jobs += [counted(folder, name, objective=name, steps=OBJECTIVE_STEPS) for name in OFFLINE]
    # stage 3 comes last: DeepSpeed then replaces torch's linear for the rest of the process
    for n in range(4):
        jobs.append({"args": folder.args(f"zero{n}", ds=stage(n))})
        if n > 0:
            half = stage(n, **BF16)
            sft = {"objective": "sft", "steps": OBJECTIVE_STEPS}
            jobs.append({"args": folder.args(f"bf16_{n}", ds=half)})
            jobs.append({"args": folder.args(f"bf16_sft_{n}", ds=half, **sft)})
        first = folder.args(f"zero{n}_resumed", ds=stage(n), steps=4, save_every=2)
        again = folder.args(f"zero{n}_resumed", ds=stage(n), resume="latest")
        # stage 1 loses its newest checkpoint and has to go back one more
        jobs += [{"args": first}, {"args": again} | ({"tear": str(torn)} if n == 1 else {})]
    jobs.append({"args": folder.args("watched3", ds=stage(3), **watching(folder))})
    folder.printed = folder.work(jobs, 1, "alone")
    return folder


@pytest.fixture(scope="module")
def pair(folder, alone) -> Folder:
    """Two ranks."""
    jobs = [{"args": folder.args(f"two{n}", ds=stage(n, **HALF))} for n in (0, 2, 3)]
    watched = folder.args("two_watched", ds=stage(3, **HALF), **watching(folder))
    jobs.append({"args": watched})
    stopped = folder.args("two_stopped", ds=stage(2, **HALF))
    jobs += [{"args": stopped, "stop": [1, 3]}, {"args": [*stopped, "--resume", "latest"]}]
    begun_alone = folder.path / "zero0_resumed/checkpoints/step-00000004"
    jobs.append({"args": folder.args("grown", ds=stage(0, **HALF), resume=begun_alone)})
    folder.work(jobs, 2, "pair")
    return folder


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_every_zero_stage_is_the_plain_loop(alone, name):
    assert (alone.losses(name) - alone.losses("plain")).abs().max() < 1e-6
    assert alone.distance(name, "plain") < 5e-4
    torch.testing.assert_close(alone.ratios(name), alone.ratios("plain"), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("name", ["v", "x", "xl"])
def test_other_models_are_the_plain_loop(alone, name):
    """SD 2.1 with v-prediction, `sample` prediction, SDXL."""
    assert (alone.losses(name) - alone.losses(f"plain_{name}")).abs().max() < 1e-6
    assert alone.distance(name, f"plain_{name}", f"{name}_model") < 5e-4


@pytest.mark.parametrize("name", ["v", "xl"])
def test_their_pipelines_take_the_trained_unet(alone, name):
    unet = diffusers.UNet2DConditionModel.from_pretrained(alone.path / name / "unet")
    model = alone.path / f"{name}_model"
    images = []
    for parts in ({}, {"unet": unet}):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(model, **parts)
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        images.append(pipeline("happy", num_inference_steps=2, latents=latents, output_type="np"))
    before, after = (torch.from_numpy(out.images) for out in images)
    assert before.shape == (1, 8, 8, 3) and not torch.equal(before, after)


def test_training_moves_the_loss(alone):
    losses = alone.losses("plain")
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)  # policy equals reference
    assert (losses[1:] - losses[0]).abs().min() > 1e-5


def test_gradient_checkpointing_changes_nothing(alone):
    assert (alone.losses("checkpointing") - alone.losses("zero1")).abs().max() < 1e-6
    assert alone.distance("checkpointing", "zero1") < 5e-4


def test_accumulation_is_a_larger_batch(alone):
    assert (alone.losses("split") - alone.losses("zero1")).abs().max() < 1e-6
    assert alone.distance("split", "zero1") < 5e-4
    torch.testing.assert_close(alone.ratios("split"), alone.ratios("zero1"), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("name", ["prepared", "streamed"])
def test_a_prepared_cache_is_its_source(alone, name):
    assert torch.equal(alone.losses(name), alone.losses("zero1"))
    assert alone.distance(name, "zero1") == 0
    assert (alone.path / name / "cache").exists() == (name == "prepared")


def test_blocks_are_another_order_of_the_same_pairs(alone):
    assert not torch.equal(alone.losses("blocks"), alone.losses("zero1"))


def test_an_optimizer_of_the_json_is_filled_in(alone):
    assert torch.equal(alone.losses("json"), alone.losses("zero1"))
    assert alone.distance("json", "zero1") == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_bf16_stays_near_fp32(alone, n):
    preference = alone.losses(f"bf16_{n}")
    assert preference[0] == pytest.approx(0.693147, abs=1e-6)  # both models round alike
    assert (preference - alone.losses("plain")).abs().max() < 0.02
    torch.testing.assert_close(
        alone.losses(f"bf16_sft_{n}"), alone.losses("sft"), rtol=5e-3, atol=0
    )
    start = load_file(alone.model / "unet/diffusion_pytorch_model.safetensors")
    exact, rounded = alone.unet("sft"), alone.unet(f"bf16_sft_{n}")
    moves = [torch.cat([(w[k] - start[k]).flatten() for k in start]) for w in (exact, rounded)]
    assert torch.cosine_similarity(*moves, dim=0) > 0.97
    assert all(value.dtype == torch.float32 for value in rounded.values())
    # exact fp32 masters, not weights rounded to 16 bits
    assert any((value != value.bfloat16().float()).any() for value in rounded.values())


@pytest.mark.parametrize("n", range(4))
def test_resumed_is_uninterrupted_bit_for_bit(alone, n):
    expected, resumed = alone.metrics(f"zero{n}"), alone.metrics(f"zero{n}_resumed")
    assert [record["step"] for record in resumed] == list(range(1, STEPS + 1))
    for a, b in zip(expected, resumed, strict=True):
        for key in a.keys() - OF_THE_MACHINE:
            assert a[key] == b[key], (a["step"], key)
    assert alone.distance(f"zero{n}", f"zero{n}_resumed") == 0
    assert torch.equal(alone.ratios(f"zero{n}"), alone.ratios(f"zero{n}_resumed"))
    assert alone.ratios(f"zero{n}").any()


def test_a_torn_checkpoint_is_skipped_and_named(alone):
    assert "skipped step-00000004, which is torn; continuing from step-00000002" in alone.printed
    latest = alone.path / "zero1_resumed/checkpoints/latest"
    assert latest.read_text() == f"step-{STEPS:08d}"


@pytest.mark.parametrize("name", OFFLINE)
def test_every_objective_trains(alone, name):
    records = alone.metrics(name)
    assert len(records) == OBJECTIVE_STEPS
    assert ("implicit_accuracy" in records[0]) == OBJECTIVES[name].needs_reference
    assert all(record["grad_norm"] > 0 for record in records)
    start = load_file(alone.model / "unet/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(value, start[key]) for key, value in alone.unet(name).items())


@pytest.mark.parametrize(
    ("run", "expected"),
    [("syncs", [0, 1, 0, 0]), ("split", [1] * 4), *((name, [1]) for name in OFFLINE)],
)
def test_the_host_never_waits_between_log_points(alone, run, expected):
    """`syncs` logs after steps 3 and 6, the others after each; `split` is ZeRO stage 1 with two
    micro-batches."""
    counts = json.loads((alone.path / f"syncs_{run}.json").read_text())
    assert counts["control"] == 1
    assert counts["steps"][0] > 0  # loads everything
    assert counts["steps"][1:-1] == expected  # the last saves


def test_a_run_leaves_everything_it_promises(alone):
    run = alone.path / "zero1"
    unet = diffusers.UNet2DConditionModel.from_pretrained(run / "unet")
    assert unet.dtype == torch.float32
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(alone.model, unet=unet)
    image = pipeline("happy", num_inference_steps=1, height=8, width=8, output_type="np").images
    assert image.shape == (1, 8, 8, 3)
    settings = json.loads((run / "config.json").read_text())
    assert settings["config"]["beta"] == 1.0 and settings["deepspeed"]["train_batch_size"] == 4
    assert list((run / "tensorboard").glob("events*"))
    expected = "step loss grad_norm skipped_steps implicit_accuracy logit logit_size margin policy_win_error "
    expected += "policy_lose_error reference_win_error reference_lose_error by_timestep "
    expected += "learning_rate pairs_per_second data_wait memory_gib"
    record = alone.metrics("zero1")[-1]
    assert list(record) == expected.split()
    assert record["learning_rate"] == 1e-3
    assert alone.metrics("zero1")[0]["learning_rate"] == 5e-4  # half of a warm-up of 2
    for name in ("zero1", "zero2", "zero3"):
        assert alone.metrics(name)[2]["grad_norm"] == pytest.approx(
            alone.metrics("zero0")[2]["grad_norm"], rel=1e-4
        )


@pytest.mark.parametrize("n", [1, 3])
def test_a_watched_run_is_the_run(alone, n):
    """Held-out pairs and grids leave weights, ratios and every metric as they were."""
    assert alone.distance(f"watched{n}", f"zero{n}") == 0
    assert torch.equal(alone.ratios(f"watched{n}"), alone.ratios(f"zero{n}"))
    for a, b in zip(alone.metrics(f"watched{n}"), alone.metrics(f"zero{n}"), strict=True):
        for key in b.keys() - OF_THE_MACHINE:
            assert a[key] == b[key], (a["step"], key)


def test_held_out_metrics_are_those_of_the_trained_unet(alone):
    records = alone.metrics("watched1")
    assert [r["step"] for r in records if "validation" in r] == [2, 4, 6]
    assert records[-1]["mfu"] > 0
    expected, pairs = held_out(alone, "watched1"), records[-1]["validation"]
    assert pairs["implicit_accuracy"] == pytest.approx(expected.pop("implicit_accuracy"))
    for name, value in expected.items():
        assert pairs[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert sum(pairs["by_timestep"]["pairs"].values()) == 10
    sft = alone.metrics("watched_sft")[-1]["validation"]
    assert sft.keys() == {"loss", "policy_win_error", "policy_lose_error", "by_timestep"}
    # the reference stays, the policy moves, at the same timesteps and noises
    first = records[1]["validation"]
    assert first["reference_win_error"] == pairs["reference_win_error"]
    assert first["policy_win_error"] != pairs["policy_win_error"]
    assert first["by_timestep"]["pairs"] == pairs["by_timestep"]["pairs"]


def held_out(folder: Folder, name: str) -> dict[str, float]:
    """Metrics of the held-out pairs from the UNet that a run left behind."""
    data = Cache(folder.path / name / "cache-validation")
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder.model, subfolder="scheduler")
    policy, reference = (
        diffusers.UNet2DConditionModel.from_pretrained(path)
        for path in (folder.path / name / "unet", folder.model / "unet")
    )
    loss_fn = PreferenceLoss.from_scheduler(scheduler, "dde", beta=1.0)
    loss_fn.load_state_dict({"ratios": folder.ratios(name)})
    index = torch.arange(len(data)).repeat(2)
    draws = torch.tensor([2**32 - 1, 2**32 - 2]).repeat_interleave(len(data))
    key = {"seed": 0, "pair_ids": data.pair_ids[index], "draw": draws}
    t = noise.sample_timesteps(loss_fn.timestep_probabilities(0, 800), **key)
    rows = caches.stored(data, index)
    eps, winners, losers = noise.pair_noise((3, *rows.mean.shape[1:]), **key).unbind(1)
    latents = rows.mean.float() + rows.std.float() * torch.cat([winners, losers])
    noisy, _ = noise.add_noise(latents, t, scheduler.alphas_cumprod, **key)
    captions = torch.cat([rows.embeddings, rows.embeddings]).float()
    inputs = (noisy, torch.cat([t, t]), captions)
    with torch.no_grad():
        out = loss_fn.eval()(policy(*inputs).sample, reference(*inputs).sample, eps, t)
    return {"loss": out.loss.item()} | {key: float(value) for key, value in out.metrics().items()}


def test_grids_show_the_trained_unet_beside_the_base(alone, pair):
    names = ["step-00000003.png", "step-00000006.png"]
    for run in ("watched1", "watched3", "two_watched"):
        assert sorted(file.name for file in (alone.path / run / "grids").iterdir()) == names
    for model, row in ((str(alone.model), 0), (str(alone.path / "watched1/unet"), 1)):
        pipeline = evaluate.load_pipeline(str(alone.model), model, torch.device("cpu"))
        options = {"seed": 0, "steps": 2, "guidance": 2.0, "batch": 3}
        images = evaluate.sample(pipeline, ["sad", "happy", "sad"], **options)
        expected = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
        for run, tolerance in (("watched1", 1), ("watched3", 1), ("two_watched", 2)):
            with Image.open(alone.path / run / "grids" / names[1]) as file:
                sheet = np.array(file)
            for column in range(3):  # cells of 96 pixels, 12 for each of the image's 8
                at = (slice(100 * row + 6, 100 * row + 96, 12), slice(86 + 100 * column, None, 12))
                found = sheet[at][:, :8].astype(int)
                assert abs(found - expected[column]).max() <= tolerance, (run, row, column)


def test_two_ranks_see_the_same_held_out_pairs(alone, pair):
    """Ten looks, five batches of two: one rank has a batch more than the other."""
    runs = (pair.metrics("two_watched")[-1], alone.metrics("watched3")[-1])
    two, one = (tags({"validation": run["validation"]}) for run in runs)
    assert two.keys() == one.keys() and len(two) > 20
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name


@pytest.mark.parametrize("n", [0, 2, 3])
def test_two_ranks_are_one(alone, pair, n):
    assert (pair.losses(f"two{n}") - alone.losses(f"zero{n}")).abs().max() < 1e-6
    assert pair.distance(f"two{n}", f"zero{n}") < 5e-4
    torch.testing.assert_close(pair.ratios(f"two{n}"), pair.ratios("zero0"), rtol=1e-4, atol=1e-10)


def test_a_signal_to_one_rank_stops_all_and_resumes(alone, pair):
    log = (pair.path / "pair.0.log").read_text()
    assert "stopped by a signal and saved" in log and "step-00000003" in log
    assert [record["step"] for record in pair.metrics("two_stopped")] == list(range(1, STEPS + 1))
    assert pair.distance("two_stopped", "two2") < 5e-4
    assert (pair.losses("two_stopped") - pair.losses("two2")).abs().max() < 1e-6


def test_stage_0_resumes_on_more_ranks(alone, pair):
    assert [record["step"] for record in pair.metrics("grown")] == [5, 6]
    assert (pair.losses("grown") - alone.losses("zero0")[4:]).abs().max() < 1e-6
    assert pair.distance("grown", "zero0") < 5e-4


def test_torchrun_runs_the_script_on_two_ranks(alone):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", free_port(), str(ROOT / "dde_fast/train.py")]
    command += alone.args("torchrun", ds=stage(1, **HALF))
    subprocess.run(command, env=environment(), check=True, timeout=300, cwd=alone.path)
    assert (alone.losses("torchrun") - alone.losses("zero1")).abs().max() < 1e-6
    assert alone.distance("torchrun", "zero1") < 5e-4


def test_only_the_same_run_continues(alone, capfd):
    def resume(**flags):
        ds = stage(1) if "ds" not in flags else flags.pop("ds")
        return fails(alone.args("other", "zero1", ds=ds, resume="latest", **flags), capfd)

    assert "output: expected a new or empty directory" in fails(alone.args("zero1"), capfd)
    assert "resume: objective: expected 'dde'" in resume(objective="dde-single")
    assert "resume: seed: expected 0" in resume(seed=1)
    other = tiny.make_model(alone.path / "other_model")
    weights = other / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_in.weight"].view(-1)[5] += 1e-6  # the reference, but for one value
    save_file(state, weights, {"format": "pt"})
    assert "resume: model: expected 'weights " in resume(model=other)
    fewer = tiny.write_pairs(alone.path / "fewer.parquet", tiny.rows()[:9])
    assert "resume: pairs: expected 'content " in resume(pairs=fewer)
    assert "ZeRO stage: expected 1" in resume(ds=stage(2))
    assert "pairs per optimizer step: expected 4" in resume(ds=stage(1, **HALF))
    assert "steps: expected at least the 6 done, got 5" in resume(steps=5)
