"""Triton kernels of the noise; the specification and the eager version are in `dde_fast.noise`.

Logarithm, sine and cosine are polynomials (Cephes' single-precision ones) on exactly reduced
arguments: a hardware log2 loses the small logarithms of u near 1, and 2πu rounded to float32 loses
the angle; both would show beyond 1e-6. They also make every GPU and the interpreter agree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dde_fast.reference import MASK32, dense_rows, empty_noised
from dde_fast.triton_configs import Config, choose, fixed


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10; all words uint32."""
    for _ in tl.static_range(10):
        h0, l0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        h1, l1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(x):
    return (x >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08


@triton.jit
def log(u):
    """Natural logarithm of normal float32 0 < u ≤ 1."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # [½, 1)
    low = mantissa < 0.70710678
    exponent = tl.where(low, exponent - 1, exponent).to(tl.float32)
    f = tl.where(low, 2 * mantissa, mantissa) - 1
    p = 7.0376836292e-2
    p = p * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    square = f * f
    tail = p * f * square - 2.12194440e-4 * exponent - 0.5 * square
    return (f + tail) + 0.693359375 * exponent


@triton.jit
def sin_cos_turns(u):
    """sin 2πu and cos 2πu of 0 ≤ u ≤ 1: to the nearest quarter turn exactly, then polynomials."""
    quarter = (4 * u + 0.5).to(tl.int32)
    a = (u - 0.25 * quarter.to(tl.float32)) * 6.283185307179586
    s = a * a
    sine = -1.9515295891e-4
    sine = sine * s + 8.3321608736e-3
    sine = sine * s - 1.6666654611e-1
    sine = sine * s * a + a
    cosine = 2.443315711809948e-5
    cosine = cosine * s - 1.388731625493765e-3
    cosine = cosine * s + 4.166664568298827e-2
    cosine = cosine * s * s - 0.5 * s + 1
    odd = (quarter & 1) == 1
    x, y = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    # quarters 0 … 4 of (sin, cos): (s, c), (c, -s), (-s, -c), (-c, s), (s, c)
    return tl.where((quarter & 2) == 2, -x, x), tl.where(((quarter + 1) & 2) == 2, -y, y)


@triton.jit
def block_normals(o_block, pair_id, draw, seed_low, seed_high):
    """Normals of Philox blocks int64 [K] as [4K] consecutive elements."""
    zero = o_block * 0
    c1 = (zero + (pair_id & 0xFFFFFFFF)).to(tl.uint32)
    c2 = (zero + ((pair_id >> 32) & 0xFFFFFFFF)).to(tl.uint32)
    c3 = (zero + (draw & 0xFFFFFFFF)).to(tl.uint32)
    k0, k1 = (zero + seed_low).to(tl.uint32), (zero + seed_high).to(tl.uint32)
    x0, x1, x2, x3 = philox4x32(o_block.to(tl.uint32), c1, c2, c3, k0, k1)
    r0 = tl.sqrt_rn(-2 * log(uniform(x0)))
    r2 = tl.sqrt_rn(-2 * log(uniform(x2)))
    s1, c1 = sin_cos_turns(uniform(x1))
    s3, c3 = sin_cos_turns(uniform(x3))
    return tl.interleave(tl.interleave(r0 * c1, r2 * c3), tl.interleave(r0 * s1, r2 * s3))


@triton.jit
def offset(o_n, channels, space):
    """Where element c·space + p of a row lies in channels_last: p·channels + c."""
    return (o_n % space) * channels + o_n // space


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def add_noise_kernel(
    p_latents,  # [2B, N]
    p_timesteps,  # int64 [B], or [2B] if HALVES
    p_alphas_cumprod,  # [T]
    p_pair_ids,  # int64 [B]
    p_draws,  # int64 [B]
    seed_low,  # the seed's words, each in [0, 2**32)
    seed_high,
    p_noisy,  # [2B, N]
    p_noise,  # [B, N]
    pairs,
    N,
    space,  # H·W
    num_timesteps,
    HALVES: tl.constexpr,
    ONLY_NOISE: tl.constexpr,
    CHANNELS: tl.constexpr,  # read where something is channels_last
    LATENTS_LAST: tl.constexpr,  # the latents are channels_last
    OUT_LAST: tl.constexpr,  # so are noisy and noise
    TILES: tl.constexpr,  # made in the order of their memory: CHANNELS divides BLOCK, 4 space
    BLOCK: tl.constexpr,
):
    i_pair, i_block = tl.program_id(0), tl.program_id(1)
    pair_id, draw = tl.load(p_pair_ids + i_pair), tl.load(p_draws + i_pair)
    o_block = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_n = i_block * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    m_n = o_n < N
    o_latent, o_out = o_n, o_n
    if TILES:
        # four pixels of every channel are one piece of memory: their blocks side by side, then
        # elements [CHANNELS, 4] turned to pixels [4, CHANNELS]
        o_block = o_block % CHANNELS * (space // 4) + o_block // CHANNELS
        b_noise = block_normals(o_block, pair_id, draw, seed_low, seed_high)
        b_noise = b_noise.reshape(BLOCK // CHANNELS, CHANNELS, 4).permute(0, 2, 1)
        b_noise = b_noise.reshape(4 * BLOCK)
        if not LATENTS_LAST:
            o_latent = offset(o_n, space, CHANNELS)
    else:
        b_noise = block_normals(o_block, pair_id, draw, seed_low, seed_high)
        if LATENTS_LAST:
            o_latent = offset(o_n, CHANNELS, space)
        if OUT_LAST:
            o_out = offset(o_n, CHANNELS, space)
    tl.store(p_noise + i_pair.to(tl.int64) * N + o_out, b_noise.to(p_noise.dtype.element_ty), m_n)
    if not ONLY_NOISE:
        t = tl.load(p_timesteps + i_pair)
        valid = (t >= 0) & (t < num_timesteps)
        if HALVES:
            valid &= t == tl.load(p_timesteps + pairs + i_pair)
        t = tl.minimum(tl.maximum(t, 0), num_timesteps - 1)
        abar = tl.load(p_alphas_cumprod + t)
        if p_alphas_cumprod.dtype.element_ty == tl.float64:
            signal, sigma = tl.sqrt(abar).to(tl.float32), tl.sqrt(1 - abar).to(tl.float32)
        else:  # tl.sqrt approximates in float32
            abar = abar.to(tl.float32)
            signal, sigma = tl.sqrt_rn(abar), tl.sqrt_rn(1 - abar)
        signal = tl.where(valid, signal, float("nan"))
        for half in tl.static_range(2):
            p_half = (i_pair + half * pairs).to(tl.int64) * N
            b_latent = tl.load(p_latents + p_half + o_latent, m_n, 0.0).to(tl.float32)
            b_noisy = signal * b_latent + sigma * b_noise
            tl.store(p_noisy + p_half + o_out, b_noisy.to(p_noisy.dtype.element_ty), m_n)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def pair_uniform_kernel(
    p_pair_ids,  # int64 [B]
    p_draws,  # int64 [B]
    block,  # the choice's Philox block, in [0, 2**32)
    seed_low,
    seed_high,
    p_out,  # [B]
    pairs,
    BLOCK: tl.constexpr,
):
    o_b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_b = o_b < pairs
    pair_id = tl.load(p_pair_ids + o_b, m_b, 0)
    draw = tl.load(p_draws + o_b, m_b, 0)
    zero = pair_id * 0
    x0, _, _, _ = philox4x32(
        (zero + block).to(tl.uint32),
        (pair_id & 0xFFFFFFFF).to(tl.uint32),
        ((pair_id >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (draw & 0xFFFFFFFF).to(tl.uint32),
        (zero + seed_low).to(tl.uint32),
        (zero + seed_high).to(tl.uint32),
    )
    tl.store(p_out + o_b, uniform(x0), m_b)


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
    """`dde_fast.noise.add_noise` in one launch: each normal is made once for both halves."""
    noisy, noise = empty_noised(latents, len(pair_ids), dtype, channels_last)
    latents = dense_rows(latents)
    _launch(noise, pair_ids, draws, seed, latents, timesteps, alphas_cumprod, noisy)
    return noisy, noise


def pair_noise(
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    shape: list[int],
    seed: int,
) -> Tensor:
    """`dde_fast.noise.pair_noise` in one launch."""
    noise = torch.empty((len(pair_ids), *shape), dtype=torch.float32, device=pair_ids.device)
    _launch(noise, pair_ids, draws, seed)
    return noise


def pair_uniform(
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    choice: int,
    seed: int,
) -> Tensor:
    """`dde_fast.noise.pair_uniform` in one launch."""
    out = torch.empty(len(pair_ids), dtype=torch.float32, device=pair_ids.device)
    block, num_warps = fixed("pair_uniform", pair_ids.device, len(pair_ids))
    pair_uniform_kernel[(triton.cdiv(len(pair_ids), block),)](
        pair_ids.contiguous(),
        draws.contiguous(),
        MASK32 - choice,
        seed & MASK32,
        (seed >> 32) & MASK32,
        out,
        len(pair_ids),
        BLOCK=block,
        num_warps=num_warps,
    )
    return out


def _launch(noise, pair_ids, draws, seed, latents=None, timesteps=None, alphas=None, noisy=None):
    pairs, n = len(pair_ids), noise[0].numel()
    pair_ids, draws = pair_ids.contiguous(), draws.contiguous()
    latents_last = latents is not None and not latents.is_contiguous()
    out_last = not noise.is_contiguous()
    channels, space = 1, n
    if latents_last or out_last:
        channels, space = noise.shape[1], noise[0, 0].numel()

    def launch(config: Config) -> None:
        add_noise_kernel[pairs, triton.cdiv(n, 4 * config.block)](
            noise if latents is None else latents,
            pair_ids if timesteps is None else timesteps.contiguous(),
            noise if alphas is None else alphas.contiguous(),
            pair_ids,
            draws,
            seed & MASK32,
            (seed >> 32) & MASK32,
            noise if noisy is None else noisy,
            noise,
            pairs,
            n,
            space,
            1 if alphas is None else len(alphas),
            HALVES=timesteps is not None and len(timesteps) == 2 * pairs,
            ONLY_NOISE=latents is None,
            CHANNELS=channels,
            LATENTS_LAST=latents_last,
            OUT_LAST=out_last,
            TILES=out_last and config.block % channels == 0 and space % 4 == 0,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )

    launch(choose("add_noise", noise, n, launch))
