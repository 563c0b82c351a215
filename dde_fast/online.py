"""Online objectives: the policy samples trajectories, a reward ranks, and every step is trained on.

    TailorPO    two candidates of each step's x_t, ranked by the reward of x̂_0(x_prev); the winner
                is where the next step starts (arXiv 2502.01667)
    TailorPO-G  the same, but the winner first moves along the reward's gradient,
                x⁺ = x^w - η_g ∇ ½(R_high - r(c, x̂_0(x^w)))²
    D3PO        two trajectories from one x_T; the better image's steps win (arXiv 2311.13231)

A micro-batch is one step of a group of trajectories: DeepSpeed's accumulation is a multiple of the
trained steps S, and an optimizer step takes all steps of trajectories that its policy sampled. So
nothing is kept between optimizer steps, and a checkpoint holds no samples. Noise is a function of
(seed, prompt's number, epoch, step).

UNet calls of TailorPO per pair: policy and reference once each on the x_t that winner and loser
share, where published code runs both models on winner and loser, four calls; and in either one
call for both candidates' x̂_0, but for the last step's, which are images. TailorPO-G adds a forward
and backward for the winner. Guidance runs each on prompt and empty caption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dde_fast import models, noise
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.loss import PreferenceLoss, PreferenceOutput
from dde_fast.memory_order import memory_order
from dde_fast.objectives import get_objective
from dde_fast.prompt_stream import PromptBatch, Prompts
from dde_fast.rewards import REWARDS, find, load_reward, score
from dde_fast.trajectories import DDIMSteps


def trained_steps(c: TrainConfig) -> int:
    """Micro-batches that belong together: the trained steps of a trajectory, or 1 offline.

    Raises:
        ValueError: no such objective or model, or steps that cannot be sampled or trained.
    """
    if not get_objective(c.objective).online:
        return 1
    steps = DDIMSteps(models.load_scheduler(c.model), c.sampling_steps)
    return len(steps.trained(c.timestep_low, c.timestep_high))


def check_reward(c: TrainConfig, prompts: Prompts) -> str:
    """What identifies the content of the reward, which is loaded and tried.

    Raises:
        ValueError, ImportError: it cannot be loaded, scores sets of images only, has no gradient
            where the objective needs one, cannot score every prompt, or gives no finite number.
    """
    guided = get_objective(c.objective).guided
    fit = [n for n, r in REWARDS.items() if r.per == "image" and (r.differentiable or not guided)]
    try:
        name, *_ = find(c.reward)
        if name not in fit:
            kind = "a differentiable one" if guided else "one"
            raise ValueError(
                f"rewards: expected {kind} of single images, {', '.join(fit)}, got {c.reward!r}"
            )
        scorer = load_reward(c.reward)
        scorer.check(prompts.names)
        tried = score(scorer, torch.full((1, 3, 64, 64), 0.5), prompts.names[:1], batch=1)
        if not tried.isfinite().all():
            raise ValueError(
                f"rewards: expected a finite score of {c.reward!r}, got {tried.item()} for an image "
                f"all grey and {prompts.names[0]!r}"
            )
    except ValueError as error:  # of evaluation's argument
        raise ValueError(str(error).replace("rewards: ", "reward: ", 1)) from None
    return f"{name}, content {scorer.identity()['sha256'][:16]}"


def reward_failure(record: dict[str, Any], reward: str) -> str | None:
    """What to tell of a reward that fails.

    Args:
        record: as `Meter.read` gives it.
        reward: as in `TrainConfig`.
    """
    share = record.get("reward_failures", 0.0)
    if not share:
        return None
    parts = record["by_timestep"]["reward_failures"]
    return (
        f"the reward {reward!r} gave no finite number, or no finite gradient, for {share:.2%} of the "
        f"pairs since the last line, at timesteps {', '.join(t for t in parts if parts[t])}: their "
        "optimizer steps were skipped"
    )


@dataclass
class OnlineOutput(PreferenceOutput):
    """A preference loss's output with the rewards behind its preferences."""

    reward_win: Tensor
    """[B], of the winners, before guidance moves them: of x̂_0 at each step (TailorPO), or of the
    final images (D3PO)."""
    reward_lose: Tensor
    """[B], of the losers."""
    reward: Tensor
    """[B], of what the trajectories ended in, x̂_0 after the last trained step; nan at the others,
    which a mean leaves out. TailorPO's are of the winners of every step, above what the policy
    samples by itself; D3PO's are the mean of both trajectories."""
    failed: Tensor
    """bool [B]: of finite images the reward or its gradient is not finite."""

    def per_pair(self) -> dict[str, Tensor]:
        return super().per_pair() | {
            "reward": self.reward,
            "reward_win": self.reward_win,
            "reward_lose": self.reward_lose,
            "reward_ties": (self.reward_win == self.reward_lose).float(),
            "reward_failures": self.failed.float(),
        }


