"""The command line, the presets and the DeepSpeed JSON."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import deepspeed
import pytest
import tiny
import torch

from dde_fast.config import PRESETS, TrainConfig, parse
from dde_fast.deepspeed_config import KNOWN_KEYS, read_engine_config
from dde_fast.inputs import FREE_ON_RESUME, identity_of
from dde_fast.models import load_scheduler
from dde_fast.objectives import OBJECTIVES
from dde_fast.trajectories import DDIMSteps

ROOT = Path(__file__).parent.parent


def engine(tmp_path, world_size: int = 1, base: dict | None = None, **settings):
    """The engine configuration of a JSON."""
    path = tiny.write_ds(tmp_path / "ds.json", **settings)
    if base is not None:
        path.write_text(json.dumps(base | settings))
    return read_engine_config(TrainConfig(deepspeed_config=str(path)), world_size)


def test_defaults_are_the_faces_preset():
    parsed = parse([])
    assert parsed == dataclasses.replace(PRESETS["faces"](), output="outputs/faces-dde")


def test_a_preset_is_a_start_that_flags_override():
    parsed = parse(["--preset", "style", "--steps", "7"])
    assert (parsed.pairs, parsed.steps, parsed.preset) == ("style", 7, "style")
    assert parse(["--preset=style", "--pairs=faces"]).pairs == "faces"


def test_online_objectives_leave_out_the_least_noise_unless_told_otherwise():
    """Of Stable Diffusion's schedule: below t = 200 a step's weight would be several times larger."""
    for objective in ("tailorpo", "tailorpo-g", "d3po"):
        online = ["--objective", objective]
        assert parse(online).timestep_low == 200
        assert parse([*online, "--timestep-low=0"]).timestep_low == 0
        assert parse([*online, "--timestep_low", "100"]).timestep_low == 100
        assert parse([*online, "--preset", "style"]).timestep_low == 500
    assert parse(["--objective", "sft"]).timestep_low == 0
    steps = DDIMSteps(load_scheduler("embedded"), TrainConfig().sampling_steps)
    weights = dict(zip(steps.timesteps, steps.weights.tolist(), strict=True))
    kept = [weights[t] for t in steps.timesteps if t >= 200]
    assert max(kept) < 4 * min(kept) < weights[101]


def test_guidance_wants_a_target_of_its_reward():
    """Of the presets' rewards they have one; sentiment's would draw others down."""
    guided = ["--objective", "tailorpo-g"]
    assert parse(guided).reward_target == 1
    assert parse([*guided, "--preset", "style"]).reward_target == 150
    other = [*guided, "--preset", "sd15", "--prompts", "a.txt", "--reward", "pickscore"]
    with pytest.raises(
        ValueError, match="^reward_target: expected one for .* 'pickscore', got the"
    ):
        parse(other)
    with pytest.raises(ValueError, match="^reward_step: expected one for the reward 'pickscore'"):
        parse([*other, "--reward_target", "1.0"])
    assert parse([*other, "--reward-target=1.0", "--reward_step=2.0"]).reward_target == 1


@pytest.mark.parametrize(("name", "steps"), [("sd15", 2000), ("sdxl", 1500)])
@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_the_papers_presets_have_the_papers_numbers(monkeypatch, name, steps, ranks):
    monkeypatch.chdir(ROOT)
    parsed = parse(["--preset", name])
    assert (parsed.objective, parsed.beta, parsed.steps) == ("dde", 5000, steps)
    assert (parsed.learning_rate, parsed.ratio_decay) == (2.05e-5, 0.9)
    assert (parsed.timestep_low, parsed.timestep_high) == (0, None)
    assert parsed.output == f"outputs/{name}-dde"
    ds = read_engine_config(parsed, ranks)
    assert (ds.batch, ds.dtype) == (2048, torch.bfloat16)


def test_dashes_and_underscores_and_equals():
    for args in (
        ["--deepspeed_config", "a.json", "--learning_rate=1e-3", "--local_rank=3"],
        ["--deepspeed-config=a.json", "--learning-rate", "1e-3", "--local-rank", "3"],
    ):
        parsed = parse(args)
        assert (parsed.deepspeed_config, parsed.learning_rate, parsed.local_rank) == (
            "a.json",
            1e-3,
            3,
        )
    assert parse(["--gradient_checkpointing"]).gradient_checkpointing
    assert parse(["--timestep_high", "700"]).timestep_high == 700


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    source = inspect.getsource(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
        explanation = re.search(rf'{field.name}: .*\n    """(.+?)[\n"]', source).group(1)
        assert " ".join(explanation.split()[:4]) in text
    assert all(name in source for name in OBJECTIVES)


def test_the_default_json_is_complete():
    parsed = read_engine_config(TrainConfig(deepspeed_config=str(ROOT / "ds.json")), 2)
    raw = json.loads((ROOT / "ds.json").read_text())
    assert raw["gradient_clipping"] == parsed.json["gradient_clipping"] == 1.0
    assert parsed.batch == 2 * raw["train_micro_batch_size_per_gpu"]
    assert parsed.dtype == torch.float32


@pytest.mark.parametrize(
    ("world_size", "settings", "expected"),
    [
        (1, {"train_micro_batch_size_per_gpu": 4}, (4, 1, 4)),
        (2, {"train_micro_batch_size_per_gpu": 4}, (4, 1, 8)),
        (2, {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, (4, 3, 24)),
        (2, {"train_micro_batch_size_per_gpu": 4, "train_batch_size": 24}, (4, 3, 24)),
        (2, {"gradient_accumulation_steps": 3, "train_batch_size": 24}, (4, 3, 24)),
        (4, {"train_batch_size": 24}, (6, 1, 24)),
    ],
)
def test_batches_complete_as_deepspeed_does(tmp_path, monkeypatch, world_size, settings, expected):
    found = engine(tmp_path, world_size, base={}, **settings)
    assert (found.micro_batch, found.accumulation, found.batch) == expected
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed.comm, "get_world_size", lambda: world_size)
    theirs = deepspeed.DeepSpeedConfig(dict(settings))
    assert expected == (
        theirs.train_micro_batch_size_per_gpu,
        theirs.gradient_accumulation_steps,
        theirs.train_batch_size,
    )


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, {"train_micro_batch_size_per_gpu": 4, "train_batch_size": 12}),
        (4, {"train_batch_size": 6}),
        (1, {"train_micro_batch_size_per_gpu": 0}),
        (1, {"train_micro_batch_size_per_gpu": "auto"}),
        (1, {"gradient_accumulation_steps": 2}),
    ],
)
def test_batches_that_do_not_multiply(tmp_path, world_size, settings):
    with pytest.raises(ValueError, match="deepspeed_config: train_.*batch_size.*: expected"):
        engine(tmp_path, world_size, base={}, **settings)


