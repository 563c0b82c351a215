"""Adapters: only they are trained, and without them the model is the base."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from train_runs import fails
from variants import LORA, distance, same_run, weights

from dde_fast import lora, models
from dde_fast.config import TrainConfig
from dde_fast.forward import PairForward
from dde_fast.loader import Batch
from dde_fast.loss import PreferenceLoss


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("lora") / "model")


def unet_of(model, dtype=torch.float32) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_base_to_the_bit(model, dtype):
    base, policy = unet_of(model, dtype), unet_of(model).train()
    lora.add_adapters(policy, TrainConfig(lora_rank=4))
    policy.to(dtype)
    off = lora.AdaptersOff(SimpleNamespace(module=policy))
    torch.manual_seed(1)
    inputs = torch.randn(2, 4, 4, 4).to(dtype), torch.tensor([3, 700]), torch.randn(2, 8, 16)
    inputs = (*inputs[:2], inputs[2].to(dtype))
    expected = base(*inputs, return_dict=False)[0]
    assert torch.equal(policy(*inputs, return_dict=False)[0], expected)  # B = 0
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    for name, weight in policy.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight)
    assert not torch.equal(policy(*inputs, return_dict=False)[0], expected)
    reference = off(*inputs, return_dict=False)[0]
    assert torch.equal(reference, expected) and not reference.requires_grad
    assert policy(*inputs, return_dict=False)[0].requires_grad  # on again
    assert trained == {name for name, weight in policy.named_parameters() if weight.requires_grad}


def test_adapters_begin_equal_in_every_process_and_leave_the_random_state_alone(model):
    torch.manual_seed(5)
    first = unet_of(model)
    before = torch.get_rng_state()
    lora.add_adapters(first, TrainConfig(lora_rank=4, seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, other = unet_of(model), unet_of(model)
    lora.add_adapters(second, TrainConfig(lora_rank=4, seed=3))
    lora.add_adapters(other, TrainConfig(lora_rank=4, seed=4))
    a, b, c = (unet.state_dict() for unet in (first, second, other))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("name", ["lora0", "lora1", "lora2", "lora3", "lora_checkpointing"])
def test_every_zero_stage_is_the_plain_loop(variants, name):
    plain = variants.losses("plain_lora")
    assert (plain[1:] - plain[0]).abs().max() > 0.05  # beta 100 raises rounding as well
    assert (variants.losses(name) - plain).abs().max() < 5e-5
    for kind in ("lora", "lora_ema"):
        expected = weights(variants, "plain_lora", kind)
        assert distance(weights(variants, name, kind), expected) < 5e-3


@pytest.mark.parametrize("n", [2, 3])
def test_bf16_follows_float32_with_exact_adapters(variants, n):
    losses = variants.losses(f"lora_bf16_{n}")
    assert (losses - variants.losses("plain_lora_gentle")).abs().max() < 0.02
    assert losses[1:].ne(losses[0]).any()
    moves = [
        torch.cat([value.flatten() for key, value in sorted(state.items()) if "lora_B" in key])
        for state in (
            weights(variants, name, "lora") for name in (f"lora_bf16_{n}", "plain_lora_gentle")
        )
    ]
    assert torch.cosine_similarity(*moves, 0) > 0.9
    exact = weights(variants, f"lora_bf16_{n}", "lora")
    assert any((value != value.bfloat16().float()).any() for value in exact.values())


def step_of(model, dtype, merged: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [64] and the gradient of the trained weights, flat, of a policy that training moved.

    Its movement is in adapters, or (`merged`) added to the weights that a full fine-tune trains: the
    same function either way.
    """
    policy = unet_of(model)
    if not merged:
        lora.add_adapters(policy, TrainConfig(lora_rank=4, lora_alpha=8))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, layer in unet_of(model).named_modules():
            if not name.endswith(tuple(f".{target}" for target in lora.targets_of(TrainConfig()))):
                continue
            a = torch.randn(4, layer.in_features, generator=generator) / layer.in_features**0.5
            b = 0.05 * torch.randn(layer.out_features, 4, generator=generator)
            ours = policy.get_submodule(name)
            if merged:
                ours.weight += 8 / 4 * b @ a
            else:
                ours.lora_A[lora.ADAPTER].weight.copy_(a)
                ours.lora_B[lora.ADAPTER].weight.copy_(b)
    policy.to(dtype)
    reference = unet_of(model, dtype)
    if not merged:
        reference = lora.AdaptersOff(SimpleNamespace(module=policy))
    scheduler = models.load_scheduler(model)
    loss_fn = PreferenceLoss.from_scheduler(scheduler, "diffusion-dpo", beta=100.0)
    inputs = SimpleNamespace(
        alphas_cumprod=scheduler.alphas_cumprod, timesteps=loss_fn.timestep_probabilities(0, None)
    )
    engine = SimpleNamespace(dtype=dtype)
    forward = PairForward(TrainConfig(), engine, inputs, policy, reference, loss_fn)
    batch = Batch(
        latents=torch.randn(128, 4, 4, 4, generator=generator),
        embeddings=torch.randn(64, tiny.LENGTH, tiny.WIDTH, generator=generator),
        captions=torch.arange(64),
        pair_ids=torch.arange(64),
        draws=torch.zeros(64, dtype=torch.int64),
    )
    out = forward(batch)
    out.loss.backward()
    trained = [weight.grad for weight in policy.parameters() if weight.requires_grad]
    return out.logits.detach(), torch.cat([grad.float().flatten() for grad in trained])


