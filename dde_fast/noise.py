"""Noise and timesteps as a pure function of (seed, pair id, draw).

What a pair sees depends on nothing else: not on rank, world size, micro-batch, worker or resume.
The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
with key = (seed low, seed high) and counter = (block, pair id low, pair id high, draw). Noise uses
blocks 0, 1, 2, … (block = element // 4); single choices (timestep, caption dropout) use blocks
counted down from 2**32 - 1, so they never meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

TIMESTEP, CAPTION_DROPOUT = 0, 1
"""Numbers of the single choices of a pair, for `pair_uniform`."""


def philox4x32(counter: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four counter words under a 64-bit key.

    Args:
        counter: four int64 tensors that broadcast together, each holding values in [0, 2**32).
        seed: the key, 0 ≤ seed < 2**64.

    Returns:
        four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK32, seed >> 32
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, so shift and mask give the exact high and low words
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _uniform(words: Tensor) -> Tensor:
    """(x >> 8)·2⁻²⁴ + 2⁻²⁵ in float32: the 24 high bits of each word, in (0, 1]."""
    return (words >> 8).to(torch.float32) * 2.0**-24 + 2.0**-25


def _pair_words(
    blocks: Tensor,  # int64 [K]
    *,
    seed: int,
    pair_ids: Tensor,  # int64 [B]
    draw: int | Tensor,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words [B, K] for every pair and block."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 <= seed < 2**64, got {seed}")
    if pair_ids.dtype != torch.int64 or pair_ids.dim() != 1:
        raise ValueError(
            f"pair_ids: expected an int64 tensor [B], got {pair_ids.dtype} {list(pair_ids.shape)}"
        )
    device = torch.device(device) if device is not None else pair_ids.device
    ids = pair_ids.to(device)[:, None]
    if isinstance(draw, Tensor):
        if draw.dtype != torch.int64 or draw.shape not in (pair_ids.shape, torch.Size([])):
            raise ValueError(
                f"draw: expected an int or an int64 tensor {list(pair_ids.shape)}, "
                f"got {draw.dtype} {list(draw.shape)}"
            )
        draws = draw.to(device).reshape(-1, 1) & _MASK32
    elif 0 <= draw < 2**32:
        draws = torch.full((1, 1), draw, dtype=torch.int64, device=device)
    else:
        raise ValueError(f"draw: expected 0 <= draw < 2**32, got {draw}")
    counter = (blocks.to(device)[None, :], ids & _MASK32, (ids >> 32) & _MASK32, draws)
    return philox4x32(counter, seed)


def pair_noise(
    shape: Sequence[int],
    *,
    seed: int,
    pair_ids: Tensor,  # int64 [B]
    draw: int | Tensor,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise of each pair, shared by its winner and its loser.

    Box-Muller over consecutive elements 4j … 4j+3 (row-major): r₀cos 2πu₁, r₀sin 2πu₁,
    r₂cos 2πu₃, r₂sin 2πu₃ with r = √(-2 ln u) of u₀ and u₂.

    Args:
        shape: shape of one latent, e.g. (4, 64, 64).
        seed: 0 ≤ seed < 2**64; 0 is a seed like any other.
        pair_ids: int64 [B], identity of each pair in its data set.
        draw: how often the pair was drawn before (its epoch): an int, or an int64 tensor [B].
        device: where the noise is made; `pair_ids`' device by default.

    Returns:
        float32 [B, *shape].

    Raises:
        ValueError: seed or draw out of range, pair_ids not int64 [B].
    """
    count = math.prod(shape)
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=pair_ids.device)
    words = _pair_words(blocks, seed=seed, pair_ids=pair_ids, draw=draw, device=device)
    # float64 inside: the float32 result is then the correctly rounded one, which is what the
    # fused backends are held against
    u0, u1, u2, u3 = (_uniform(word).double() for word in words)
    r0, r2 = (-2.0 * u0.log()).sqrt(), (-2.0 * u2.log()).sqrt()
    a1, a3 = 2.0 * math.pi * u1, 2.0 * math.pi * u3
    normals = torch.stack([r0 * a1.cos(), r0 * a1.sin(), r2 * a3.cos(), r2 * a3.sin()], dim=-1)
    return normals.flatten(1)[:, :count].float().reshape(len(pair_ids), *shape)


