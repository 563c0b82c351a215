"""A DDIM step of two candidates with log-probabilities against the eager code of DDPO and D3PO.

`eager` is their `ddim_step_with_logprob` written well: coefficients looked up before, one mean for
both candidates, nothing copied. `forward` makes the candidates from noise without a graph, as
sampling does; `both` judges given ones and differentiates their log-probabilities. Bytes: each
input read once and each output written once, forward and backward for themselves.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ALPHAS_CUMPROD, BACKENDS, BATCHES, COLD, DEVICE, SETS, SHAPES
from torch import Tensor

from dde_fast.sampling import ddim_coefficients, ddim_step

CANDIDATES = 2


def eager(
    prediction: Tensor,  # [B, C, H, W]
    sample: Tensor,  # [B, C, H, W]
    coefficients: Tensor,  # [B, 5]
    noise: Tensor | None,  # [2B, C, H, W]
    next_sample: Tensor | None,  # [2B, C, H, W]
) -> tuple[Tensor, Tensor]:
    """ddpo-pytorch's ddim_with_logprob.py for `epsilon`, arithmetic in float32."""
    a, b, a_prev, direction, sigma = coefficients.reshape(-1, 5, 1, 1, 1).unbind(1)
    prediction, sample_wide = prediction.float(), sample.float()
    denoised = (sample_wide - b * prediction) / a
    mean = a_prev * denoised + direction * prediction
    if next_sample is None:
        next_sample = mean + sigma * noise.float().unflatten(0, (CANDIDATES, -1))
    else:
        next_sample = next_sample.float().unflatten(0, (CANDIDATES, -1))
    log_prob = (
        -((next_sample.detach() - mean) ** 2) / (2 * sigma**2)
        - torch.log(sigma)
        - math.log(math.sqrt(2 * math.pi))
    )
    return next_sample.flatten(0, 1).to(sample.dtype), log_prob.mean((2, 3, 4)).flatten()


def calls(name: str, mode: str, sets: list):
    """Functions without arguments, one per set of inputs."""

    def step(prediction, sample, coefficients, noise, next_sample):
        if name == "eager":
            return eager(prediction, sample, coefficients, noise, next_sample)
        return ddim_step(
            prediction, sample, coefficients, prediction_type="epsilon", noise=noise,
            next_sample=next_sample, backend=name,
        )  # fmt: skip

    def forward(prediction, sample, coefficients, noise):
        with torch.no_grad():
            return step(prediction, sample, coefficients, noise, None)

    def both(prediction, sample, coefficients, next_sample):
        _, log_prob = step(prediction, sample, coefficients, None, next_sample)
        return torch.autograd.grad(log_prob.sum(), prediction)

    return [lambda s=s: {"forward": forward, "both": both}[mode](*s) for s in sets]


def inputs(batch: int, shape: tuple[int, ...], dtype: torch.dtype):
    t = torch.randint(100, 1000, (batch,))
    coefficients = ddim_coefficients(ALPHAS_CUMPROD, t, t - 50, eta=1.0, prediction_type="epsilon")
    rows = (batch, batch, CANDIDATES * batch)
    prediction, sample, other = (torch.randn(n, *shape, device=DEVICE).to(dtype) for n in rows)
    return prediction.requires_grad_(), sample, coefficients.to(DEVICE), other


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("name", ["eager", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_ddim(measure, benchmark, shape, batch, dtype, name, mode, cache="warm"):
    benchmark.group = f"ddim_step {mode} {cache} {shape} B={batch} {str(dtype)[6:]}"
    sets = [inputs(batch, SHAPES[shape], dtype) for _ in range(SETS)]
    # read prediction, sample, K others and write K samples; or read twice and write the gradient
    rows = 2 + 2 * CANDIDATES if mode == "forward" else 2 * (2 + CANDIDATES) + 1
    measure(
        calls(name, mode, sets),
        bytes=rows * batch * torch.Size(SHAPES[shape]).numel() * dtype.itemsize,
        cache=cache,
        op="ddim_step",
        name=name,
        mode=mode,
        pairs=batch,
        shape=list(SHAPES[shape]),
        dtype=str(dtype)[6:],
    )


@pytest.mark.parametrize("name", ["eager", *BACKENDS])
@pytest.mark.parametrize(("shape", "batch"), COLD)
def bench_ddim_cold(measure, benchmark, shape, batch, name):
    bench_ddim(measure, benchmark, shape, batch, torch.float32, name, mode="both", cache="cold")
