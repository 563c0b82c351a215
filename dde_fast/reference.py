"""Every op in plain eager PyTorch, written from the papers; with float64 inputs it is the truth.

All functions take pairs as one batch, winners first, losers second. A latent's shape is written
[C, H, W] but may be anything; N is its number of elements. Errors are means over a latent, losses
means over pairs. Arithmetic is float32 (float64 for float64 inputs) whatever the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Link:
    """A function of the logit z and its derivative; s is the label smoothing, beta the temperature."""

    loss: Callable[[Tensor, float, float], Tensor]
    """(z, beta, s) -> loss of each pair."""
    slope: Callable[[Tensor, float, float], Tensor]
    """(z, beta, s) -> d loss / d z."""


LINKS: dict[str, Link] = {
    # -(1-s)·logσ(z) - s·logσ(-z): Rafailov et al. 2023, Eq. 7, with conservative label smoothing
    "sigmoid": Link(
        lambda z, beta, s: -(1 - s) * F.logsigmoid(z) - s * F.logsigmoid(-z),
        lambda z, beta, s: s * torch.sigmoid(z) - (1 - s) * torch.sigmoid(-z),
    ),
    # (z/beta - 1/(2·beta))²: Azar et al. 2023, Eq. 17
    "ipo": Link(
        lambda z, beta, s: (z / beta - 0.5 / beta) ** 2,
        lambda z, beta, s: 2 * (z / beta - 0.5 / beta) / beta,
    ),
    # max(0, 1 - z): Zhao et al. 2023 (SLiC); 0·z keeps a NaN visible
    "hinge": Link(
        lambda z, beta, s: (1 - z).clamp(min=0),
        lambda z, beta, s: torch.where(z >= 1, 0.0, -1.0) + 0 * z,
    ),
    # -z: for objectives without a preference (sft), where -z is already the loss
    "linear": Link(lambda z, beta, s: -z, lambda z, beta, s: 0 * z - 1),
}


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32: 16-bit inputs are widened before any arithmetic."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def is_channels_last(x: Tensor) -> bool:
    """Whether it is four-dimensional and in that memory order; contiguous as well, it may be."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def same_layout(*tensors: Tensor) -> list[Tensor]:
    """The tensors with one order of elements in memory, copied only where they have none.

    A mean does not care which order it is: contiguous and channels_last both pass untouched. For
    the kernels, which see a latent as N elements in a row.
    """
    if all([x.is_contiguous() for x in tensors]):
        return list(tensors)
    if all(is_channels_last(x) for x in tensors):
        return list(tensors)
    return [x.contiguous() for x in tensors]


def is_dense(x: Tensor) -> bool:
    """Whether it is contiguous or channels_last."""
    return x.is_contiguous() or is_channels_last(x)


def dense_rows(x: Tensor) -> Tensor:
    """The tensor, contiguous or channels_last; copied only where it is neither."""
    return x if is_dense(x) else x.contiguous()


def number_of_pairs(policy: Tensor, target: Tensor) -> int:
    """B: one of the two may be shared by the pair and have B rows, the other has 2B."""
    return max(policy.size(0), target.size(0)) // 2


def pair_errors(
    policy: Tensor,  # [2B, C, H, W], or [B, C, H, W] shared by the pair
    reference: Tensor | None,  # like policy, or its errors [2B], or None
    target: Tensor,  # [2B, C, H, W], or [B, C, H, W] shared by the pair
) -> tuple[Tensor, Tensor | None, Tensor]:
    """e_policy, e_reference and d = e_policy - e_reference, each [2B].

    e = ‖y - o‖²/N. With the reference's prediction at hand, d is accumulated as a difference,
    (o_ref - o)·((y - o) + (y - o_ref)): at t near T beta·ω·e is 10⁶ where the logit is O(1), and
    the difference of two float32 sums would lose it. Without a reference d = e_policy.
    """
    cached = reference is not None and reference.dim() == 1
    # a cached error [2B] sets no precision of its own
    dtype = accumulation_dtype(policy, None if cached else reference, target)
    pairs = number_of_pairs(policy, target)
    o = policy.to(dtype).reshape(-1, pairs, policy[0].numel())
    y = target.to(dtype).reshape(-1, pairs, policy[0].numel())
    policy_error = (y - o).square().mean(-1).flatten()
    if reference is None:
        return policy_error, None, policy_error
    if cached:
        reference_error = reference.to(dtype)
        return policy_error, reference_error, policy_error - reference_error
    r = reference.to(dtype).reshape(o.shape)
    reference_error = (y - r).square().mean(-1).flatten()
    difference = ((r - o) * ((y - o) + (y - r))).mean(-1).flatten()
    return policy_error, reference_error, difference


