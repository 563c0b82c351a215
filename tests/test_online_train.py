"""Online objectives in the trainer: ranks, ZeRO, accumulation and resumption are one trajectory."""

import json
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file
from train_runs import BF16, HALF, ROOT, Folder, fails, stage
from variants import same_run, weights

from dde_fast import config
from dde_fast.config import PRESETS
from dde_fast.deepspeed_config import read_engine_config
from dde_fast.judges import Colourfulness
from dde_fast.online import trained_steps

STEPS, RESUMED = 3, (0, 3)
# small steps, or the moves would grow what rounding leaves
GUIDANCE = {"reward_target": 150.0, "reward_step": 2e-3}
# at the others' learning rate its loss doubles in a step, and rounding grows with it
D3PO = {"objective": "d3po", "learning_rate": 1e-4}
UNUSED = ("pairs", "caption_dropout", "timestep_high")
OF_PRESET = {"sd15": "tailorpo", "sdxl": "tailorpo-g"}
TRAINED = 16
"""Of the 20 steps that the presets sample, those from t = 200 on."""


class Online(Folder):
    """The model's last DDIM step has no noise: of three steps two are trained."""

    def __init__(self, path):
        super().__init__(path)
        self.prompts = path / "prompts.txt"
        self.prompts.write_text("happy\nsad\ncat\nred\nblue\n")

    def args(self, name, output="", ds=None, **flags):
        flags = {
            "objective": "tailorpo",
            "prompts": self.prompts,
            "reward": "colourfulness",
            "sampling_steps": 3,
            "steps": STEPS,
            "beta": 20.0,
            **flags,
        }
        given = super().args(name, output, ds, **flags)
        parts = dict(zip(given[::2], given[1::2], strict=True))
        kept = {k: v for k, v in parts.items() if k[2:] not in UNUSED or k[2:] in flags}
        return [part for pair in kept.items() for part in pair]

    def preset(self, name):
        """One step of a paper's preset with an online objective, its model made small."""
        make = {"sd15": tiny.make_model, "sdxl": tiny.make_sdxl_model}[name]
        json_of = ROOT / PRESETS[name]().deepspeed_config
        ds = json.loads(json_of.read_text()) | {"train_micro_batch_size_per_gpu": 1}
        tiny.write_ds(self.path / f"{name}.json", **ds | {"train_batch_size": TRAINED})
        flags = {
            "preset": name,
            "objective": OF_PRESET[name],
            "model": make(self.path / f"model-{name}"),
            "prompts": self.prompts,
            "reward": "colourfulness",
            "deepspeed_config": self.path / f"{name}.json",
            "output": self.path / name,
            "steps": 1,
        }
        flags |= GUIDANCE if OF_PRESET[name] == "tailorpo-g" else {}
        return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Online:
    return Online(tmp_path_factory.mktemp("online"))


@pytest.fixture(scope="module")
def alone(folder) -> Online:
    lora = {"lora_rank": 2, "learning_rate": 1e-2}
    guided = {"objective": "tailorpo-g"} | GUIDANCE
    syncs = str(folder.path / "syncs.json")
    jobs = [
        {"args": folder.args("plain"), "plain": "online"},
        {"args": folder.args("split", ds=stage(1, **HALF, gradient_accumulation_steps=4))},
        {"args": [*folder.args("checkpointing", ds=stage(1)), "--gradient_checkpointing"]},
        {"args": folder.args("bf16", ds=stage(2, **BF16))},
        {"args": folder.args("lora", ds=stage(2), **lora)},
        {"args": folder.args("syncs", log_every=3, **guided), "count_syncs": syncs},
        {"args": folder.args("tailorpo-g0", **guided)},
        {"args": folder.args("d3po0", **D3PO)},
    ]
    failing = folder.args("failing", steps=9, max_skipped=2, save_every=1)
    jobs.append({"args": failing, "spoil": [4], "exit": 2})
    jobs += [{"args": folder.preset(name)} for name in OF_PRESET]
    for n in range(4):  # stage 3 last, as everywhere
        jobs.append({"args": folder.args(f"zero{n}", ds=stage(n))})
        if n in RESUMED:
            resumed = (f"zero{n}_resumed", "", stage(n))
            jobs.append({"args": folder.args(*resumed, steps=2)})
            jobs.append({"args": folder.args(*resumed, resume="latest")})
    checkpointed = folder.args("tailorpo-g3", ds=stage(3), **guided)
    jobs.append({"args": [*checkpointed, "--gradient_checkpointing"]})
    jobs.append({"args": folder.args("d3po3", ds=stage(3), **D3PO)})
    grids = {"grid_every": 2, "grid_images": 2, "grid_steps": 2, "ema_decay": 0.5}
    jobs.append({"args": folder.args("watched3", ds=stage(3), **grids)})
    folder.work(jobs, 1, "alone")
    return folder