def test_known_keys_are_those_of_the_installed_deepspeed():
    source = "".join(path.read_text() for path in Path(deepspeed.__file__).parent.rglob("*.py"))
    for key in KNOWN_KEYS:
        assert re.search(rf"""["']{key}["']""", source), key
    for key in ("amp", "nebula", "elasticity", "gradient_clippping"):
        assert key not in KNOWN_KEYS


@pytest.mark.parametrize("key", ["zero_optimisation", "gradient_clip", "amp"])
def test_unknown_keys_are_named(tmp_path, key):
    with pytest.raises(ValueError, match=rf"deepspeed_config: .*\['{key}'\]"):
        engine(tmp_path, **{key: {}})


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 4, "train_batch_size": 8}')
    with pytest.raises(ValueError, match="'train_batch_size'.* given twice"):
        read_engine_config(TrainConfig(deepspeed_config=str(path)), 1)


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"bf16": true}'])
def test_a_json_that_is_none(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="deepspeed_config: .*expected"):
        read_engine_config(TrainConfig(deepspeed_config=str(path)), 1)


def test_a_json_that_is_elsewhere(tmp_path, monkeypatch):
    """A preset's path is one in the repository: the error says so, and where it was looked for."""
    monkeypatch.chdir(tmp_path)
    where = re.escape(f"got 'configs/zero1.json' in {str(tmp_path)!r} (No such file")
    with pytest.raises(ValueError, match=f"are in the repository's folder.*{where}"):
        read_engine_config(parse(["--preset", "sd15"]), 1)


