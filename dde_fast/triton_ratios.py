"""Triton kernels of the importance-ratio table; the eager version is `dde_fast.ratios`.

One launch to observe a batch, one to update the table; sums in float64, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dde_fast.triton_configs import fixed


@triton.jit
def observe_ratios_kernel(
    p_sums,  # float64 [5, T]
    p_policy_error,  # [2B]
    p_reference_error,  # [2B]
    p_timesteps,  # int64 [B] or [2B]
    p_scale,  # [T]
    pairs,
    num_timesteps,
    BLOCK_T: tl.constexpr,
):
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < num_timesteps
    b_policy_w = tl.zeros([BLOCK_T], tl.float64)
    b_policy_l = tl.zeros([BLOCK_T], tl.float64)
    b_reference_w = tl.zeros([BLOCK_T], tl.float64)
    b_reference_l = tl.zeros([BLOCK_T], tl.float64)
    b_count = tl.zeros([BLOCK_T], tl.float64)
    for i_pair in range(pairs):
        policy_w = tl.load(p_policy_error + i_pair).to(tl.float64)
        policy_l = tl.load(p_policy_error + pairs + i_pair).to(tl.float64)
        reference_w = tl.load(p_reference_error + i_pair).to(tl.float64)
        reference_l = tl.load(p_reference_error + pairs + i_pair).to(tl.float64)
        # errors are not negative: their sum is finite only if each is
        finite = policy_w + policy_l + reference_w + reference_l < float("inf")
        at = o_t == tl.where(finite, tl.load(p_timesteps + i_pair), -1)
        b_policy_w += tl.where(at, policy_w, 0.0)
        b_policy_l += tl.where(at, policy_l, 0.0)
        b_reference_w += tl.where(at, reference_w, 0.0)
        b_reference_l += tl.where(at, reference_l, 0.0)
        b_count += tl.where(at, 1.0, 0.0)
    scale = tl.load(p_scale + o_t, m_t, 0.0).to(tl.float64)
    T = num_timesteps
    p = p_sums + o_t
    tl.store(p, tl.load(p, m_t) + scale * b_policy_w, m_t)
    tl.store(p + T, tl.load(p + T, m_t) + scale * b_policy_l, m_t)
    tl.store(p + 2 * T, tl.load(p + 2 * T, m_t) + scale * b_reference_w, m_t)
    tl.store(p + 3 * T, tl.load(p + 3 * T, m_t) + scale * b_reference_l, m_t)
    tl.store(p + 4 * T, tl.load(p + 4 * T, m_t) + b_count, m_t)


@triton.jit
def updated_row(p_ratios, p_sums, o_t, m_t, b_count, rate):
    """A row's new values in the table's precision, written back; its sums emptied."""
    b_old = tl.load(p_ratios + o_t, m_t, 0.0).to(tl.float64)
    b_mean = tl.load(p_sums + o_t, m_t, 0.0) / tl.maximum(b_count, 1.0)
    b_new = tl.where(b_count > 0, b_old + (b_mean - b_old) * rate, b_old)
    b_new = b_new.to(p_ratios.dtype.element_ty)
    tl.store(p_ratios + o_t, b_new, m_t)
    tl.store(p_sums + o_t, tl.zeros_like(b_mean), m_t)
    return tl.where(m_t, b_new.to(tl.float64), 0.0)


@triton.jit
def update_ratios_kernel(
    p_ratios,  # [4, T]
    p_margins,  # [T]
    p_sums,  # float64 [5, T]
    rate: tl.float64,  # 1 - decay
    num_timesteps,
    BLOCK_T: tl.constexpr,
):
    T = num_timesteps
    later = tl.zeros([], tl.float64)
    for i_block in range(0, tl.cdiv(T, BLOCK_T)):
        # from the last block to the first: m_t sums what comes later
        o_t = (tl.cdiv(T, BLOCK_T) - 1 - i_block) * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        b_count = tl.load(p_sums + 4 * T + o_t, m_t, 0.0)
        b_policy_w = updated_row(p_ratios, p_sums, o_t, m_t, b_count, rate)
        b_policy_l = updated_row(p_ratios + T, p_sums + T, o_t, m_t, b_count, rate)
        b_reference_w = updated_row(p_ratios + 2 * T, p_sums + 2 * T, o_t, m_t, b_count, rate)
        b_reference_l = updated_row(p_ratios + 3 * T, p_sums + 3 * T, o_t, m_t, b_count, rate)
        tl.store(p_sums + 4 * T + o_t, tl.zeros_like(b_count), m_t)
        b_delta = (b_policy_w - b_reference_w) - (b_policy_l - b_reference_l)
        b_margin = later + tl.cumsum(b_delta, 0, reverse=True) - b_delta
        tl.store(p_margins + o_t, b_margin.to(p_margins.dtype.element_ty), m_t)
        later += tl.sum(b_delta, 0)


def observe_ratios(
    sums: Tensor,  # float64 [5, T]
    policy_error: Tensor,  # [2B]
    reference_error: Tensor,  # [2B]
    timesteps: Tensor,  # int64 [B] or [2B]
    scale: Tensor,  # [T]
) -> None:
    """`dde_fast.ratios.observe_ratios` in one launch."""
    pairs, steps = policy_error.shape[0] // 2, sums.shape[1]
    block, num_warps = fixed("observe_ratios", sums.device, steps)
    observe_ratios_kernel[(triton.cdiv(steps, block),)](
        sums,
        policy_error.contiguous(),
        reference_error.contiguous(),
        timesteps.contiguous(),
        scale.contiguous(),
        pairs,
        steps,
        BLOCK_T=block,
        num_warps=num_warps,
    )


def update_ratios(
    ratios: Tensor,  # [4, T]
    margins: Tensor,  # [T]
    sums: Tensor,  # float64 [5, T]
    decay: float,
) -> None:
    """`dde_fast.ratios.update_ratios` in one launch."""
    block, num_warps = fixed("update_ratios", sums.device, sums.shape[1])
    args = (ratios, margins, sums, 1 - decay, sums.shape[1])
    update_ratios_kernel[(1,)](*args, BLOCK_T=block, num_warps=num_warps)
