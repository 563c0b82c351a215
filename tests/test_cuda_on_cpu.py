"""The loss head's CUDA kernels on the CPU, by the emulator in cuda_on_cpu/, against float64.

What this shows: indices, shares, barriers, the ticket, the arithmetic. What it cannot show: that a
GPU accepts the launch, and that its weaker memory order is respected.
"""

import ctypes
import shlex
import subprocess
from ctypes import (  # fmt: skip
    POINTER,
    Structure,
    c_bool,
    c_double,
    c_int,
    c_int32,
    c_int64,
    c_uint,
    c_ulonglong,
    c_void_p,
)
from pathlib import Path

import pytest
import torch

from dde_fast import reference
from dde_fast.compiled import LINK

HERE = Path(__file__).parent / "cuda_on_cpu"
COMPILE = "c++ -std=c++20 -O1 -Wall -Wno-unknown-pragmas -fPIC -shared -pthread"
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = [F32, F64, F16, BF16]  # numbered as in csrc/rows.h
MARGIN = 64  # elements around every tensor that nobody may write, or read to any effect
TILE = 2048


class Rows(Structure):
    _fields_ = [("data", c_void_p), ("rows", c_int64), ("dtype", c_int32)]


class Column(Structure):
    _fields_ = [("data", c_void_p), ("wide", c_bool)]


class Schedule(Structure):
    _fields_ = [("timesteps", c_void_p), ("weights", Column), ("margins", Column), ("steps", c_int64), ("halves", c_bool)]  # fmt: skip


class Objective(Structure):
    _fields_ = [("link", c_int64), ("beta", c_double), ("lose_weight", c_double), ("label_smoothing", c_double)]  # fmt: skip


OUTPUTS = ("gradient", "loss", "logits", "policy_error", "reference_error", "margin", "partial")


