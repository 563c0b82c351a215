"""Online objectives with rewards that fail, and with gradients too faint for half precision."""

import math
from unittest.mock import patch

import pytest
import tiny
import torch
from test_online import Toy, batch_of, brightness, forward_of

from dde_fast import rewards
from dde_fast.metrics import Meter
from dde_fast.online import FORWARDS, OnlineOutput, pulled_back, reward_failure
from dde_fast.rewards import REWARDS, Reward

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model"))


def sad_is_none(images, prompts):
    """No number for those that are sad."""
    return brightness(images, prompts) * torch.tensor(
        [math.nan if p == "sad" else 1 for p in prompts]
    )


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for name, score in (
        ("brightness", brightness),
        ("broken", lambda images, prompts: brightness(images, prompts) * math.inf),
        ("half broken", sad_is_none),
        ("edge", lambda images, prompts: (0 * brightness(images, prompts)).sqrt()),
        ("faint", lambda images, prompts: 1e-9 * brightness(images, prompts)),
    ):
        row = Reward(lambda _, score=score: Toy(score), True, "image", name)
        monkeypatch.setitem(REWARDS, name, row)
    rewards.load_reward.cache_clear()


def test_a_reward_that_is_no_number_shows_in_the_loss_and_is_named(model):
    for objective in FORWARDS:
        forward = forward_of(model, objective, "broken")
        out = forward(batch_of())
        assert out.loss.isnan() and out.failed.tolist() == [True, True]
        out = forward_of(model, objective, "half broken")(batch_of())
        assert out.loss.isnan() and out.per_pair()["reward_failures"].tolist() == [0, 1]
        assert not forward_of(model, objective)(batch_of()).failed.any()
        forward = forward_of(model, objective)
        with torch.no_grad():
            forward.engine.unet.conv_out.bias[0] = torch.nan
        out = forward(batch_of())  # no fault of the reward
        assert out.loss.isnan() and not out.failed.any()
    out = forward_of(model, "tailorpo-g", "edge")(batch_of())
    assert out.reward_win.isfinite().all() and out.failed.all()
    assert not forward_of(model, "tailorpo", "edge")(batch_of()).failed.any()


def test_a_failing_reward_is_told_of_with_its_timesteps():
    meter = Meter(torch.device("cpu"), 1000)
    ones, failed = torch.ones(2), torch.tensor([False, True])
    for timestep, fails in ((334, failed), (667, ~ones.bool())):
        parts = {"loss": ones[0], "logits": ones, "policy_error": torch.ones(4)}
        parts |= {"reference_error": torch.ones(4), "margin": ones}
        parts |= {"timesteps": torch.full((2,), timestep), "failed": fails}
        rewards = dict.fromkeys(("reward", "reward_win", "reward_lose"), ones)
        meter.observe(OnlineOutput(**parts, **rewards))
    with patch("torch.distributed.all_reduce"):
        record = meter.read()
    text = reward_failure(record, "colourfulness")
    assert "the reward 'colourfulness' gave no finite number" in text
    assert "25.00% of the pairs" in text and "at timesteps 300-399:" in text
    assert reward_failure({"loss": 1.0}, "sentiment") is None
    assert reward_failure({"reward_failures": 0.0}, "sentiment") is None


def test_guidance_in_half_precision_loses_nothing(model):
    """Gradients so small that fp16 has no number for them."""
    fields = {"reward_target": 1.0, "reward_step": 1e9}
    exact, half = (forward_of(model, "tailorpo-g", "faint", **fields) for _ in range(2))
    half.dtype = torch.float16
    half.engine.unet.half()
    for i in (0, 1):
        for forward in (exact, half):
            forward.begin(batch_of())
        x = exact.noise(1 + i, 1)[0]
        moves = [forward.moved(i, x) - x for forward in (exact, half)]
        assert moves[0].abs().max() > 1e-2
        assert (moves[1] - moves[0]).norm() < 0.02 * moves[0].norm()


def test_a_gradient_goes_through_half_precision_as_through_single():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 4, 3, padding=1)
    gradient = torch.randn(3, 4, 4, 4) * torch.tensor([1e-9, 1e4, 0.0]).reshape(3, 1, 1, 1)
    found = []
    for dtype in (torch.float32, torch.float16):
        x = torch.ones(3, 4, 4, 4, requires_grad=True)
        found.append(pulled_back(layer.to(dtype)(x.to(dtype)).float(), x, gradient))
    exact, half = found
    error = (half - exact).flatten(1).norm(dim=1)
    assert (error[:2] < 5e-3 * exact.flatten(1).norm(dim=1)[:2]).all()
    assert exact[0].abs().max() < 1e-7 and not half[2].any()
    assert pulled_back(x * 1, x, gradient * torch.nan).isnan().all()
