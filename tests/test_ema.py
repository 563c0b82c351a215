"""The moving average of the weights against averages made elsewhere."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from train_runs import STEPS
from variants import EMA, distance, same_run, weights

from dde_fast import ema


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


def test_an_average_is_not_begun_in_the_middle_of_a_run():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    engine = SimpleNamespace(basic_optimizer=optimizer, global_steps=0)
    ema.check_restored(engine)  # nothing was stepped yet
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(ValueError, match="ema_decay: expected a checkpoint with the average"):
        ema.check_restored(engine)
    ema.attach(engine, 0.9)
    optimizer.step()
    ema.check_restored(engine)
    assert torch.equal(optimizer.state[weight][ema.STATE], weight)


def test_a_run_without_an_average_leaves_none(variants):
    assert not (variants.path / "adafactor/unet_ema").exists()


def test_two_ranks_share_one_average(variants, variants_of_two):
    same_run(variants_of_two, "sharded", "replicated", "unet_ema")
    for n in (0, 2, 3):
        ours = weights(variants_of_two, f"two_lora{n}", "lora_ema")
        assert distance(ours, weights(variants, "plain_lora", "lora_ema")) < 5e-3
