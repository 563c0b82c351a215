"""Noise and timesteps as a pure function of (seed, pair id, draw).

What a pair sees depends on nothing else: not on rank, world size, micro-batch, worker or resume.
The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
with key = (seed low, seed high) and counter = (block, pair id low, pair id high, draw). Noise uses
blocks 0, 1, 2, … (block = element // 4); single choices (timestep, caption dropout) use blocks
counted down from 2**32 - 1, so they never meet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dde_fast import backends, ops

TIMESTEP, CAPTION_DROPOUT = 0, 1
"""Numbers of the single choices of a pair, for `pair_uniform`."""


def pair_noise(
    shape: Sequence[int],
    *,
    seed: int,
    pair_ids: Tensor,  # int64 [B]
    draw: int | Tensor,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Standard normal noise of each pair, shared by its winner and its loser.

    Box-Muller over consecutive elements 4j … 4j+3 (row-major): r₀cos 2πu₁, r₀sin 2πu₁,
    r₂cos 2πu₃, r₂sin 2πu₃ with r = √(-2 ln u) of u₀ and u₂, u = (x >> 8)·2⁻²⁴ + 2⁻²⁵.

    Args:
        shape: shape of one latent, e.g. (4, 64, 64).
        seed: 0 ≤ seed < 2**64; 0 is a seed like any other.
        pair_ids: int64 [B], identity of each pair in its data set.
        draw: how often the pair was drawn before (its epoch): an int, or an int64 tensor [B].
        device: where the noise is made; `pair_ids`' device by default.
        backend: as in `PreferenceLoss`; the integers are the same on all, normals to 1e-6.

    Returns:
        float32 [B, *shape].

    Raises:
        ValueError: seed or draw out of range, pair_ids not int64 [B].
    """
    ids, draws, seed = _key(seed, pair_ids, draw, device)
    backend = backends.resolve_backend(backend, ids.device)
    return ops.pair_noise(ids, draws, list(shape), seed, backend)


def pair_uniform(
    choice: int,
    *,
    seed: int,
    pair_ids: Tensor,  # int64 [B]
    draw: int | Tensor,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """One uniform number in (0, 1] per pair for a single decision, the same for both halves.

    Args:
        choice: which decision: `TIMESTEP`, `CAPTION_DROPOUT`, or any number from 2 on of your own.
        seed, pair_ids, draw, device, backend: as in `pair_noise`.

    Returns:
        float32 [B].
    """
    if not 0 <= choice < 2**16:
        raise ValueError(f"choice: expected 0 <= choice < 2**16, got {choice}")
    ids, draws, seed = _key(seed, pair_ids, draw, device)
    return ops.pair_uniform(ids, draws, choice, seed, backends.resolve_backend(backend, ids.device))


def running_sums(probabilities: Tensor) -> Tensor:  # [T]
    """Of a distribution, float64 [T] on the CPU: added there, they are the same for every device
    and run, which a CUDA cumsum's are not."""
    return probabilities.cpu().double().cumsum(0)


def sample_timesteps(
    probabilities: Tensor,  # [T]
    *,
    seed: int,
    pair_ids: Tensor,  # int64 [B]
    draw: int | Tensor,
    device: torch.device | str | None = None,
    backend: str = "auto",
    summed: bool = False,
) -> Tensor:
    """One timestep per pair from a discrete distribution, by inversion of its cumulative sum.

    Args:
        probabilities: [T], non-negative; normalised here. A timestep of probability 0 is never
            drawn. Keep it on the device where it is used: it is moved there otherwise.
        seed, pair_ids, draw, device, backend: as in `pair_noise`.
        summed: whether these are their `running_sums` already; else each call adds them up.

    Returns:
        int64 [B] with values in [0, T).
    """
    if probabilities.dim() != 1:
        raise ValueError(f"probabilities: expected [T], got {list(probabilities.shape)}")
    u = pair_uniform(
        TIMESTEP, seed=seed, pair_ids=pair_ids, draw=draw, device=device, backend=backend
    )
    cumulative = probabilities.to(device=u.device, dtype=torch.float64)
    cumulative = cumulative if summed else cumulative.cumsum(0)
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
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Noise both halves of each pair with the pair's own noise: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε.

    Args:
        latents: [2B, …], winners first, losers second.
        timesteps: [B], or [2B] with equal halves.
        alphas_cumprod: [T], on the latents' device.
        seed, pair_ids, draw, backend: as in `pair_noise`.
        dtype: of both results; the latents' by default. The arithmetic is float32.
        memory_format: of both results, `torch.channels_last` for a model in that layout: the same
            numbers, written in that order by the same pass. The latents may have either.

    Returns:
        noisy [2B, …] and noise [B, …] (the regression target of `epsilon`, shared by the pair).

    Raises:
        ValueError: an odd batch, or timesteps, pair_ids or devices that do not fit it; another
            memory format, or channels_last for latents without four dimensions.
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
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "memory_format: expected torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )
    channels_last = memory_format == torch.channels_last
    if channels_last and latents.dim() != 4:
        raise ValueError(
            "memory_format: expected latents [2B, C, H, W] with torch.channels_last, "
            f"got {list(latents.shape)}"
        )
    ids, draws, seed = _key(seed, pair_ids, draw, latents.device)
    dtype, backend = dtype or latents.dtype, backends.resolve_backend(backend, latents.device)
    return ops.add_noise(
        latents, timesteps, alphas_cumprod, ids, draws, seed, dtype, channels_last, backend
    )


def _key(
    seed: int, pair_ids: Tensor, draw: int | Tensor, device: torch.device | str | None
) -> tuple[Tensor, Tensor, int]:
    """Pair ids and draws int64 [B] on the device, and the seed's 64 bits as a signed integer."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 <= seed < 2**64, got {seed}")
    if pair_ids.dtype != torch.int64 or pair_ids.dim() != 1:
        raise ValueError(
            f"pair_ids: expected an int64 tensor [B], got {pair_ids.dtype} {list(pair_ids.shape)}"
        )
    ids = pair_ids if device is None else pair_ids.to(device)
    if not isinstance(draw, Tensor):
        if not 0 <= draw < 2**32:
            raise ValueError(f"draw: expected 0 <= draw < 2**32, got {draw}")
        draws = torch.full_like(ids, draw)
    elif draw.dtype == torch.int64 and draw.shape == pair_ids.shape:
        draws = draw.to(ids.device)
    else:
        raise ValueError(
            f"draw: expected an int or an int64 tensor {list(pair_ids.shape)}, "
            f"got {draw.dtype} {list(draw.shape)}"
        )
    return ids, draws, seed - 2**64 if seed >= 2**63 else seed
