"""The op `ddim_step` in every backend: float64 written out, gradients, opcheck, compile, layouts;
the compiled extension's on every instruction set."""

import math

import pytest
import torch
from conftest import BACKENDS, DEVICE, ISAS, on_all_sets_and_threads
from steps import PREVIOUS, TIMES, TYPES, coefficients, inputs, mean_and_size

from dde_fast import compiled, ops, reference
from dde_fast.sampling import ddim_linear, ddim_step

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIXED = [
    (torch.bfloat16, torch.float32, torch.float32),  # autocast
    (torch.float16, torch.float16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float64),
]
CASES = [(1, (1,)), (2, (4, 9, 7)), (2, (3, 31, 33)), (3, (4, 33, 130)), (2, (4, 64, 64))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize(
    ("count", "shape", "dtype"),
    [(*case, torch.float32) for case in CASES]
    + [(*CASES[1], dtype) for dtype in (*FLOATS[1:], *MIXED)]
    + [(*CASES[3], torch.bfloat16)],
    ids=str,
)
def test_float64_written_out(count, shape, dtype, prediction_type, backend):
    """Samples, log-densities and gradients within the rounding of what they are sums of."""
    o, x, z = inputs(count, shape, dtype)
    k = coefficients(prediction_type)
    o.requires_grad_()
    settings = dict(prediction_type=prediction_type, backend=backend)
    made, log_prob = ddim_step(o, x, k, noise=z, **settings)
    wide = torch.float64 in (o.dtype, x.dtype, z.dtype)
    assert made.shape == z.shape and made.dtype == x.dtype
    assert log_prob.shape == (3 * count,)
    assert log_prob.dtype == (torch.float64 if wide else torch.float32)

    tolerance = 1e-14 if wide else 5e-7
    mean, size = mean_and_size(o.detach(), x, k, prediction_type)
    sigma = k[:, 4].double()[:, None]
    error = made.double().flatten(1).unflatten(0, (count, 3)) - mean
    noise = z.double().flatten(1).unflatten(0, (count, 3))
    size = size + sigma * noise.abs()
    # a 16-bit result is rounded once (truncated in the interpreter); fp16 has subnormals
    rounding = tolerance + (torch.finfo(x.dtype).eps if made.element_size() < 8 else 0)
    assert ((error - sigma * noise).abs() <= rounding * size + 6e-8 * (not wide)).all()

    # of the sample as it was rounded
    exact = -(error**2).mean(-1) / (2 * sigma[:, 0] ** 2) - sigma[:, 0].log()
    exact = (exact - 0.5 * math.log(2 * math.pi)).flatten()
    slack = tolerance * (1 + exact.abs() + (size * error.abs() / sigma**2).mean(-1).flatten())
    assert ((log_prob - exact).abs() <= slack).all()

    incoming, at_made = torch.linspace(-1, 2, 3 * count), torch.randn(z.shape).to(x.dtype)
    arriving = (incoming.to(log_prob), at_made.to(DEVICE))
    (gradient,) = torch.autograd.grad((log_prob, made), o, arriving)
    _, slope = ddim_linear(k, prediction_type)
    factor = arriving[0].double().reshape(count, 3, 1) / (sigma**2 * error.shape[-1])
    terms = torch.stack([factor * error, arriving[1].double().reshape(error.shape)])
    exact = slope[:, None] * terms.sum((0, 1))
    size = slope[:, None].abs() * (terms.abs().sum((0, 1)) + (factor.abs() * size).sum(0))
    rounding = tolerance + (torch.finfo(o.dtype).eps if o.element_size() < 8 else 0)
    assert gradient.dtype == o.dtype and gradient.shape == o.shape
    floor = 6e-8 if o.dtype == torch.float16 else 0
    assert ((gradient.double().flatten(1) - exact).abs() <= rounding * size + floor).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("count", [1, 2])
def test_gradcheck(count, prediction_type, backend):
    """Finite differences in float64: of the sample that is made, and of a given one's density."""
    o, x, z = inputs(count, (1, 3), torch.float64, batch=2)
    k = coefficients(prediction_type, times=TIMES[:2], previous=PREVIOUS[:2])
    settings = dict(prediction_type=prediction_type, backend=backend)
    given = ddim_step(o, x, k, noise=z, **settings)[0] + 0.1
    o.requires_grad_()

    def made(o):
        return ddim_step(o, x, k, noise=z, **settings)[0]

    def density(o):
        return ddim_step(o, x, k, next_sample=given, **settings)[1]

    for f in (made, density):
        assert torch.autograd.gradcheck(f, (o,), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["noise", "next_sample"])
def test_opcheck(mode, backend):
    for dtype in (torch.float32, torch.bfloat16):
        o, x, z = inputs(2, dtype=dtype)
        k = coefficients()
        given = (z, None) if mode == "noise" else (None, z)
        o.requires_grad_()
        torch.library.opcheck(torch.ops.dde_fast.ddim_step, (o, x, k, *given, "sample", backend))
        made, log_prob = ops.ddim_step(o.detach(), x, k, *given, "sample", backend)
        tensors = (o.detach(), x, made if mode == "noise" else z, k)
        for arriving in ((z, log_prob), (z, None), (None, log_prob)):
            torch.library.opcheck(
                torch.ops.dde_fast.ddim_step_backward, (*arriving, *tensors, "sample", backend)
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph_and_meta(backend):
    o, x, z = inputs(2)
    k = coefficients()

    def step(o, x, z, k):
        made, log_prob = ddim_step(o, x, k, prediction_type="epsilon", noise=z, backend=backend)
        again = ddim_step(
            o, x, k, prediction_type="epsilon", next_sample=made.detach() + 0.1, backend=backend
        )
        return made, log_prob, again[1]

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = o.clone().requires_grad_()
        out = f(leaf, x, z, k)
        (out[0].square().mean() + out[1].sum() + out[2].sum()).backward()
        results.append([*(y.detach() for y in out), leaf.grad])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)
    leaf = o.to("meta").requires_grad_()
    out = step(leaf, x.to("meta"), z.to("meta"), k.to("meta"))
    (out[0].sum() + out[2].sum()).backward()
    assert leaf.grad.is_meta and [list(y.shape) for y in out] == [[6, 4, 9, 7], [6], [6]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_is_written_and_the_same_each_time(backend):
    """Outputs start as NaN under deterministic fill: an unwritten element would show."""
    o, x, z = inputs(2, (4, 33, 17))
    o.requires_grad_()
    k, runs = coefficients(), []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            made, log_prob = ddim_step(o, x, k, prediction_type="epsilon", noise=z, backend=backend)
            (gradient,) = torch.autograd.grad(log_prob.sum() + made.sum(), o)
            runs.append((made, log_prob, gradient))
    finally:
        torch.use_deterministic_algorithms(False)
    for first, again in zip(*runs, strict=True):
        assert first.isfinite().all() and first.equal(again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """channels_last, mixed and sliced inputs give the contiguous result; the sample keeps the
    noise's layout, the gradient the prediction's."""
    o, x, z = inputs(2, (4, 6, 10))
    k, at_made = coefficients(), torch.randn(6, 4, 6, 10, device=DEVICE)

    def run(o, x, z):
        o = o.requires_grad_()
        made, log_prob = ddim_step(o, x, k, prediction_type="epsilon", noise=z, backend=backend)
        (gradient,) = torch.autograd.grad(log_prob.sum() + (made * at_made).sum(), o)
        return made.detach(), log_prob.detach(), gradient

    def last(x):
        return x.detach().contiguous(memory_format=torch.channels_last)

    def sliced(x):
        return torch.cat([x.detach(), x.detach()], 1)[:, :4]

    expected = run(o.clone(), x, z)
    for makes in ((last,) * 3, (last, torch.clone, last), (torch.clone, last, sliced), (sliced,) * 3):  # fmt: skip
        args = [make(t.detach()) for make, t in zip(makes, (o, x, z), strict=True)]
        out = run(*args)
        assert out[0].equal(expected[0])
        assert out[0].stride() == torch.empty_like(args[2]).stride()
        torch.testing.assert_close(out[1], expected[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out[2], expected[2], rtol=1e-5, atol=1e-7)
        assert out[2].stride() == torch.empty_like(args[0]).stride()


def outputs(module, o, x, k, z, prediction_type="epsilon"):
    """All that a backend's functions return on the CPU, in the ways in which they can be called."""
    o, x, k, z = (tensor.cpu() for tensor in (o, x, k, z))
    made, log_prob = module.ddim_step(o, x, k, z, None, prediction_type)
    _, again = module.ddim_step(o, x, k, None, made, prediction_type)
    arriving = z.to(x.dtype), torch.linspace(-1, 1, len(z)).to(log_prob.dtype)
    gradients = [
        module.ddim_step_backward(*some, o, x, made, k, prediction_type)
        for some in (arriving, (None, arriving[1]), (arriving[0], None))
    ]
    return [made, log_prob, again, *gradients]


@pytest.mark.parametrize("n", [1, 15, 16, 17, 511, 513, 4097, 12345])
def test_any_size_and_alignment(isa, n):
    """Samples to the bit, the rest to its rounding."""

    def shifted(x):
        storage = torch.empty(x.numel() + 3, dtype=x.dtype)
        return storage[3:].reshape(x.shape).copy_(x)

    for dtype in FLOATS:
        for prediction_type in TYPES:
            o, x, z = (shifted(tensor) for tensor in inputs(2, (n,), dtype))
            args = (o, x, coefficients(prediction_type), z, prediction_type)
            eager, fast = (outputs(module, *args) for module in (reference, compiled))
            assert fast[0].equal(eager[0]) and fast[1].equal(fast[2])
            for a, b in zip(eager[1:], fast[1:], strict=True):
                assert b.dtype == a.dtype and b.shape == a.shape
                rounding = 2 * torch.finfo(b.dtype).eps if b.dtype.itemsize == 2 else 0
                tolerance = 1e-12 if dtype == torch.float64 else 1e-5
                largest = max(1, a.double().abs().max().item())
                torch.testing.assert_close(b, a, rtol=rounding, atol=tolerance * largest)


@pytest.mark.skipif(not ISAS, reason="the compiled extension is not there")
def test_all_instruction_sets_and_threads_give_the_same_bits():
    def make():
        k, found = coefficients(), []
        for dtype in FLOATS:
            o, x, z = inputs(3, (4, 65, 63), dtype)
            found += outputs(compiled, o, x, k, z)
        return found

    first, *others = on_all_sets_and_threads(make)
    for found in others:
        assert all(a.equal(b) for a, b in zip(found, first, strict=True))