class OnlineForward:
    """One trained step of a group of trajectories at each call.

    Pairs of equal rewards carry no preference: their loser is taken to be the winner itself, so the
    logit is 0, the loss log 2 (of `sigmoid`) and the gradient nothing; they count in the mean.
    """

    def __init__(
        self,
        c: TrainConfig,
        e: EngineConfig,
        inputs,  # inputs.Inputs
        engine,
        reference: Callable,  # called like the UNet
        loss_fn: PreferenceLoss,
    ):
        device = loss_fn.ratios.device
        self.c, self.dtype, self.device = c, e.dtype, device
        self.order = memory_order(c)
        self.engine, self.reference, self.loss_fn = engine, reference, loss_fn
        self.steps: DDIMSteps = inputs.steps.to(device)
        self.trained = self.steps.trained(c.timestep_low, c.timestep_high)
        self.encoders = models.Encoders.load(c.model, device)
        self.reward = load_reward(c.reward)
        self.shape = models.latent_shape(engine.module.config)
        sides = [side * self.encoders.scale for side in self.shape[1:]]
        self.time_ids = torch.tensor([*sides, 0.0, 0.0, *sides], device=device)
        self.guided = c.guidance_scale > 1
        self.empty = self.encoders.prompts([""])

    def begin(self, batch: PromptBatch) -> Tensor:
        """x_T [B, …] of new trajectories."""
        self.batch = batch
        self.texts = self.encoders.encode(batch.captions)
        return self.noise(0, 1)[0]

    def noise(self, number: int, count: int) -> Tensor:
        """float32 [count, B, …]: x_T for number 0, step i's z for i + 1.

        Each is a stream of its own: the upper half of the prompt's id is number + 1. 0 is left to
        evaluation and grids, whose images of the same seed must not start where training did.
        """
        made = noise.pair_noise(
            (count, *self.shape),
            seed=self.c.seed,
            pair_ids=self.batch.prompt_ids + (number + 1 << 32),
            draw=self.batch.epochs,
            backend=self.c.backend,
        )
        return made.transpose(0, 1)

    def predict(self, model: Callable, timestep: int, sample: Tensor) -> Tensor:
        """o = u + g (c - u) with guidance g, float32 [K·B, …], sample k·B + b of prompt b."""
        texts = {
            name: rows.repeat(len(sample) // len(rows), *[1] * (rows.dim() - 1))
            for name, rows in self.texts.items()
        }
        if self.guided:
            sample = torch.cat([sample, sample])
            texts = {
                name: torch.cat([self.empty[name].expand_as(rows), rows])
                for name, rows in texts.items()
            }
        added = None
        if "pooled" in texts:
            time_ids = self.time_ids.expand(len(sample), -1)
            added = {"text_embeds": texts["pooled"].to(self.dtype), "time_ids": time_ids}
        prediction = model(
            sample.to(self.dtype, memory_format=self.order),
            torch.full((len(sample),), timestep, device=self.device),
            texts["embeddings"].to(self.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0].float()
        if not self.guided:
            return prediction
        empty, prompted = prediction.chunk(2)
        return empty + self.c.guidance_scale * (prompted - empty)

    def advance(self, i: int, sample: Tensor, count: int) -> Tensor:
        """x_prev of the policy's step i without training, its first `count` candidates' noise."""
        prediction = self.predict(self.engine.module, self.steps.timesteps[i], sample)
        z = self.noise(i + 1, 2)[:count].flatten(0, 1)
        return self.steps.step(i, prediction, sample, z, self.c.backend)

    def ahead(self, i: int, sample: Tensor) -> Tensor | None:
        """The policy's prediction at what step i led to; None where that are images."""
        if i + 1 == len(self.steps):
            return None
        return self.predict(self.engine.module, self.steps.previous[i], sample)

    def scored(self, i: int, sample: Tensor, ahead: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """r(c, x̂_0) of what step i led to, [K·B], differentiable with respect to it and to the
        prediction there; and bool [K·B], where it is not finite though its image is."""
        if ahead is not None:  # x̂_0 of an image is the image
            sample = self.steps.denoised(self.steps.previous[i], ahead, sample)
        images = self.encoders.decode(sample)
        captions = self.batch.captions * (len(sample) // len(self.batch.captions))
        rewards = self.reward(images, captions).float()
        return rewards, ~rewards.isfinite() & images.isfinite().flatten(1).all(1)

    def rewards(self, i: int, sample: Tensor) -> Tensor:
        """r(c, x̂_0) of what step i led to, [K·B]."""
        return self.scored(i, sample, self.ahead(i, sample))[0]

    def output(
        self,
        i: int,
        policy: Tensor,  # [B, C, H, W], or [2B, C, H, W]
        reference: Tensor,  # like policy
        sample: Tensor,  # like policy
        candidates: Tensor,  # [2B, C, H, W], winners first
        rewards: Tensor,  # [2B], winners first
        failed: Tensor,  # bool [B]
    ) -> OnlineOutput:
        """The loss of step i."""
        target = self.steps.target(i, candidates, sample)
        # a reward that is no number must not pass for a preference: 0·nan shows in the loss
        target = target + 0 * rewards.reshape(-1, *[1] * (target.dim() - 1))
        target = target.contiguous(memory_format=self.order)
        win, lose = rewards.chunk(2)
        out = self.loss_fn(policy, reference, target, self.steps.time(i, len(win)))
        ended = win if i == self.trained[-1] else torch.full_like(win, float("nan"))
        return OnlineOutput(
            **vars(out), reward_win=win, reward_lose=lose, reward=ended, failed=failed
        )


def ranked(rewards: Tensor) -> Tensor:  # [2B] -> int64 [2B]
    """The rows of the winners, then of the losers, of candidates b and B + b; of equal ones the
    first is both."""
    first, second = rewards.chunk(2)
    rows = torch.arange(len(first), device=rewards.device)
    return torch.cat([rows + len(rows) * (second > first), rows + len(rows) * (second < first)])


class TailorPO(OnlineForward):
    """Two candidates of every x_t; the winner is where the next step starts."""

    def __call__(self, batch: PromptBatch) -> OnlineOutput:
        i = self.trained[batch.step]
        with torch.no_grad():
            if batch.step == 0:
                self.sample, self.at = self.begin(batch), 0
            for before in range(self.at, i):
                self.sample = self.advance(before, self.sample, 1)
            t, sample = self.steps.timesteps[i], self.sample
            reference = self.predict(self.reference, t, sample)
        policy = self.predict(self.engine, t, sample)
        with torch.no_grad():
            z = self.noise(i + 1, 2).flatten(0, 1)
            made = self.steps.step(i, policy.detach(), sample, z, self.c.backend)
            rewards, failed = self.scored(i, made, self.ahead(i, made))
            order = ranked(rewards)
            winners, losers = made[order].chunk(2)
        moved = self.moved(i, winners)
        rewards = rewards[order]
        # or a finite reward's gradient is not finite
        astray = rewards[: len(moved)].isfinite() & ~moved.isfinite().flatten(1).all(1)
        failed = failed.reshape(2, -1).any(0) | astray
        self.sample, self.at = moved, i + 1
        candidates = torch.cat([moved, losers])
        return self.output(i, policy, reference, sample, candidates, rewards, failed)

    def moved(self, i: int, winners: Tensor) -> Tensor:
        """Where the winners of step i go on from."""
        return winners


class GuidedTailorPO(TailorPO):
    """TailorPO whose winners move along the reward's gradient, through VAE and policy.

    Of equal candidates the one that moved wins over itself before.
    """

    def moved(self, i: int, winners: Tensor) -> Tensor:
        """x⁺ = x - η_g ∇ ½(R_high - r(c, x̂_0(x)))². No weight gets a gradient."""
        with torch.enable_grad():
            x = winners.detach().requires_grad_()
            ahead = self.ahead(i, x)
            # cut at the prediction: what comes after it is float32, the UNet need not be
            inputs = [x] if ahead is None else [x, ahead.detach().requires_grad_()]
            rewards, _ = self.scored(i, *inputs)
            away = 0.5 * (self.c.reward_target - rewards).square().sum()
            gradient, *at_prediction = torch.autograd.grad(away, inputs, materialize_grads=True)
            for part in at_prediction:
                gradient = gradient + pulled_back(ahead, x, part)
        return winners - self.c.reward_step * gradient


def pulled_back(output: Tensor, x: Tensor, gradient: Tensor) -> Tensor:  # each [B, C, H, W]
    """The gradient with respect to x that one with respect to a UNet's output stands for.

    On its way each sample's is scaled by a power of two so that its largest element is between ½ and
    1, as a loss scale does for weights: a UNet in fp16 would round what is below 6e-8 to nothing.
    """
    largest = gradient.flatten(1).abs().amax(1)
    # 2^100 and a gradient of zeros stay finite
    exponent = torch.frexp(largest).exponent.clamp(min=-100)
    scale = torch.ldexp(torch.ones_like(largest), -exponent).reshape(-1, 1, 1, 1)
    (found,) = torch.autograd.grad(output, x, gradient * scale)
    return found / scale


class D3PO(OnlineForward):
    """Two trajectories from one x_T, sampled before their first step is trained."""

    @torch.no_grad()
    def begin(self, batch: PromptBatch) -> Tensor:
        path = [super().begin(batch).repeat(2, 1, 1, 1)]
        for i in range(len(self.steps)):
            path.append(self.advance(i, path[-1], 2))
        rewards, failed = self.scored(len(self.steps) - 1, path[-1])
        order = ranked(rewards)
        self.path, self.final = [sample[order] for sample in path], rewards[order]
        self.failed = failed.reshape(2, -1).any(0)
        return self.path[0]

    def __call__(self, batch: PromptBatch) -> OnlineOutput:
        if batch.step == 0:
            self.begin(batch)
        i = self.trained[batch.step]
        t, sample, made = self.steps.timesteps[i], *self.path[i : i + 2]
        with torch.no_grad():
            reference = self.predict(self.reference, t, sample)
        policy = self.predict(self.engine, t, sample)
        out = self.output(i, policy, reference, sample, made, self.final, self.failed)
        return replace(out, reward=self.final.reshape(2, -1).mean(0))


FORWARDS: dict[str, type[OnlineForward]] = {
    "tailorpo": TailorPO,
    "tailorpo-g": GuidedTailorPO,
    "d3po": D3PO,
}
"""What the trainer calls with each batch, by objective."""
