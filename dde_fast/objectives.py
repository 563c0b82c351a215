"""The table of objectives: one row each.

Every row is a case of

    logit = -beta · ω_t · (d_w - a_l d_l) + beta · m_t,     loss = mean over pairs of link(logit)

with d = e_policy - e_reference, see `dde_fast.loss`. A new objective is one new row.

The online ones take two candidates of a denoising step that the policy itself sampled and a reward
ranked, see `dde_fast.online`. With the step's mean μ = A x_t + B o and variance σ², a candidate's
target is (x_prev - A x_t)/B and ω_t = B²/(2σ²), so that -ω_t·d is the difference of its
log-densities under policy and reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DISCOUNT, DISCOUNT_STEPS = 0.9, 50
"""γ and n of `discounted`: the published code weighs 50 sampling steps by 0.9^i."""

ONLINE_LOW = 200
"""First timestep that the trainer trains online: ω_t = B²/(2σ²) of the last step, whose noise all but
vanishes, is tens of times that of the others."""


def uniform(num_timesteps: int) -> Tensor:
    """P(t) ∝ 1, float64 [T]."""
    return torch.ones(num_timesteps, dtype=torch.float64)


def discounted(num_timesteps: int) -> Tensor:
    """P(t) ∝ γ^i with i = ⌊(T-1-t)·n/T⌋, float64 [T]: from the noisiest step on."""
    t = torch.arange(num_timesteps)
    i = (num_timesteps - 1 - t) * DISCOUNT_STEPS // num_timesteps
    return torch.tensor(DISCOUNT, dtype=torch.float64) ** i


@dataclass(frozen=True)
class Objective:
    """One row. `weight` maps k_t (float64 [T]) to ω_t."""

    name: str
    weight: Callable[[Tensor], Tensor] | None
    """k_t -> ω_t, both float64 [T]; None for an online objective, whose sampler gives ω_t."""
    correction: bool = False
    """m_t = Σ_{j>t} Δr_j from the importance-ratio table, else 0."""
    timesteps: Callable[[int], Tensor] = uniform
    """T -> unnormalised sampling distribution of t, float64 [T]."""
    needs_reference: bool = True
    """False: d = e_policy, and beta plays no role."""
    lose_weight: float = 1.0
    """a_l, the weight of the loser's d beside the winner's."""
    timestep_low: int = 0
    """First timestep that the trainer trains unless another is given."""
    guided: bool = False
    """Whether winners move along the reward's gradient, which must then exist."""
    source: str = ""

    @property
    def online(self) -> bool:
        """Whether its pairs are sampled by the policy while it trains."""
        return self.weight is None


def _square(k: Tensor) -> Tensor:
    return k**2


def _half(k: Tensor) -> Tensor:
    return torch.full_like(k, 0.5)


OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective("dde", _square, correction=True, source="arXiv 2411.14871, Eq. 11 and 18"),
        Objective("dde-single", _square, source="arXiv 2411.14871, Sec. 4.5"),
        Objective("dde-step", _half, correction=True, source="arXiv 2411.14871, Sec. 4.5"),
        Objective("diffusion-dpo", _half, source="arXiv 2311.12908 and its published code"),
        Objective("discounted", _half, timesteps=discounted, source="arXiv 2402.08265's code"),
        Objective(
            "sft",
            torch.ones_like,
            needs_reference=False,
            lose_weight=0.0,
            source="mean square error on the winners",
        ),
        Objective("tailorpo", None, timestep_low=ONLINE_LOW, source="arXiv 2502.01667"),
        Objective(
            "tailorpo-g", None, timestep_low=ONLINE_LOW, guided=True, source="arXiv 2502.01667"
        ),
        Objective("d3po", None, timestep_low=ONLINE_LOW, source="arXiv 2311.13231"),
    )
}


def get_objective(name: str) -> Objective:
    """The row of that name.

    Raises:
        ValueError: no such row; the message lists them.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {list(OBJECTIVES)}, got {name!r}")
    return OBJECTIVES[name]


def timestep_probabilities(
    objective: Objective, num_timesteps: int, low: int = 0, high: int | None = None
) -> Tensor:
    """The objective's distribution of t restricted to low ≤ t < high, float64 [T], sum 1.

    Raises:
        ValueError: not 0 ≤ low < high ≤ T.
    """
    high = num_timesteps if high is None else high
    if not 0 <= low < high <= num_timesteps:
        raise ValueError(
            f"timestep range: expected 0 <= low < high <= {num_timesteps}, got {low} … {high}"
        )
    probabilities = objective.timesteps(num_timesteps)
    t = torch.arange(num_timesteps)
    probabilities = probabilities * ((t >= low) & (t < high))
    return probabilities / probabilities.sum()
