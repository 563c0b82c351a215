"""The planner's choices, at their boundaries, and what it prints."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from train_runs import fails

from dde_fast import config, planner, train
from dde_fast.config import PRESETS, TrainConfig
from dde_fast.deepspeed_config import complete, read_json
from dde_fast.planner import CONTEXT, MARGIN, Gpus, Model

ROOT = Path(__file__).parent.parent
RAW = read_json(str(ROOT / "configs/zero1.json"))
SD15 = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
SHAPES = {"latent": (4, 64, 64), "embedding": (77, 768), "pooled": None}


@pytest.fixture(scope="module")
def sd15() -> Model:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    return planner.read_model(PRESETS["sd15"](), unet.config, torch.bfloat16, **SHAPES)


def plan(model: Model, gib: float, count: int = 1, raw: dict = RAW, **changes) -> planner.Plan:
    c = dataclasses.replace(PRESETS["sd15"](), **changes)
    gpus = Gpus(count, round(gib * 2**30), "", 312.0)
    dtype = torch.bfloat16 if "bf16" in raw else torch.float32
    return planner.make_plan(c, raw, dtype, model, gpus)


def test_a_pair_costs_what_the_trainer_counts(sd15):
    """8 forward passes and, all blocks recomputed, three quarters of two more: what lies between
    their pieces is kept."""
    assert (sd15.frozen, sd15.trained, sd15.reference) == (0, 859_520_964, 859_520_964)
    assert sd15.activations.forward == pytest.approx(0.803e12, rel=0.005)
    assert sd15.operations() == pytest.approx(8 * 0.803e12, rel=0.02)
    more = sd15.operations(sd15.activations.blocks) - sd15.operations()
    assert 0.7 < more / (2 * 0.803e12) < 0.8


def test_one_card_of_24_gib_trains_stable_diffusion_15(sd15):
    found = plan(sd15, 24)
    assert found.engine.batch == 2048
    assert found.engine.micro_batch * found.engine.accumulation == 2048
    assert found.engine.micro_batch >= 4 and found.option.blocks
    assert sum(found.needs.values()) + CONTEXT <= (1 - MARGIN) * 24 * 2**30
    # 2 for weights, 4 for gradients, 12 for the optimizer, 2 for the reference
    assert found.needs["reference"] == 2 * 859_520_964
    state = found.needs["weights, gradients, optimizer"]
    assert found.engine.stage == 1 and state == 18 * 859_520_964


def test_more_memory_is_never_worse(sd15):
    """Fewer operations recomputed, a lower stage, a larger micro-batch; all within the memory."""
    seen = []
    for gib in (20.6, 21, 21.5, 22, 23, 24, 25, 26, 28, 30, 36, 44, 60, 80):
        found = plan(sd15, gib)
        e, option = found.engine, found.option
        busy = min(e.micro_batch, 4)
        seen.append((-busy, option.operations, e.stage, -e.micro_batch))
        assert sum(found.needs.values()) + CONTEXT <= (1 - MARGIN) * gib * 2**30
        assert found.pairs_per_second == pytest.approx(0.4 * 312e12 / found.operations)
    assert seen == sorted(seen, reverse=True)
    assert len({operations for _, operations, *_ in seen}) > 5
    last = plan(sd15, 200)
    assert (last.option.blocks, last.engine.stage, last.engine.micro_batch) == ((), 1, 32)


def test_the_boundary_is_exact(sd15):
    """The very bytes that a plan needs are enough for it, and one less are not."""
    found = plan(sd15, 40)
    bytes_ = (sum(found.needs.values()) + CONTEXT) / (1 - MARGIN)
    again = plan(sd15, (bytes_ + 2) / 2**30)
    assert (again.option, again.needs) == (found.option, found.needs)
    less = plan(sd15, (bytes_ - 2) / 2**30)
    assert (less.option, less.needs) != (found.option, found.needs)


def test_zero_3_only_where_no_lower_stage_fits(sd15):
    many = plan(sd15, 24, 8)
    assert many.engine.stage < 3 and many.engine.accumulation * many.engine.micro_batch == 256
    small = plan(sd15, 4.4, 64, shard_reference=True)
    assert small.engine.stage == 3
    assert small.needs["reference"] == 2 * (859_520_964 // 64)
    assert plan(sd15, 6, 64, shard_reference=True).engine.stage == 2


def test_what_is_compiled_whole_is_never_shared_out(sd15):
    """Where stage 3 would be chosen, there is no plan with --compile whole; elsewhere it is the same."""

    def stage(gib: float, **changes) -> int | None:
        try:
            return plan(sd15, gib, 64, **changes).engine.stage
        except ValueError as error:
            assert str(error).startswith("plan_memory: expected at least")
            return None

    sizes = [4 + n / 8 for n in range(24)]
    usual = [stage(gib) for gib in sizes]
    assert {None, 2, 3} <= set(usual)
    expected = [None if number == 3 else number for number in usual]
    assert [stage(gib, compile="whole") for gib in sizes] == expected
    assert [stage(gib, compile="regional") for gib in sizes] == usual


def test_with_cuda_graphs_no_stage_keeps_gradients_between_micro_batches(sd15):
    few = {key: value for key, value in RAW.items() if key != "data_types"}
    for raw, expected in ((RAW, 1), (few, 2)):
        assert plan(sd15, 80, 4, raw).engine.stage == 1
        found = plan(sd15, 80, 4, raw, compile="graphs", channels_last=True).engine
        assert found.accumulation > 1 and found.stage == expected
    whole = {key: value for key, value in RAW.items() if key != "bf16"}
    with pytest.raises(ValueError, match="compile: expected .* gradients are kept"):
        plan(sd15, 80, 4, whole, compile="graphs", optimizer="adafactor")


@pytest.mark.parametrize("sums", [True, False])
def test_bf16_is_reduced_when_the_activations_are_gone(sd15, sums):
    """With float32 sums at stage 1; else in buckets beside them."""
    raw = RAW if sums else {key: value for key, value in RAW.items() if key != "data_types"}
    e = complete(raw | {"train_batch_size": 8}, PRESETS["sd15"](), 1)
    e = dataclasses.replace(e, batch=1, accumulation=1, micro_batch=1)
    few, many = (sd15.needs(PRESETS["sd15"](), e, size) for size in (1000.0, 1e9))
    assert few["more in the optimizer step"] == (2 * 859_520_964 - 2000 if sums else 0)
    assert many["more in the optimizer step"] == 0  # activations of 2 GB are more
    assert few["weights, gradients, optimizer"] == (18 if sums else 20) * 859_520_964
    assert few["DeepSpeed's buffers"] == many["DeepSpeed's buffers"] == (0 if sums else 10**9)


MICRO, ACCUMULATION = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@pytest.mark.parametrize(
    ("raw", "expected", "why"),
    [
        ({"train_batch_size": 64, MICRO: 8}, 64, "train_batch_size of 'ds.json'"),
        ({MICRO: 16}, 64, "micro-batch 16 × accumulation 1 of 'ds.json' × 4 GPUs"),
        ({MICRO: 2, ACCUMULATION: 3}, 24, "micro-batch 2 × accumulation 3 of 'ds.json' × 4 GPUs"),
        ({ACCUMULATION: 3}, 2048, "the paper's, as 'ds.json' gives no micro-batch and no batch"),
    ],
)
def test_the_batch_is_the_jsons(sd15, raw, expected, why):
    c = dataclasses.replace(PRESETS["sd15"](), deepspeed_config="ds.json")
    gpus = Gpus(4, 80 * 2**30, "", None)
    assert planner.batch_of(c, raw, 4) == (expected, why)
    bf16 = raw | {"bf16": {"enabled": True}}
    found = planner.make_plan(c, bf16, torch.bfloat16, sd15, gpus)
    assert found.engine.batch == expected
    text = planner.describe(c, sd15, gpus, found, bf16)
    assert re.search(rf"^batch +{expected} pairs per step: {re.escape(why)}$", text, re.M)
    assert json.loads(text.split("ds.json:\n")[1])["train_batch_size"] == expected


def test_the_step_needs_its_copy_of_the_gradients_where_activations_are_small(sd15):
    small = plan(sd15, 4.4, 64, shard_reference=True)
    assert small.needs["more in the optimizer step"] == 0  # 54 MB, less than the activations
    e = dataclasses.replace(small.engine, batch=1, accumulation=1, micro_batch=1)
    assert (e.ranks, e.stage) == (1, 3)
    needs = sd15.needs(PRESETS["sd15"](), e, 1000.0)
    assert needs["activations"] == 2000
    assert needs["more in the optimizer step"] == 4 * 859_520_964 - 2000


def test_each_way_to_save_memory_is_counted(sd15):
    usual = plan(sd15, 80).needs
    eight_bits = plan(sd15, 80, optimizer="adamw8bit")
    assert eight_bits.needs["weights, gradients, optimizer"] == 12 * 859_520_964
    averaged = plan(sd15, 80, ema_decay=0.999).needs
    assert (
        averaged["average of the weights"] == 4 * 859_520_964
        and not usual["average of the weights"]
    )


def test_a_reference_is_counted_where_there_is_one(folder):
    """None for SFT and with scores; with adapters it is run, but takes no memory of its own."""
    unet_config = planner.models.load_unet_config(str(folder / "sd"))
    shapes = {"latent": (4, 4, 4), "embedding": (8, 16), "pooled": None}
    for changes, own, runs in (
        ({}, True, True),
        ({"objective": "sft"}, False, False),
        ({"reference_scores": 4}, False, False),
        ({"lora_rank": 2}, False, True),
    ):
        c = dataclasses.replace(PRESETS["sd15"](), **changes)
        model = planner.read_model(c, unet_config, torch.bfloat16, **shapes)
        assert (model.reference > 0, model.runs_reference) == (own, runs)
        needs = plan(model, 80, **changes).needs
        assert needs["reference"] == (2 * model.trained if own else 0)
        one = model.activations
        assert model.operations() == 2 * (one.forward * (1 + runs) + one.backward)
    assert 0 < model.trained < model.frozen / 10  # adapters alone


def test_nothing_fits(sd15):
    with pytest.raises(ValueError, match="^plan_memory: expected at least (.+?) GiB") as stop:
        plan(sd15, 16)
    least = float(re.search("at least (.+?) GiB", str(stop.value)).group(1))
    assert 16 < least < 24
    assert plan(sd15, least + 0.1).engine.micro_batch == 1
    with pytest.raises(ValueError, match="^plan_memory"):
        plan(sd15, least - 0.1)


def test_gpus_that_do_not_divide_the_batch(sd15):
    with pytest.raises(
        ValueError, match="^plan_gpus: expected a divisor of train_.* = 2048, got 3"
    ):
        plan(sd15, 80, 3)
    assert plan(sd15, 80, 2048).engine.micro_batch == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan")
    tiny.make_model(path / "sd")
    tiny.make_sdxl_model(path / "sdxl")
    return path


def flags(folder: Path, model: str, **ds) -> list[str]:
    path = tiny.write_ds(folder / "ds.json", **ds)
    named = ["--model", str(folder / model), "--deepspeed_config", str(path)]
    return ["--plan", *named, "--output", str(folder / "run"), "--plan_memory", "24"]


@pytest.mark.parametrize("memory", ["24", "1.16"])
@pytest.mark.parametrize(
    ("model", "ds", "more"),
    [
        ("sd", {"bf16": {"enabled": True}, "zero_optimization": {"reduce_bucket_size": 10**6}}, []),
        ("sd", {"train_batch_size": 64}, ["--objective", "sft", "--lora_rank", "2"]),
        ("sdxl", {"train_batch_size": 64}, ["--gradient_checkpointing", "--plan_gpus", "4"]),
    ],
)
def test_what_is_printed_can_be_used(folder, capsys, monkeypatch, model, ds, more, memory):
    """The flags and the JSON go through the trainer's own checks; nothing is loaded or written."""
    nothing = lambda *_, **__: pytest.fail("loaded")  # noqa: E731
    monkeypatch.setattr(planner.models, "load_unet", nothing)
    monkeypatch.setattr(train, "start_process", nothing)
    asked = [*flags(folder, model, **ds), "--peak_tflops", "100", *more, "--plan_memory", memory]
    before = sorted(folder.rglob("*"))
    train.main(asked)
    assert sorted(folder.rglob("*")) == before
    text = capsys.readouterr().out
    printed, fragment = text.split("flags: ")[1].split("ds.json:\n")
    c = config.parse([*asked, *shlex.split(printed)])
    ranks = c.plan_gpus or 1
    e = complete(json.loads(fragment), c, ranks)
    assert e.batch == ds.get("train_batch_size", 4)  # its micro-batch, on one GPU
    assert re.search(rf"^ZeRO stage +{e.stage}$", text, re.M)
    assert f"{e.micro_batch} pairs per GPU, {e.accumulation} per step of {e.batch}" in text
    recomputed = re.search(r"recomputed blocks +(.+?) \(", text).group(1)
    if recomputed == "none":
        assert not c.gradient_checkpointing and not c.checkpoint_blocks
    elif recomputed == "all":
        assert c.gradient_checkpointing and not c.checkpoint_blocks
    else:
        assert c.checkpoint_blocks.split(",") == recomputed.split(", ")
    assert re.search(r"memory per GPU +1\.\d\d GiB predicted; 10% is to stay free", text)
    assert re.search(r"speed +\S+ pairs/s at 0.4 of 100 · 10¹² operations", text)
    assert not (folder / "run").exists()


