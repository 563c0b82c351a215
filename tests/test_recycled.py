"""Memory of large gradients that goes round: never in two hands at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dde_fast import PreferenceLoss, backends, recycled

SHAPE = (4, 4, 128, 128)  # 1 MiB in float32


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(recycled, "_kept", [])


@pytest.mark.parametrize(
    "hold",
    [lambda g: g, lambda g: g[1:, 0], lambda g: g.numpy(), lambda g: g.untyped_storage()],
    ids=["tensor", "view", "array", "storage"],
)
def test_what_is_held_is_not_used_again_and_what_is_gone_is(hold):
    x = torch.empty(SHAPE)
    made = recycled.empty_like(x)
    first, held = made.data_ptr(), hold(made)
    del made
    made = recycled.empty_like(x)
    second = made.data_ptr()
    assert second != first
    del held, made
    again = [recycled.empty_like(x) for _ in range(2)]
    assert {made.data_ptr() for made in again} == {first, second}


def test_two_in_turn_are_all_that_is_kept():
    x, held, seen = torch.empty(SHAPE), None, set()
    for _ in range(6):  # as `gradient = ...` in a loop
        held = recycled.empty_like(x)
        seen.add(held.data_ptr())
    assert len(seen) == 2
    for rows in range(1, 5):
        recycled.empty_like(x[:rows])
    assert len(recycled._kept) == recycled.KEPT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_it_is_empty_like(dtype, order):
    x = torch.empty(SHAPE, dtype=dtype).to(memory_format=order)
    for _ in range(2):
        made = recycled.empty_like(x)
        assert (made.shape, made.stride(), made.dtype) == (x.shape, x.stride(), x.dtype)
        assert made.data_ptr() % 64 == 0 and made.untyped_storage().nbytes() == x.nbytes
        made.fill_(3.0)
        assert made.eq(3).all()
        del made
    assert len(recycled._kept) == 1


@pytest.mark.parametrize(
    "x", [torch.empty(4, 4, 8, 8), torch.empty(SHAPE)[..., ::2], torch.empty(SHAPE, device="meta")]
)
def test_small_strided_and_other_devices_tensors_are_torchs(x):
    made, usual = recycled.empty_like(x), torch.empty_like(x)
    assert (made.shape, made.stride(), made.device) == (usual.shape, usual.stride(), usual.device)
    assert not recycled._kept


def test_threads_never_share_it():
    x, start = torch.empty(SHAPE), threading.Barrier(4)

    def work(mark: int) -> bool:
        start.wait()
        own = True
        for turn in range(200):
            made = recycled.empty_like(x)
            made[0].fill_(mark + turn)
            own &= bool(made[0].eq(mark + turn).all())
        return own

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(0, 4000, 1000)))


@pytest.mark.skipif(
    backends.why_not("cpp", torch.device("cpu")) is not None, reason="the extension is not there"
)
def test_gradients_of_a_loss_that_somebody_keeps_stay_as_they_are():
    loss_fn = PreferenceLoss(
        "diffusion-dpo", alphas_cumprod=torch.linspace(0.99, 0.01, 10), backend="cpp"
    )
    torch.manual_seed(0)
    reference, target = torch.randn(2, *SHAPE)
    timesteps, kept = torch.tensor([3, 7]), []
    for step in range(4):
        policy = (reference + 0.01 * step * torch.randn(SHAPE)).requires_grad_()
        loss_fn(policy, reference, target, timesteps).loss.backward()
        kept.append((policy, policy.grad.clone()))
    assert len({policy.grad.data_ptr() for policy, _ in kept}) == 4
    assert all(torch.equal(policy.grad, then) for policy, then in kept)
    del kept, policy
    before = {id(memory) for memory in recycled._kept}
    for _ in range(3):
        policy = reference.clone().requires_grad_()
        loss_fn(policy, reference, target, timesteps).loss.backward()
    assert {id(memory) for memory in recycled._kept} == before
