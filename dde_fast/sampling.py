"""The DDIM step with its log-probability, forward and backward: what online objectives are made of.

A step draws x_prev from a Gaussian around a mean that is linear in the prediction o,

    x_prev = μ + σ z,   μ = √ᾱ_prev x̂_0 + √(1-ᾱ_prev-σ²) ε̂ = A x_t + B o

(Song et al., "Denoising Diffusion Implicit Models", 2020, Eq. 12 and 16). Candidates of one x_t,
as TailorPO's, share its prediction: they are the rows k·B + b, the first of every x_t first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dde_fast import backends, ops
from dde_fast.reference import DENOISE, accumulation_dtype, ddim_mean
from dde_fast.schedule import check_alphas_cumprod


def ddim_coefficients(
    alphas_cumprod: Tensor,  # [T]
    timesteps: Tensor,  # int64 [S]
    previous_timesteps: Tensor,  # int64 [S]
    *,
    eta: float,
    prediction_type: str,
    final_alpha_cumprod: float | Tensor = 1.0,  # a number or []
) -> Tensor:
    """What `ddim_step` needs of the schedule, one row per step: (√ᾱ_t, √(1-ᾱ_t), √ᾱ_prev, c, σ).

    σ = eta·√((1-ᾱ_prev)/(1-ᾱ_t)·(1-ᾱ_t/ᾱ_prev)) and c = √(1-ᾱ_prev-σ²), operation by operation as
    diffusers' `DDIMScheduler` and in the precision of `alphas_cumprod`: its float32 table gives its
    samples to the bit, a float64 one the exact coefficients.

    Args:
        alphas_cumprod: [T], ᾱ of the noise schedule, least noise first.
        timesteps: int64 [S], the t that are stepped from.
        previous_timesteps: int64 [S], where each step leads; -1 is the end, ᾱ = the final one.
        eta: 0 (deterministic) to 1 (as noisy as ancestral sampling).
        prediction_type: `epsilon`, `v_prediction` or `sample`.
        final_alpha_cumprod: ᾱ at the end: 1, or a scheduler's `final_alpha_cumprod`.

    Returns:
        float32 [S, 5] on the device of `alphas_cumprod`; index it by step, or expand one row.

    Raises:
        ValueError: an argument out of range; the message names it.
    """
    _check_prediction_type(prediction_type)
    steps = len(check_alphas_cumprod(alphas_cumprod, prediction_type))
    table = alphas_cumprod.detach().cpu().to(accumulation_dtype(alphas_cumprod))
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected 0 <= eta <= 1, got {eta}")
    if not 0 < final_alpha_cumprod <= 1:
        raise ValueError(
            f"final_alpha_cumprod: expected 0 < final_alpha_cumprod <= 1, got {final_alpha_cumprod}"
        )
    named = {"timesteps": timesteps, "previous_timesteps": previous_timesteps}
    for name, x in named.items():
        if x.dtype != torch.int64 or x.dim() != 1 or x.shape != timesteps.shape:
            raise ValueError(f"{name}: expected int64 [S], got {x.dtype} {list(x.shape)}")
    t, previous = timesteps.cpu(), previous_timesteps.cpu()
    if ((t < 0) | (t >= steps)).any():
        raise ValueError(f"timesteps: expected values in [0, {steps}), got {t.tolist()}")
    if ((previous < -1) | (previous >= t)).any():
        raise ValueError(
            "previous_timesteps: expected -1 or a timestep before each of timesteps, "
            f"got {previous.tolist()}"
        )
    abar = table[t]
    # clamp: -1 has a value of its own
    abar_prev = torch.where(previous < 0, float(final_alpha_cumprod), table[previous.clamp(min=0)])
    beta, beta_prev = 1 - abar, 1 - abar_prev
    sigma = eta * (beta_prev / beta * (1 - abar / abar_prev)).sqrt()
    # at zero terminal SNR and eta = 1 what is left for the direction is a rounding below 0
    direction = (1 - abar_prev - sigma**2).clamp(min=0).sqrt()
    columns = (abar.sqrt(), beta.sqrt(), abar_prev.sqrt(), direction, sigma)
    return torch.stack(columns, dim=1).float().to(alphas_cumprod.device)


def ddim_linear(
    coefficients: Tensor,  # float32 [S, 5]
    prediction_type: str,
) -> tuple[Tensor, Tensor]:
    """A and B of μ = A x_t + B o, each float64 [S]: B is a difference that nearly cancels.

    With them TailorPO's loss is the preference loss of (x_prev - A x_t)/B as target and the weight
    ω = B²/(2σ²): its error times -ω is the log-density but for terms that no prediction enters.
    """
    _check_prediction_type(prediction_type)
    columns = coefficients.double().unbind(-1)
    return tuple(ddim_mean(o, x, columns, prediction_type) for x, o in ((1.0, 0.0), (0.0, 1.0)))


def ddim_step(
    prediction: Tensor,  # [B, C, H, W]
    sample: Tensor,  # [B, C, H, W]
    coefficients: Tensor,  # float32 [B, 5]
    *,
    prediction_type: str,
    noise: Tensor | None = None,  # [K·B, C, H, W]
    next_sample: Tensor | None = None,  # [K·B, C, H, W]
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One DDIM step of each of K candidates of x_t, or the log-density of steps that were taken.

        x_prev = μ + σ z
        log_prob = mean over elements of -(x_prev - μ)²/(2σ²) - log σ - ½ log 2π

    The log-probability is a mean over the latent, as in DDPO's and D3PO's published code: N times
    it is the density's logarithm. It is that of x_prev as returned, in the dtype of `sample`, and
    held fixed: d log_prob / d o = (d μ / d o)·(x_prev - μ)/(σ²N) whether x_prev was made here or
    given. Where σ = 0 it is NaN, for a deterministic step has no density.

    Args:
        prediction: the model's output o, [B, …]; the only differentiable input.
        sample: x_t, [B, …].
        coefficients: float32 [B, 5], a row of `ddim_coefficients` for each sample.
        prediction_type: `epsilon`, `v_prediction` or `sample`.
        noise: z, [K·B, …], candidate k of row b at k·B + b; or
        next_sample: x_prev, [K·B, …], to be judged: exactly one of the two.
        backend: as in `PreferenceLoss`.

    Returns:
        x_prev [K·B, …] in the dtype of `sample`, differentiable where it was made from noise (the
        given `next_sample` itself otherwise), and log_prob [K·B], differentiable; float32, or
        float64 if any input is. The arithmetic is in that precision.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a gradient wanted of anything but
            prediction.
    """
    _check_prediction_type(prediction_type)
    if (noise is None) == (next_sample is None):
        got = "neither" if noise is None else "both"
        raise ValueError(f"noise: expected exactly one of noise and next_sample, got {got}")
    candidates = {"noise": noise} if next_sample is None else {"next_sample": next_sample}
    _check_inputs(prediction, sample, coefficients, candidates)
    made, log_prob = ops.ddim_step(
        prediction,
        sample,
        coefficients,
        noise,
        next_sample,
        prediction_type,
        backends.resolve_backend(backend, sample.device),
    )
    return made if next_sample is None else next_sample, log_prob


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in DENOISE:
        raise ValueError(
            f"prediction_type: expected one of {list(DENOISE)}, got {prediction_type!r}"
        )


