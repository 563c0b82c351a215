"""Every op as a GPU has to run it: on the current stream and device, in a graph, at any address,
without stopping the host. The table of calls runs on the CPU too, so that it is known to work."""

import pytest
import torch
from conftest import BACKENDS, DEVICE

from dde_fast import backends, ops

FAST = [name for name in BACKENDS if name != "reference"]
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
PAIRS, SHAPE, STEPS = 3, (4, 16, 24), 10


class Inputs(dict):
    """Tensors by name; `shift` puts each so many elements behind an aligned address."""

    def __init__(self, seed=1, dtype=torch.float32, device=DEVICE, shift=0):
        self.shift = shift
        generator = torch.Generator().manual_seed(seed)
        rows = dict(policy=6, reference=6, target=3, noise=6, next=6)
        made = {k: torch.randn(n, *SHAPE, generator=generator).to(dtype) for k, n in rows.items()}
        made |= {k: torch.rand(6, generator=generator) + 0.1 for k in ("errors", "other_errors")}
        made |= {k: torch.rand(STEPS, generator=generator) * 0.9 + 0.05 for k in ("weights", "margins", "abar")}  # fmt: skip
        made["timesteps"] = torch.randperm(STEPS - 1, generator=generator)[:PAIRS] + 1
        made["ids"], made["draws"] = torch.randint(1, 2**40, (2, PAIRS), generator=generator)
        made["coefficients"] = torch.rand(3, 5, generator=generator) + 0.5
        made["logits"] = torch.randn(PAIRS, generator=generator)
        made["factor"] = torch.rand((), generator=generator) + 1.5
        made["sums"] = torch.rand(5, STEPS, generator=generator).double() + 1
        made["ratios"] = torch.rand(4, STEPS, generator=generator)
        super().__init__({name: self.place(x.to(device)) for name, x in made.items()})

    def place(self, x):
        memory = torch.empty(x.numel() + self.shift, dtype=x.dtype, device=x.device)
        return memory[self.shift :].view(x.shape).copy_(x)

    def own(self, name):
        """A copy, for what is changed in place."""
        return self.place(self[name])

    def __call__(self, names):
        return [self[name] for name in names.split()]


LOSS = "policy reference target timesteps weights margins"
CONSTANTS = (2.0, 0.7, "sigmoid", 0.1)


def changed(f, x, names, *rest):
    """What `f` leaves in copies of its first arguments."""
    own = [x.own(name) for name in names.split()]
    f(*own, *rest)
    return own


def gradient(backend, x, scale):
    """Through autograd, of a scaled loss."""
    policy = x["policy"].detach().requires_grad_()
    made = backend in ops.WITH_GRADIENT
    op = ops.preference_loss_with_gradient if made else ops.preference_loss
    loss = op(policy, *x(LOSS)[1:], *CONSTANTS, backend)[0]
    return [loss.detach(), *torch.autograd.grad(loss * scale if scale != 1 else loss, policy)]


BACKWARD = "policy target timesteps logits weights"
CALLS = {  # (op, what calls it): f is the backend's function of that name
    "loss": ("preference_loss", lambda f, x: f(*x(LOSS), *CONSTANTS)),
    "loss of errors": ("preference_loss", lambda f, x: f(x["policy"], x["errors"], *x(LOSS)[2:], *CONSTANTS)),
    "loss with gradient": ("preference_loss_with_gradient", lambda f, x: f(*x(LOSS), *CONSTANTS)),
    "loss backward": ("preference_loss_backward", lambda f, x: [f(*x("factor logits errors"), *x(BACKWARD), *CONSTANTS)]),
    "scale": ("scale_gradient", lambda f, x: changed(f, x, "policy", x["factor"])),
    "pair_noise": ("pair_noise", lambda f, x: [f(*x("ids draws"), SHAPE, 7)]),
    "pair_uniform": ("pair_uniform", lambda f, x: [f(*x("ids draws"), 3, 7)]),
    "add_noise": ("add_noise", lambda f, x: f(*x("policy timesteps abar ids draws"), 7, x["policy"].dtype, False)),
    "step": ("ddim_step", lambda f, x: f(*step(x), x["noise"], None, "epsilon")),
    "density": ("ddim_step", lambda f, x: f(*step(x), None, x["next"], "epsilon")[1:]),
    "step backward": ("ddim_step_backward", lambda f, x: [f(x["noise"], x["errors"], x["policy"][:3], x["target"], *x("next coefficients"), "epsilon")]),
    "observe": ("observe_ratios", lambda f, x: changed(f, x, "sums", *x("errors other_errors timesteps weights"))),
    "update": ("update_ratios", lambda f, x: changed(f, x, "ratios margins sums", 0.9)),
}  # fmt: skip


def step(x):
    return x["policy"][:3], x["target"], x["coefficients"]


def rows():
    for backend in FAST:
        for name, (op, call) in CALLS.items():
            try:
                f = backends.implementation(backend, op)
            except StopIteration:
                continue
            yield pytest.param(lambda x, f=f, call=call: [*call(f, x)], id=f"{backend}-{name}")
        for scale in (1, 0.3):
            yield pytest.param(lambda x, b=backend, s=scale: gradient(b, x, s), id=f"{backend}-gradient-{scale}")  # fmt: skip


each_call = pytest.mark.parametrize("call", list(rows()))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def same_bits(a, b):
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


@each_dtype
@each_call
def test_any_address_and_every_input_counts(call, dtype):
    """An odd address gives the aligned result; other inputs, and zeros, do not."""
    expected = call(Inputs(dtype=dtype))
    assert all(x.isfinite().all() for x in expected)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(call(Inputs(dtype=dtype, shift=1)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
    nothing = Inputs(dtype=dtype)
    for x in nothing.values():
        x.zero_()
    for other in (Inputs(2, dtype), nothing):
        assert not same_bits(call(other), expected)


@on_gpu
@each_call
def test_runs_on_the_current_stream(call):
    """Its inputs come late on that stream: on any other, zeros would be read."""
    given, late = Inputs(), Inputs()
    expected = call(given)
    for x in late.values():
        x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # cycles: 50 ms or more
        for name, x in late.items():
            x.copy_(given[name])
        out = call(late)
    torch.cuda.synchronize()
    assert same_bits(out, expected)


@on_gpu
@each_dtype
@each_call
def test_graph(call, dtype):
    static = Inputs(dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch's manual has it: what is built at first use is built
        call(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(static)
    for seed in (2, 3):
        given = Inputs(seed, dtype)
        for name, x in static.items():
            x.copy_(given[name])
        graph.replay()
        assert same_bits(out, call(given))


@on_gpu
@each_call
def test_the_host_never_waits(call):
    given = Inputs()
    call(given)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(given)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
@each_call
def test_another_device_than_the_current_one(call):
    expected, out = call(Inputs()), call(Inputs(device="cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(out, expected, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.to(b.device), b)
