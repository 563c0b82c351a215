"""The compiled extension: every instruction set this machine has, threads, layouts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import on_all_sets_and_threads
from steps import coefficients
from steps import inputs as step_inputs

from dde_fast import compiled, ratios, reference

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
REASON = compiled.why_not(CPU)
needs_extension = pytest.mark.skipif(REASON is not None, reason=str(REASON))
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**62 + 3, -1])
DRAWS = torch.tensor([0, 7, 2**31, 2**32 - 1, 1, 0])


def arguments(
    dtypes=FLOATS[:1] * 3,
    pairs=3,
    shape=(4, 9, 7),
    rows=(2, 2, 2),
    mode="prediction",
    link="sigmoid",
    make=lambda x: x,
):
    """Of `preference_loss`; `rows` of policy, reference and target are 2 or 1 per pair."""
    generator = torch.Generator().manual_seed(pairs)
    o, r, y = (torch.randn(n * pairs, *shape, generator=generator).to(dtype) for n, dtype in zip(rows, dtypes, strict=True))  # fmt: skip
    errors = torch.rand(2 * pairs, generator=generator)
    r = {"prediction": make(r), "errors": errors, "none": None}[mode]
    t = torch.linspace(0, 9, pairs).long()
    weights, margins = torch.linspace(0.1, 2, 10), torch.linspace(-0.1, 0.1, 10)
    return make(o), r, make(y), t, weights, margins, 5.0, 0.7, link, 0.1


def run(module, args):
    """Outputs and gradient; every way in which a gradient can arrive is used."""
    out = module.preference_loss(*args)
    policy, _, target, t, weights, _, *constants = args
    logits = out[1]
    incoming = (torch.tensor(2.0), torch.linspace(-1, 1, len(logits)), torch.ones(2 * len(logits)))
    incoming = [x.to(logits.dtype) for x in incoming]
    gradient = module.preference_loss_backward(
        *incoming, policy, target, t, logits, weights, *constants
    )
    return [*out, gradient]


def to_double(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]  # fmt: skip


def check(args):
    """|extension - fp64| ≤ |eager - fp64| + rounding of the largest thing summed."""
    truth, eager, fast = run(reference, to_double(args)), run(reference, args), run(compiled, args)
    tolerance = 1e-6 if fast[0].dtype == torch.float32 else 1e-13
    for i, (exact, a, b) in enumerate(zip(truth, eager, fast, strict=True)):
        if exact is None:
            assert a is None and b is None
            continue
        assert b.dtype == a.dtype and b.shape == a.shape and b.stride() == a.stride()
        largest = exact.abs().max().clamp(min=1 if i < 5 else 0)
        # a 16-bit gradient is rounded once
        rounding = torch.finfo(b.dtype).eps if b.dtype.itemsize == 2 else tolerance
        excess = (b.double() - exact).abs() - (a.double() - exact).abs()
        assert (excess <= tolerance * largest + rounding * exact.abs()).all(), (i, excess.max())


@needs_extension
@pytest.mark.parametrize("policy", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_dtypes(isa, policy, target):
    for ref in FLOATS:
        check(arguments((policy, ref, target)))


@needs_extension
@pytest.mark.parametrize("mode", ["prediction", "errors", "none"])
@pytest.mark.parametrize("rows", [(2, 2, 2), (2, 2, 1), (1, 1, 2)])
def test_shared_rows_references_and_links(isa, rows, mode):
    for link in reference.LINKS:
        check(arguments(rows=rows, mode=mode, link=link))
        check(arguments((torch.bfloat16,) * 3, rows=rows, mode=mode, link=link))


@needs_extension
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 511, 513, 4095, 4096, 4097, 12345])
def test_any_size_and_alignment(isa, n):
    """Odd rows put every other row off any alignment; so does a storage offset."""

    def shifted(x):
        storage = torch.empty(x.numel() + 3, dtype=x.dtype)
        return storage[3:].reshape(x.shape).copy_(x)

    for dtype in FLOATS:
        check(arguments((dtype,) * 3, pairs=2, shape=(n,), make=shifted))


@needs_extension
def test_layouts(isa):
    def last(x):
        return x.contiguous(memory_format=torch.channels_last)

    def sliced(x):
        return torch.cat([x, x], 1)[:, : x.shape[1]]

    for make in (last, sliced):
        check(arguments(make=make))
        check(arguments(rows=(1, 1, 2), make=make))
    o, r, y, *rest = arguments()
    check([last(o), r, y, *rest])
    check([o, last(r), sliced(y), *rest])


@needs_extension
def test_threads_and_instruction_sets_give_the_same_bits():
    """The loss differs where there is no fused multiply-add: on x86's baseline."""

    def make():
        loss, noised = [], []
        for dtype in FLOATS:
            args = arguments((dtype,) * 3, pairs=5, shape=(4, 65, 63))
            loss += [*run(compiled, args), *compiled.preference_loss_with_gradient(*args)]
            abar, t = torch.linspace(0.9, 0.1, 10), args[3]
            inputs = (args[0], t, abar, IDS[:5], DRAWS[:5], 3, dtype)
            noised += compiled.add_noise(*inputs)
            noised += compiled.add_noise(*inputs, channels_last=True)
        return compiled.isa(), loss, noised

    seen = on_all_sets_and_threads(make)
    for name, loss, noised in seen:
        assert all(a.equal(b) for a, b in zip(noised, seen[0][2], strict=True))
        same = seen[0] if name == "baseline" else seen[-1]
        assert all(a.equal(b) for a, b in zip(loss, same[1], strict=True))


