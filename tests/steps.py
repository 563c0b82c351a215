"""Inputs of DDIM steps for the tests, and their mean written out in float64."""

import torch
from conftest import DEVICE
from longhand import scaled_linear
from torch import Tensor

from dde_fast.sampling import ddim_coefficients

TYPES = ("epsilon", "v_prediction", "sample")
TIMES, PREVIOUS = torch.tensor([981, 501, 41]), torch.tensor([931, 451, 0])


def coefficients(prediction_type="epsilon", eta=1.0, times=TIMES, previous=PREVIOUS) -> Tensor:
    """float32 [3, 5]: near the noise, in the middle, and the last step but one."""
    table = scaled_linear()
    found = ddim_coefficients(table, times, previous, eta=eta, prediction_type=prediction_type)
    return found.to(DEVICE)


def inputs(count=2, shape=(4, 9, 7), dtype=torch.float32, batch=3) -> list[Tensor]:
    """prediction, sample [B, …] and noise [K·B, …]; `dtype` is one or three."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * 3
    generator = torch.Generator().manual_seed(count)
    rows = (batch, batch, count * batch)
    made = (torch.randn(n, *shape, generator=generator) for n in rows)
    return [x.to(DEVICE, kind) for x, kind in zip(made, dtypes, strict=True)]


def mean_and_size(
    o: Tensor,  # [B, …]
    x: Tensor,  # [B, …]
    k: Tensor,  # [B, 5]
    prediction_type: str,
) -> tuple[Tensor, Tensor]:
    """[B, N] in float64: the mean, and the size of the terms that it is the sum of."""
    a, b, a_prev, c, _ = (column[:, None] for column in k.double().unbind(1))
    o, x = (t.double().flatten(1) for t in (o, x))
    if prediction_type == "epsilon":
        mean = a_prev * (x - b * o) / a + c * o
        return mean, a_prev * (x.abs() + b * o.abs()) / a + c * o.abs()
    if prediction_type == "v_prediction":
        mean = (a_prev * a + c * b) * x + (c * a - a_prev * b) * o
        return mean, (a_prev * a + c * b) * x.abs() + (c * a + a_prev * b) * o.abs()
    mean = a_prev * o + c * (x - a * o) / b
    return mean, a_prev * o.abs() + c * (x.abs() + a * o.abs()) / b
