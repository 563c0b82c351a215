"""Triton kernels of the loss head and their launchers; the formulas are in `dde_fast.reference`.

Forward is two launches: `pair_errors_kernel` reads every prediction once and leaves partial sums,
`pair_logits_kernel` (one program) finishes them in a fixed order and forms logits, losses and
their mean. Backward is one. No atomics: the same inputs give the same bits, run after run.

Floats are passed as float64, which a launch would make float32 by itself, and narrowed first thing
to the precision of the sums.

Letters: i_ index, o_ offsets, m_ mask, p_ pointer, b_ block; N elements of a latent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dde_fast.reference import accumulation_dtype, number_of_pairs, same_layout
from dde_fast.triton_configs import Config, choose, fixed

MAX_CHUNKS = 64
"""Partial sums of a sample that the second launch adds up."""

REFERENCE = {"none": 0, "prediction": 1, "errors": 2}
LINK = {"sigmoid": 0, "ipo": 1, "hinge": 2, "linear": 3}


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)) for x ≤ 0 without cancellation: log(u)·e/(u - 1), u = fl(1 + e)."""
    e = tl.exp(x)
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def link_loss(z, beta, label_smoothing, LINK: tl.constexpr):
    if LINK == 0:
        tail = log1p_exp(-tl.abs(z))
        # z < 0 rather than minimum(z, 0): a NaN stays one
        return tail + tl.where(z < 0, -(1 - label_smoothing) * z, label_smoothing * z)
    elif LINK == 1:
        return (z / beta - 0.5 / beta) * (z / beta - 0.5 / beta)
    elif LINK == 2:
        return tl.where(z >= 1, 0.0, 1 - z)
    else:
        return -z


@triton.jit
def link_slope(z, beta, label_smoothing, LINK: tl.constexpr):
    if LINK == 0:
        e = tl.exp(-tl.abs(z))
        low, high = e / (1 + e), 1 / (1 + e)  # σ(-|z|), σ(|z|)
        up = tl.where(z >= 0, high, low)
        down = tl.where(z >= 0, low, high)
        return label_smoothing * up - (1 - label_smoothing) * down
    elif LINK == 1:
        return 2 * (z / beta - 0.5 / beta) / beta
    elif LINK == 2:
        return tl.where(z >= 1, 0.0, -1.0) + 0 * z
    else:
        return 0 * z - 1