@needs_extension
@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_large_gradients_go_around_the_caches(isa, dtype):
    """From 32 MiB on in aligned lines; the same bits as where the address forbids it."""
    n = (1 << 23) // dtype.itemsize
    o, r, y = torch.randn(3, 4, n, dtype=torch.bfloat16).to(dtype)
    rest = (torch.tensor([3, 7]), torch.rand(10), torch.rand(10), 5.0, 0.7, 0, 0.1)
    aligned, moved = torch.empty(4, n, dtype=dtype), torch.empty(4 * n + 1, dtype=dtype)[1:]
    assert aligned.data_ptr() % 64 == 0 and moved.data_ptr() % 64 != 0
    for gradient in (aligned, moved.view(4, n)):
        gradient.fill_(float("nan"))
        torch.ops.dde_fast_cpp.preference_loss_with_gradient(gradient, o, r, y, *rest)
    assert aligned.isfinite().all() and aligned.flatten().equal(moved)


@needs_extension
def test_equal_models_give_log_2_and_an_invalid_number_shows(isa):
    args = list(arguments(pairs=7))
    args[1], args[5], args[9] = args[0].clone(), torch.zeros(10), 0.0
    loss, logits, *_ = compiled.preference_loss(*args)
    assert loss.item() == torch.tensor(2.0).log().item() and not logits.any()
    for value in (float("nan"), float("inf")):
        bad = args[0].clone()
        bad[3, 0, 0, 0] = value
        out = run(compiled, [bad, *args[1:]])
        assert not out[0].isfinite() and out[1].isfinite().logical_not().nonzero().tolist() == [[3]]
        assert not out[5][3].isfinite().all()
    for t, wrong in (([0, 10, 5], 1), ([-1, 3, 5], 0), ([1, 2, 3, 1, 2, 4], 2)):
        _, logits, *_ = compiled.preference_loss(
            *arguments()[:3], torch.tensor(t), *arguments()[4:]
        )
        assert logits.isnan().nonzero().flatten().tolist() == [wrong]


@needs_extension
def test_sixteen_bits_are_rounded_to_nearest_even(isa):
    """Each value of both formats, and everything halfway between two, as torch rounds it."""
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        values = values[values.isfinite()]
        wide = values.float()
        ties = (wide[1:] + wide[:-1]) / 2
        x = torch.cat([wide, ties, ties * (1 + 1e-6), wide * 1.7, torch.tensor([1e38, 7e4, 65519.0, 65520.0])])  # fmt: skip
        latents, one = torch.stack([x, x]), torch.ones(1)
        # signal √1 and sigma 0: the latents pass through
        noisy, _ = compiled.add_noise(
            latents, torch.zeros(1).long(), one, IDS[:1], DRAWS[:1], 0, dtype
        )
        assert noisy[0].equal(x.to(dtype))
        back, _ = compiled.add_noise(
            noisy, torch.zeros(1).long(), one, IDS[:1], DRAWS[:1], 0, torch.float32
        )
        assert back.equal(noisy.float())


@needs_extension
def test_gradients_are_rounded_to_nearest_even(isa):
    """Of every finite bf16 number o the one halfway to the next, and just beside; what is subnormal
    may become zero on sets with a conversion of their own."""
    o = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    o = o.where(o.isfinite() & (o.abs() < 1e38), 1.0)
    half = torch.ldexp(torch.ones(o.shape), torch.frexp(o.float())[1] - 9)  # of o's last place
    o, y = torch.stack([o, o]), torch.stack([half, 1.0078125 * half]).bfloat16()
    n, none = o.size(1), torch.zeros(1)
    gradient = compiled.preference_loss_backward(
        None, None, torch.full((2,), n / 2), o, y, none.long(), none, none, 1.0, 1.0, "sigmoid", 0.0
    )
    exact = o.float() - y.float()
    rounded = exact.bfloat16()
    small = rounded.abs() < torch.finfo(torch.bfloat16).tiny
    assert gradient[~small].equal(rounded[~small]) and small.sum() < 1000
    assert (gradient[small].float() - rounded[small].float()).abs().max() < 1.2e-38
    between = exact[0] != rounded[0].float()
    assert between.sum() > 6e4  # there were halves to round


