"""The moving average of the weights against averages made elsewhere."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from train_runs import STEPS
from train_worker import Syncs
from variants import EMA, distance, same_run, weights

from dde_fast import checkpoint, ema, inputs
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import read_engine_config


def start_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder.model / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("n", [0, 2, 3])
def test_every_zero_stage_is_diffusers_average_of_the_plain_loop(variants, n):
    expected, start = weights(variants, "plain_ema", "unet_ema"), start_of(variants)
    assert distance(weights(variants, f"ema{n}", "unet_ema"), expected, start) < 5e-4
    assert distance(weights(variants, f"ema{n}", "unet"), expected, start) > 1e-2


@pytest.mark.parametrize("n", [2, 3])
def test_the_average_is_of_the_exact_weights_beneath_16_bits(variants, n):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as read

    place = variants.path / f"ema_bf16_{n}/checkpoints"
    steps = [read(str(place), f"step-{step:08d}") for step in range(1, 5)]
    average = {key: value.double() for key, value in steps[0].items()}
    for count, state in enumerate(steps[1:], 1):
        decay = min(EMA["ema_decay"], (1 + count) / (10 + count))
        for key, value in state.items():
            average[key] = decay * average[key] + (1 - decay) * value.double()
    found = weights(variants, f"ema_bf16_{n}", "unet_ema")
    assert any((value != value.bfloat16().float()).any() for value in found.values())
    for key, value in found.items():
        torch.testing.assert_close(value.double(), average[key], rtol=1e-6, atol=1e-8)
    # and beside it the weights themselves, to the bit
    for key, value in weights(variants, f"ema_bf16_{n}", "unet").items():
        assert torch.equal(value, steps[-1][key])


def test_exporting_a_finished_run_again_changes_nothing(variants):
    # the job "finished" resumed ema2 at its last step and wrote everything anew
    written = (variants.path / "ema2/unet_ema").stat().st_mtime
    marker = variants.path / f"ema2/checkpoints/step-{STEPS:08d}/COMPLETE"
    assert written > marker.stat().st_mtime
    start = start_of(variants)
    for kind in ("unet", "unet_ema"):
        expected = weights(variants, "plain_ema", kind)
        assert distance(weights(variants, "ema2", kind), expected, start) < 5e-4


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_the_optimizer_skipped_is_none(fused):
    """Nor does the host wait to hear whether it was: the optimizer knows it on the device."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    engine = SimpleNamespace(basic_optimizer=optimizer, global_steps=0)
    ema.attach(engine, 0.9)
    expected, waits = None, 0
    for step, skipped in enumerate([False, False, True, False, True, True, False]):
        engine.global_steps = step
        weight.grad = torch.full((3,), torch.nan if skipped else 1.0)
        if fused:  # as optimizer_step does
            optimizer.found_inf = torch.tensor(float(skipped))
        if fused or not skipped:
            with Syncs() as syncs:
                optimizer.step()
            waits += syncs.count
        if not skipped:
            decay = min(0.9, (1 + step) / (10 + step)) if expected is not None else 0.0
            expected = decay * (0 if expected is None else expected) + (1 - decay) * weight.detach()
        average = optimizer.state[weight][ema.STATE]
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=0)
        assert not torch.equal(average, weight) or step == 0
    assert waits == 0 or not fused


LOST = {
    "an average": ({"ema_decay": 0.9}, {}, "the average that ema_decay keeps"),
    "8 bits": ({"optimizer": "adamw8bit"}, {}, "the states of adamw8bit"),
    "another of the JSON": ({}, {"optimizer": {"type": "Lion"}}, "the states of Lion"),
    "amsgrad": (
        {},
        {"optimizer": {"type": "Adam", "params": {"amsgrad": True}}},
        "the maxima of amsgrad",
    ),
}


@pytest.mark.parametrize("name", list(LOST))
def test_what_cannot_be_split_for_other_ranks_is_refused_before_it_is_loaded(tmp_path, name):
    flags, ds, lost = LOST[name]

    def check(stage: int, ranks: int, flags: dict, ds: dict) -> None:
        zero = {"zero_optimization": {"stage": stage}}
        path = tiny.write_ds(tmp_path / "ds.json", **zero, **ds)
        c = TrainConfig(deepspeed_config=str(path), **flags)
        inputs.check_ranks(c, read_engine_config(c, ranks), start)

    start = checkpoint.Checkpoint(tmp_path, 1, 4, world_size=2, skipped=0, identity={})
    for n in (1, 2, 3):
        with pytest.raises(ValueError, match=f"resume: expected 2 ranks, .* got 1: .* not {lost}"):
            check(n, 1, flags, ds)
        check(n, 2, flags, ds)  # as many as wrote it
        check(n, 1, {}, {"optimizer": {"type": "AdamW"}})
        check(n, 1, {}, {})
    check(0, 1, flags, ds)  # every rank holds the whole


def test_a_run_without_an_average_leaves_none(variants):
    assert not (variants.path / "adafactor/unet_ema").exists()


def test_two_ranks_share_one_average(variants, variants_of_two):
    same_run(variants_of_two, "sharded", "replicated", "unet_ema")
    for n in (0, 2, 3):
        ours = weights(variants_of_two, f"two_lora{n}", "lora_ema")
        assert distance(ours, weights(variants, "plain_lora", "lora_ema")) < 5e-3
