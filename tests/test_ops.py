"""The ops: opcheck, gradcheck, compile, meta device, determinism, layouts, kernels against fp64."""

import itertools

import pytest
import torch
from conftest import BACKENDS, DEVICE
from longhand import scaled_linear

from dde_fast import PreferenceLoss, ops, reference
from dde_fast.reference import LINKS

FAST = [b for b in BACKENDS if b != "reference"]
WEIGHTS = ((1 - scaled_linear()) / scaled_linear()).float()
MARGINS = torch.linspace(-1e-4, 1e-4, 1000)


def arguments(
    pairs=3,
    shape=(4, 6, 5),
    dtype=torch.float32,
    link="sigmoid",
    backend="reference",
    mode="prediction",
    shared=True,
    predictions="each",
    halves=False,
    beta=20.0,
    drift=0.1,
    timesteps=None,
):
    generator = torch.Generator().manual_seed(pairs)
    y = torch.randn(pairs if shared else 2 * pairs, *shape, generator=generator)
    r = torch.randn(2 * pairs, *shape, generator=generator)
    o = r + drift * torch.randn(r.shape, generator=generator)
    e = r.flatten(1).square().mean(1)
    if predictions == "shared":  # one for both halves, each with its target
        r, o = r[:pairs], o[:pairs]
    if timesteps is None:
        timesteps = torch.linspace(0, 999, pairs).long()
    ref = {"prediction": r.to(dtype), "errors": e, "none": None}[mode]
    tensors = [o.to(dtype), ref, y.to(dtype)]
    tensors += [timesteps.repeat(2) if halves else timesteps, WEIGHTS, MARGINS]
    tensors = [x if x is None else x.to(DEVICE) for x in tensors]
    smoothing = 0.1 if link == "sigmoid" else 0.0
    return (*tensors, beta, 0.7, link, smoothing, backend)


