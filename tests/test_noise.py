"""The generator: published vectors, independence of batch composition, moments, refusals."""

import functools
import itertools
import math

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from dde_fast import backends, noise, ops
from dde_fast.loader import Batch
from dde_fast.noise import add_noise, pair_noise, pair_uniform, sample_timesteps
from dde_fast.noising import Noising
from dde_fast.reference import philox4x32

IDS = torch.tensor([3, 2**33 + 5, 0, 7])


PUBLISHED = [  # counter, key and words of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds
    ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "seed", "expected"), PUBLISHED)
def test_published_vectors(counter, seed, expected):
    words = philox4x32([torch.tensor([c]) for c in counter], seed)
    assert " ".join(f"{w.item():08x}" for w in words) == expected


def test_noise_is_the_specified_box_muller():
    """Element by element in Python floats, from the integer stream."""
    shape, seed, draw = (3, 5), 2**40 + 17, 9
    made = pair_noise(shape, seed=seed, pair_ids=IDS, draw=draw).reshape(4, -1)
    for row, pair_id in enumerate(IDS.tolist()):
        for element in range(15):
            counter = [element // 4, pair_id & 0xFFFFFFFF, pair_id >> 32, draw]
            words = [w.item() for w in philox4x32([torch.tensor([c]) for c in counter], seed)]
            u = [
                torch.tensor((w >> 8) * 2**-24 + 2**-25, dtype=torch.float32).item() for w in words
            ]
            a, b = (0, 1) if element % 4 < 2 else (2, 3)
            trig = math.cos if element % 2 == 0 else math.sin
            expected = math.sqrt(-2 * math.log(u[a])) * trig(2 * math.pi * u[b])
            assert made[row, element].item() == pytest.approx(expected, abs=1e-6)


def test_a_pair_sees_the_same_in_any_batch():
    draws = torch.tensor([0, 1, 2, 1])
    probabilities = torch.ones(1000)
    everything = pair_noise((4, 8, 8), seed=0, pair_ids=IDS, draw=draws)
    times = sample_timesteps(probabilities, seed=0, pair_ids=IDS, draw=draws)
    for i in range(4):
        alone = {"seed": 0, "pair_ids": IDS[i : i + 1], "draw": int(draws[i])}
        assert pair_noise((4, 8, 8), **alone).equal(everything[i : i + 1])
        assert sample_timesteps(probabilities, **alone).equal(times[i : i + 1])
    # and something else for another draw, seed, or pair
    for change in ({"draw": 5}, {"seed": 1}, {"pair_ids": IDS + 1}):
        other = pair_noise((4, 8, 8), **{"seed": 0, "pair_ids": IDS, "draw": draws, **change})
        assert (other != everything).float().mean() > 0.99


@functools.cache
def normals(backend: str, seed: int = 0, draw: int = 0, part: int = 1):
    """float64 [P / part, 16384] of P = 64 pairs, a million numbers; 16 for Triton's interpreter,
    which takes five seconds for those. Every other pair id needs its high word."""
    pairs = (16 if backend == "triton" and DEVICE.type == "cpu" else 64) // part
    ids = torch.arange(pairs, device=DEVICE) // 2 + torch.arange(pairs, device=DEVICE) % 2 * 2**32
    made = pair_noise((4, 64, 64), seed=seed, pair_ids=ids, draw=draw, backend=backend)
    return made.flatten(1).double().cpu()


def check_standard_normal(x):
    """Kolmogorov-Smirnov at p = 1e-4, moments and tails to four of their standard deviations."""
    x = x.flatten()
    n = len(x)
    cdf, below = torch.special.ndtr(x.sort().values), torch.arange(n + 1, dtype=x.dtype) / n
    distance = torch.maximum((below[1:] - cdf).max(), (cdf - below[:-1]).max())
    assert distance < math.sqrt(-math.log(1e-4 / 2) / 2 / n)
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    for limit in (3.0, 4.0):
        expected = n * math.erfc(limit / math.sqrt(2))
        assert abs((x.abs() > limit).sum() - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_normals_are_standard_normal(backend):
    check_standard_normal(normals(backend))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + 0.01,
        lambda x: x * 1.01,
        lambda x: x.clamp(-4, 4),
        lambda x: x.round(decimals=1),
        lambda x: (3 * (2 * torch.special.ndtr(x) - 1)) / math.sqrt(3),
        torch.abs,
    ],
    ids=["shifted", "scaled", "clipped", "coarse", "uniform", "one-sided"],
)
def test_the_check_of_normals_fails_for_what_is_not(wrong):
    with pytest.raises(AssertionError):
        check_standard_normal(wrong(normals("reference")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_draws_and_seeds_are_independent(backend):
    x = normals(backend)
    pairs, n = x.shape
    off_diagonal = (x @ x.T / n)[~torch.eye(pairs, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 6 / math.sqrt(n)
    some = x[: pairs // 16]
    for other in ({"draw": 1}, {"draw": 2**31}, {"seed": 1}, {"seed": 2**32}):
        y = normals(backend, **other, part=16)
        assert (some @ y.T / n).abs().max() < 6 / math.sqrt(n)
        assert abs((some * y).mean()) < 4 / math.sqrt(y.numel())
        # nor are their sizes related: the variance of (x² - 1)(y² - 1) is 4
        assert abs(((some**2 - 1) * (y**2 - 1)).mean()) < 4 * 2 / math.sqrt(y.numel())
    for distance in (1, 2, 3, 4, 64):  # within a Box-Muller pair, a Philox block, across them
        a, b = x[:, distance:], x[:, :-distance]
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())
        assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 4 * 2 / math.sqrt(a.numel())


@pytest.mark.parametrize("kind", ["uniform", "discounted", "restricted"])
def test_sums_made_once_give_the_same_timesteps(kind):
    probabilities = {
        "uniform": torch.full((1000,), 1e-3, dtype=torch.float64),
        "discounted": 0.98 ** torch.arange(999, -1, -1, dtype=torch.float64),
        "restricted": (torch.arange(1000) < 800).float(),
    }[kind]
    ids = torch.arange(40000, device=DEVICE)
    key = {"seed": 3, "pair_ids": ids, "draw": ids % 7}
    sums = noise.running_sums(probabilities)
    assert sums.dtype == torch.float64 and sums.device.type == "cpu"
    found = sample_timesteps(sums.to(DEVICE), summed=True, **key)
    assert found.cpu().equal(sample_timesteps(probabilities, **key, device="cpu"))


class Functions(TorchDispatchMode):
    """Names of the torch functions that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_training_sums_no_distribution_up_in_a_step():
    probabilities, alphas = torch.ones(10, dtype=torch.float64), torch.rand(10, device=DEVICE)
    noising = Noising(alphas, probabilities, "epsilon", seed=3, dtype=torch.float32)
    ids = torch.arange(4, device=DEVICE)
    batch = Batch(
        latents=torch.randn(8, 4, 2, 2, device=DEVICE),
        embeddings=torch.randn(1, 3, 5, device=DEVICE),
        captions=torch.zeros_like(ids),
        pair_ids=ids,
        draws=ids % 2,
    )
    with Functions() as called:
        noised = noising(batch)
    assert "searchsorted" in called.names and "cumsum" not in called.names
    expected = sample_timesteps(probabilities, seed=3, pair_ids=ids.cpu(), draw=ids.cpu() % 2)
    assert noised.timesteps.cpu().equal(expected)


def test_timesteps_follow_their_distribution():
    probabilities = torch.zeros(1000, dtype=torch.float64)
    probabilities[200], probabilities[700], probabilities[999] = 1, 2, 1
    ids = torch.arange(40000)
    t = sample_timesteps(probabilities, seed=1, pair_ids=ids, draw=0)
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [200, 700, 999]
    expected = torch.tensor([0.25, 0.5, 0.25]) * len(ids)
    assert ((counts - expected) ** 2 / expected).sum() < 14  # χ², 2 degrees of freedom, p ≈ 1e-3
    # the timestep says nothing about the decision next to it
    u = pair_uniform(noise.CAPTION_DROPOUT, seed=1, pair_ids=ids, draw=0)
    assert 0 < u.min() and u.max() <= 1
    assert abs(torch.corrcoef(torch.stack([u.double(), t.double()]))[0, 1]) < 0.02


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_add_noise_is_diffusers(dtype):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents = torch.randn(8, 4, 8, 8)
    t = torch.tensor([0, 10, 500, 999])
    keys = {"seed": 0, "pair_ids": IDS, "draw": 0}
    noisy, eps = add_noise(latents, t, scheduler.alphas_cumprod, **keys, dtype=dtype)
    expected_eps = pair_noise((4, 8, 8), **keys)
    expected = scheduler.add_noise(latents, expected_eps.repeat(2, 1, 1, 1), t.repeat(2))
    assert noisy.dtype == eps.dtype == (dtype or torch.float32)
    assert eps.equal(expected_eps.to(eps.dtype))
    tolerance = 1e-6 if dtype is None else 2e-2
    torch.testing.assert_close(noisy.float(), expected, rtol=tolerance, atol=tolerance)
    again, _ = add_noise(latents, t.repeat(2), scheduler.alphas_cumprod, **keys, dtype=dtype)
    assert again.equal(noisy)


FAST = [b for b in BACKENDS if b != "reference"]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 + 11, 2**64 - 1])
def test_backends_draw_the_same(seed, backend):
    """Integers to the bit (seen through the uniforms), normals to 1e-6, for all words of the key."""
    ids = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**62 + 3, 5], device=DEVICE)
    draws = torch.tensor([0, 7, 2**31, 2**32 - 1, 1, 0], device=DEVICE)
    keys = {"seed": seed, "pair_ids": ids, "draw": draws}
    for choice in (0, 1, 2**16 - 1):
        u = [pair_uniform(choice, **keys, backend=b) for b in ("reference", backend)]
        assert u[0].equal(u[1])
    for shape in ((1,), (3, 5), (4, 33, 7), (2, 1030)):
        n = [pair_noise(shape, **keys, backend=b) for b in ("reference", backend)]
        torch.testing.assert_close(n[1], n[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_normals_agree_over_many_samples(backend):
    fast = normals(backend)
    exact = normals("reference")[: len(fast)]
    assert exact.abs().max() > 4.5
    torch.testing.assert_close(fast, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", [torch.float32, torch.float64])
def test_backends_add_the_same_noise(table, dtype, backend):
    alphas = torch.linspace(0.9991, 0.0047, 1000, dtype=table, device=DEVICE)
    latents = torch.randn(8, 4, 9, 7, device=DEVICE).to(dtype)
    latents = latents.contiguous(memory_format=torch.channels_last)
    t = torch.tensor([0, 10, 500, 999], device=DEVICE)
    keys = {"seed": 0, "pair_ids": IDS.to(DEVICE), "draw": 1}
    exact, fast = (add_noise(latents, t, alphas, **keys, backend=b) for b in ("reference", backend))
    ulp = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for a, b in zip(exact, fast, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(b, a, rtol=ulp, atol=1e-6)


LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    # whole tiles of four and of sixteen channels, and rests; odd sizes; nothing to reorder
    [(4, 18, 16), (16, 6, 10), (3, 8, 4), (5, 7, 9), (4, 5, 1), (1, 6, 6), (8, 1, 1)],
)
def test_channels_last_is_only_another_order(shape, backend):
    alphas = torch.linspace(0.9991, 0.0047, 1000, device=DEVICE)
    t = torch.tensor([999, 10], device=DEVICE)
    keys = {"seed": 0, "pair_ids": IDS[:2].to(DEVICE), "draw": 1, "backend": backend}
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    for given, made in ((fp32, fp32), (bf16, bf16), (fp16, fp16), (bf16, fp32), (fp32, fp64)):
        latents = torch.randn(4, *shape, device=DEVICE).to(given)
        expected = add_noise(latents, t, alphas, **keys, dtype=made)
        # the third is neither: every other column of a wider tensor
        inputs = [latents.contiguous(memory_format=layout) for layout in LAYOUTS]
        inputs.append(latents.repeat_interleave(2, 3)[..., ::2])
        for x, layout in itertools.product(inputs, LAYOUTS):
            results = add_noise(x, t, alphas, **keys, dtype=made, memory_format=layout)
            for result, same in zip(results, expected, strict=True):
                assert result.dtype == made and result.equal(same)
                assert result.stride() == torch.empty(result.shape, memory_format=layout).stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops(backend):
    """opcheck, and one compiled graph with eager's numbers."""
    ids, draws = IDS.to(DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(torch.ops.dde_fast.pair_noise, (ids, draws, [3, 5], -1, backend))
    torch.library.opcheck(torch.ops.dde_fast.pair_uniform, (ids, draws, 1, 7, backend))
    latents = torch.randn(8, 3, 5, device=DEVICE)
    alphas = torch.linspace(0.9, 0.1, 10, device=DEVICE)
    t = torch.tensor([0, 3, 9, 5], device=DEVICE)
    args = (latents, t, alphas, ids, draws, 0, torch.bfloat16, False, backend)
    torch.library.opcheck(torch.ops.dde_fast.add_noise, args)
    latents = torch.randn(8, 3, 5, 2, device=DEVICE)
    args = (latents, t, alphas, ids, draws, 0, torch.bfloat16, True, backend)
    torch.library.opcheck(torch.ops.dde_fast.add_noise, args)

    def step(latents, ids):
        keys = {"seed": 5, "pair_ids": ids, "draw": 0, "backend": backend}
        times = sample_timesteps(torch.ones(10, device=DEVICE), **keys)
        layout = {"memory_format": torch.channels_last}
        return times, *add_noise(latents, times, alphas, **keys, **layout)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(latents, ids), step(latents, ids), strict=True):
        assert a.equal(b) and a.stride() == b.stride()


def test_a_timestep_out_of_range_is_refused():
    with pytest.raises(ValueError, match="timesteps: .*got 10"):
        ops.add_noise(
            torch.zeros(2, 4), torch.tensor([10]), torch.ones(10), torch.zeros(1).long(),
            torch.zeros(1).long(), 0, torch.float32, False, "reference",
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table", [torch.float32, torch.float64])
def test_a_bad_timestep_makes_nan_where_the_host_may_not_look(table, backend):
    """What a GPU does instead of raising, checked on the functions below the check: of both halves
    of that pair, and of no other."""
    add = backends.implementation(backend, "add_noise")
    alphas = torch.linspace(0.9, 0.1, 10, dtype=table, device=DEVICE)
    latents = torch.randn(6, 4, 3, 5, device=DEVICE)
    keys = (IDS[:3].to(DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE), 0, torch.float32)
    expected, noise = add(latents, torch.tensor([0, 3, 5], device=DEVICE), alphas, *keys)
    for bad, timesteps in (
        (1, [0, 10, 5]),
        (0, [-1, 3, 5]),
        (2, [0, 3, 2**62]),
        (1, [0, 3, 5, 0, 4, 5]),
    ):
        noisy, made = add(latents, torch.tensor(timesteps, device=DEVICE), alphas, *keys)
        assert noisy[[bad, bad + 3]].isnan().all() and made.equal(noise)
        good = [i for i in range(6) if i % 3 != bad]
        assert noisy[good].equal(expected[good])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed: expected"),
        ({"seed": 2**64}, "seed: expected"),
        ({"draw": -1}, "draw: expected"),
        ({"draw": torch.zeros(3).long()}, "draw: expected"),
        ({"pair_ids": torch.zeros(2)}, "pair_ids: expected an int64"),
        ({"pair_ids": torch.zeros(5).long()}, "pair_ids: expected"),
        ({"latents": torch.zeros(3, 1, 2, 2)}, "latents: expected an even batch"),
        ({"timesteps": torch.zeros(3).long()}, "timesteps: expected"),
        ({"alphas_cumprod": torch.ones(10, device="meta")}, "alphas_cumprod: expected on"),
        ({"memory_format": torch.preserve_format}, "memory_format: expected torch.contiguous"),
        (
            {"memory_format": torch.channels_last, "latents": torch.zeros(4, 3, 2)},
            r"memory_format: expected latents \[2B, C, H, W\]",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "latents": torch.zeros(4, 1, 2, 2),
        "timesteps": torch.zeros(2).long(),
        "alphas_cumprod": torch.full((10,), 0.5),
        "seed": 0,
        "pair_ids": torch.arange(2),
        "draw": 0,
    }
    add_noise(**good)
    with pytest.raises(ValueError, match=message):
        add_noise(**{**good, **change})
