"""Coefficient tables of a noise schedule, computed in float64 and cast once.

Code timesteps are 0-based, t = 0 … T-1 (the paper's t is code t + 1). `alphas_cumprod[t]` = ᾱ_t;
the step before t has ᾱ_prev = alphas_cumprod[t-1], and 1 for t = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RECONSTRUCTION: dict[str, Callable[[Tensor], Tensor]] = {
    # prediction type -> k_t of ᾱ_t, where x̂_0 - x_0 = ± k_t (target - prediction)
    "epsilon": lambda abar: ((1 - abar) / abar).sqrt(),
    "v_prediction": lambda abar: (1 - abar).sqrt(),
    "sample": torch.ones_like,
    # x_t = (1-σ) x_0 + σ ε is the variance-preserving x_t up to scale at ᾱ = (1-σ)²/((1-σ)² + σ²)
    "flow": lambda abar: (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt()),
}
"""k_t of each prediction type: from the DDIM one-shot reconstruction x̂_0 (arXiv 2411.14871,
Eq. 9-10 with t' = 0: ᾱ_0 = 1 and σ = 0)."""


def check_alphas_cumprod(alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """float64 copy [T] of a schedule, refused if it is none.

    Raises:
        ValueError: not one-dimensional, empty, not decreasing within [0, 1), or a last value of 0
            (zero terminal SNR) with `epsilon`, whose x̂_0 does not exist there.
    """
    if prediction_type not in RECONSTRUCTION:
        raise ValueError(
            f"prediction_type: expected one of {sorted(RECONSTRUCTION)}, got {prediction_type!r}"
        )
    table = torch.as_tensor(alphas_cumprod).detach().double().cpu()
    if table.dim() != 1 or len(table) == 0:
        raise ValueError(f"alphas_cumprod: expected a non-empty [T], got {list(table.shape)}")
    if not bool(((table >= 0) & (table < 1)).all()) or bool((table.diff() >= 0).any()):
        raise ValueError(
            "alphas_cumprod: expected values in [0, 1) that decrease with t (0 = least noise), "
            f"got {table[0].item():.6g} … {table[-1].item():.6g}"
        )
    if prediction_type == "epsilon" and table[-1] == 0:
        raise ValueError(
            "alphas_cumprod: expected values above 0 for prediction_type 'epsilon', got 0 at the "
            "last timestep (zero terminal SNR); use 'v_prediction'"
        )
    return table


def reconstruction_scale(alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """k_t, float64 [T]: one-shot reconstruction error of x_0 per unit of prediction error."""
    return RECONSTRUCTION[prediction_type](alphas_cumprod.double())


def posterior_scale(alphas_cumprod: Tensor) -> Tensor:
    """g_t = √ᾱ_prev β_t / (1-ᾱ_t), float64 [T]: coefficient of x_0 in the posterior mean
    μ(x_t, x_0) (Ho et al. 2020, Eq. 7). g_0 = 1."""
    abar = alphas_cumprod.double()
    previous = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1 - abar / previous
    return previous.sqrt() * beta / (1 - abar)


def observation_scale(alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """½ g_t² k_t², float64 [T]: turns a mean square error e into the observation
    ½‖μ_θ(x_t, t) - μ(x_t, x_0)‖²/N of the stepwise estimation (arXiv 2411.14871, Eq. 7)."""
    k = reconstruction_scale(alphas_cumprod, prediction_type)
    return 0.5 * (posterior_scale(alphas_cumprod) * k) ** 2


def alphas_cumprod_of(scheduler: object) -> Tensor:
    """[T] of a diffusers scheduler: its `alphas_cumprod`, or for a flow-matching one the
    variance-preserving schedule of the same signal-to-noise ratio, (1-σ)²/((1-σ)² + σ²).

    Raises:
        ValueError: the scheduler has neither `alphas_cumprod` nor flow `sigmas`.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is not None:
        return torch.as_tensor(table)
    config = getattr(scheduler, "config", {})
    if "FlowMatch" in type(scheduler).__name__:
        sigmas = torch.as_tensor(scheduler.sigmas).double().cpu()
        sigmas = sigmas[sigmas > 0].flip(0)
        expected = config.get("num_train_timesteps", len(sigmas))
        if len(sigmas) != expected:
            raise ValueError(
                f"scheduler: expected its {expected} training sigmas, got {len(sigmas)}; "
                "pass it before set_timesteps() is called"
            )
        return (1 - sigmas) ** 2 / ((1 - sigmas) ** 2 + sigmas**2)
    raise ValueError(
        "scheduler: expected a diffusers scheduler with alphas_cumprod or a flow-matching one, "
        f"got {type(scheduler).__name__}"
    )


def prediction_type_of(scheduler: object) -> str:
    """A diffusers scheduler's prediction type, `flow` for the flow-matching ones.

    Raises:
        ValueError: its config names none.
    """
    if "FlowMatch" in type(scheduler).__name__:
        return "flow"
    config = getattr(scheduler, "config", {})
    if "prediction_type" not in config:
        raise ValueError(
            "scheduler: expected a config with prediction_type, "
            f"got {type(scheduler).__name__}; pass prediction_type="
        )
    return config["prediction_type"]