def words(blocks, ids, draws, first_block, seed):
    out = torch.empty(len(ids), blocks, 4, dtype=torch.int64)
    torch.ops.dde_fast_cpp.pair_words(out, ids, draws, first_block, seed)
    return out


@needs_extension
def test_published_philox_vectors():
    """Random123's known answers for philox4x32 with 10 rounds."""
    counter = torch.tensor([[0] * 4, [-1] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    keys = (0, -1, 0x299F31D0A4093822)
    answers = ("6627e8d5 e169c58d bc57ac4c 9b00dbd8", "408f276d 41c83b0e a20bc7c6 6d5451fd",
               "d16cfe09 94fdcceb 5001e420 24126ea1")  # fmt: skip
    for (block, low, high, draw), key, answer in zip(counter.tolist(), keys, answers, strict=True):
        pair_id = -1 if low == -1 else high << 32 | low
        (made,) = words(1, torch.tensor([pair_id]), torch.tensor([draw]), block, key).reshape(1, 4)
        assert " ".join(f"{w:08x}" for w in made.tolist()) == answer


@needs_extension
def test_noise_is_the_reference_stream(isa):
    for seed in (0, 1, -3, 2**62 + 11):
        u = [m.pair_uniform(IDS, DRAWS, 2**16 - 1, seed) for m in (reference, compiled)]
        assert u[0].equal(u[1])
        for shape in ((1,), (3, 5), (4, 33, 7), (2, 1030)):
            n = [m.pair_noise(IDS, DRAWS, shape, seed) for m in (reference, compiled)]
            torch.testing.assert_close(n[1], n[0], rtol=0, atol=1e-6)
    n = [m.pair_noise(IDS, DRAWS, (4, 212, 212), 5) for m in (reference, compiled)]
    assert n[0].numel() > 10**6 and (n[1] - n[0]).abs().max() <= 1e-6


@needs_extension
@pytest.mark.parametrize("made", FLOATS)
@pytest.mark.parametrize("given", FLOATS)
def test_add_noise(isa, given, made):
    abar, t = torch.linspace(0.999, 0.004, 10, dtype=torch.float64), torch.tensor([0, 9, 5])
    for shape in ((4, 8, 8), (3, 31, 33), (1,)):
        latents = torch.randn(6, *shape).to(given)
        args = (latents, t, abar, IDS[:3], DRAWS[:3], 9, made)
        for a, b in zip(reference.add_noise(*args), compiled.add_noise(*args), strict=True):
            assert b.dtype == made
            tolerance = 2e-6 if made.itemsize > 2 else 2 * torch.finfo(made).eps
            torch.testing.assert_close(b, a, rtol=tolerance, atol=2e-6)


@needs_extension
@pytest.mark.parametrize("steps", [1, 37, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_table(dtype, steps):
    """With pairs to leave out, several at one timestep, both shapes of timesteps, and strides."""
    generator = torch.Generator().manual_seed(steps)
    policy, ref = torch.rand(2, 2 * 64, generator=generator, dtype=dtype)
    t = torch.randint(0, steps, (64,), generator=generator)
    t[0], t[1], t[2:5] = -1, steps, steps - 1
    policy[6], ref[64 + 7], policy[8] = float("nan"), float("inf"), -float("inf")
    scale = torch.rand(2 * steps, generator=generator)[::2]
    states = []
    for module in (ratios, compiled):
        table = torch.rand(4, steps, generator=torch.Generator().manual_seed(1))
        margins, sums = torch.zeros(steps), torch.zeros(5, steps, dtype=torch.float64)
        module.observe_ratios(sums, policy, ref, t, scale)
        module.observe_ratios(
            sums, ref.repeat_interleave(2)[::2], policy.float(), t.repeat(2), scale
        )
        seen = sums.clone()
        module.update_ratios(table, margins, sums, 0.9)
        assert not sums.any()
        states.append((seen, table, margins))
    assert states[1][0][4].sum() == 2 * (64 - 5)
    for exact, fast in zip(*states, strict=True):
        torch.testing.assert_close(fast, exact, rtol=2e-7, atol=1e-12)


@needs_extension
@pytest.mark.parametrize("dtype", FLOATS)
def test_scale_gradient(dtype):
    """As float's product, in any memory order and on any number of threads."""
    for shape in ((1,), (0, 3), (2, 4, 9, 7), (1, 8, 129, 130)):
        given = torch.randn(shape).to(dtype)
        if given.dim() == 4:
            given = given.contiguous(memory_format=torch.channels_last)
        for factor in (torch.tensor(0.3), torch.tensor(2.0**16), torch.tensor(1.0).double()):
            gradient = given.clone()
            compiled.scale_gradient(gradient, factor)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert gradient.equal((given.to(wide) * factor.to(wide)).to(dtype))
    op = torch.ops.dde_fast_cpp.scale_gradient
    with pytest.raises(RuntimeError, match="gradient: expected dense memory"):
        op(torch.ones(4, 4)[:, :2], torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="factor: expected 1 contiguous"):
        op(torch.ones(4), torch.ones(2))


@needs_extension
def test_no_tensor_beyond_the_outputs():
    """Partial sums and factors, a few numbers for 4096 elements, are plain arrays."""
    args = arguments(pairs=4, shape=(4, 64, 64))
    run(compiled, args)
    with torch.profiler.profile(profile_memory=True) as profile:
        run(compiled, args)
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    assert allocated <= args[0].numel() * 4 + 4096


@needs_extension
def test_refusals_keep_memory_safe():
    op = torch.ops.dde_fast_cpp.preference_loss
    o, r, y, t, weights, margins, *_ = arguments()
    rest = (weights, margins, 5.0, 0.7, 0, 0.1)
    with pytest.raises(RuntimeError, match="target: expected 3 or 6 rows, got 2"):
        op(o, r, y[:2], t, *rest)
    with pytest.raises(RuntimeError, match="target: expected rows of policy.s shape"):
        op(o, r, y[:, :2], t, *rest)
    with pytest.raises(RuntimeError, match="timesteps: expected 3"):
        op(o, r, y, t[:2], *rest)
    with pytest.raises(RuntimeError, match="policy: expected float32"):
        op(o.long(), r, y, t, *rest)
    with pytest.raises(RuntimeError, match="weights: expected some"):
        op(o, r, y, t, weights[:0], margins[:0], *rest[2:])
    op, (o, x, z) = torch.ops.dde_fast_cpp.ddim_step, (t.cpu() for t in step_inputs(shape=(4, 8)))
    k = coefficients().cpu()
    for args, message in (
        ((torch.empty(6), None, o, x, z[:4], k, 0), "candidates: expected 3 rows, got 4"),
        ((torch.empty(2), None, o, x, z, k, 0), "log_prob: expected 6"),
        ((torch.empty(6), z.double(), o, x, z, k, 0), "next: expected the dtype of sample"),
        ((torch.empty(6), None, o[:, :2], x, z, k, 0), "prediction: expected 3 dense rows of 32"),
        ((torch.empty(6), None, o, x, z, k[0], 0), "coefficients: expected 15"),
        ((torch.empty(6), None, o, x, z, k, 3), "prediction_type: expected 0, 1 or 2, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*args)

    sums, error = torch.zeros(5, 10, dtype=torch.float64), torch.zeros(6)
    observe = torch.ops.dde_fast_cpp.observe_ratios
    with pytest.raises(RuntimeError, match="reference_error: expected 6"):
        observe(sums, error, error[:4], t, weights)
    with pytest.raises(RuntimeError, match="sums: expected"):
        observe(sums.T, error, error, t, weights)
    with pytest.raises(RuntimeError, match="ratios: expected 40"):
        torch.ops.dde_fast_cpp.update_ratios(sums[:, :4].float(), margins, sums, 0.9)
    with pytest.raises(
        RuntimeError, match="DDE_FAST_CPU: expected baseline, avx2, avx512 or avx512bf16"
    ):
        compiled.isa("altivec")


@needs_extension
def test_the_environment_chooses_the_instruction_set():
    code = "from dde_fast import compiled; print(compiled.isa())"
    environment = {**os.environ, "DDE_FAST_CPU": "baseline"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert result.stdout.strip() == "baseline", result.stderr


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    assert "no kernels for xpu" in compiled.why_not("xpu")
    if not torch.cuda.is_available() and REASON is None:
        assert compiled.why_not("cuda") == "torch sees no CUDA device"
    with monkeypatch.context() as patch:  # an older GPU
        patch.setattr(compiled, "_load", lambda library: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda index: (8 - 2 * index, 5))
        assert compiled.why_not("cuda:0") is None
        assert "no code for sm_65" in compiled.why_not("cuda:1")
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    assert "was not built" in compiled._load.__wrapped__("_cpu")
    (tmp_path / "_cpu.abi3.so").write_text("no library")
    assert "does not load: " in compiled._load.__wrapped__("_cpu")
