"""The objectives in float64, the long way, from the papers' equations; shares no code with dde_fast.

One pair at a time, in loops: noise the images, reconstruct x̂_0 by DDIM from the model's output,
form both posterior means, subtract, square. Slow and plain on purpose.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def scaled_linear(steps: int = 1000) -> Tensor:
    """Stable Diffusion's ᾱ, float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def sigma_of(abar: float) -> float:
    """σ of the flow x_t = (1-σ) x_0 + σ ε with the signal-to-noise ratio of ᾱ."""
    return math.sqrt(1 - abar) / (math.sqrt(abar) + math.sqrt(1 - abar))


K = {
    "epsilon": lambda abar: math.sqrt((1 - abar) / abar),
    "v_prediction": lambda abar: math.sqrt(1 - abar),
    "sample": lambda abar: 1.0,
    "flow": sigma_of,
}
"""k_t, for tolerances only: the losses here never use it."""


def noised(x0: Tensor, eps: Tensor, abar: float, prediction_type: str) -> Tensor:
    if prediction_type == "flow":
        s = sigma_of(abar)
        return (1 - s) * x0 + s * eps
    return math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps


def target(x0: Tensor, eps: Tensor, abar: float, prediction_type: str) -> Tensor:
    return {
        "epsilon": eps,
        "v_prediction": math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0,
        "sample": x0,
        "flow": eps - x0,
    }[prediction_type]


