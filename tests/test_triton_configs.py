"""The Triton kernels' table of configurations, and tuning, which only its variable starts."""

import ast
import importlib
import re

import pytest
import test_noise
import test_ops
import test_sampling_ops
import torch
from conftest import DEVICE
from steps import coefficients, inputs
from test_triton import SHARED_BYTES

from dde_fast import backends, noise, ops, sampling, triton_configs
from dde_fast.triton_configs import FIXED, TUNED, Config, candidates, serving

MODULES = [importlib.import_module(f"dde_fast.{name}") for name in backends.BACKENDS["triton"]]
SHAPE = (3, 31, 33)
"""An odd number of elements, more than any block."""


def test_the_table_has_every_kernel():
    names = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert {f"{kernel}_kernel" for kernel in FIXED} == names
    assert {*TUNED} < {*FIXED}


@pytest.mark.parametrize("target", SHARED_BYTES)
@pytest.mark.parametrize("kernel", FIXED)
def test_the_table_serves_every_architecture(kernel, target):
    for name in (target, "cpu", "xpu"):
        for n in (1, 3069, 4 * 64 * 64, 2**30):
            block, num_warps = serving(kernel, name, n)
            assert block & (block - 1) == 0 and num_warps in (1, 2, 4, 8, 16)
            if kernel in TUNED:  # until a measured row says otherwise
                assert num_warps * (64 if name.startswith("gfx") else 32) == 128


def test_the_first_row_that_fits_serves(monkeypatch):
    rows = [("sm_90", 100, 1, 1), ("sm_90", 1000, 2, 2), ("sm_", 1000, 3, 4), ("", 1e9, 4, 8)]
    monkeypatch.setitem(FIXED, "add_noise", rows)
    for architecture, n, block in (
        ("sm_90", 100, 1),
        ("sm_90", 101, 2),
        ("sm_90", 1001, 4),
        ("sm_80", 100, 3),
        ("gfx942", 1, 4),
    ):
        assert serving("add_noise", architecture, n).block == block


@pytest.mark.parametrize(
    ("hip", "expected"), [(None, "sm_90"), ("6.4", "gfx942")], ids=["nvidia", "amd"]
)
def test_architectures(hip, expected, monkeypatch):
    class Properties:
        gcnArchName = "gfx942:sramecc+:xnack-"

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton_configs.architecture(torch.device("cuda:1")) == expected
    assert triton_configs.architecture(torch.device("cpu")) == "cpu"


# the interpreter has no warps: one candidate of each block
@pytest.mark.parametrize("i", range(6) if DEVICE.type == "cuda" else (0, 1, 4))
def test_every_candidate_is_as_exact(i, monkeypatch):
    """The tests of the kernels against eager and float64, with what tuning may take."""

    def other(kernel, device, n):
        return candidates(serving(kernel, triton_configs.architecture(device), n))[i]

    monkeypatch.setattr(triton_configs, "fixed", other)
    case = dict(pairs=2, shape=SHAPE, shared=False, halves=True)
    shared = dict(pairs=3, shape=SHAPE, shared=False, predictions="shared")
    for dtype in (torch.float32, torch.bfloat16):
        test_ops.test_no_further_from_float64_than_eager(case, "sigmoid", dtype, "triton")
        test_sampling_ops.test_float64_written_out(2, SHAPE, dtype, "epsilon", "triton")
    test_ops.test_no_further_from_float64_than_eager(shared, "ipo", torch.float32, "triton")
    test_noise.test_backends_draw_the_same(2**63 + 11, "triton")
    for shape in ((5, 7, 9), (4, 18, 16)):
        test_noise.test_channels_last_is_only_another_order(shape, "triton")


class Recorder:
    """A kernel that notes the configurations in which it is launched."""

    def __init__(self, kernel):
        self.kernel, self.launched = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launched.append(Config(options["BLOCK"], options["num_warps"]))
            return self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def recorders(monkeypatch):
    """Of the tuned kernels, in a process that nobody has tuned in."""
    found = {}
    for kernel in TUNED:
        name = f"{kernel}_kernel"
        (module,) = (module for module in MODULES if hasattr(module, name))
        found[kernel] = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, found[kernel])
    monkeypatch.setattr(triton_configs, "_fastest", {})
    monkeypatch.delenv("DDE_FAST_AUTOTUNE", raising=False)
    triton_configs.requested.cache_clear()
    yield found
    triton_configs.requested.cache_clear()


