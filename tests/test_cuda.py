"""What only a GPU shows of the loss with its gradient: launches, streams, graphs."""

import pytest
import torch
from test_cuda_on_cpu import BF16, F16, F32, F64, arguments, check, same_bits

from dde_fast import compiled, ops

REASON = compiled.why_not("cuda")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def on_device(args):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]


def with_gradient(args):
    *tensors, beta, lose_weight, link, label_smoothing = args
    gradient = torch.full_like(tensors[0], float("nan"))
    constants = (beta, lose_weight, compiled.LINK[link], label_smoothing)
    out = torch.ops.dde_fast_cpp.preference_loss_with_gradient(gradient, *tensors, *constants)
    return [*out, gradient]


def launches(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum("dde_fast::" in event.name for event in profile.events())


def check_on_device(args, expected_launches):
    given = on_device(args)
    out = with_gradient(given)
    for _ in range(3):
        assert same_bits(out, with_gradient(given))
    check([x.cpu() for x in out], args)
    assert launches(lambda: with_gradient(given)) == expected_launches


def one_launch():
    return 1 if torch.cuda.get_device_capability()[0] >= 9 else 2


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)])
@pytest.mark.parametrize("n", [8, 4096, 16384, 16392, 65536, 2**18])
def test_one_launch(dtypes, n):
    many = 300 if n <= 4096 else 9
    for pairs, rows, mode in ((1, (2, 2), "prediction"), (5, (2, 1), "errors"), (many, (1, 2), "none")):  # fmt: skip
        args = arguments(*dtypes, n=n, pairs=pairs, rows=rows, mode=mode)
        check_on_device(args, one_launch())


def test_two_launches_where_a_pair_does_not_fit():
    for dtype, n in ((BF16, 2**19), (F64, 512), (F32, 13)):
        check_on_device(arguments(dtype, n=n), 2)
    args = arguments(F32, F16)
    check_on_device(args, 2)


def test_streams_do_not_disturb_one_another():
    given = [on_device(arguments(BF16, n=n, pairs=64)) for n in (4096, 16384, 65536)]
    alone = [with_gradient(args) for args in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    for _ in range(50):
        together = []
        for stream, args in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                together.append(with_gradient(args))
        torch.cuda.synchronize()
        assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))


def test_graph_launches_again():
    given, others = (on_device(arguments(BF16, n=4096, pairs=pairs)) for pairs in (32, 32))
    with_gradient(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = with_gradient(given)
    for i in range(4):
        given[0].copy_(others[0] * (i + 1))
        graph.replay()
        assert same_bits(out, with_gradient(given))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_tensors_of_another_device_than_the_current_one(backend):
    """Loss, gradient and noise of cuda:1 while cuda:0 is current: the numbers of cuda:0."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        args = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments(BF16)]
        policy = args[0].requires_grad_()
        out = ops.preference_loss(policy, *args[1:], backend)
        out[0].backward()
        ids = torch.arange(3, device=device)
        noise = ops.pair_noise(ids, ids, [4, 8, 8], 0, backend)
        assert torch.cuda.current_device() == 0
        results.append([x.detach().cpu() for x in (*out, policy.grad, noise)])
    assert same_bits(*results)