def reconstruct(o: Tensor, xt: Tensor, abar: float, prediction_type: str) -> Tensor:
    """x̂_0 by one DDIM step from t to the clean image (ᾱ_0 = 1, σ = 0)."""
    if prediction_type == "flow":
        return xt - sigma_of(abar) * o
    if prediction_type == "v_prediction":
        return math.sqrt(abar) * xt - math.sqrt(1 - abar) * o
    if prediction_type == "sample":
        return o
    eps = o
    x0 = (xt - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    return math.sqrt(1.0) * x0 + math.sqrt(1 - 1.0 - 0.0**2) * eps


def posterior_mean(xt: Tensor, x0: Tensor, abar: Tensor, t: int) -> Tensor:
    """μ(x_t, x_0) of q(x_{t-1} | x_t, x_0), Ho et al. 2020, Eq. 7."""
    previous = abar[t - 1] if t > 0 else torch.tensor(1.0, dtype=torch.float64)
    alpha = abar[t] / previous
    beta = 1 - alpha
    return (previous.sqrt() * beta / (1 - abar[t])) * x0 + (
        alpha.sqrt() * (1 - previous) / (1 - abar[t])
    ) * xt


@dataclass
class Pair:
    """Clean latents, shared noise, timestep and the four predictions of one pair."""

    x0_w: Tensor
    x0_l: Tensor
    eps: Tensor
    t: int
    policy_w: Tensor
    policy_l: Tensor
    reference_w: Tensor
    reference_l: Tensor

    def rows(self):
        yield from (
            (self.policy_w, self.x0_w),
            (self.policy_l, self.x0_l),
            (self.reference_w, self.x0_w),
            (self.reference_l, self.x0_l),
        )


def terms(pair: Pair, abar: Tensor, prediction_type: str, objective: str) -> list[Tensor]:
    """What a model's output costs at t: policy w, policy l, reference w, reference l."""
    a = abar[pair.t].item()
    values = []
    for o, x0 in pair.rows():
        xt = noised(x0, pair.eps, a, prediction_type)
        if objective in ("dde", "dde-single"):
            values.append((reconstruct(o, xt, a, prediction_type) - x0).square().mean())
        else:
            values.append(0.5 * (target(x0, pair.eps, a, prediction_type) - o).square().mean())
    return values


def observations(pair: Pair, abar: Tensor, prediction_type: str) -> list[Tensor]:
    """½‖μ_θ(x_t, t) - μ(x_t, x_0)‖²/N, Eq. 7, for the four predictions."""
    a = abar[pair.t].item()
    values = []
    for o, x0 in pair.rows():
        # both means at the same variance-preserving x_t; x̂_0 does not depend on its scale
        xt = noised(x0, pair.eps, a, prediction_type)
        xt_vp = noised(x0, pair.eps, a, "epsilon")
        x0_hat = reconstruct(o, xt, a, prediction_type)
        difference = posterior_mean(xt_vp, x0_hat, abar, pair.t) - posterior_mean(
            xt_vp, x0, abar, pair.t
        )
        values.append(0.5 * difference.square().mean())
    return values


def margin(ratios: list[list[float]], t: int) -> float:
    """Σ_{j>t} Δr_j."""
    return sum(
        ratios[0][j] - ratios[2][j] - ratios[1][j] + ratios[3][j]
        for j in range(t + 1, len(ratios[0]))
    )


def link(z: Tensor, name: str, beta: float, s: float) -> Tensor:
    if name == "sigmoid":
        zero = torch.zeros_like(z)  # -logσ(z) = log(1 + exp(-z))
        return (1 - s) * torch.logaddexp(zero, -z) + s * torch.logaddexp(zero, z)
    if name == "ipo":
        return (z / beta - 1 / (2 * beta)) ** 2
    return torch.clamp(1 - z, min=0)


def loss(
    pairs: list[Pair],
    abar: Tensor,
    *,
    objective: str,
    prediction_type: str = "epsilon",
    beta: float = 5000.0,
    link_name: str = "sigmoid",
    s: float = 0.0,
    ratios: list[list[float]] | None = None,
) -> tuple[Tensor, Tensor]:
    """loss [] and logits [B] in float64."""
    logits, losses = [], []
    for pair in pairs:
        if objective == "sft":
            a = abar[pair.t].item()
            y = target(pair.x0_w, pair.eps, a, prediction_type)
            losses.append((y - pair.policy_w).square().mean())
            logits.append(-losses[-1])
            continue
        pw, pl, rw, rl = terms(pair, abar, prediction_type, objective)
        z = -beta * ((pw - rw) - (pl - rl))
        if objective in ("dde", "dde-step") and ratios is not None:
            z = z + beta * margin(ratios, pair.t)
        logits.append(z)
        losses.append(link(z, link_name, beta, s))
    return torch.stack(losses).mean(), torch.stack(logits)


def random_pairs(
    timesteps: list[int],
    shape: tuple[int, ...],
    abar: Tensor,
    *,
    prediction_type: str = "epsilon",
    error: float = 0.5,
    drift: float = 0.05,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Pair]:
    """Pairs whose reference errs by `error` and whose policy drifts by `drift` from it; every
    given tensor is representable in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(scale=1.0):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def rounded(x):
        return x.to(dtype).double()

    pairs = []
    for t in timesteps:
        x0_w, x0_l, eps = (rounded(randn()) for _ in range(3))
        a = abar[t].item()
        r_w, r_l = (target(x0, eps, a, prediction_type) + randn(error) for x0 in (x0_w, x0_l))
        p_w, p_l = r_w + randn(drift), r_l + randn(drift)
        pairs.append(Pair(x0_w, x0_l, eps, t, *map(rounded, (p_w, p_l, r_w, r_l))))
    return pairs


def batch(pairs: list[Pair], abar: Tensor, prediction_type: str, dtype, device, shared=False):
    """policy, reference, target [2B, …] (target [B, …] if shared), timesteps [B] for dde_fast."""
    targets = [
        [target(x0, p.eps, abar[p.t].item(), prediction_type) for p in pairs for x0 in [half(p)]]
        for half in (lambda p: p.x0_w, lambda p: p.x0_l)
    ]
    policy = torch.stack([p.policy_w for p in pairs] + [p.policy_l for p in pairs])
    reference = torch.stack([p.reference_w for p in pairs] + [p.reference_l for p in pairs])
    y = torch.stack(targets[0] if shared else targets[0] + targets[1])
    timesteps = torch.tensor([p.t for p in pairs], device=device)
    return (*(x.to(device=device, dtype=dtype) for x in (policy, reference, y)), timesteps)