def to_double(args):
    return tuple(
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["prediction", "errors", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(mode, dtype, backend):
    args = arguments(mode=mode, dtype=dtype, backend=backend)
    args[0].requires_grad_()
    torch.library.opcheck(torch.ops.dde_fast.preference_loss, args)
    loss, logits, error, *_ = ops.preference_loss(*args)
    backward = (torch.ones_like(loss), torch.ones_like(logits), torch.ones_like(error))
    policy, _, target, timesteps, weights, _, *constants = args
    torch.library.opcheck(
        torch.ops.dde_fast.preference_loss_backward,
        (*backward, policy.detach(), target, timesteps, logits.detach(), weights, *constants),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("link", "output", "predictions"),
    [
        ("sigmoid", 0, "each"),
        ("sigmoid", 0, "shared"),
        ("ipo", 0, "each"),
        ("ipo", 1, "shared"),
        ("hinge", 0, "each"),
        ("linear", 0, "each"),
    ],
)
def test_gradcheck(link, output, predictions, backend):
    """loss and logits by finite differences in float64."""
    kwargs = dict(shared=False, halves=True, predictions=predictions)
    args = list(arguments(2, (1, 1, 3), torch.float64, link, backend, **kwargs))
    if link == "hinge":
        args[6] = 0.3  # away from the kink
    policy = args[0].requires_grad_()

    def f(policy):
        return ops.preference_loss(policy, *args[1:])[output]

    assert torch.autograd.gradcheck(f, (policy,), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_predictions_are_repeated_ones(backend):
    """[B] predictions with [2B] targets give what [2B] equal halves give, gradients summed."""
    args = arguments(3, shared=False, predictions="shared", backend=backend)
    once = args[0].requires_grad_()
    out = ops.preference_loss(once, *args[1:])
    twice = once.detach().repeat(2, 1, 1, 1).requires_grad_()
    expected = ops.preference_loss(twice, args[1].repeat(2, 1, 1, 1), *args[2:])
    for a, b in zip(out, expected, strict=True):
        assert a.equal(b)
    (gradient,) = torch.autograd.grad(out[0], once)
    (halves,) = torch.autograd.grad(expected[0], twice)
    torch.testing.assert_close(gradient, halves.unflatten(0, (2, 3)).sum(0), rtol=1e-5, atol=1e-7)


def test_all_outputs_are_differentiable_at_once():
    for backend in BACKENDS:
        args = list(arguments(1, (1, 1, 3), torch.float64, backend=backend))
        policy = args[0].requires_grad_()

        def f(policy, args=args):
            loss, logits, error, *_ = ops.preference_loss(policy, *args[1:])
            return loss * 3 + logits.sin().sum() + error.square().sum()

        assert torch.autograd.gradcheck(f, (policy,), atol=1e-6, rtol=1e-5)


CASES = [
    dict(pairs=1, shape=(4, 64, 64)),
    dict(pairs=1, shape=(1, 1, 1)),
    dict(pairs=5, shape=(4, 9, 7)),
    dict(pairs=3, shape=(3, 31, 33), shared=False, halves=True),
    dict(pairs=40, shape=(1, 5, 5), mode="errors"),
    dict(pairs=2, shape=(16, 33, 130)),
    dict(pairs=33, shape=(2, 3, 5), mode="none"),
    dict(pairs=4, shape=(4, 16, 16), beta=5000.0, drift=3.0),  # saturated both ways
    dict(pairs=3, shape=(4, 9, 7), shared=False, predictions="shared"),
    dict(pairs=3, shape=(4, 8, 8), shared=False, predictions="shared", mode="errors"),
    dict(pairs=2, shape=(4, 8, 8), timesteps=torch.tensor([999, 0])),
]


def term_sizes(args):
    """[B]: beta·ω·(size of what is summed into d_w and d_l), in which a logit's rounding counts."""
    policy, ref, target, timesteps, weights, _, beta = to_double(args)[:7]
    pairs = max(len(policy), len(target)) // 2
    y, policy, ref = (
        x if x is None or x.dim() == 1 or len(x) == 2 * pairs else x.repeat(2, 1, 1, 1)
        for x in (target, policy, ref)
    )
    size = (y - policy).square()
    if ref is not None and ref.dim() > 1:
        size = ((ref - policy) * (2 * y - policy - ref)).abs()
    size = size.flatten(1).mean(1)
    return beta * weights[timesteps[:pairs]] * (size[:pairs] + size[pairs:])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("case", "link"),
    [(case, "sigmoid") for case in CASES]
    + [(CASES[i], link) for i in (2, 7) for link in LINKS if link != "sigmoid"],
    ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x["shape"])),
)
def test_no_further_from_float64_than_eager(case, link, dtype, backend):
    """|kernel - fp64| ≤ |eager in the same dtype - fp64| + 1e-6 (fp64: 1e-14) of what is summed."""
    args = {
        name: arguments(**case, link=link, dtype=dtype, backend=name)
        for name in ("reference", backend)
    }
    args["truth"] = (*to_double(args["reference"])[:-1], "reference")
    out = {name: [x.double() for x in ops.preference_loss(*a)] for name, a in args.items()}
    beta, smoothing = args["truth"][6], args["truth"][9]
    logits = out["truth"][1]
    slope = LINKS[link].slope(logits, beta, smoothing).abs()
    sizes = term_sizes(args["truth"])
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    scales = [x.abs() for x in out["truth"]]
    scales[1] = scales[1] + sizes
    scales[0] = scales[0] + (slope * sizes).mean() + sizes.max() * 1e-6
    for i, (truth, eager, fast) in enumerate(zip(*(out[n] for n in ("truth", "reference", backend)), strict=True)):  # fmt: skip
        excess = (fast - truth).abs() - (eager - truth).abs()
        assert (excess <= tolerance * scales[i]).all(), (i, excess.max())

    # the gradient, from the same logits
    gradients = {}
    for name, (policy, _, target, timesteps, weights, _, *constants) in args.items():
        z = logits if name == "truth" else logits.to(reference.accumulation_dtype(policy))
        grad_loss = torch.tensor(3.0, dtype=z.dtype, device=DEVICE)
        gradients[name] = ops.preference_loss_backward(
            grad_loss, None, None, policy, target, timesteps, z, weights, *constants
        ).double()
    truth = gradients["truth"]
    eager, fast = ((gradients[name] - truth).abs() for name in ("reference", backend))
    # a 16-bit result is rounded once; the interpreter truncates bf16, and fp16 has subnormals
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 4 * tolerance
    floor = 6e-8 if dtype == torch.float16 else 0.0
    # the slope of a saturated logit is its float32 rounding
    floor = floor + 1e-6 * truth.abs().max() * (dtype != torch.float64)
    assert (fast <= eager + rounding * truth.abs() + floor).all()
    assert (gradients[backend] - truth).norm() <= rounding * truth.norm() + floor * truth.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_is_written(backend):
    """Outputs start as NaN under deterministic fill: an unwritten element would show."""
    torch.use_deterministic_algorithms(True)
    try:
        args = arguments(pairs=5, shape=(4, 9, 7), backend=backend)
        policy = args[0].requires_grad_()
        out = ops.preference_loss(policy, *args[1:])
        out[0].backward()
        loss_fn = PreferenceLoss("dde", alphas_cumprod=scaled_linear(), backend=backend).to(DEVICE)
        loss_fn(args[0], args[1], args[2], args[3])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in out) and policy.grad.isfinite().all()
    assert (policy.grad != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_inputs_same_bits(backend):
    args = arguments(pairs=9, shape=(4, 33, 17), backend=backend)
    policy = args[0].requires_grad_()
    runs = []
    for _ in range(3):
        out = ops.preference_loss(policy, *args[1:])
        runs.append([*out, *torch.autograd.grad(out[0], policy)])
    for run in runs[1:]:
        assert all(a.equal(b) for a, b in zip(run, runs[0], strict=True))


def losses_of(backend):
    with_gradient = backend in ops.WITH_GRADIENT
    return [ops.preference_loss, *[ops.preference_loss_with_gradient] * with_gradient]


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """channels_last, permuted, mixed and sliced inputs give the contiguous result; the gradient keeps
    the policy's own layout."""
    base = arguments(pairs=2, shape=(4, 6, 10), backend=backend, shared=False)
    expected = ops.preference_loss(base[0].requires_grad_(), *base[1:])
    (gradient,) = torch.autograd.grad(expected[0], base[0])

    def last(x):
        return x.detach().contiguous(memory_format=torch.channels_last)

    def sliced(x):
        return torch.cat([x.detach(), x.detach()], 1)[:, :4]

    def permuted(x):
        return x.detach().transpose(1, 2).contiguous().transpose(1, 2)

    def batch_last(x):
        return x.detach().movedim(0, 3).contiguous().movedim(3, 0)

    def batch_within(x):
        return x.detach().transpose(0, 1).contiguous().transpose(0, 1)

    cases = ((last,) * 3, (last, torch.clone, last), (torch.clone, last, sliced), (sliced,) * 3,
             (last, sliced, torch.clone), (permuted,) * 3, (permuted, last, permuted),
             (torch.clone, permuted, last), (batch_last,) * 3, (batch_within,) * 3,
             (batch_last, torch.clone, last))  # fmt: skip
    for loss, (p, r, y) in itertools.product(losses_of(backend), cases):
        policy = p(base[0]).detach().requires_grad_()
        out = loss(policy, r(base[1]), y(base[2]), *base[3:])
        torch.testing.assert_close(out[0], expected[0], rtol=1e-6, atol=1e-6)
        (layout,) = torch.autograd.grad(out[0], policy)
        torch.testing.assert_close(layout, gradient, rtol=1e-5, atol=1e-9)
        assert layout.stride() == torch.empty_like(policy).stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_only_seem_dense(backend):
    """Rows behind one another whose last element lies where a dense row's does, with gaps and
    repetitions between."""
    base = arguments(pairs=2, shape=(4, 6, 10), backend=backend, shared=False)
    seeming = [x.as_strided(x.shape, (240, 0, 46, 1)) for x in base[:3]]
    for loss in losses_of(backend):
        results = []
        for inputs in (seeming, [x.contiguous() for x in seeming]):
            policy = inputs[0].detach().requires_grad_()
            out = loss(policy, *inputs[1:], *base[3:])
            results.append([*out[:5], *torch.autograd.grad(out[0], policy)])
        for a, b in zip(*results, strict=True):
            assert a.equal(b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", ["dde", "sft"])
def test_compile_fullgraph(objective, backend):
    """The whole drop-in, table update included, in one graph with eager's numbers."""
    args = arguments(pairs=3, backend=backend)
    policy, reference_prediction, target, timesteps = args[:4]
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        loss_fn = PreferenceLoss(objective, alphas_cumprod=scaled_linear(), backend=backend)
        loss_fn = loss_fn.to(DEVICE)

        def step(policy, loss_fn=loss_fn):
            out = loss_fn(policy, reference_prediction, target, timesteps)
            return out.loss, out.metrics()

        compiled = wrap(step)
        for _ in range(2):
            leaf = policy.detach().requires_grad_()
            loss, metrics = compiled(leaf)
            loss.backward()
        results.append([loss.detach(), leaf.grad, loss_fn.ratios.clone(), *metrics.values()])
    assert results[1][2].any() == (objective == "dde")
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


def test_meta_device():
    for mode in ("prediction", "errors", "none"):
        args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments(mode=mode)]
        policy = args[0].requires_grad_()
        loss, logits, error, ref_error, margin = ops.preference_loss(policy, *args[1:])
        loss.backward()
        assert policy.grad.shape == policy.shape and policy.grad.is_meta
        assert [list(x.shape) for x in (loss, logits, error, ref_error, margin)] == [
            [], [3], [6], [0] if mode == "none" else [6], [3]
        ]  # fmt: skip


def test_invalid_timesteps_make_nan_where_the_host_may_not_look():
    """What a GPU does instead of raising, checked on the functions below the check."""
    from dde_fast import triton_kernels

    modules = [reference, *([triton_kernels] if "triton" in BACKENDS else [])]
    for module in modules:
        for timesteps, bad in (([0, 1000, 5], 1), ([-1, 3, 5], 0), ([1, 2, 3, 1, 2, 4], 2)):
            args = arguments(timesteps=torch.tensor(timesteps))
            _, logits, *_ = module.preference_loss(*args[:-1])
            assert logits.isnan().nonzero().flatten().tolist() == [bad]
