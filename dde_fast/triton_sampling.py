"""Triton kernels of the DDIM step; formulas and the eager version are in `dde_fast.reference`.

Forward is two launches: `ddim_step_kernel` holds μ of a block in registers while it goes through
the candidates and leaves partial sums, `ddim_density_kernel` adds them up in a fixed order.
Backward is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dde_fast.reference import accumulation_dtype, same_layout
from dde_fast.triton_configs import Config, choose, fixed

PREDICTION = {"epsilon": 0, "v_prediction": 1, "sample": 2}


@triton.jit
def divide(x, y):
    """x / y rounded once: in float32 the operator approximates."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in the dtype; float64 goes to 16 bits through float32, as in torch."""
    return (x.to(tl.float32) if DTYPE.primitive_bitwidth == 16 else x).to(DTYPE)


@triton.jit
def step_mean(p_row, x, o, PREDICTION: tl.constexpr):
    """μ from x_t and the prediction, in their precision; p_row: five coefficients."""
    a, b = tl.load(p_row).to(x.dtype), tl.load(p_row + 1).to(x.dtype)
    a_prev, direction = tl.load(p_row + 2).to(x.dtype), tl.load(p_row + 3).to(x.dtype)
    if PREDICTION == 0:
        return a_prev * divide(x - b * o, a) + direction * o
    elif PREDICTION == 1:
        return a_prev * (a * x - b * o) + direction * (a * o + b * x)
    else:
        return a_prev * o + direction * divide(x - a * o, b)


@triton.jit
def step_slope(p_row, PREDICTION: tl.constexpr):
    """d μ / d o in float64: its two terms nearly cancel."""
    one = tl.full([], 1.0, tl.float64)
    return step_mean(p_row, 0 * one, one, PREDICTION)


