"""`add_noise` of pairs against torch.randn + diffusers' add_noise.

Bytes: latents of both halves read, noisy latents of both and the pair's noise written. In the
channels_last rows the noisy latents come out in the memory order that a channels_last UNet wants.
"""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, BATCHES, COLD, DEVICE, SETS, SHAPES
from diffusers import DDPMScheduler

from dde_fast.noise import add_noise


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("name", ["diffusers", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pairs", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_noise(measure, benchmark, shape, pairs, dtype, name, layout, cache="warm"):
    benchmark.group = f"add_noise {layout} {cache} {shape} B={pairs} {str(dtype)[6:]}"
    memory_format = getattr(torch, layout)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alphas_cumprod = scheduler.alphas_cumprod.to(DEVICE)
    pair_ids = torch.arange(pairs, device=DEVICE)

    def theirs(latents, timesteps):
        noise = torch.randn_like(latents[:pairs])
        noisy = scheduler.add_noise(latents, noise.repeat(2, 1, 1, 1), timesteps.repeat(2))
        return noisy.contiguous(memory_format=memory_format), noise

    def ours(latents, timesteps):
        keys = {"seed": 0, "pair_ids": pair_ids, "draw": 0, "backend": name}
        return add_noise(latents, timesteps, alphas_cumprod, **keys, memory_format=memory_format)

    function = theirs if name == "diffusers" else ours
    sets = [
        (
            torch.randn(2 * pairs, *SHAPES[shape], device=DEVICE).to(dtype),
            torch.randint(0, 1000, (pairs,), device=DEVICE),
        )
        for _ in range(SETS)
    ]
    measure(
        [lambda s=s: function(*s) for s in sets],
        bytes=5 * pairs * torch.Size(SHAPES[shape]).numel() * dtype.itemsize,
        cache=cache,
        op="add_noise",
        name=name,
        layout=layout,
        pairs=pairs,
        shape=list(SHAPES[shape]),
        dtype=str(dtype)[6:],
    )


@pytest.mark.parametrize("name", ["diffusers", *BACKENDS])
@pytest.mark.parametrize(("shape", "pairs"), COLD)
def bench_noise_cold(measure, benchmark, shape, pairs, name):
    options = {"dtype": torch.float32, "layout": "contiguous_format", "cache": "cold"}
    bench_noise(measure, benchmark, shape, pairs, name=name, **options)