@triton.jit
def pair_errors_kernel(
    p_policy,  # [2B, N], or [B, N] if SHARED_POLICY
    p_reference,  # like policy, unread unless REFERENCE is 1
    p_target,  # [2B, N], or [B, N] if SHARED_TARGET
    p_partial,  # [3, 2B, CHUNKS]: sums of (y-o)², (y-o_ref)² and their difference
    pairs,
    N,
    chunk,
    CHUNKS: tl.constexpr,
    REFERENCE: tl.constexpr,
    SHARED_POLICY: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sample, i_chunk = tl.program_id(0), tl.program_id(1)
    DTYPE: tl.constexpr = p_partial.dtype.element_ty
    i_target = i_sample % pairs if SHARED_TARGET else i_sample
    i_policy = i_sample % pairs if SHARED_POLICY else i_sample
    p_o = p_policy + i_policy.to(tl.int64) * N
    p_r = p_reference + i_policy.to(tl.int64) * N
    p_y = p_target + i_target.to(tl.int64) * N
    start = i_chunk * chunk
    b_policy = tl.zeros([BLOCK], DTYPE)
    b_reference = tl.zeros([BLOCK], DTYPE)
    b_difference = tl.zeros([BLOCK], DTYPE)
    for offset in range(0, chunk, BLOCK):
        o_n = start + offset + tl.arange(0, BLOCK)
        m_n = o_n < N
        b_y = tl.load(p_y + o_n, m_n, 0.0).to(DTYPE)
        b_o = tl.load(p_o + o_n, m_n, 0.0).to(DTYPE)
        b_e = b_y - b_o
        b_policy += b_e * b_e
        if REFERENCE == 1:
            b_r = tl.load(p_r + o_n, m_n, 0.0).to(DTYPE)
            b_f = b_y - b_r
            b_reference += b_f * b_f
            b_difference += (b_r - b_o) * (b_e + b_f)
    rows = 2 * pairs
    p_out = p_partial + i_sample * CHUNKS + i_chunk
    tl.store(p_out, tl.sum(b_policy, 0))
    if REFERENCE == 1:
        tl.store(p_out + rows * CHUNKS, tl.sum(b_reference, 0))
        tl.store(p_out + 2 * rows * CHUNKS, tl.sum(b_difference, 0))


@triton.jit
def mean_of_chunks(p_partial, o_row, m_row, N, CHUNKS: tl.constexpr, CHUNKS_2: tl.constexpr):
    o_chunk = tl.arange(0, CHUNKS_2)
    m = m_row[:, None] & (o_chunk < CHUNKS)[None, :]
    return tl.sum(tl.load(p_partial + o_row[:, None] * CHUNKS + o_chunk[None, :], m, 0.0), 1) / N


@triton.jit
def pair_logits_kernel(
    p_partial,  # [3, 2B, CHUNKS]
    p_cached,  # [2B], the reference's errors, unread unless REFERENCE is 2
    p_timesteps,  # int64 [B], or [2B] if HALVES
    p_weights,  # [T]
    p_margins,  # [T]
    p_loss,  # []
    p_logits,  # [B]
    p_policy_error,  # [2B]
    p_reference_error,  # [2B], unwritten if REFERENCE is 0
    p_margin,  # [B]
    pairs,
    N,
    num_timesteps,
    beta: tl.float64,
    lose_weight: tl.float64,
    label_smoothing: tl.float64,
    CHUNKS: tl.constexpr,
    CHUNKS_2: tl.constexpr,
    HALVES: tl.constexpr,
    REFERENCE: tl.constexpr,
    LINK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    DTYPE: tl.constexpr = p_logits.dtype.element_ty
    beta, lose_weight = tl.full([], beta, DTYPE), tl.full([], lose_weight, DTYPE)
    label_smoothing = tl.full([], label_smoothing, DTYPE)
    rows = 2 * pairs
    first = tl.zeros([], DTYPE)
    b_sum = tl.zeros([BLOCK_B], DTYPE)
    for i_b in range(0, pairs, BLOCK_B):
        o_w = i_b + tl.arange(0, BLOCK_B)
        m_b = o_w < pairs
        o_l = o_w + pairs
        e_w = mean_of_chunks(p_partial, o_w, m_b, N, CHUNKS, CHUNKS_2)
        e_l = mean_of_chunks(p_partial, o_l, m_b, N, CHUNKS, CHUNKS_2)
        tl.store(p_policy_error + o_w, e_w, m_b)
        tl.store(p_policy_error + o_l, e_l, m_b)
        if REFERENCE == 0:
            d_w, d_l = e_w, e_l
        else:
            if REFERENCE == 1:
                f_w = mean_of_chunks(p_partial, rows + o_w, m_b, N, CHUNKS, CHUNKS_2)
                f_l = mean_of_chunks(p_partial, rows + o_l, m_b, N, CHUNKS, CHUNKS_2)
                d_w = mean_of_chunks(p_partial, 2 * rows + o_w, m_b, N, CHUNKS, CHUNKS_2)
                d_l = mean_of_chunks(p_partial, 2 * rows + o_l, m_b, N, CHUNKS, CHUNKS_2)
            else:
                f_w = tl.load(p_cached + o_w, m_b, 0.0).to(DTYPE)
                f_l = tl.load(p_cached + o_l, m_b, 0.0).to(DTYPE)
                d_w, d_l = e_w - f_w, e_l - f_l
            tl.store(p_reference_error + o_w, f_w, m_b)
            tl.store(p_reference_error + o_l, f_l, m_b)
        t = tl.load(p_timesteps + o_w, m_b, 0)
        valid = (t >= 0) & (t < num_timesteps)
        if HALVES:
            valid &= t == tl.load(p_timesteps + o_l, m_b, 0)
        t = tl.minimum(tl.maximum(t, 0), num_timesteps - 1)
        weight = tl.load(p_weights + t).to(DTYPE)
        margin = tl.load(p_margins + t).to(DTYPE)
        z = -beta * weight * (d_w - lose_weight * d_l) + beta * margin
        z = tl.where(valid, z, float("nan")).to(DTYPE)
        tl.store(p_logits + o_w, z, m_b)
        tl.store(p_margin + o_w, margin, m_b)
        loss = link_loss(z, beta, label_smoothing, LINK).to(DTYPE)
        if i_b == 0:
            first = tl.sum(tl.where(o_w == 0, loss, 0.0), 0)
        # about the first pair's loss: exact when all are equal, so log 2 stays log 2
        b_sum += tl.where(m_b, loss - first, 0.0)
    tl.store(p_loss, first + tl.sum(b_sum, 0) / pairs)


@triton.jit
def preference_loss_backward_kernel(
    p_grad_loss,  # []
    p_grad_logits,  # [B]
    p_grad_policy_error,  # [2B]
    p_policy,  # [2B, N], or [B, N] if SHARED_POLICY
    p_target,  # [2B, N], or [B, N] if SHARED_TARGET
    p_timesteps,  # int64 [B] or [2B]
    p_logits,  # [B]
    p_weights,  # [T]
    p_gradient,  # like policy
    pairs,
    N,
    num_timesteps,
    beta: tl.float64,
    lose_weight: tl.float64,
    label_smoothing: tl.float64,
    HAS_LOSS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    HAS_ERROR: tl.constexpr,
    SHARED_POLICY: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    LINK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, i_block = tl.program_id(0), tl.program_id(1)  # a row of the policy
    DTYPE: tl.constexpr = p_logits.dtype.element_ty
    beta, lose_weight = tl.full([], beta, DTYPE), tl.full([], lose_weight, DTYPE)
    label_smoothing = tl.full([], label_smoothing, DTYPE)
    i_pair = i_row % pairs
    z = tl.load(p_logits + i_pair)
    t = tl.load(p_timesteps + i_pair)
    t = tl.minimum(tl.maximum(t, 0), num_timesteps - 1)
    at_logit = tl.zeros([], DTYPE)
    if HAS_LOSS:
        slope = link_slope(z, beta, label_smoothing, LINK)
        at_logit += tl.load(p_grad_loss).to(DTYPE) * slope / pairs
    if HAS_LOGITS:
        at_logit += tl.load(p_grad_logits + i_pair).to(DTYPE)
    at_winner = (-beta * tl.load(p_weights + t).to(DTYPE) * at_logit).to(DTYPE)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    p_row = i_row.to(tl.int64) * N
    b_o = tl.load(p_policy + p_row + o_n, m_n, 0.0).to(DTYPE)
    b_gradient = tl.zeros([BLOCK], DTYPE)
    for half in tl.static_range(2 if SHARED_POLICY else 1):
        i_sample = i_row + half * pairs
        at_error = tl.where(i_sample < pairs, at_winner, -lose_weight * at_winner).to(DTYPE)
        if HAS_ERROR:
            at_error += tl.load(p_grad_policy_error + i_sample).to(DTYPE)
        i_target = i_pair if SHARED_TARGET else i_sample
        b_y = tl.load(p_target + i_target.to(tl.int64) * N + o_n, m_n, 0.0).to(DTYPE)
        b_gradient += (b_o - b_y) * (2 * at_error / N).to(DTYPE)
    tl.store(p_gradient + p_row + o_n, b_gradient.to(p_gradient.dtype.element_ty), m_n)


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
    """`dde_fast.reference.preference_loss` in two launches."""
    mode = "none" if reference is None else "prediction"
    if reference is not None and reference.dim() == 1:
        mode = "errors"
    if mode == "prediction":
        policy, reference, target = same_layout(policy, reference, target)
        dtype = accumulation_dtype(policy, reference, target)
    else:
        policy, target = same_layout(policy, target)
        dtype = accumulation_dtype(policy, target)
    pairs, n = number_of_pairs(policy, target), policy[0].numel()
    rows = 2 * pairs
    new = policy.new_empty
    loss, logits, margin = (new(size, dtype=dtype) for size in ((), (pairs,), (pairs,)))
    policy_error = new((rows,), dtype=dtype)
    reference_error = None if mode == "none" else new((rows,), dtype=dtype)

    def sum_up(config: Config) -> Tensor:
        block = config.block
        chunk = triton.cdiv(triton.cdiv(n, MAX_CHUNKS), block) * block
        chunks = triton.cdiv(n, chunk)
        partial = new((3, rows, chunks), dtype=dtype)
        pair_errors_kernel[rows, chunks](
            policy,
            reference if mode == "prediction" else policy,
            target,
            partial,
            pairs,
            n,
            chunk,
            CHUNKS=chunks,
            REFERENCE=REFERENCE[mode],
            SHARED_POLICY=policy.shape[0] == pairs,
            SHARED_TARGET=target.shape[0] == pairs,
            BLOCK=block,
            num_warps=config.num_warps,
        )
        return partial

    partial = sum_up(choose("pair_errors", policy, n, sum_up))
    chunks = partial.shape[2]
    block, num_warps = fixed("pair_logits", policy.device, n)
    pair_logits_kernel[(1,)](
        partial,
        reference.contiguous() if mode == "errors" else partial,
        timesteps.contiguous(),
        weights.contiguous(),
        margins.contiguous(),
        loss,
        logits,
        policy_error,
        reference_error if reference_error is not None else policy_error,
        margin,
        pairs,
        n,
        len(weights),
        beta,
        lose_weight,
        label_smoothing,
        CHUNKS=chunks,
        CHUNKS_2=triton.next_power_of_2(chunks),
        HALVES=timesteps.shape[0] == rows,
        REFERENCE=REFERENCE[mode],
        LINK=LINK[link],
        BLOCK_B=min(block, triton.next_power_of_2(pairs)),
        num_warps=num_warps,
    )
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
    """`dde_fast.reference.preference_loss_backward` in one launch."""
    gradient = torch.empty_like(policy)
    # the gradient is written in its own memory order, so the inputs must have that one too
    policy, target, out = same_layout(policy, target, gradient)
    pairs, n = len(logits), policy[0].numel()
    absent = logits

    def launch(config: Config) -> None:
        preference_loss_backward_kernel[policy.shape[0], triton.cdiv(n, config.block)](
            grad_loss if grad_loss is not None else absent,
            grad_logits.contiguous() if grad_logits is not None else absent,
            grad_policy_error.contiguous() if grad_policy_error is not None else absent,
            policy,
            target,
            timesteps.contiguous(),
            logits.contiguous(),
            weights.contiguous(),
            out,
            pairs,
            n,
            len(weights),
            beta,
            lose_weight,
            label_smoothing,
            HAS_LOSS=grad_loss is not None,
            HAS_LOGITS=grad_logits is not None,
            HAS_ERROR=grad_policy_error is not None,
            SHARED_POLICY=policy.shape[0] == pairs,
            SHARED_TARGET=target.shape[0] == pairs,
            LINK=LINK[link],
            BLOCK=config.block,
            num_warps=config.num_warps,
        )

    launch(choose("preference_loss_backward", policy, n, launch))
    return out if out.stride() == gradient.stride() else gradient.copy_(out)