def mean_of_pairs(x: Tensor) -> Tensor:
    """Mean of [B] about its first element: exact when all are equal, so log 2 stays log 2."""
    return x[0] + (x - x[0]).mean()


def pair_timesteps(timesteps: Tensor, pairs: int, num_timesteps: int) -> tuple[Tensor, Tensor]:
    """Timesteps [B] of the pairs, made safe to index with, and which of them are valid.

    Valid: within [0, T) and, where [2B] were given, equal in both halves.
    """
    winner, loser = timesteps[:pairs], timesteps[-pairs:]
    valid = (winner >= 0) & (winner < num_timesteps) & (winner == loser)
    return winner.clamp(0, num_timesteps - 1), valid


def preference_loss(
    policy: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    reference: Tensor | None,  # like policy, or its errors [2B], or None
    target: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    timesteps: Tensor,  # [B] or [2B]
    weights: Tensor,  # [T]
    margins: Tensor,  # [T]
    beta: float,
    lose_weight: float,
    link: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """loss [], logits [B], policy_error [2B], reference_error [2B], margin [B].

    logit = -beta·ω_t·(d_w - a_l·d_l) + beta·m_t and loss = mean of link(logit): Eq. 11 and 18 of
    arXiv 2411.14871 with ω_t = k_t², Eq. 12 with ω_t = ½. A pair whose timestep is not valid has a
    NaN logit.
    """
    pairs = number_of_pairs(policy, target)
    policy_error, reference_error, d = pair_errors(policy, reference, target)
    t, valid = pair_timesteps(timesteps, pairs, len(weights))
    weight, margin = weights[t].to(d.dtype), margins[t].to(d.dtype)
    logits = -beta * weight * (d[:pairs] - lose_weight * d[pairs:]) + beta * margin
    logits = torch.where(valid, logits, float("nan"))
    loss = mean_of_pairs(LINKS[link].loss(logits, beta, label_smoothing))
    return loss, logits, policy_error, reference_error, margin


def preference_loss_backward(
    grad_loss: Tensor | None,  # []
    grad_logits: Tensor | None,  # [B]
    grad_policy_error: Tensor | None,  # [2B]
    policy: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    target: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    timesteps: Tensor,  # [B] or [2B]
    logits: Tensor,  # [B]
    weights: Tensor,  # [T]
    beta: float,
    lose_weight: float,
    link: str,
    label_smoothing: float,
) -> Tensor:
    """Gradient of the policy's prediction, in its shape and dtype.

    d e / d o = 2 (o - y)/N, times link'(z)/B · -beta·ω_t for the winner and +beta·ω_t·a_l for the
    loser, plus what arrives at the logits and the policy's errors themselves. A prediction that
    the pair shares gets the sum of both.
    """
    pairs = len(logits)
    dtype = accumulation_dtype(policy, target, logits)
    t, _ = pair_timesteps(timesteps, pairs, len(weights))
    at_logits = torch.zeros_like(logits)
    if grad_loss is not None:
        slope = LINKS[link].slope(logits, beta, label_smoothing)
        at_logits = at_logits + grad_loss.to(logits.dtype) * slope / pairs
    if grad_logits is not None:
        at_logits = at_logits + grad_logits
    at_winner = -beta * weights[t].to(dtype) * at_logits
    at_error = torch.cat([at_winner, -lose_weight * at_winner])
    if grad_policy_error is not None:
        at_error = at_error + grad_policy_error
    o = policy.to(dtype).reshape(-1, pairs, policy[0].numel())
    y = target.to(dtype).reshape(-1, pairs, policy[0].numel())
    gradient = (o - y) * (2 * at_error / o.shape[-1]).reshape(2, pairs, 1)
    if len(o) == 1:
        gradient = gradient.sum(0)
    return torch.empty_like(policy).copy_(gradient.reshape(policy.shape))


DENOISE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    # prediction type -> (x, o, a, b) -> x̂_0, ε̂ with a = √ᾱ_t and b = √(1-ᾱ_t); linear in x and o
    "epsilon": lambda x, o, a, b: ((x - b * o) / a, o),
    "v_prediction": lambda x, o, a, b: (a * x - b * o, a * o + b * x),
    "sample": lambda x, o, a, b: (o, (x - a * o) / b),
}
"""What a prediction o at x = x_t says of the clean latent and of its noise."""