@triton.jit
def ddim_step_kernel(
    p_prediction,  # [B, N]
    p_sample,  # [B, N]
    p_given,  # [K·B, N], the noise, or the next samples if not MAKE
    p_coefficients,  # [B, 5]
    p_next,  # [K·B, N], unwritten if not MAKE
    p_partial,  # [K·B, blocks]: sums of (next - μ)²
    batch,
    candidates,
    N,
    MAKE: tl.constexpr,
    PREDICTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, i_block = tl.program_id(0), tl.program_id(1)
    DTYPE: tl.constexpr = p_partial.dtype.element_ty
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    p_row = p_coefficients + i_row * 5
    o_row = i_row.to(tl.int64) * N
    b_x = tl.load(p_sample + o_row + o_n, m_n, 0.0).to(DTYPE)
    b_o = tl.load(p_prediction + o_row + o_n, m_n, 0.0).to(DTYPE)
    b_mean = step_mean(p_row, b_x, b_o, PREDICTION)
    sigma = tl.load(p_row + 4).to(DTYPE)
    for k in range(candidates):
        i_candidate = (k * batch + i_row).to(tl.int64)
        b_next = tl.load(p_given + i_candidate * N + o_n, m_n, 0.0).to(DTYPE)
        if MAKE:
            b_made = narrow(b_mean + sigma * b_next, p_next.dtype.element_ty)
            tl.store(p_next + i_candidate * N + o_n, b_made, m_n)
            b_next = b_made.to(DTYPE)  # the density is that of next as rounded
        b_error = tl.where(m_n, b_next - b_mean, 0.0)
        tl.store(
            p_partial + i_candidate * tl.num_programs(1) + i_block, tl.sum(b_error * b_error, 0)
        )


@triton.jit
def ddim_density_kernel(
    p_partial,  # [K·B, blocks]
    p_coefficients,  # [B, 5]
    p_log_prob,  # [K·B]
    batch,
    N,
    blocks,
    BLOCK: tl.constexpr,
):
    i_candidate = tl.program_id(0)
    b_sum = tl.zeros([BLOCK], tl.float64)
    for i in range(0, blocks, BLOCK):
        o = i + tl.arange(0, BLOCK)
        p = p_partial + i_candidate.to(tl.int64) * blocks + o
        b_sum += tl.load(p, o < blocks, 0.0).to(tl.float64)
    sigma = tl.load(p_coefficients + i_candidate % batch * 5 + 4).to(tl.float64)
    safe = tl.where(sigma > 0, sigma, 1.0)
    half_log_2pi = tl.full([], 0.91893853320467274178, tl.float64)  # a literal is float32
    density = -tl.sum(b_sum, 0) / (2 * safe * safe * N) - tl.log(safe) - half_log_2pi
    density = tl.where(sigma > 0, density, float("nan"))
    tl.store(p_log_prob + i_candidate, density.to(p_log_prob.dtype.element_ty))


@triton.jit
def ddim_step_backward_kernel(
    p_grad_next,  # [K·B, N], unread unless HAS_NEXT
    p_grad_log_prob,  # [K·B], unread unless HAS_LOG_PROB
    p_prediction,  # [B, N]
    p_sample,  # [B, N]
    p_next,  # [K·B, N]
    p_coefficients,  # [B, 5]
    p_gradient,  # like prediction
    batch,
    candidates,
    N,
    HAS_NEXT: tl.constexpr,
    HAS_LOG_PROB: tl.constexpr,
    PREDICTION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, i_block = tl.program_id(0), tl.program_id(1)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    p_row = p_coefficients + i_row * 5
    o_row = i_row.to(tl.int64) * N
    b_gradient = tl.zeros([BLOCK], DTYPE)
    if HAS_LOG_PROB:
        b_x = tl.load(p_sample + o_row + o_n, m_n, 0.0).to(DTYPE)
        b_o = tl.load(p_prediction + o_row + o_n, m_n, 0.0).to(DTYPE)
        b_mean = step_mean(p_row, b_x, b_o, PREDICTION)
        sigma = tl.load(p_row + 4).to(tl.float64)
        # nothing passes a deterministic step, but a NaN stays one
        scale = tl.where(sigma > 0, 1 / tl.where(sigma > 0, sigma * sigma * N, 1.0), 0.0)
    for k in range(candidates):
        i_candidate = (k * batch + i_row).to(tl.int64)
        if HAS_NEXT:
            b_gradient += tl.load(p_grad_next + i_candidate * N + o_n, m_n, 0.0).to(DTYPE)
        if HAS_LOG_PROB:
            b_next = tl.load(p_next + i_candidate * N + o_n, m_n, 0.0).to(DTYPE)
            factor = tl.load(p_grad_log_prob + i_candidate).to(tl.float64) * scale
            b_gradient += factor.to(DTYPE) * (b_next - b_mean)
    b_gradient *= step_slope(p_row, PREDICTION).to(DTYPE)
    tl.store(p_gradient + o_row + o_n, narrow(b_gradient, p_gradient.dtype.element_ty), m_n)


def ddim_step(
    prediction: Tensor,  # [B, C, H, W]
    sample: Tensor,  # [B, C, H, W]
    coefficients: Tensor,  # float32 [B, 5]
    noise: Tensor | None,  # [K·B, C, H, W]
    next_sample: Tensor | None,  # [K·B, C, H, W], instead of noise
    prediction_type: str,
) -> tuple[Tensor | None, Tensor]:
    """`dde_fast.reference.ddim_step` in two launches."""
    given = next_sample if noise is None else noise
    dtype = accumulation_dtype(prediction, sample, given)
    made = out = None
    if noise is None:
        prediction, sample, given = same_layout(prediction, sample, given)
    else:
        made = torch.empty_like(noise, dtype=sample.dtype)
        prediction, sample, given, out = same_layout(prediction, sample, given, made)
    batch, rows, n = len(sample), len(given), sample[0].numel()
    coefficients = coefficients.contiguous()
    log_prob = sample.new_empty(rows, dtype=dtype)

    def step(config: Config) -> Tensor:
        blocks = triton.cdiv(n, config.block)
        partial = sample.new_empty((rows, blocks), dtype=dtype)
        ddim_step_kernel[batch, blocks](
            prediction,
            sample,
            given,
            coefficients,
            given if out is None else out,
            partial,
            batch,
            rows // batch,
            n,
            MAKE=out is not None,
            PREDICTION=PREDICTION[prediction_type],
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
        return partial

    partial = step(choose("ddim_step", sample, n, step))
    blocks = partial.shape[1]
    block, num_warps = fixed("ddim_density", sample.device, n)
    ddim_density_kernel[(rows,)](
        partial,
        coefficients,
        log_prob,
        batch,
        n,
        blocks,
        BLOCK=min(block, triton.next_power_of_2(blocks)),
        num_warps=num_warps,
    )
    if made is not None and out.stride() != made.stride():
        made.copy_(out)
    return made, log_prob


def ddim_step_backward(
    grad_next: Tensor | None,  # [K·B, C, H, W]
    grad_log_prob: Tensor | None,  # [K·B]
    prediction: Tensor,  # [B, C, H, W]
    sample: Tensor,  # [B, C, H, W]
    next_sample: Tensor,  # [K·B, C, H, W]
    coefficients: Tensor,  # float32 [B, 5]
    prediction_type: str,
) -> Tensor:
    """`dde_fast.reference.ddim_step_backward` in one launch."""
    gradient = torch.empty_like(prediction)
    dtype = accumulation_dtype(prediction, sample, next_sample, grad_log_prob)
    tensors = [gradient, prediction, sample, next_sample]
    tensors += [] if grad_next is None else [grad_next]
    # the gradient is written in its own memory order, so the inputs must have that one too
    out, prediction, sample, next_sample, *rest = same_layout(*tensors)
    batch, n = len(sample), sample[0].numel()

    def launch(config: Config) -> None:
        ddim_step_backward_kernel[batch, triton.cdiv(n, config.block)](
            rest[0] if rest else next_sample,
            next_sample if grad_log_prob is None else grad_log_prob.contiguous(),
            prediction,
            sample,
            next_sample,
            coefficients.contiguous(),
            out,
            batch,
            len(next_sample) // batch,
            n,
            HAS_NEXT=grad_next is not None,
            HAS_LOG_PROB=grad_log_prob is not None,
            PREDICTION=PREDICTION[prediction_type],
            DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )

    launch(choose("ddim_step_backward", sample, n, launch))
    return out if out.stride() == gradient.stride() else gradient.copy_(out)
