"""The importance-ratio table's ops: every backend against the eager one."""

import pytest
import torch
from conftest import BACKENDS, DEVICE

from dde_fast import ops


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_ratio_ops_are_the_reference(backend):
    """Observe and update on a full-length and an odd table, empty ones and NaN included."""
    for steps, decay in ((1000, 0.9), (37, 0.0)):
        generator = torch.Generator().manual_seed(steps)
        states = {}
        scale = torch.rand(steps, generator=generator)
        batches = [torch.rand(2, 10, generator=generator) for _ in range(3)]
        batches[1][0, 2] = float("nan")
        batches[2][1, 9] = float("inf")
        times = [torch.randint(0, steps, (5,), generator=generator) for _ in range(3)]
        times[0][0] = times[0][1] = steps - 1
        for name in ("reference", backend):
            ratios = torch.rand(4, steps, generator=torch.Generator().manual_seed(0)).to(DEVICE)
            margins = torch.zeros(steps, device=DEVICE)
            sums = torch.zeros(5, steps, dtype=torch.float64, device=DEVICE)
            for (policy, ref), t in zip(batches, times, strict=True):
                args = (x.to(DEVICE) for x in (policy, ref, t, scale))
                ops.observe_ratios(sums, *args, name)
            seen = sums.clone()
            ops.update_ratios(ratios, margins, sums, decay, name)
            assert not sums.any()
            states[name] = (seen, ratios, margins)
        assert states[backend][0][4].sum() == 13
        for fast, exact in zip(states[backend], states["reference"], strict=True):
            torch.testing.assert_close(fast, exact, rtol=2e-7, atol=1e-6 if exact.dim() == 1 else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ratio_ops_opcheck(backend):
    sums = torch.zeros(5, 10, dtype=torch.float64, device=DEVICE)
    error, t = torch.rand(4, device=DEVICE), torch.tensor([1, 9], device=DEVICE)
    scale = torch.rand(10, device=DEVICE)
    torch.library.opcheck(
        torch.ops.dde_fast.observe_ratios, (sums, error, error, t, scale, backend)
    )
    table = torch.rand(4, 10, device=DEVICE)
    torch.library.opcheck(torch.ops.dde_fast.update_ratios, (table, scale, sums, 0.9, backend))