@pytest.fixture(scope="module")
def pair(folder, alone) -> Online:
    jobs = [{"args": folder.args(f"two{n}", ds=stage(n, **HALF))} for n in (0, 3)]
    jobs.append({"args": folder.args("two_d3po", ds=stage(2, **HALF), **D3PO)})
    stopped = folder.args("two_stopped", ds=stage(2, **HALF))
    jobs += [{"args": stopped, "stop": [1, 2]}, {"args": [*stopped, "--resume", "latest"]}]
    folder.work(jobs, 2, "pair")
    return folder


def same_trajectory(folder: Folder, a: str, b: str) -> None:
    """Up to rounding, which samples of the policy and beta magnify."""
    assert len(folder.losses(a)) == len(folder.losses(b)) == STEPS
    assert (folder.losses(a) - folder.losses(b)).abs().max() < 2e-5
    for x, y in zip(folder.metrics(a), folder.metrics(b), strict=True):
        assert x["reward"] == pytest.approx(y["reward"], rel=1e-4)
    assert folder.distance(a, b) < 1e-3


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_every_zero_stage_is_the_plain_loop(alone, name):
    same_trajectory(alone, name, "plain")
    losses = alone.losses(name)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert (losses[1:] - losses[0]).abs().min() > 1e-5


@pytest.mark.parametrize("name", ["split", "checkpointing"])
def test_accumulation_and_checkpointing_change_nothing(alone, name):
    same_trajectory(alone, name, "zero1")


@pytest.mark.parametrize("n", RESUMED)
def test_resumed_is_uninterrupted_bit_for_bit(alone, n):
    same_run(alone, f"zero{n}", f"zero{n}_resumed", "unet")


@pytest.mark.parametrize("objective", ["tailorpo-g", "d3po"])
def test_the_others_are_the_same_at_stage_3(alone, objective):
    same_trajectory(alone, f"{objective}3", f"{objective}0")
    assert not torch.equal(alone.losses(f"{objective}0"), alone.losses("zero0"))


@pytest.mark.parametrize(
    ("two", "one"), [("two0", "zero0"), ("two3", "zero0"), ("two_d3po", "d3po0")]
)
def test_two_ranks_are_one(alone, pair, two, one):
    same_trajectory(pair, two, one)


def test_a_stopped_run_samples_its_next_trajectories_anew(alone, pair):
    same_trajectory(pair, "two_stopped", "two0")


def test_bf16_begins_as_fp32(alone):
    losses = alone.losses("bf16")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses.isfinite().all()
    assert (losses[1:] - losses[0]).abs().min() > 1e-5


def test_guided_winners_are_better(alone):
    """Towards a target above the rewards, from the first step on, where the weights are equal."""
    guided, plain = (alone.metrics(name)[0]["reward"] for name in ("tailorpo-g0", "zero0"))
    assert guided > plain + 1


def test_adapters_learn_from_the_model_without_them(alone):
    losses = alone.losses("lora")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert (losses[1:] - losses[0]).abs().min() > 1e-5
    state = weights(alone, "lora", "lora")
    assert all(value.any() for value in state.values())


def test_grids_and_averages_leave_the_run(alone):
    assert alone.distance("watched3", "zero3") == 0
    assert (alone.path / "watched3/grids/step-00000003.png").is_file()
    assert weights(alone, "watched3", "unet_ema")


def test_the_host_never_waits_between_log_points(alone):
    counts = json.loads((alone.path / "syncs.json").read_text())
    assert counts["control"] == 1
    assert counts["steps"][1:-1] == [0]


def test_what_is_logged(alone):
    record = alone.metrics("zero0")[-1]
    assert record["reward_win"] > record["reward_lose"] and 0 <= record["reward_ties"] < 1
    # images are what the last trained step's winner leads to, and nothing earlier
    assert list(record["by_timestep"]["reward"]) == ["300-399"]
    assert list(record["by_timestep"]["reward_win"]) == ["300-399", "600-699"]
    assert record["reward"] == record["by_timestep"]["reward_win"]["300-399"]
    assert sum(record["by_timestep"]["pairs"].values()) == 8 and "mfu" not in record
    card = (alone.path / "zero0/README.md").read_text()
    assert f"- prompts: `{alone.prompts}` (content " in card and "- reward: `colourfulness`" in card
    d3po = alone.metrics("d3po0")[-1]
    assert d3po["reward"] == pytest.approx((d3po["reward_win"] + d3po["reward_lose"]) / 2)