def test_precision(tmp_path):
    on = {"enabled": True}
    zero1 = {"zero_optimization": {"stage": 1}}
    assert engine(tmp_path).dtype == torch.float32
    assert engine(tmp_path, bf16={"enabled": False}).dtype == torch.float32
    assert engine(tmp_path, bf16=on, **zero1).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="stage: expected 1, 2 or 3 with 16 bits"):
        engine(tmp_path, bf16=on)
    with pytest.raises(ValueError, match="bf16 or fp16, got both"):
        engine(tmp_path, bf16=on, fp16=on, **zero1)


@pytest.mark.parametrize("key", ["bf16", "bfloat16"])
def test_bf16_gradients_are_summed_at_once_at_stage_1_unless_told_otherwise(tmp_path, key):
    def section(stage: int, **more) -> dict:
        zero = {"zero_optimization": {"stage": stage}}
        return engine(tmp_path, **{key: {"enabled": True} | more}, **zero).json[key]

    assert section(1) == {"enabled": True, "immediate_grad_update": True}
    assert section(1, immediate_grad_update=False)["immediate_grad_update"] is False
    assert section(2) == {"enabled": True}
    off = engine(tmp_path, **{key: {"enabled": False}}, zero_optimization={"stage": 1})
    assert off.json[key] == {"enabled": False}


def test_clipping_is_always_written_and_nothing_waits_per_step(tmp_path):
    assert engine(tmp_path, base={"train_batch_size": 4}).json["gradient_clipping"] == 1.0
    assert engine(tmp_path, gradient_clipping=0.5).json["gradient_clipping"] == 0.5
    assert engine(tmp_path).json["timers"] == {"throughput": {"enabled": False}}


def test_auto_comes_from_the_configuration(tmp_path):
    auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    path = tiny.write_ds(
        tmp_path / "ds.json",
        optimizer={"type": "AdamW", "params": auto},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    )
    settings = TrainConfig(
        deepspeed_config=str(path), learning_rate=3e-4, adam_beta2=0.95, warmup_steps=9
    )
    ds = read_engine_config(settings, 1).json
    assert ds["optimizer"]["params"] == {
        "lr": 3e-4,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.01,
        "torch_adam": True,  # DeepSpeed's own would be compiled
        "fused": True,
    }
    assert ds["scheduler"]["params"] == {"warmup_num_steps": 9}
    with pytest.raises(ValueError, match="optimizer.params.momentum: expected a value"):
        engine(tmp_path, optimizer={"type": "SGD", "params": {"momentum": "auto"}})
    own = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": False}}
    assert engine(tmp_path, optimizer=own).json["optimizer"] == own


def test_identity_covers_what_shapes_the_trajectory(tmp_path):
    path = tiny.write_ds(tmp_path / "ds.json")
    settings = TrainConfig(deepspeed_config=str(path))
    engine_config = read_engine_config(settings, 1)
    identity = identity_of(settings, engine_config)
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert FREE_ON_RESUME < fields
    assert fields - FREE_ON_RESUME == identity.keys() & fields
    assert {"objective", "beta", "seed", "learning_rate", "caption_dropout"} <= identity.keys()
    assert identity["deepspeed_config: pairs per optimizer step"] == 4
    assert json.loads(json.dumps(identity)) == identity