def ddim_mean(
    prediction: Tensor | float,  # [B, C, H, W]
    sample: Tensor | float,  # [B, C, H, W]
    coefficients: Sequence[Tensor],  # (a, b, a_prev, c, σ), each to broadcast with them
    prediction_type: str,
) -> Tensor:
    """μ = a_prev·x̂_0 + c·ε̂ in diffusers' order of operations (Song et al. 2020, Eq. 12)."""
    a, b, a_prev, direction, _ = coefficients
    denoised, epsilon = DENOISE[prediction_type](sample, prediction, a, b)
    return a_prev * denoised + direction * epsilon


def ddim_step(
    prediction: Tensor,  # [B, C, H, W]
    sample: Tensor,  # [B, C, H, W]
    coefficients: Tensor,  # float32 [B, 5]
    noise: Tensor | None,  # [K·B, C, H, W]
    next_sample: Tensor | None,  # [K·B, C, H, W], instead of noise
    prediction_type: str,
) -> tuple[Tensor | None, Tensor]:
    """next [K·B, …] if it was not given, log_prob [K·B]: see `dde_fast.sampling.ddim_step`.

    The density is that of next as it is returned, rounded: computed again from it, it is the same.
    """
    dtype = accumulation_dtype(prediction, sample, noise, next_sample)
    rows = coefficients.to(dtype)
    columns = [x.reshape(-1, *[1] * (sample.dim() - 1)) for x in rows.unbind(1)]
    mean = ddim_mean(prediction.to(dtype), sample.to(dtype), columns, prediction_type)
    made = None
    if next_sample is None:
        made = mean + columns[-1] * noise.to(dtype).unflatten(0, (-1, len(sample)))
        made = torch.empty_like(noise, dtype=sample.dtype).copy_(made.flatten(0, 1))
        next_sample = made
    error = next_sample.to(dtype).unflatten(0, (-1, len(sample))) - mean
    sigma = rows[:, -1]
    log_prob = -error.square().flatten(2).mean(-1) / (2 * sigma**2)
    log_prob = log_prob - sigma.log() - 0.5 * math.log(2 * math.pi)
    return made, torch.where(sigma > 0, log_prob, float("nan")).flatten()


def ddim_step_backward(
    grad_next: Tensor | None,  # [K·B, C, H, W]
    grad_log_prob: Tensor | None,  # [K·B]
    prediction: Tensor,  # [B, C, H, W]
    sample: Tensor,  # [B, C, H, W]
    next_sample: Tensor,  # [K·B, C, H, W]
    coefficients: Tensor,  # float32 [B, 5]
    prediction_type: str,
) -> Tensor:
    """Gradient of the prediction, in its shape and dtype, summed over the candidates.

    d μ / d o times what arrives at next, plus grad_log_prob·(next - μ)/(σ²N). Where σ = 0 there is
    no density and nothing passes, so such a step may be masked out of a loss; a NaN stays one.
    """
    dtype = accumulation_dtype(prediction, sample, next_sample, grad_log_prob)
    # in float64: the two terms of the slope nearly cancel
    slope = ddim_mean(1.0, 0.0, coefficients.double().unbind(1), prediction_type).to(dtype)
    shape = (-1, *[1] * (sample.dim() - 1))
    gradient = torch.zeros(sample.shape, dtype=dtype, device=sample.device)
    if grad_next is not None:
        gradient = gradient + grad_next.to(dtype).unflatten(0, (-1, len(sample))).sum(0)
    if grad_log_prob is not None:
        columns = [x.reshape(shape) for x in coefficients.to(dtype).unbind(1)]
        mean = ddim_mean(prediction.to(dtype), sample.to(dtype), columns, prediction_type)
        error = next_sample.to(dtype).unflatten(0, (-1, len(sample))) - mean
        g, sigma = grad_log_prob.to(dtype).reshape(-1, len(sample)), columns[-1].flatten()
        factor = torch.where(sigma > 0, g / (sigma**2 * sample[0].numel()), 0 * g)
        gradient = gradient + (error * factor.reshape(-1, *mean.shape[:1], *shape[1:])).sum(0)
    return torch.empty_like(prediction).copy_(slope.reshape(shape) * gradient)


MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four counter words under a 64-bit key.

    Args:
        counter: four int64 tensors that broadcast together, each holding values in [0, 2**32).
        seed: the key, 0 ≤ seed < 2**64.

    Returns:
        four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, so shift and mask give the exact high and low words
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK32) ^ c1 ^ k0,
            p1 & MASK32,
            ((p0 >> 32) & MASK32) ^ c3 ^ k1,
            p0 & MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & MASK32, (k1 + _WEYL[1]) & MASK32
    return c0, c1, c2, c3


def uniform(words: Tensor) -> Tensor:
    """(x >> 8)·2⁻²⁴ + 2⁻²⁵ in float32: the 24 high bits of each word, in (0, 1]."""
    return (words >> 8).to(torch.float32) * 2.0**-24 + 2.0**-25


def _pair_words(
    blocks: Tensor,  # int64 [K]
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words [B, K] for every pair and block."""
    ids, draws = pair_ids[:, None], draws[:, None]
    counter = (blocks[None, :], ids & MASK32, (ids >> 32) & MASK32, draws & MASK32)
    return philox4x32(counter, seed % 2**64)


def pair_noise(
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    shape: Sequence[int],
    seed: int,
) -> Tensor:
    """Standard normals float32 [B, *shape] by Box-Muller, see `dde_fast.noise`."""
    count = math.prod(shape)
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=pair_ids.device)
    # float64 inside: the float32 result is then the correctly rounded one, which is what the
    # fused backends are held against
    u0, u1, u2, u3 = (uniform(w).double() for w in _pair_words(blocks, pair_ids, draws, seed))
    r0, r2 = (-2.0 * u0.log()).sqrt(), (-2.0 * u2.log()).sqrt()
    a1, a3 = 2.0 * math.pi * u1, 2.0 * math.pi * u3
    normals = torch.stack([r0 * a1.cos(), r0 * a1.sin(), r2 * a3.cos(), r2 * a3.sin()], dim=-1)
    return normals.flatten(1)[:, :count].float().reshape(len(pair_ids), *shape)


def pair_uniform(
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    choice: int,
    seed: int,
) -> Tensor:
    """One uniform float32 [B] per pair: word 0 of block 2**32 - 1 - choice."""
    blocks = torch.full((1,), MASK32 - choice, dtype=torch.int64, device=pair_ids.device)
    return uniform(_pair_words(blocks, pair_ids, draws, seed)[0])[:, 0]


def empty_noised(
    latents: Tensor,  # [2B, C, H, W]
    pairs: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Memory of what `add_noise` returns: noisy [2B, …] and noise [B, …]."""
    shapes = latents.shape, (pairs, *latents.shape[1:])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    noisy, noise = (
        torch.empty(shape, dtype=dtype, device=latents.device, memory_format=layout)
        for shape in shapes
    )
    return noisy, noise


def add_noise(
    latents: Tensor,  # [2B, C, H, W]
    timesteps: Tensor,  # int64 [B] or [2B]
    alphas_cumprod: Tensor,  # [T]
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    seed: int,
    dtype: torch.dtype,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε of both halves [2B, …], and the pairs' ε [B, …].

    A pair whose timestep is not valid has NaN for x_t.
    """
    pairs, shape = len(pair_ids), latents.shape[1:]
    noise = pair_noise(pair_ids, draws, shape, seed)
    t, valid = pair_timesteps(timesteps, pairs, len(alphas_cumprod))
    abar = torch.where(valid, alphas_cumprod.double()[t], float("nan"))
    abar = abar.reshape(pairs, *[1] * len(shape))
    signal, sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
    halves = [signal * half.float() + sigma * noise for half in latents.chunk(2)]
    noisy, noise_out = empty_noised(latents, pairs, dtype, channels_last)
    return noisy.copy_(torch.cat(halves)), noise_out.copy_(noise)
