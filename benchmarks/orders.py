"""What is assumed of rewards along a trajectory, measured on a base model.

Orders: TailorPO ranks two candidates of a step by their stepwise reward, the reward of x̂_0; D3PO
takes it that two whole trajectories are ordered at every step as their images are. Guidance:
TailorPO-G moves the winner along the gradient of its stepwise reward.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dde_fast import models
from dde_fast.config import TrainConfig
from dde_fast.online import GuidedTailorPO
from dde_fast.prompt_stream import PromptBatch
from dde_fast.trajectories import DDIMSteps


class Probe(GuidedTailorPO):
    """Trajectories of a base without training.

    Args:
        c: of a run of tailorpo-g.
        prompts: trajectory n has prompt n modulo their number.
        continuations: M, images that each candidate is followed to.
    """

    def __init__(self, c: TrainConfig, prompts: list[str], continuations: int):
        steps = DDIMSteps(models.load_scheduler(c.model), c.sampling_steps)
        super().__init__(
            c,
            SimpleNamespace(dtype=torch.float32),
            SimpleNamespace(steps=steps),
            SimpleNamespace(module=models.load_unet(c.model).eval().requires_grad_(False)),
            None,
            steps.loss("tailorpo-g"),
        )
        self.prompts, self.continuations = prompts, continuations

    def start(self, first: int, count: int) -> Tensor:
        """x_T of trajectories first … first + count - 1."""
        numbers = torch.arange(first, first + count)
        ids, epochs = numbers % len(self.prompts), numbers // len(self.prompts)
        captions = [self.prompts[i] for i in ids.tolist()]
        return self.begin(PromptBatch(captions, ids, epochs, 0))

    def finish(self, i: int, sample: Tensor) -> Tensor:
        """Rewards [M, K·B] of the images that candidates [K·B, …] of step i lead to, with η = 1."""
        noises = self.continuations * len(sample) // len(self.batch.captions)
        sample = sample.repeat(self.continuations, 1, 1, 1)
        for j in range(i + 1, len(self.steps)):
            prediction = self.predict(self.engine.module, self.steps.timesteps[j], sample)
            # a number that no step of the trajectory itself uses
            z = self.noise((i + 1) * 1000 + j, noises).flatten(0, 1)
            sample = self.steps.step(j, prediction, sample, z)
        return self.rewards(len(self.steps) - 1, sample).reshape(self.continuations, -1)


def gaps(rewards: Tensor) -> Tensor:  # [..., 2B] -> [..., B]
    """The first candidate's reward less the second's."""
    first, second = rewards.chunk(2, dim=-1)
    return first - second


@torch.no_grad()
def look(probe: Probe, first: int, count: int) -> list[dict[str, Tensor]]:
    """What happens at each trained step of B trajectories.

    Returns:
        `stepwise` [B] and `images` [M, B]: gaps of two candidates, in stepwise reward and between
        the images they lead to; `trajectories` [B] and `end` [B]: gaps of two trajectories from
        one x_T, in stepwise reward at this step and of their images; `raised` [B]: by how much
        guidance raises the winner's stepwise reward.
    """
    x = probe.start(first, count)
    pair, passed = x.repeat(2, 1, 1, 1), []
    for i in range(len(probe.steps.timesteps)):
        pair = probe.advance(i, pair, 2)
        passed.append(gaps(probe.rewards(i, pair)))
    rows = []
    for i in range(probe.trained[-1] + 1):
        made = probe.advance(i, x.repeat(2, 1, 1, 1), 2)
        if i in probe.trained:
            rewards = probe.rewards(i, made)
            best = rewards.reshape(2, -1).argmax(0) * count + torch.arange(count)
            row = {"stepwise": gaps(rewards), "images": gaps(probe.finish(i, made))}
            row["raised"] = probe.rewards(i, probe.moved(i, made[best])) - rewards[best]
            rows.append(row | {"trajectories": passed[i], "end": passed[-1]})
        x = made[:count]  # either is a sample of the base
    return rows


def share(values: Tensor) -> dict[str, float]:
    """A share of trajectories, [..., B], with its standard error over them."""
    p = values.double().reshape(-1, values.shape[-1]).mean(0)
    return {"share": p.mean().item(), "error": (p.std(correction=0) / len(p) ** 0.5).item()}


def measure(probe: Probe, count: int, group: int = 32) -> list[dict[str, Any]]:
    """Shares over so many trajectories, by timestep.

    Returns:
        `disagree`: the order by stepwise reward is not that of one image each; `disagree_mean`: not
        that of the mean of M images each; `trajectories_disagree`: two trajectories' order at the
        step is not their images'; `guidance_raises`; `raised`: by how much in the mean.
    """
    parts = [look(probe, n, min(group, count - n)) for n in range(0, count, group)]
    rows = []
    for i, step in zip(probe.trained, zip(*parts, strict=True), strict=True):
        x = {key: torch.cat([part[key] for part in step], dim=-1) for key in step[0]}
        order = x["stepwise"].sign()
        shares = {
            "disagree": x["images"].sign() != order,
            "disagree_mean": x["images"].mean(0).sign() != order,
            "trajectories_disagree": x["trajectories"].sign() != x["end"].sign(),
            "guidance_raises": x["raised"] > 0,
        }
        row = {"t": probe.steps.timesteps[i], "raised": x["raised"].mean().item()}
        rows.append(row | {key: share(values) for key, values in shares.items()})
    return rows