def run_all(dtype=torch.float32, shape=SHAPE):
    """Every tuned kernel once."""
    args = test_ops.arguments(1, shape, dtype, backend="triton")
    loss, *_ = ops.preference_loss(args[0].requires_grad_(), *args[1:])
    loss.backward()
    latents, t = torch.zeros(2, *shape, dtype=dtype, device=DEVICE), torch.tensor([5])
    ids, alphas = torch.tensor([3]).to(DEVICE), torch.full((10,), 0.5).to(DEVICE)
    noise.add_noise(latents, t.to(DEVICE), alphas, seed=0, pair_ids=ids, draw=0, backend="triton")
    o, x, z = inputs(1, shape, dtype)
    settings = dict(prediction_type="epsilon", noise=z, backend="triton")
    _, log_prob = sampling.ddim_step(o.requires_grad_(), x, coefficients(), **settings)
    log_prob.sum().backward()


def usual(kernel):
    return serving(kernel, triton_configs.architecture(DEVICE), 3069)


FASTEST = 4


@pytest.fixture
def given(recorders, monkeypatch):
    """Durations handed out so far, by which the candidate FASTEST is the fastest."""
    given: list[float] = []

    def bench(run, **_):
        run()
        given.append(abs(len(given) % 6 - FASTEST) + 1.0)
        return given[-1]

    monkeypatch.setattr(triton_configs, "do_bench", bench)
    return given


def test_on_request_the_fastest_is_taken(recorders, given, monkeypatch, capsys):
    monkeypatch.setenv("DDE_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(triton_configs, "may_time", lambda device: True)
    run_all()
    assert len(given) == 6 * len(TUNED)
    for kernel, recorder in recorders.items():
        tried = candidates(usual(kernel))
        assert recorder.launched == [*tried, tried[FASTEST]]
        recorder.launched.clear()
    run_all()
    assert len(given) == 6 * len(TUNED)
    for kernel, recorder in recorders.items():
        assert recorder.launched == [candidates(usual(kernel))[FASTEST]]

    # each says so in a line that is a row of the table
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(TUNED)
    for line in lines:
        kernel, row = re.fullmatch(r"dde_fast: .*FIXED: (\w+): (\(.+?\)),  # .+ ms", line).groups()
        monkeypatch.setitem(FIXED, kernel, [ast.literal_eval(row), *FIXED[kernel]])
        best = next(iter(recorders[kernel].launched))
        assert serving(kernel, triton_configs.architecture(DEVICE), 3069) == best

    # another dtype and another size are timed for themselves
    run_all(torch.bfloat16)
    run_all(shape=(1, 5, 5))
    assert len(given) == 3 * 6 * len(TUNED)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_gpu_is_timed(recorders, monkeypatch, capsys):
    monkeypatch.setenv("DDE_FAST_AUTOTUNE", "1")
    run_all()
    assert {key[0] for key in triton_configs._fastest} == {*TUNED}
    assert len(capsys.readouterr().err.splitlines()) == len(TUNED)


def test_nothing_is_timed_unless_asked(recorders, given, monkeypatch):
    monkeypatch.setattr(triton_configs, "may_time", lambda device: True)
    for value in (None, "", "0"):
        if value is not None:
            monkeypatch.setenv("DDE_FAST_AUTOTUNE", value)
        triton_configs.requested.cache_clear()
        run_all()
    assert given == []
    for kernel, recorder in recorders.items():
        assert recorder.launched == 3 * [usual(kernel)]


def test_no_kernel_is_timed_while_a_graph_is_recorded(monkeypatch):
    """Nor in the interpreter."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for capturing, compiling in ((True, False), (False, True), (False, False)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
            patch.setattr(torch.compiler, "is_compiling", lambda c=compiling: c)
            assert triton_configs.may_time(cuda) == (not capturing and not compiling)
            assert not triton_configs.may_time(cpu)


def test_the_fixed_one_runs_until_one_can_be_timed(given, monkeypatch):
    monkeypatch.setenv("DDE_FAST_AUTOTUNE", "1")
    tensor, launched = torch.empty(2, device=DEVICE), []
    for timing, expected in ((False, 0), (True, FASTEST), (False, FASTEST)):
        monkeypatch.setattr(triton_configs, "may_time", lambda device, t=timing: t)
        chosen = triton_configs.choose("ddim_step", tensor, 3069, launched.append)
        assert chosen == candidates(usual("ddim_step"))[expected]
        assert len(given) == (6 if expected else 0)
    assert launched == candidates(usual("ddim_step"))


def test_an_unknown_request_is_named(recorders, monkeypatch):
    monkeypatch.setenv("DDE_FAST_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="DDE_FAST_AUTOTUNE: expected 0 or 1, got 'yes'"):
        run_all()