def _check_inputs(
    prediction: Tensor,  # [B, C, H, W]
    sample: Tensor,  # [B, C, H, W]
    coefficients: Tensor,  # float32 [B, 5]
    candidates: dict[str, Tensor],  # noise or next_sample, [K·B, C, H, W]
) -> None:
    """Refuse what cannot be meant; looks at no tensor's values."""
    fixed = {"sample": sample, "coefficients": coefficients, **candidates}
    for name, x in {"prediction": prediction, **fixed}.items():
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {x.dtype}")
        if x.device != sample.device:
            raise ValueError(
                f"{name}: expected on {sample.device}, where sample is, got {x.device}"
            )
    for name, x in fixed.items():
        if x.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without gradient (the gradient reaches prediction "
                "only), got one that requires it; detach it"
            )
    if sample.dim() < 2 or sample.numel() == 0:
        raise ValueError(f"sample: expected a non-empty batch [B, ...], got {list(sample.shape)}")
    batch, shape = sample.shape[0], sample.shape[1:]
    if prediction.shape != sample.shape:
        raise ValueError(
            f"prediction: expected {list(sample.shape)} like sample, got {list(prediction.shape)}"
        )
    if coefficients.dtype != torch.float32 or coefficients.shape != (batch, 5):
        raise ValueError(
            f"coefficients: expected float32 {[batch, 5]}, a row per sample, "
            f"got {coefficients.dtype} {list(coefficients.shape)}"
        )
    for name, x in candidates.items():
        if x.dim() < 1 or x.shape[1:] != shape or x.shape[0] == 0 or x.shape[0] % batch:
            raise ValueError(
                f"{name}: expected [K·{batch}, {', '.join(map(str, shape))}], got {list(x.shape)}"
            )
