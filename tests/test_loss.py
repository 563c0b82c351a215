"""The drop-in against the papers' equations written the long way, in float64."""

import math

import longhand
import pytest
import torch
from conftest import BACKENDS, DEVICE

from dde_fast import OBJECTIVES, PreferenceLoss
from dde_fast.backends import why_not

SHAPE = (4, 16, 12)
TIMESTEPS = [0, 1, 300, 998, 999]
ABAR = longhand.scaled_linear()
OFFLINE = [name for name, row in OBJECTIVES.items() if not row.online]


def test_triton_is_tested():
    assert "triton" in BACKENDS, why_not("triton", DEVICE)


def make(objective, backend, **kwargs) -> PreferenceLoss:
    return PreferenceLoss(objective, alphas_cumprod=ABAR, backend=backend, **kwargs).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("objective", OFFLINE)
def test_objectives_equal_longhand(objective, prediction_type, backend):
    """loss, logits and gradient in float64, with a filled ratio table, t = 0 and T-1 included."""
    pairs = longhand.random_pairs(TIMESTEPS, SHAPE, ABAR, prediction_type=prediction_type)
    loss_fn = make(objective, backend, prediction_type=prediction_type, beta=20.0).eval()
    table = 0.01 * torch.rand(4, 1000, generator=torch.Generator().manual_seed(1))
    loss_fn.load_state_dict({"ratios": table})
    for pair in pairs:
        for name in ("policy_w", "policy_l"):
            setattr(pair, name, getattr(pair, name).requires_grad_())
    expected, logits = longhand.loss(
        pairs,
        ABAR,
        objective=objective,
        prediction_type=prediction_type,
        beta=20.0,
        ratios=table.double().tolist(),
    )
    expected.backward()
    policy, reference, y, t = longhand.batch(pairs, ABAR, prediction_type, torch.float64, DEVICE)
    policy = policy.detach().requires_grad_()
    out = loss_fn(policy, reference, y, t)
    out.loss.backward()
    # the tables are float32: their rounding is all that is left
    torch.testing.assert_close(out.logits.cpu(), logits.detach(), rtol=5e-7, atol=1e-6)
    torch.testing.assert_close(out.loss.cpu(), expected.detach(), rtol=1e-6, atol=1e-9)
    grads = [p.policy_w.grad for p in pairs]
    grads += [p.policy_l.grad if p.policy_l.grad is not None else 0 * p.policy_l for p in pairs]
    gradient = torch.stack([g.detach() for g in grads])
    torch.testing.assert_close(policy.grad.cpu(), gradient, rtol=5e-6, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("link", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_links_equal_longhand(link, label_smoothing, backend):
    if label_smoothing and link != "sigmoid":
        with pytest.raises(ValueError, match="label_smoothing"):
            make("dde", backend, link=link, label_smoothing=label_smoothing)
        return
    pairs = longhand.random_pairs(TIMESTEPS, SHAPE, ABAR, drift=0.02)
    expected, _ = longhand.loss(
        pairs, ABAR, objective="dde-step", beta=200.0, link_name=link, s=label_smoothing
    )
    loss_fn = make("dde-step", backend, beta=200.0, link=link, label_smoothing=label_smoothing)
    out = loss_fn(*longhand.batch(pairs, ABAR, "epsilon", torch.float64, DEVICE))
    torch.testing.assert_close(out.loss.cpu(), expected, rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_low_precision_inputs_lose_nothing(prediction_type, dtype, backend):
    """Inputs that bf16 and fp16 hold exactly: the loss is then as right as in float32."""
    pairs = longhand.random_pairs(
        TIMESTEPS, SHAPE, ABAR, prediction_type=prediction_type, dtype=dtype
    )
    expected, logits = longhand.loss(
        pairs, ABAR, objective="dde", prediction_type=prediction_type, beta=5000.0
    )
    shared = prediction_type == "epsilon"
    inputs = longhand.batch(pairs, ABAR, prediction_type, dtype, DEVICE, shared=shared)
    out = make("dde", backend, prediction_type=prediction_type)(*inputs)
    assert out.logits.dtype == torch.float32
    # a logit's float32 rounding counts in the size of what is summed: beta·ω_t·|drift|·|error|
    k = [longhand.K[prediction_type](ABAR[t].item()) for t in TIMESTEPS]
    size = 5000 * torch.tensor(k).double() ** 2 * 0.05
    assert ((out.logits.cpu().double() - logits).abs() <= 1e-6 * (size + logits.abs())).all()
    torch.testing.assert_close(out.loss.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_small_differences_survive_at_the_noisiest_step(seed, dtype, backend):
    """t = 999, beta 5000, policy within 1e-3 of the reference: beta·ω·e is 10⁵-10⁶, logits O(10)."""
    pairs = longhand.random_pairs(
        [999, 998, 999, 990], (4, 32, 32), ABAR, drift=1e-3, dtype=dtype, seed=seed
    )
    _, logits = longhand.loss(pairs, ABAR, objective="dde")
    out = make("dde", backend)(*longhand.batch(pairs, ABAR, "epsilon", dtype, DEVICE, True))
    assert logits.abs().max() > 1
    torch.testing.assert_close(out.logits.cpu().double(), logits, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pairs", [1, 2, 3, 7, 33])
def test_equal_models_give_log_2_to_the_last_bit(pairs, dtype, backend):
    x = torch.randn(2 * pairs, *SHAPE, device=DEVICE, dtype=torch.float32).to(dtype)
    y = torch.randn(pairs, *SHAPE, device=DEVICE).to(dtype)
    t = torch.randint(0, 1000, (pairs,), device=DEVICE)
    out = make("dde", backend)(x, x.clone(), y, t)
    exact = torch.tensor(math.log(2), dtype=out.loss.dtype)
    assert out.loss.cpu().equal(exact) and not out.logits.any()
    # and equal samples, whatever the reference is
    same = x[:pairs].repeat(2, 1, 1, 1)
    reference = torch.randn_like(x[:pairs]).repeat(2, 1, 1, 1)
    out = make("dde", backend)(same, reference, y, t)
    assert out.loss.cpu().equal(exact) and not out.logits.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_diffusion_dpo_is_salesforces_formula(backend):
    """The published code (train.py of DiffusionDPO), on the same tensors, beta 5000."""
    pairs = longhand.random_pairs([10, 400, 900], SHAPE, ABAR, drift=0.01, dtype=torch.float32)
    model_pred, ref_pred, target, t = longhand.batch(pairs, ABAR, "epsilon", torch.float32, DEVICE)
    model_losses = (model_pred - target).pow(2).mean(dim=[1, 2, 3])
    model_losses_w, model_losses_l = model_losses.chunk(2)
    ref_losses = (ref_pred - target).pow(2).mean(dim=[1, 2, 3])
    ref_losses_w, ref_losses_l = ref_losses.chunk(2)
    inside_term = -0.5 * 5000 * ((model_losses_w - model_losses_l) - (ref_losses_w - ref_losses_l))
    expected = -torch.nn.functional.logsigmoid(inside_term).mean()
    implicit_acc = (inside_term > 0).sum().float() / inside_term.size(0)
    implicit_acc += 0.5 * (inside_term == 0).sum().float() / inside_term.size(0)

    out = make("diffusion-dpo", backend, beta=5000)(model_pred, ref_pred, target, t)
    # theirs subtracts float32 sums; 2e-3 is what that costs at beta 5000
    torch.testing.assert_close(out.logits, inside_term, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(out.loss, expected, rtol=1e-3, atol=1e-4)
    assert out.metrics()["implicit_accuracy"] == implicit_acc
    metrics = out.metrics()
    torch.testing.assert_close(metrics["policy_win_error"], model_losses_w.mean())
    torch.testing.assert_close(metrics["reference_lose_error"], ref_losses_l.mean())
    # the float64 truth on the same float32 tensors
    truth, logits = longhand.loss(pairs, ABAR, objective="diffusion-dpo")
    torch.testing.assert_close(out.logits.cpu().double(), logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss.cpu().double(), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_reference_errors_give_the_same_loss(backend):
    pairs = longhand.random_pairs(TIMESTEPS, SHAPE, ABAR, dtype=torch.float32)
    policy, reference, y, t = longhand.batch(pairs, ABAR, "epsilon", torch.float32, DEVICE)
    policy.requires_grad_()
    full = make("dde", backend, beta=5.0)(policy, reference, y, t)
    cached = make("dde", backend, beta=5.0)(policy, full.reference_error, y, t)
    torch.testing.assert_close(cached.logits, full.logits, rtol=1e-4, atol=1e-3)
    assert cached.reference_error.equal(full.reference_error)
    (gradient,) = torch.autograd.grad(full.logits.sum(), policy)
    (from_cache,) = torch.autograd.grad(cached.logits.sum(), policy)
    assert gradient.equal(from_cache)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ratio_table_after_50_updates(backend):
    """Drop-in updates against a table of Python floats; every logit used the table before it."""
    generator = torch.Generator().manual_seed(0)
    loss_fn = make("dde", backend, ratio_decay=0.9)
    table = [[0.0] * 1000 for _ in range(4)]
    for step in range(50):
        timesteps = torch.randint(0, 1000, (3,), generator=generator).tolist()
        timesteps[1] = timesteps[0] if step % 2 else [0, 999, 500][step % 3]
        pairs = longhand.random_pairs(timesteps, (2, 4, 4), ABAR, dtype=torch.float32, seed=step)
        out = loss_fn(*longhand.batch(pairs, ABAR, "epsilon", torch.float32, DEVICE))
        margins = [longhand.margin(table, t) for t in timesteps]
        torch.testing.assert_close(
            out.margin.cpu().double(), torch.tensor(margins).double(), rtol=2e-5, atol=1e-6
        )
        observed = {}
        for pair in pairs:
            values = longhand.observations(pair, ABAR, "epsilon")
            observed.setdefault(pair.t, []).append(values)
        for t, values in observed.items():
            for row in range(4):
                mean = sum(v[row].item() for v in values) / len(values)
                table[row][t] = 0.9 * table[row][t] + 0.1 * mean
    expected = torch.tensor(table, dtype=torch.float64)
    assert (expected != 0).any(0).sum() > 60
    torch.testing.assert_close(loss_fn.ratios.cpu().double(), expected, rtol=3e-6, atol=1e-12)


def test_a_batch_may_be_split():
    """One batch of 16 = 4 of 4: the table and the mean loss and gradient (2 ranks: test_train)."""
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.randint(990, 1000, (16,), generator=generator).tolist()
    pairs = longhand.random_pairs(timesteps, SHAPE, ABAR, dtype=torch.float32)
    whole, parts = make("dde", "auto"), make("dde", "auto")
    parts.auto_update = False
    for _ in range(2):  # the second round sees a non-zero table
        policy, *rest = longhand.batch(pairs, ABAR, "epsilon", torch.float32, DEVICE)
        policy.requires_grad_()
        out = whole(policy, *rest)
        (gradient,) = torch.autograd.grad(out.loss, policy)
        losses, gradients = [], []
        for i in range(0, 16, 4):
            policy, *rest = longhand.batch(pairs[i : i + 4], ABAR, "epsilon", torch.float32, DEVICE)
            policy.requires_grad_()
            part = parts(policy, *rest)
            gradients.append(torch.autograd.grad(part.loss / 4, policy)[0].unflatten(0, (2, 4)))
            losses.append(part.loss)
        parts.update_ratios()
        assert parts.ratios.any()
        torch.testing.assert_close(parts.ratios, whole.ratios, rtol=1e-7, atol=0)
        torch.testing.assert_close(torch.stack(losses).mean(), out.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            torch.cat(gradients, 1).flatten(0, 1), gradient, rtol=1e-6, atol=0
        )


def test_eval_mode_updates_nothing_and_state_follows():
    pairs = longhand.random_pairs([5, 600], SHAPE, ABAR, dtype=torch.float32)
    inputs = longhand.batch(pairs, ABAR, "epsilon", torch.float32, DEVICE)
    loss_fn = make("dde", "auto").eval()
    loss_fn(*inputs)
    assert not loss_fn.ratios.any()
    loss_fn.train()(*inputs)
    assert loss_fn.ratios[:, 5].all() and loss_fn.ratios[:, 600].all()
    assert list(loss_fn.state_dict()) == ["ratios"]
    other = make("dde", "auto").eval()
    other.load_state_dict(loss_fn.state_dict())
    assert other(*inputs).margin.equal(loss_fn.eval()(*inputs).margin)
    assert other(*inputs).margin[0] != 0
    # a model's .half() rounds no table
    halved = loss_fn.half()
    assert halved.ratios.dtype == halved.weights.dtype == torch.float32
    assert loss_fn.to("meta").ratios.device.type == "meta"


def test_a_non_finite_prediction_shows_and_does_not_poison_the_table():
    pairs = longhand.random_pairs([5, 600], SHAPE, ABAR, dtype=torch.float32)
    for link in ("sigmoid", "ipo", "hinge"):
        for backend in BACKENDS:
            policy, *rest = longhand.batch(pairs, ABAR, "epsilon", torch.float32, DEVICE)
            policy[0, 0, 0, 0] = float("nan")
            policy.requires_grad_()
            loss_fn = make("dde", backend, link=link)
            out = loss_fn(policy, *rest)
            out.loss.backward()
            assert out.loss.isnan() and policy.grad[0].isnan().any()
            assert not loss_fn.ratios[:, 5].any() and loss_fn.ratios[:, 600].all()
            assert loss_fn.ratios.isfinite().all()


@pytest.mark.parametrize("objective", OFFLINE)
def test_timestep_distributions(objective):
    loss_fn = make(objective, "auto")
    p = loss_fn.timestep_probabilities()
    assert p.dtype == torch.float64 and p.shape == (1000,)
    assert abs(p.sum().item() - 1) < 1e-12
    if objective == "discounted":
        # 50 steps of 20 timesteps, 0.9 less each, from the noisiest on
        for t, i in ((999, 0), (980, 0), (979, 1), (500, 24), (0, 49)):
            assert p[t].item() == pytest.approx(p[999].item() * 0.9**i, rel=1e-12)
    else:
        assert (p == p[0]).all()
    part = loss_fn.timestep_probabilities(200, 700)
    assert not part[:200].any() and not part[700:].any() and (part[200:700] > 0).all()
    with pytest.raises(ValueError, match="timestep range"):
        loss_fn.timestep_probabilities(700, 200)


GOOD = {"policy": (4, 4, 8, 8), "reference": (4, 4, 8, 8), "target": (2, 4, 8, 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": torch.zeros(3, 4, 8, 8)}, r"policy: expected an even.*\[3, 4, 8, 8\]"),
        ({"target": torch.zeros(3, 4, 8, 8)}, r"target: expected .*got \[3, 4, 8, 8\]"),
        ({"reference": torch.zeros(4, 4, 8, 4)}, r"reference: expected .*got \[4, 4, 8, 4\]"),
        ({"reference": torch.zeros(2, 4, 8, 8)}, r"reference: expected .*got \[2, 4, 8, 8\]"),
        ({"reference": torch.zeros(4, 1)}, r"reference: expected .*got \[4, 1\]"),
        ({"reference": torch.zeros(2)}, r"reference: expected .*got \[2\]"),
        ({"reference": torch.zeros(())}, r"reference: expected .*got \[\]"),
        ({"target": torch.zeros(4, 4, 4, 16)}, r"target: expected .*got \[4, 4, 4, 16\]"),
        ({"policy": torch.zeros(0, 4, 8, 8)}, r"policy: expected an even.*\[0, 4, 8, 8\]"),
        ({"policy": torch.zeros(4, 0, 8, 8)}, r"policy: expected an even.*\[4, 0, 8, 8\]"),
        ({"policy": torch.zeros(4)}, r"policy: expected an even.*got \[4\]"),
        ({"reference": torch.zeros(4).half()}, "reference: expected its errors in float32"),
        ({"reference": None}, "reference: objective 'dde' needs it"),
        ({"policy": torch.zeros(4, 8, 8, 8)}, "learned variance"),
        ({"policy": torch.zeros(4, 4, 8, 8).int()}, "policy: expected a floating-point"),
        ({"target": torch.zeros(2, 4, 8, 8, requires_grad=True)}, "target: .*without gradient"),
        ({"reference": torch.zeros(4, 4, 8, 8, requires_grad=True)}, "reference: .*without grad"),
        ({"target": torch.zeros(2, 4, 8, 8, device="meta")}, "target: expected on .*got meta"),
        ({"timesteps": torch.zeros(3).long()}, r"timesteps: expected \[2\] or \[4\], got \[3\]"),
        ({"timesteps": torch.zeros(2, 1).long()}, r"timesteps: expected .*got \[2, 1\]"),
        ({"timesteps": torch.zeros(2)}, "timesteps: expected int64, got torch.float32"),
        ({"timesteps": torch.tensor([0, 1000])}, r"timesteps: .*\[0, 1000\), got 1000"),
        ({"timesteps": torch.tensor([-1, 9])}, r"timesteps: .*\[0, 1000\), got -1"),
        ({"timesteps": torch.tensor([1, 2, 1, 3])}, "timesteps: expected equal halves"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("trained", [False, True])
def test_bad_input_is_named(change, message, backend, trained):
    """Whoever looks at it: before the op or, as `auto` has it on a CPU, the op itself."""
    inputs = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    inputs["timesteps"] = torch.tensor([3, 4])
    inputs["policy"].requires_grad_(trained)
    loss_fn = PreferenceLoss("dde", alphas_cumprod=ABAR, backend=backend)
    loss_fn(**inputs)
    with pytest.raises(ValueError, match=message):
        loss_fn(**{**inputs, **change})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"objective": "ddpo"}, "objective: expected one of .*'dde-step'.*got 'ddpo'"),
        ({"prediction_type": "eps"}, "prediction_type: expected one of"),
        ({"beta": 0}, "beta: expected"),
        ({"beta": float("nan")}, "beta: expected"),
        ({"link": "tanh"}, "link: expected one of"),
        ({"objective": "sft", "link": "ipo"}, "link: objective 'sft' has none"),
        ({"label_smoothing": 0.7}, "label_smoothing: expected"),
        ({"ratio_decay": 1.0}, "ratio_decay: expected"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"alphas_cumprod": torch.zeros(2, 2)}, "alphas_cumprod: expected a non-empty"),
        ({"alphas_cumprod": ABAR.flip(0)}, "alphas_cumprod: .*decrease"),
        ({"alphas_cumprod": torch.tensor([0.9, 0.0])}, "zero terminal SNR"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(**{"alphas_cumprod": ABAR, **kwargs})


def test_from_scheduler():
    from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

    loss_fn = PreferenceLoss.from_scheduler(
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), "dde"
    )
    expected = (1 - ABAR) / ABAR
    torch.testing.assert_close(loss_fn.weights.double(), expected, rtol=1e-4, atol=0)
    v = PreferenceLoss.from_scheduler(DDIMScheduler(prediction_type="v_prediction"))
    assert v.prediction_type == "v_prediction" and v.weights[-1] < 1
    flow = PreferenceLoss.from_scheduler(FlowMatchEulerDiscreteScheduler(), "dde-single")
    sigmas = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(flow.weights, (sigmas**2), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="scheduler: expected"):
        PreferenceLoss.from_scheduler(object(), prediction_type="epsilon")


def test_an_output_by_pair_is_what_its_metrics_average_and_holds_no_graph():
    torch.manual_seed(0)
    policy, reference, target = (torch.randn(6, 2, 3, 3, device=DEVICE) for _ in range(3))
    timesteps = torch.tensor([5, 900, 30], device=DEVICE)
    loss_fn = PreferenceLoss("dde", alphas_cumprod=longhand.scaled_linear(), beta=0.1).to(DEVICE)
    out = loss_fn(policy.requires_grad_(), reference, target, timesteps.repeat(2)).detach()
    assert torch.equal(out.timesteps, timesteps)
    assert not (
        out.loss.requires_grad or out.logits.requires_grad or out.policy_error.requires_grad
    )
    by_pair = out.per_pair()
    assert all(values.shape == (3,) for values in by_pair.values())
    assert {name: values.mean() for name, values in by_pair.items()} == out.metrics()
    assert torch.equal(by_pair["logit_size"], out.logits.abs())
    assert torch.equal(by_pair["policy_win_error"], out.policy_error[:3])