def test_the_embedded_model_without_a_known_peak(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    train.main(["--plan", "--plan_memory", "8", "--plan_gpus", "1"])
    text = capsys.readouterr().out
    assert "16 pairs per step: micro-batch 16 × accumulation 1 of 'ds.json' × 1 GPU\n" in text
    assert "embedded, 3,4" in text and "unknown without the GPU's peak: --peak_tflops" in text


BAD = {
    "no GPU": (["--plan_memory", "0"], "plan_memory: expected the GiB of a GPU"),
    "too little": (["--plan_memory", "0.5"], "plan_memory: expected at least"),
    "no divisor": (["--plan_gpus", "7"], "plan_gpus: expected a divisor of train_batch_size = 64"),
    "optimizer": (["--optimizer", "adam"], "optimizer: expected auto or one of ['adamw'"),
    "compile": (
        ["--compile", "all"],
        "compile: expected none or one of ['regional', 'whole', 'graphs'], got",
    ),
    "compiled, shared": (
        ["--compile", "whole", "--shard_reference"],
        "compile: expected regional or none with shard_reference",
    ),
    "blocks": (
        ["--checkpoint_blocks", "mid_block"],
        "checkpoint_blocks: expected none beside --plan, which chooses them, got 'mid_block'",
    ),
    "attention": (["--attention", "paged"], "attention: expected one of ['sdpa'"),
    "negative": (["--plan_gpus", "-1"], "plan_gpus: expected 0"),
    "too much": (["--plan_share", "1.5"], "plan_share: expected above 0, at most 1, got 1.5"),
    "online": (
        ["--objective", "tailorpo", "--reward", "colourfulness"],
        "plan: expected an objective that trains on pairs",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_flags_are_one_line_and_exit_2(folder, capfd, monkeypatch, name):
    more, message = BAD[name]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert message in fails([*flags(folder, "sd", train_batch_size=64), *more], capfd)


BF16 = {"bf16": {"enabled": True}}
OWN = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
BAD_JSON = [
    ({"train_batch_size": "auto"}, [], "deepspeed_config: train_batch_size: expected"),
    ({MICRO: "auto"}, [], f"deepspeed_config: {MICRO}: expected a number above 0, got 'auto'"),
    ({ACCUMULATION: 0}, [], f"deepspeed_config: {ACCUMULATION}: expected a number above 0, got 0"),
    ({"zero_optimization": 1}, [], "deepspeed_config: zero_optimization: expected"),
    (
        BF16,
        ["--optimizer", "adafactor"],
        "optimizer: expected one that works on the flat slices of",
    ),
    (OWN, ["--optimizer", "adamw8bit"], "optimizer: expected auto beside"),
]


@pytest.mark.parametrize(("ds", "more", "message"), BAD_JSON)
def test_a_bad_json_is_one_line_and_exit_2(folder, capfd, ds, more, message):
    assert f"error: {message}" in fails([*flags(folder, "sd", **ds), *more], capfd)


def test_adafactor_in_fp32_is_planned_without_zero(folder, capsys):
    train.main([*flags(folder, "sd"), "--optimizer", "adafactor"])
    assert re.search("^ZeRO stage +0$", capsys.readouterr().out, re.M)


def test_another_machine_may_run_fp16(folder, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    asked = flags(folder, "sd", fp16={"enabled": True})
    train.main(asked)
    assert re.search("^ZeRO stage +1$", capfd.readouterr().out, re.M)
    assert "plan_memory: expected the GiB" in fails([*asked, "--plan_memory", "0"], capfd)


def test_this_machines_gpus(monkeypatch):
    found = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    expected = Gpus(4, 80 * 2**30, "NVIDIA A100-SXM4-80GB", 312.0)
    assert planner.find_gpus(TrainConfig(), torch.bfloat16) == expected
    assert planner.find_gpus(TrainConfig(), torch.float32).peak is None
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert planner.find_gpus(TrainConfig(), torch.bfloat16).count == 16
    others = planner.find_gpus(TrainConfig(plan_gpus=2, plan_memory=0.5), torch.bfloat16)
    assert others == Gpus(2, 2**29, "", None)


def test_the_shapes_are_those_of_a_prepared_cache(whole, monkeypatch, folder):
    """Not those that the model was made for."""
    c = TrainConfig(model=str(folder / "sdxl"), pairs=str(whole))
    unet_config = planner.models.load_unet_config(c.model)
    assert planner.shapes_of(c, unet_config)["pooled"] is None
    own = planner.shapes_of(dataclasses.replace(c, pairs="faces"), unet_config)
    assert own == {"latent": (4, 4, 4), "embedding": (8, 24), "pooled": 12}