class Case(Structure):
    _fields_ = [
        *((name, Rows) for name in ("policy", "reference", "target")),
        ("schedule", Schedule),
        ("objective", Objective),
        ("errors", Column),
        *((name, c_void_p) for name in (*OUTPUTS, "count")),
        *((name, c_int64) for name in ("pairs", "n", "chunk")),
        ("blocks", c_uint),
        *((name, c_bool) for name in ("wide", "backwards", "aligned")),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulator") / "kernels.so"
    command = [*shlex.split(COMPILE), f"-I{HERE}", f"-I{HERE.parents[1]}/csrc", "-o", str(library), f"{HERE}/run.cpp"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.run_pairs.argtypes = [POINTER(Case), c_ulonglong]
    loaded.run_two.argtypes = [POINTER(Case), c_ulonglong]
    loaded.run_scale.argtypes = [c_void_p, c_int, c_int64, Column, c_uint]
    return loaded


def guarded(shape, dtype):
    """NaN everywhere, and the tensor within it."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 2 * MARGIN,), float("nan"), dtype=dtype)
    return memory, memory[MARGIN : MARGIN + size].view(shape)


def arguments(
    policy=F32, target=None, n=512, pairs=3, rows=(2, 2), mode="prediction", link="sigmoid"
):
    """Of `preference_loss`; `rows` of policy and target are 2 or 1 per pair."""
    generator = torch.Generator().manual_seed(n + pairs)
    kinds = ((rows[0], policy), (rows[0], policy), (rows[1], target or policy))
    o, r, y = (torch.randn(k * pairs, n, generator=generator).to(dtype) for k, dtype in kinds)
    errors = torch.rand(2 * pairs, generator=generator).to(o.dtype if o.dtype == F64 else F32)
    r = {"prediction": r, "errors": errors, "none": None}[mode]
    t = torch.linspace(0, 9, pairs).long()
    weights, margins = torch.linspace(0.1, 2, 10), torch.linspace(-0.1, 0.1, 10)
    lose_weight = 0.0 if link == "linear" else 0.7  # as sft has it
    return o, r, y, t, weights, margins, 5.0, lose_weight, link, 0.1


class Run:
    """One call of the kernels: the outputs in guarded memory, then loss, …, margin, gradient."""

    def __init__(self, args, blocks=0, backwards=False, chunk=TILE, aligned=True):
        policy, ref, target, self.timesteps, self.weights, self.margins, *constants = args
        beta, lose_weight, link, smoothing = constants
        cached = ref is not None and ref.dim() == 1
        self.inputs = []
        for x in (policy, None if cached else ref, target):
            memory, inside = guarded(x.shape, x.dtype) if x is not None else (None, None)
            self.inputs.append(inside if x is None else inside.copy_(x))
        self.errors = ref if cached else None
        pairs, n = max(len(policy), len(target)) // 2, policy[0].numel()
        wide = reference.accumulation_dtype(policy, None if cached else ref, target)
        rows = 2 * pairs if ref is not None else 0
        shapes = ((), (pairs,), (2 * pairs,), (rows,), (pairs,), (3, 2 * pairs, -(-n // chunk)))
        self.memory = [guarded(policy.shape, policy.dtype), *(guarded(s, wide) for s in shapes)]
        self.count = torch.randint(-(2**62), 2**62, (1 + pairs,))
        views = [Rows(x.data_ptr() if x is not None else None, len(x) if x is not None else 0, DTYPES.index(x.dtype) if x is not None else 0) for x in self.inputs]  # fmt: skip
        schedule = Schedule(self.timesteps.data_ptr(), Column(self.weights.data_ptr()), Column(self.margins.data_ptr()), len(self.weights), len(self.timesteps) == 2 * pairs)  # fmt: skip
        errors = Column(ref.data_ptr(), ref.dtype == F64) if cached else Column()
        pointers = [inside.data_ptr() for _, inside in self.memory]
        objective = Objective(LINK[link], beta, lose_weight, smoothing)
        self.case = Case(*views, schedule, objective, errors, *pointers, self.count.data_ptr(), pairs, n, chunk, blocks, wide == F64, backwards, aligned)  # fmt: skip

    def outputs(self):
        for memory, inside in self.memory:
            outside = torch.cat([memory[:MARGIN], memory[MARGIN + inside.numel() :]])
            assert outside.isnan().all()
        gradient, *out, _ = (inside.clone() for _, inside in self.memory)
        return [*out, gradient]


def expected(args):
    """Of the eager implementation in the same dtypes, and in float64."""
    results = []
    for wide in (False, True):
        given = [x.double() if wide and isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]  # fmt: skip
        out = list(reference.preference_loss(*given))
        policy, _, target, t, weights, _, *constants = given
        one = torch.ones_like(out[0])
        out.append(reference.preference_loss_backward(one, None, None, policy, target, t, out[1], weights, *constants))  # fmt: skip
        results.append(out)
    return results


def check(got, args):
    """|kernel - fp64| ≤ |eager - fp64| + rounding of the largest thing summed."""
    eager, truth = expected(args)
    tolerance = 1e-6 if got[0].dtype == F32 else 1e-13
    for i, (exact, a, b) in enumerate(zip(truth, eager, got, strict=True)):
        if exact is None:
            assert b.numel() == 0
            continue
        assert b.dtype == a.dtype and b.shape == a.shape
        largest = exact.abs().max().clamp(min=1 if i < 5 else 0)
        rounding = torch.finfo(b.dtype).eps if b.dtype.itemsize == 2 else tolerance
        excess = (b.double() - exact).abs() - (a.double() - exact).abs()
        assert (excess <= tolerance * largest + rounding * exact.abs()).all(), (i, excess.max())


def same_bits(a, b):
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


def run_pairs(kernels, args, nonce=2**63 + 12345, **options):
    run = Run(args, **options)
    kernels.run_pairs(run.case, nonce)
    return run.outputs()


def run_two(kernels, args, nonce=2**63 + 12345, **options):
    run = Run(args, **options)
    kernels.run_two(run.case, nonce)
    return run.outputs()


VECTOR_DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]


@pytest.mark.parametrize("dtypes", VECTOR_DTYPES)
@pytest.mark.parametrize("n", [8, 512])
def test_cluster_dtypes(kernels, dtypes, n):
    for pairs in (1, 3):
        args = arguments(*dtypes, n=n, pairs=pairs)
        check(run_pairs(kernels, args), args)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("blocks", [0, 1, 2, 4, 8, 16])
def test_cluster_sizes(kernels, dtype, blocks):
    """A last share that is short, and shares that are empty; in either order of the threads."""
    for n in (8, 2 * TILE, 8 * TILE + 8):
        args = arguments(dtype, n=n, pairs=3)
        out = run_pairs(kernels, args, blocks=blocks)
        check(out, args)
        assert same_bits(out, run_pairs(kernels, args, blocks=blocks, backwards=True))


@pytest.mark.parametrize("mode", ["prediction", "errors", "none"])
@pytest.mark.parametrize("rows", [(2, 2), (2, 1), (1, 2)])
def test_cluster_shared_rows_references_and_links(kernels, rows, mode):
    for link in LINK:
        for dtype in (F32, BF16):
            args = arguments(dtype, n=16, rows=rows, mode=mode, link=link)
            check(run_pairs(kernels, args, blocks=2), args)


def test_cluster_of_latents_of_16_channels(kernels):
    """More than a block's shared memory holds in a cluster of 8: the emulator aborts unless the op
    takes 16."""
    args = arguments(BF16, n=16 * 128 * 128, pairs=2, rows=(2, 1))
    check(run_pairs(kernels, args), args)


@pytest.mark.parametrize(
    ("kind", "dtype", "n"),
    [("run_pairs", F32, 8), *(("run_two", dtype, 2 * TILE + 8) for dtype in DTYPES)],
)
def test_means_over_more_pairs_than_threads_and_launched_again(kernels, kind, dtype, n):
    """Pairs end in any order, and so do the chunks of one."""
    args = arguments(dtype, n=n, pairs=300)
    run, results = Run(args, blocks=1), []
    for backwards in (False, True):  # as a CUDA graph does: the same nonce, the count left behind
        run.case.backwards = backwards
        for _, inside in run.memory:
            inside.fill_(float("nan"))
        getattr(kernels, kind)(run.case, 2**64 - 7)
        results.append(run.outputs())
    check(results[0], args)
    assert same_bits(*results)


@pytest.mark.parametrize("run", [run_pairs, run_two])
def test_equal_models_give_log_2_and_an_invalid_number_shows(kernels, run):
    args = list(arguments(BF16, pairs=7, n=4104))
    args[1], args[5], args[9] = args[0].clone(), torch.zeros(10), 0.0
    loss, logits, *_ = run(kernels, args)
    assert loss.item() == torch.tensor(2.0).log().item() and not logits.any()
    args[0][3, 4100] = float("nan")
    loss, logits, policy_error, *_, gradient = run(kernels, args)
    assert loss.isnan() and logits.isnan().nonzero().flatten().tolist() == [3]
    assert gradient.isfinite().all(1).logical_not().nonzero().flatten().tolist() == [3, 10]
    for t, wrong in (([0, 10, 5], 1), ([-1, 3, 5], 0), ([1, 2, 3, 1, 2, 4], 2)):
        _, logits, *_ = run(kernels, [*arguments()[:3], torch.tensor(t), *arguments()[4:]])
        assert logits.isnan().nonzero().flatten().tolist() == [wrong]


@pytest.mark.parametrize("run", [run_pairs, run_two])
def test_close_models_at_large_weights(kernels, run):
    """The difference of two sums would be off by more than the logit here."""
    args = list(arguments(n=2 * TILE))
    args[1] = args[0] + 1e-6 * args[1]
    args[4], args[6] = torch.full((10,), 200.0), 5000.0
    check(run(kernels, args), args)


@pytest.mark.parametrize("dtypes", [*VECTOR_DTYPES, (F64, F64)])
def test_two_kernels(kernels, dtypes):
    for n, pairs in ((8, 1), (2 * TILE + 8, 3)):
        args = arguments(*dtypes, n=n, pairs=pairs)
        out = run_two(kernels, args)
        check(out, args)
        assert same_bits(out, run_two(kernels, args, backwards=True))


@pytest.mark.parametrize("mode", ["prediction", "errors", "none"])
@pytest.mark.parametrize("rows", [(2, 2), (2, 1), (1, 2)])
def test_two_kernels_of_any_size_and_dtypes(kernels, rows, mode):
    for dtypes, n in (((F32, F32), 16), ((F32, BF16), 16), ((F16, F64), 13), ((BF16, BF16), 2051)):
        args = arguments(*dtypes, n=n, rows=rows, mode=mode)
        check(run_two(kernels, args), args)
    args = arguments(BF16, n=16, rows=rows, mode=mode, link="ipo")
    check(run_two(kernels, args, aligned=False), args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(9))
def test_scale_of_any_size_and_alignment(kernels, dtype, offset):
    """In place, each element once, nothing around them; a factor of 1 touches nothing."""
    for n, blocks in ((1, 1), (7, 1), (8, 2), (TILE + 13, 1), (3 * TILE + 5, 2), (TILE, 3)):
        for kind, factor in ((F32, 0.3), (F64, 0.3), (F32, 65536.0), (F64, 1.0)):
            by = torch.tensor(factor, dtype=kind)
            memory, _ = guarded((n + offset,), dtype)
            inside = memory[MARGIN + offset : -MARGIN].copy_(torch.randn(n).to(dtype))
            given = inside.clone()
            kernels.run_scale(inside.data_ptr(), DTYPES.index(dtype), n, Column(by.data_ptr(), kind == F64), blocks)  # fmt: skip
            wide = F64 if dtype == F64 else F32
            assert inside.equal(given if factor == 1 else (given.to(wide) * by.to(wide)).to(dtype))
            assert memory[: MARGIN + offset].isnan().all() and memory[-MARGIN:].isnan().all()