def pair_uniform(
    choice: int,
    *,
    seed: int,
    pair_ids: Tensor,  # int64 [B]
    draw: int | Tensor,
    device: torch.device | str | None = None,
) -> Tensor:
    """One uniform number in (0, 1] per pair for a single decision, the same for both halves.

    Args:
        choice: which decision: `TIMESTEP`, `CAPTION_DROPOUT`, or any number from 2 on of your own.
        seed, pair_ids, draw, device: as in `pair_noise`.

    Returns:
        float32 [B].
    """
    if not 0 <= choice < 2**16:
        raise ValueError(f"choice: expected 0 <= choice < 2**16, got {choice}")
    blocks = torch.tensor([_MASK32 - choice], dtype=torch.int64, device=pair_ids.device)
    words = _pair_words(blocks, seed=seed, pair_ids=pair_ids, draw=draw, device=device)
    return _uniform(words[0])[:, 0]


def sample_timesteps(
    probabilities: Tensor,  # [T]
    *,
    seed: int,
    pair_ids: Tensor,  # int64 [B]
    draw: int | Tensor,
    device: torch.device | str | None = None,
) -> Tensor:
    """One timestep per pair from a discrete distribution, by inversion of its cumulative sum.

    Args:
        probabilities: [T], non-negative; normalised here. A timestep of probability 0 is never
            drawn. Keep it on the device where it is used: it is moved there otherwise.
        seed, pair_ids, draw, device: as in `pair_noise`.

    Returns:
        int64 [B] with values in [0, T).
    """
    if probabilities.dim() != 1:
        raise ValueError(f"probabilities: expected [T], got {list(probabilities.shape)}")
    u = pair_uniform(TIMESTEP, seed=seed, pair_ids=pair_ids, draw=draw, device=device)
    cumulative = probabilities.to(device=u.device, dtype=torch.float64).cumsum(0)
    # left: the smallest t with cumulative[t] >= u·total, which always has positive probability
    return torch.searchsorted(cumulative, u.double() * cumulative[-1], right=False)


def add_noise(
    latents: Tensor,  # [2B, C, H, W], winners first
    timesteps: Tensor,  # int64 [B], or [2B] with equal halves
    alphas_cumprod: Tensor,  # [T]
    *,
    seed: int,
    pair_ids: Tensor,  # int64 [B]
    draw: int | Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise both halves of each pair with the pair's own noise: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε.

    Args:
        latents: [2B, …], winners first, losers second.
        timesteps: [B], or [2B] with equal halves.
        alphas_cumprod: [T], on the latents' device.
        seed, pair_ids, draw: as in `pair_noise`.
        dtype: of both results; the latents' by default. The arithmetic is float32.

    Returns:
        noisy [2B, …] and noise [B, …] (the regression target of `epsilon`, shared by the pair).

    Raises:
        ValueError: an odd batch, or timesteps, pair_ids or devices that do not fit it.
    """
    pairs, odd = divmod(latents.shape[0], 2)
    if odd:
        raise ValueError(f"latents: expected an even batch [2B, ...], got {list(latents.shape)}")
    if len(pair_ids) != pairs:
        raise ValueError(f"pair_ids: expected [{pairs}], got {list(pair_ids.shape)}")
    if timesteps.shape not in ((pairs,), (2 * pairs,)):
        raise ValueError(
            f"timesteps: expected [{pairs}] or [{2 * pairs}], got {list(timesteps.shape)}"
        )
    for name, tensor in (("timesteps", timesteps), ("alphas_cumprod", alphas_cumprod)):
        if tensor.device != latents.device:
            raise ValueError(f"{name}: expected on {latents.device}, got {tensor.device}")
    shape = latents.shape[1:]
    noise = pair_noise(shape, seed=seed, pair_ids=pair_ids, draw=draw, device=latents.device)
    abar = alphas_cumprod.double()[timesteps[:pairs]].reshape(pairs, *[1] * len(shape))
    signal, sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
    halves = [signal * half.float() + sigma * noise for half in latents.chunk(2)]
    dtype = dtype or latents.dtype
    return torch.cat(halves).to(dtype), noise.to(dtype)
