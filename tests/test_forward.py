"""A batch of pairs through noise, models and loss, against the same written out."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.nn.functional import logsigmoid

from dde_fast import models, noise
from dde_fast.config import TrainConfig
from dde_fast.forward import PairForward
from dde_fast.loader import Batch
from dde_fast.loss import PreferenceLoss

BETA = 10.0


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny.make_sdxl_model(tmp_path_factory.mktemp("sdxl") / "model")


def forward_of(model, *, timesteps: list[int], objective: str = "diffusion-dpo") -> PairForward:
    """Policy and reference differ; timesteps are drawn from those given."""
    scheduler = models.load_scheduler(model)
    loss_fn = PreferenceLoss.from_scheduler(scheduler, objective, beta=BETA)
    policy, reference = models.load_unet(model), models.load_unet(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for value in policy.parameters():
            value += 0.05 * torch.randn_like(value)
    chosen = torch.zeros(1000, dtype=torch.float64)
    chosen[timesteps] = 1
    inputs = SimpleNamespace(alphas_cumprod=scheduler.alphas_cumprod, timesteps=chosen)
    engine = SimpleNamespace(dtype=torch.float32)
    return PairForward(TrainConfig(seed=3), engine, inputs, policy, reference, loss_fn)


def batch_of(width: int, pooled: int | None, count: int = 2) -> Batch:
    torch.manual_seed(6)
    return Batch(
        latents=torch.randn(2 * count, 4, 4, 4),
        embeddings=torch.randn(count, tiny.LENGTH, width),
        captions=torch.arange(count),
        pooled=None if pooled is None else torch.randn(count, pooled),
        time_ids=None if pooled is None else torch.randint(0, 1025, (2 * count, 6)).float(),
        pair_ids=torch.tensor([7, 40])[:count],
        draws=torch.tensor([0, 2])[:count],
    )


def test_sdxl_is_conditioned_on_caption_and_each_images_sizes(sdxl):
    forward, batch = forward_of(sdxl, timesteps=[300]), batch_of(tiny.WIDTH + 8, 12)
    out = forward(batch)
    alpha = models.load_scheduler(sdxl).alphas_cumprod[300]
    eps = noise.pair_noise((4, 4, 4), seed=3, pair_ids=batch.pair_ids, draw=batch.draws)

    def error(unet: torch.nn.Module, i: int, half: int) -> torch.Tensor:
        row = i + 2 * half
        noisy = alpha.sqrt() * batch.latents[row] + (1 - alpha).sqrt() * eps[i]
        added = {"text_embeds": batch.pooled[i][None], "time_ids": batch.time_ids[row][None]}
        found = unet(noisy[None], 300, batch.embeddings[i][None], added_cond_kwargs=added).sample
        return (found[0] - eps[i]).square().mean()

    inside = []
    for i in range(2):
        win, lose = (
            error(forward.engine, i, half) - error(forward.reference, i, half) for half in (0, 1)
        )
        inside.append(-0.5 * BETA * (win - lose))
    torch.testing.assert_close(out.logits, torch.stack(inside), rtol=1e-4, atol=1e-5)
    expected = -logsigmoid(torch.stack(inside)).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", ["pooled", "time_ids", "embeddings"])
def test_each_condition_of_sdxl_changes_the_loss(sdxl, part):
    forward, batch = forward_of(sdxl, timesteps=[300]), batch_of(tiny.WIDTH + 8, 12)
    before = forward(batch).loss
    getattr(batch, part)[-1] += 100.0
    assert (forward(batch).loss - before).abs() > 1e-5


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("objective", ["dde", "diffusion-dpo"])
def test_zero_terminal_snr_is_finite_at_its_last_timestep(tmp_path, prediction, objective):
    model = tiny.make_model(tmp_path / "model", prediction, rescale_betas_zero_snr=True)
    assert models.load_scheduler(model).alphas_cumprod[-1] == 0
    forward = forward_of(model, timesteps=[999], objective=objective)
    out = forward(batch_of(tiny.WIDTH, None))
    out.loss.backward()
    forward.loss_fn.update_ratios()
    assert out.loss.isfinite() and out.loss != torch.tensor(2.0).log()
    assert forward.loss_fn.ratios.isfinite().all()
    assert all(value.grad.isfinite().all() for value in forward.engine.parameters())


def test_zero_terminal_snr_with_epsilon_is_refused(tmp_path):
    model = tiny.make_model(tmp_path / "model", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero terminal SNR.*use 'v_prediction'"):
        forward_of(model, timesteps=[999])
