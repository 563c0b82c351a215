"""The table of importance ratios: stepwise estimation of arXiv 2411.14871 (Eq. 7, Algorithm 1).

A table r [4, T] (policy winner, policy loser, reference winner, reference loser) of the observed
½‖μ_θ(x_t, t) - μ(x_t, x_0)‖²/N. Its sums over later-noised steps are the correction terms

    m_t = Σ_{j=t+1}^{T-1} Δr_j,     Δr = r_policy,w - r_reference,w - r_policy,l + r_reference,l.

Observations of one optimizer step are summed in float64 first, over micro-batches and ranks, so
the update does not depend on how a batch is split.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 32


def observe_ratios(
    sums: Tensor,  # float64 [5, T], updated in place
    policy_error: Tensor,  # [2B]
    reference_error: Tensor,  # [2B]
    timesteps: Tensor,  # int64 [B] or [2B]
    scale: Tensor,  # [T], ½ g_t² k_t²
) -> None:
    """Add a batch's observations ½ g_t² k_t² e to rows 0-3 and their number to row 4.

    A pair with a non-finite error or a timestep out of range is left out: one bad batch shows in
    its loss and does not poison the table for the rest of the run.
    """
    pairs, num_timesteps = policy_error.shape[0] // 2, sums.shape[1]
    errors = torch.cat([policy_error, reference_error]).detach().double().reshape(4, pairs)
    at = timesteps[:pairs, None] == torch.arange(num_timesteps, device=sums.device)  # [B, T]
    at = at & errors.isfinite().all(0)[:, None]
    # a masked sum: in a fixed order on every device, unlike index_add_
    rows = [torch.where(at, row[:, None], 0.0).sum(0) * scale.double() for row in errors]
    sums += torch.stack([*rows, at.sum(0).double()])


def update_ratios(
    ratios: Tensor,  # [4, T], updated in place
    margins: Tensor,  # [T], updated in place
    sums: Tensor,  # float64 [5, T], emptied
    decay: float,
) -> None:
    """r[:, t] ← decay · r[:, t] + (1 - decay) · (mean observation at t), only where t was observed;
    then m_t of the new table."""
    count = sums[4]
    mean = sums[:4] / count.clamp(min=1)
    updated = decay * ratios.double() + (1 - decay) * mean
    ratios.copy_(torch.where(count > 0, updated, ratios.double()))
    sums.zero_()
    margins.copy_(margins_of(ratios))


def margins_of(ratios: Tensor) -> Tensor:
    """m_t = Σ_{j>t} Δr_j of a table [4, T], float64 [T]."""
    policy_w, policy_l, reference_w, reference_l = ratios.double()
    return _sum_after((policy_w - reference_w) - (policy_l - reference_l))


def _sum_after(x: Tensor) -> Tensor:
    """Σ_{j>t} x_j for every t: suffix sums by blocks, in a fixed order on every device (a CUDA
    cumsum has none, and refuses to run under torch.use_deterministic_algorithms)."""
    blocks = F.pad(x, (0, -len(x) % _BLOCK)).reshape(-1, _BLOCK)  # [R, 32]

    def after(rows: Tensor) -> Tensor:
        size = rows.shape[-1]
        later = torch.ones(size, size, dtype=x.dtype, device=x.device).triu(1)
        return (rows[..., None, :] * later).sum(-1)

    return (after(blocks) + after(blocks.sum(-1))[:, None]).flatten()[: len(x)]