def test_bf16_rounds_adapters_no_more_than_whole_weights(model):
    """What separates a 16-bit run from one in float32 is the rounding of the forward, not adapters."""
    found = {
        (merged, dtype): step_of(model, dtype, merged)
        for merged in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    }
    logits = {key: value[0] for key, value in found.items()}
    exact = logits[True, torch.float32]
    torch.testing.assert_close(logits[False, torch.float32], exact, rtol=1e-3, atol=1e-3)
    rounding, cosine = {}, {}
    for merged in (False, True):
        half, full = found[merged, torch.bfloat16], found[merged, torch.float32]
        rounding[merged] = float((half[0] - full[0]).square().mean().sqrt() / exact.std())
        cosine[merged] = float(torch.cosine_similarity(half[1], full[1], 0))
    assert rounding[False] < 1.5 * rounding[True]
    assert min(cosine.values()) > 0.99


@pytest.mark.parametrize("name", ["lora0", "lora1", "lora2", "lora3", "lora_bf16_2", "lora_bf16_3"])
def test_the_first_loss_is_log_2(variants, name):
    assert variants.losses(name)[0] == torch.tensor(math.log(2.0), dtype=torch.float32)


@pytest.mark.parametrize("n", [0, 2, 3])
def test_resumed_is_uninterrupted_bit_for_bit(variants, n):
    same_run(variants, f"lora{n}", f"lora{n}_resumed", "lora", "lora_ema")


@pytest.mark.parametrize("n", [0, 2, 3])
def test_two_ranks_are_one(variants, variants_of_two, n):
    name = f"two_lora{n}"
    assert (variants_of_two.losses(name) - variants.losses(f"lora{n}")).abs().max() < 5e-5
    ours, alone = weights(variants_of_two, name, "lora"), weights(variants, f"lora{n}", "lora")
    assert distance(ours, alone) < 5e-3


def test_a_checkpoint_holds_adapters_alone(variants):
    whole = (variants.model / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    for n in range(4):
        files = (variants.path / f"lora{n}/checkpoints").rglob("*.pt")
        state = torch.load(next(iter(sorted(files))), weights_only=False)["module"]
        assert not state or all(".lora_" in name for name in state), n
        size = sum(
            file.stat().st_size for file in (variants.path / f"lora{n}/checkpoints").rglob("*.pt")
        )
        assert size < whole


BAD = {
    "rank": (["--lora_rank", "-1"], "lora_rank: expected 0"),
    "alpha": (["--lora_rank", "4", "--lora_alpha", "-1"], "lora_alpha: expected"),
    "no target": (["--lora_rank", "4", "--lora_targets", " , "], "lora_targets: expected names"),
    "alpha alone": (["--lora_alpha", "4"], "lora_alpha: expected 0 where lora_rank is 0"),
    "no such layer": (["--lora_rank", "4", "--lora_targets", "to_q,to_z"], "got 'to_z'"),
    "no layer for it": (["--lora_rank", "4", "--lora_targets", "norm1"], "norm1"),
    "two references": (["--lora_rank", "4", "--shard_reference"], "shard_reference: expected"),
    "no reference": (["--objective", "sft", "--shard_reference"], "shard_reference: expected"),
    "ema": (["--ema_decay", "1"], "ema_decay: expected"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_flags_are_one_line_and_exit_2(variants, capfd, name):
    flags, message = BAD[name]
    assert message in fails([*variants.args("bad"), *flags], capfd)
    assert not (variants.path / "bad").exists()


def test_other_adapters_do_not_continue_a_run(variants, capfd):
    other = variants.args("other", "lora1", resume="latest", **LORA | {"lora_rank": 8})
    assert "resume: " in fails(other, capfd)


def test_without_peft_the_message_says_what_to_install(variants, capfd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    message = fails([*variants.args("bad"), "--lora_rank", "4"], capfd)
    assert "lora_rank: expected peft to be installed (pip install peft)" in message
