"""What rounding does to a logit: the measurement, and the page made from it."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def noise(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "conftest")  # that of the benchmarks, for a while
    import reference_noise

    return reference_noise


def test_how_rounding_moves_a_logit(noise):
    """By hand: errors that move by δ move the logit by beta · ω_t · (δ_w - δ_l)."""
    case = noise.Case("two pairs", "sd15", 4, 2, 2, (1,), ("float32", "bfloat16"))
    made = noise.Models(case, small=True)
    batch = noise.make_batch(case, Path())
    found, asked = {}, {}
    generator = torch.Generator().manual_seed(0)
    for t in noise.TIMESTEPS:
        target = torch.randn(2, 4, 4, 4, generator=generator)
        asked[t] = noise.Noised((), {}, torch.tensor([t, t]), target)
        exact = target.repeat(2, 1, 1, 1) + torch.randn(4, 4, 4, 4, generator=generator)
        for key in ((True, "float32", 2), (False, "float32", 2), (True, "bfloat16", 2)):
            found[key + (t,)] = exact
        found[False, "float32", 1, t] = exact
        moved = target.repeat(2, 1, 1, 1) + torch.randn(4, 4, 4, 4, generator=generator)
        found[False, "bfloat16", 2, t] = moved
        found[False, "bfloat16", 1, t] = exact
    rows = {
        (row["what"], row.get("dtype"), row["timestep"]): row
        for row in noise.compare(case, made, found, asked)
    }
    for t in noise.TIMESTEPS:
        moved, exact = (
            (found[False, dtype, 2, t] - asked[t].target.repeat(2, 1, 1, 1))
            .square()
            .mean((1, 2, 3))
            for dtype in ("bfloat16", "float32")
        )
        win, lose = (moved - exact).chunk(2)
        abar = made.alphas_cumprod[t]
        for name, weight in (("diffusion-dpo", 0.5), ("dde", (1 - abar) / abar)):
            expected = float((5000 * weight * (win - lose)).std())
            for what in ("scores", "reference", "both"):
                row = rows[what, "bfloat16", t]
                assert row["logit_std"][name] == pytest.approx(expected, rel=1e-3)
                assert row["error_std"] == pytest.approx(float((moved - exact).std()), rel=1e-3)
            assert rows["scores", "float32", t]["logit_std"][name] < 1e-3 * expected
            assert rows["logits", None, t]["logit_std"][name] == 0
    parts = list(noise.parts(batch, 1))
    assert torch.equal(torch.cat([part.latents[:1] for part in parts]), batch.latents[:2])
    assert torch.equal(torch.cat([part.latents[1:] for part in parts]), batch.latents[2:])


def test_rounding_is_measured_from_forwards(noise, monkeypatch):
    """A small UNet: bf16 moves logits far more than another batch size does in float32."""
    case = noise.Case("four pairs", "sd15", 8, 4, 2, (1, 4), ("float32", "bfloat16"))
    monkeypatch.setitem(noise.CASES, "small", case)
    result = noise.measure("small", case, small=True)
    worst = {
        (what, dtype): max(
            row["logit_std"]["diffusion-dpo"]
            for row in result["rows"]
            if (row["what"], row.get("dtype")) == (what, dtype)
        )
        for what, dtype in (("scores", "float32"), ("reference", "bfloat16"), ("logits", None))
    }
    assert 0 < 10 * worst["scores", "float32"] < worst["reference", "bfloat16"]
    assert worst["logits", None] > 0
    lines = noise.table(result).splitlines()
    assert len(lines) == 4 + 1 + 2 + 1 + 1 and all(line.count("|") == 5 for line in lines[2:])
    assert "made at 1, 4 pairs" in lines[5] and result["machine"]["commit"]


def test_the_page_on_rounding_is_made_from_the_committed_results(noise):
    page = noise.PAGE.read_text(encoding="utf-8")
    assert page == noise.render(page)
    for case in noise.CASES.values():
        assert f"**{case.title}**" in page
