"""Optimizers by name, and the DeepSpeed JSONs of configs/."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from train_runs import ROOT, fails, stage
from variants import CONFIGS, ON_TWO, QUANTISED, RESUMED, same_run, weights

from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import read_engine_config
from dde_fast.optimizers import OPTIMIZERS, load_optimizer


def moves(folder, name: str) -> torch.Tensor:
    start = load_file(folder.model / "unet/diffusion_pytorch_model.safetensors")
    return torch.cat(
        [(w - start[key]).flatten() for key, w in weights(folder, name, "unet").items()]
    )


def load(tmp_path, name: str, **ds):
    path = tiny.write_ds(tmp_path / "ds.json", **ds)
    c = TrainConfig(optimizer=name, deepspeed_config=str(path), learning_rate=2e-3)
    return load_optimizer(c, read_engine_config(c, 1))


def test_auto_is_the_jsons_own_or_adamw(tmp_path):
    made = load(tmp_path, "auto")([torch.nn.Parameter(torch.ones(3))])
    assert type(made) is torch.optim.AdamW
    assert made.defaults["lr"] == 2e-3 and made.defaults["weight_decay"] == 0.01
    own = {"type": "AdamW", "params": {"lr": 1e-3}}
    assert load(tmp_path, "auto", optimizer=own) is None


def test_contradictions_are_refused(tmp_path):
    own = {"type": "AdamW", "params": {"lr": 1e-3}}
    with pytest.raises(ValueError, match="optimizer: expected auto beside .*'AdamW', got 'adamw'"):
        load(tmp_path, "adamw", optimizer=own)
    with pytest.raises(ValueError, match="flat slices of ZeRO stage 1, got 'adafactor'"):
        load(tmp_path, "adafactor", **stage(1))


@pytest.mark.parametrize("name", [n for n, row in OPTIMIZERS.items() if row.package != "torch"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    package = OPTIMIZERS[name].package
    monkeypatch.setitem(__import__("sys").modules, package, None)
    for module in [m for m in __import__("sys").modules if m.startswith(f"{package}.")]:
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=f"installed for '{name}' .pip install {package}."):
        load(tmp_path, name)


def test_an_unknown_name_is_one_line_and_exit_2(variants, capfd):
    message = fails([*variants.args("bad"), "--optimizer", "adamx"], capfd)
    assert "optimizer: expected auto or one of ['adamw', " in message


def test_adafactor_trains_factored_and_resumes(variants):
    same_run(variants, "adafactor", "adafactor_resumed", "unet")
    assert moves(variants, "adafactor").abs().max() > 1e-4
    path = variants.path / "adafactor/checkpoints/step-00000004/mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=False)["optimizer"]["state"]
    assert any("exp_avg_sq_row" in state for state in states.values())


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_8_bit_optimizers_train_in_8_bits_and_resume(variants, name):
    if name not in QUANTISED:
        pytest.skip("bitsandbytes is not installed")
    same_run(variants, name, f"{name}_resumed", "unet")
    path = variants.path / f"{name}/checkpoints/step-00000006"
    states = torch.load(next(path.glob("*optim_states.pt")), weights_only=False)
    moments = states["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    assert moments["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8
    if name == "adamw8bit":
        assert torch.cosine_similarity(moves(variants, name), moves(variants, "ema2"), 0) > 0.9


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_for_the_papers_batch_on_any_power_of_two(name):
    path = ROOT / f"configs/{name}.json"
    for ranks in (1, 8, 64):
        parsed = read_engine_config(TrainConfig(deepspeed_config=str(path)), ranks)
        assert parsed.batch == 2048 and parsed.dtype == torch.bfloat16
        assert parsed.json["gradient_clipping"] == 1.0
        assert parsed.json["data_types"] == {"grad_accum_dtype": "fp32"}
        assert f"zero{parsed.stage}" in name or name == "multi-node"
    assert json.loads(path.read_text())["train_micro_batch_size_per_gpu"] == parsed.micro_batch


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_run(variants, name, request):
    runs = request.getfixturevalue("variants_of_two") if name in ON_TWO else variants
    losses = runs.losses(f"config_{name}")
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    # within bf16's rounding of the same training in float32
    assert (losses - variants.losses("ema0")[:2]).abs().max() < 0.02
    assert 1e-4 < moves(runs, f"config_{name}").abs().max() < 5e-3
    if name in RESUMED:
        same_run(variants, f"config_{name}", f"config_{name}_resumed", "unet", "unet_ema")


def test_a_sharded_reference_gives_the_same_losses_to_the_bit(variants_of_two):
    same_run(variants_of_two, "replicated", "sharded", "unet")