BAD = {
    "no image reward": (["--reward", "distinct"], "reward: expected one of single images, "),
    "no such reward": (["--reward", "beauty"], "got 'beauty'"),
    "no gradient": (
        "--objective tailorpo-g --reward human_score --reward_target 1 --reward_step 1".split(),
        "reward: expected a differentiable one of single images, ",
    ),
    "no prompts": (["--prompts", "away.txt"], "prompts: expected faces, style, a file of prompts"),
    "offline's field": (["--pairs", "style"], "pairs: expected none with objective 'tailorpo'"),
    "held-out pairs": (["--validation_pairs", "faces"], "validation_pairs: expected none with"),
    "another reward's target": (
        ["--objective", "tailorpo-g"],
        "reward_target: expected one for the reward 'colourfulness', got the default 1.0, which is of",
    ),
    "another reward's step": (
        ["--objective", "tailorpo-g", "--reward-target=150"],
        "reward_step: expected one for the reward 'colourfulness', got the default 2.0",
    ),
    "guidance without": (["--reward_step", "3"], "reward_step: expected none with objective 'tai"),
    "no steps": (["--sampling_steps", "0"], "sampling_steps: expected at least 1, got 0"),
    "many steps": (["--sampling_steps", "2000"], "sampling_steps: expected 1 to 1000, got 2000"),
    "no timestep": (
        ["--timestep_low", "0", "--timestep_high", "200"],
        "timestep range: expected to hold a timestep of",
    ),
    "only small noise": (["--timestep_high", "200"], "expected above timestep_low = 200, got 200"),
    "weak guidance": (["--guidance_scale", "0.5"], "guidance_scale: expected at least 1, got 0.5"),
    "unknown name": (["--reward", "prompt_match"], "prompt_match knows 'face'"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_flags_are_one_line_and_exit_2(folder, capfd, name):
    flags, message = BAD[name]
    assert message in fails(folder.args("bad") + flags, capfd)
    assert not (folder.path / "bad").exists()


def test_offline_refuses_what_it_does_not_use(capfd):
    message = fails(["--reward", "colourfulness", "--output", "bad"], capfd)
    assert (
        "reward: expected none with objective 'dde', as it is of objectives that sample" in message
    )


def test_accumulation_is_a_multiple_of_the_trained_steps(folder, capfd):
    bad = folder.args("bad", ds={"gradient_accumulation_steps": 3})
    message = fails(bad, capfd)
    assert "a multiple of the 2 trained steps of a trajectory, got 3; 4 would do" in message

    def engine(ranks=1, **ds):
        c = config.parse(folder.args("json", ds=ds))
        assert trained_steps(c) == 2
        e = read_engine_config(c, ranks, trained_steps(c))
        return e.micro_batch, e.accumulation, e.batch

    assert engine() == (4, 2, 8)
    assert engine(ranks=3) == (4, 2, 24)
    assert engine(gradient_accumulation_steps=6) == (4, 6, 24)
    assert engine(train_batch_size=16) == (4, 4, 16)


def test_only_the_same_run_continues(alone, capfd):
    def resume(**flags):
        return fails(alone.args("other", "zero1", ds=stage(1), resume="latest", **flags), capfd)

    assert "resume: sampling_steps: expected 3" in resume(sampling_steps=4, timestep_low=300)
    assert "resume: guidance_scale: expected 2.0" in resume(guidance_scale=3.0)
    assert "resume: objective: expected 'tailorpo'" in resume(objective="d3po")
    other = alone.path / "other.txt"
    other.write_text("happy\nsad\n")
    assert "resume: prompts: expected 'content " in resume(prompts=other)
    assert "resume: reward: expected " in resume(reward="human_score")


@pytest.mark.parametrize("name", OF_PRESET)
def test_a_papers_preset_runs_with_an_online_objective(alone, name):
    """The policy begins as the reference; SDXL's added conditions and bf16 included."""
    (record,) = alone.metrics(name)
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-6) and record["reward"] > 0
    assert record["reward_failures"] == 0 and record["skipped_steps"] == 0
    assert sum(record["by_timestep"]["pairs"].values()) == TRAINED
    assert min(record["by_timestep"]["pairs"]) == "200-299"
    start = load_file(alone.path / f"model-{name}/unet/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(value, start[key]) for key, value in alone.unet(name).items())


def test_a_reward_that_fails_is_named_where_and_when(alone):
    records = alone.metrics("failing")
    assert [record["reward_failures"] for record in records] == [0, 0.5, 1]
    assert "warning" not in records[0] and "at timesteps 300-399" in records[1]["warning"]
    (line,) = [line for line in log(alone) if "error: gradient: expected finite" in line]
    assert "the reward 'colourfulness' gave no finite number" in line and "100.00%" in line
    assert "300-399, 600-699" in line and "step-00000003" in line and "learning_rate" not in line


def log(folder):
    return (folder.path / "alone.0.log").read_text().splitlines()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda scores: scores * math.nan,
            "reward: expected a finite score of 'colourfulness', got",
        ),
        (lambda scores: scores[:, None], "reward: expected scores [1] of colourfulness, one per"),
    ],
)
def test_a_broken_reward_is_found_before_anything_starts(
    folder, capfd, monkeypatch, answer, message
):
    each = Colourfulness.each
    monkeypatch.setattr(Colourfulness, "each", lambda *args: answer(each(*args)))
    assert message in fails(folder.args("bad"), capfd)
    assert not (folder.path / "bad").exists()
