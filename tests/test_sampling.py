"""The DDIM step: its coefficients, diffusers to the bit, TailorPO's loss, refusals."""

import math

import pytest
import torch
from conftest import BACKENDS, DEVICE
from diffusers import DDIMScheduler
from longhand import scaled_linear
from steps import PREVIOUS, TIMES, TYPES, coefficients, inputs

from dde_fast import backends, ops
from dde_fast.sampling import ddim_coefficients, ddim_linear, ddim_step

CPU = torch.device("cpu")
ON_CPU = [b for b in ("reference", "cpp") if backends.why_not(b, CPU) is None]
"""Backends whose float32 samples are PyTorch's to the bit."""


def test_coefficients_written_out():
    table = scaled_linear()
    times, previous = torch.tensor([999, 500, 0]), torch.tensor([949, 3, -1])
    for eta in (0.0, 0.3, 1.0):
        for final in (1.0, table[0].item()):
            rows = ddim_coefficients(
                table, times, previous, eta=eta, prediction_type="epsilon",
                final_alpha_cumprod=final,
            )  # fmt: skip
            assert rows.dtype == torch.float32 and rows.shape == (3, 5)
            for row, t, before in zip(rows.tolist(), times, previous, strict=True):
                abar, prev = table[t].item(), final if before < 0 else table[before].item()
                sigma = eta * math.sqrt((1 - prev) / (1 - abar) * (1 - abar / prev))
                written = [math.sqrt(abar), math.sqrt(1 - abar), math.sqrt(prev)]
                written += [math.sqrt(1 - prev - sigma**2), sigma]
                assert row == pytest.approx(written, rel=6e-8, abs=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("end", [True, False])
def test_samples_are_diffusers_to_the_bit(end, prediction_type, eta, backend):
    """A whole trajectory of 20 steps, each from the sample before."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type=prediction_type, set_alpha_to_one=end, steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    times = scheduler.timesteps
    rows = ddim_coefficients(
        scheduler.alphas_cumprod, times, (times - 50).clamp(min=-1), eta=eta,
        prediction_type=prediction_type, final_alpha_cumprod=scheduler.final_alpha_cumprod,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 9, 7, generator=generator)
    for t, row in zip(times.tolist(), rows, strict=True):
        prediction, z = torch.randn(2, *sample.shape, generator=generator)
        expected = scheduler.step(prediction, t, sample, eta=eta, variance_noise=z).prev_sample
        made, log_prob = ddim_step(
            prediction, sample, row.expand(2, 5), prediction_type=prediction_type, noise=z,
            backend=backend,
        )  # fmt: skip
        assert made.equal(expected), t
        assert log_prob.isnan().all() == (row[4] == 0)
        sample = made


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_terminal_snr(backend):
    """ᾱ = 0: x_t says nothing of x_0, and rounding leaves no negative number under the root."""
    table = scaled_linear().float()
    table[-1] = 0
    times = torch.full((50,), 999)
    rows = ddim_coefficients(
        table, times, torch.arange(900, 950), eta=1.0, prediction_type="v_prediction"
    ).to(DEVICE)
    assert rows.isfinite().all() and (rows[:, 0] == 0).all() and (rows[:, 3] < 1e-3).all()
    args = inputs(1, batch=50)
    made, log_prob = ddim_step(*args[:2], rows, prediction_type="v_prediction", noise=args[2], backend=backend)  # fmt: skip
    assert made.isfinite().all() and log_prob.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_judged_again_is_as_likely(dtype, backend):
    """Made here or given: the same log-density and gradient, so the first ratio of DDPO is 1."""
    o, x, z = inputs(2, dtype=dtype)
    k, settings = coefficients(), dict(prediction_type="epsilon", backend=backend)
    results = []
    made = None
    for _ in range(2):
        leaf = o.clone().requires_grad_()
        given = {"noise": z} if made is None else {"next_sample": made.detach()}
        step, log_prob = ddim_step(leaf, x, k, **given, **settings)
        made = step if made is None else made
        assert made.requires_grad and (step is made or not step.requires_grad)
        (gradient,) = torch.autograd.grad(log_prob.sum(), leaf)
        results.append((log_prob, gradient))
    for first, again in zip(*results, strict=True):
        assert first.equal(again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_deterministic_step_has_no_density(backend):
    """The last step to ᾱ = 1 among others: NaN where it is used, harmless where it is masked."""
    o, x, z = inputs(2)
    o.requires_grad_()
    k = coefficients(previous=torch.tensor([931, 451, -1]))
    made, log_prob = ddim_step(o, x, k, prediction_type="epsilon", noise=z, backend=backend)
    assert log_prob.isnan().tolist() == [False, False, True] * 2
    masked = torch.where(log_prob.isnan(), 0.0, log_prob).sum()
    (gradient,) = torch.autograd.grad(masked, o, retain_graph=True)
    assert gradient.isfinite().all() and not gradient[2].any() and gradient[:2].any()
    (gradient,) = torch.autograd.grad(made.sum(), o, retain_graph=True)
    assert gradient.isfinite().all() and gradient[2].any()
    (gradient,) = torch.autograd.grad(log_prob.square().sum(), o)
    assert gradient[2].isnan().all() and gradient[:2].isfinite().all()


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_mean_is_linear(prediction_type):
    o, x, z = inputs(1, dtype=torch.float64)
    k = coefficients(prediction_type, eta=0.0)
    made, _ = ddim_step(o, x, k, prediction_type=prediction_type, noise=z)
    a, b = (c[:, None, None, None] for c in ddim_linear(k, prediction_type))
    torch.testing.assert_close(made, a * x + b * o, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_tailorpo_is_a_preference_loss(prediction_type):
    """Differences of log-densities of two candidates of one x_t, and the loss head's logit of
    targets (x_prev - A x_t)/B with the weight B²/(2σ²): the same number and gradient."""
    beta = 3.0
    o, x, z = inputs(2, dtype=torch.float64)
    o_reference = o + 0.1 * torch.randn(o.shape, dtype=o.dtype, device=DEVICE)
    o.requires_grad_()
    k = coefficients(prediction_type)
    made, _ = ddim_step(o_reference, x, k, prediction_type=prediction_type, noise=z)

    def densities(prediction):
        settings = dict(prediction_type=prediction_type, next_sample=made)
        return ddim_step(prediction, x, k, **settings)[1]

    ratio = densities(o) - densities(o_reference)
    logits = beta * (ratio[:3] - ratio[3:])
    loss = -torch.nn.functional.logsigmoid(logits).mean()

    a, b = ddim_linear(k, prediction_type)
    shape = (3, 1, 1, 1)
    target = (made.unflatten(0, (2, 3)) - a.reshape(shape) * x) / b.reshape(shape)
    weights = b**2 / (2 * k[:, 4].double() ** 2)
    head, head_logits, *_ = ops.preference_loss(
        o, o_reference, target.flatten(0, 1), torch.arange(3, device=DEVICE), weights,
        torch.zeros_like(weights), beta, 1.0, "sigmoid", 0.0, "reference",
    )  # fmt: skip
    torch.testing.assert_close(head_logits, logits, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(head, loss, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(f, o)[0] for f in (loss, head)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


TABLE = {
    "alphas_cumprod": scaled_linear(),
    "timesteps": TIMES,
    "previous_timesteps": PREVIOUS,
    "eta": 1.0,
    "prediction_type": "epsilon",
    "final_alpha_cumprod": 1.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alphas_cumprod": torch.ones(5)}, "alphas_cumprod: expected values"),
        ({"timesteps": TIMES.float()}, "timesteps: expected int64"),
        ({"timesteps": TIMES + 900}, "timesteps: expected values in .0, 1000.*got .1881"),
        ({"previous_timesteps": PREVIOUS[:2]}, "previous_timesteps: expected int64"),
        ({"previous_timesteps": TIMES}, "previous_timesteps: expected -1 or .*got .981"),
        ({"previous_timesteps": PREVIOUS - 2}, "previous_timesteps: expected -1 or"),
        ({"eta": 1.5}, "eta: expected 0 <= eta <= 1, got 1.5"),
        ({"prediction_type": "flow"}, "prediction_type: expected one of .*got 'flow'"),
        ({"final_alpha_cumprod": 0.0}, "final_alpha_cumprod: expected"),
    ],
)
def test_a_bad_schedule_is_named(change, message):
    ddim_coefficients(**TABLE)
    with pytest.raises(ValueError, match=message):
        ddim_coefficients(**{**TABLE, **change})


def wanted(x):
    return x.clone().requires_grad_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"next_sample": g["noise"]}, "noise: expected exactly one .*got both"),
        (lambda g: {"noise": None}, "noise: expected exactly one .*got neither"),
        (lambda g: {"noise": None, "next_sample": wanted(g["noise"])}, "next_sample: .*gradient"),
        (lambda g: {"noise": wanted(g["noise"])}, "noise: expected a tensor without gradient"),
        (lambda g: {"sample": wanted(g["sample"])}, "sample: expected a tensor without gradient"),
        (lambda g: {"noise": g["noise"][:4]}, r"noise: expected \[K·3, 4, 9, 7\], got \[4, 4"),
        (lambda g: {"noise": g["noise"][:, :2]}, r"noise: expected \[K·3, 4, 9, 7\]"),
        (lambda g: {"prediction": g["prediction"][:2]}, r"prediction: expected \[3, 4, 9, 7\]"),
        (lambda g: {"sample": g["sample"].long()}, "sample: expected a floating-point"),
        (lambda g: {"coefficients": g["coefficients"][0]}, r"coefficients: expected .*\[3, 5\]"),
        (lambda g: {"coefficients": g["coefficients"].double()}, "coefficients: expected float32"),
        (lambda g: {"coefficients": g["coefficients"].to("meta")}, "coefficients: expected on"),
        (lambda g: {"sample": g["sample"][:0]}, "sample: expected a non-empty batch"),
        (lambda g: {"prediction_type": "flow"}, "prediction_type: expected one of"),
        (lambda g: {"backend": "opencl"}, "backend: expected one of"),
    ],
)
def test_bad_input_is_named(change, message):
    o, x, z = inputs(2)
    good = {"prediction": o, "sample": x, "noise": z, "coefficients": coefficients()}
    good |= {"prediction_type": "epsilon", "backend": "reference"}
    ddim_step(**good)
    with pytest.raises(ValueError, match=message):
        ddim_step(**{**good, **change(good)})
