"""The formula of docs/memory.md, by hand."""

from types import MethodType, SimpleNamespace

import pytest
import torch
from deepspeed import comm
from deepspeed.runtime import engine
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from dde_fast.memory import (
    MOMENTS,
    REDUCED,
    STATES,
    buffer_bytes,
    bytes_per_gpu,
    step_bytes,
    summed_at_once,
)
from dde_fast.optimizers import OPTIMIZERS

FP32_SUMS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
AT_ONCE = FP32_SUMS | {"bf16": {"enabled": True, "immediate_grad_update": True}}


@pytest.mark.parametrize(
    ("stage", "width", "expected"),
    [
        (1, 2, 2 * 3 + (2 + 4) * 8 + 12 * 8 // 4),
        (2, 2, 2 * 3 + 2 * 8 + (4 + 12) * 8 // 4),
        (3, 2, (2 * 3 + (2 + 2 + 4 + 12) * 8) / 4),
        (0, 4, 4 * 3 + (4 + 4 + 8) * 8),
        (1, 4, 4 * 3 + (4 + 4) * 8 + (4 + 8) * 8 // 4),
        (2, 4, 4 * 3 + 4 * 8 + (4 + 4 + 8) * 8 // 4),
        (3, 4, (4 * 3 + (4 + 4 + 8) * 8) / 4),
    ],
)
def test_every_stage_by_hand(stage, width, expected):
    """3 frozen and 8 trained parameters on 4 GPUs."""
    assert bytes_per_gpu(3, 8, 4, stage, width=width) == round(expected)
    assert bytes_per_gpu(3, 8, 4, stage, 5, width=width) == round(expected + width * 5)


@pytest.mark.parametrize(("width", "stage"), STATES)
def test_gradients_stay_beside_their_sums_only_at_stage_1(width, stage):
    more = 2 * 8 if (width, stage) == (2, 1) else 0
    least = bytes_per_gpu(3, 8, 4, stage, width=width)
    assert bytes_per_gpu(3, 8, 4, stage, width=width, at_once=False) == least + more


@pytest.mark.parametrize(
    ("stage", "json", "expected"),
    [
        (1, AT_ONCE, True),
        (1, FP32_SUMS, False),
        (2, AT_ONCE, False),
        (1, {"bf16": AT_ONCE["bf16"]}, False),
        (1, AT_ONCE | {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, False),
    ],
)
def test_which_gradients_are_summed_at_once(stage, json, expected):
    """Those of DeepSpeed's optimizer for bf16 with float32 sums, where it is told to."""
    assert summed_at_once(stage, json) is expected


@pytest.mark.parametrize("stage", range(4))
def test_what_the_optimizer_keeps_is_shared_out_from_stage_1_on(stage):
    share, width = 4 if stage else 1, 4 if stage == 0 else 2
    plain = bytes_per_gpu(0, 8, 4, stage, width=width)
    averaged = bytes_per_gpu(0, 8, 4, stage, width=width, ema=True)
    assert averaged - plain == 4 * 8 // share
    eight_bits = bytes_per_gpu(0, 8, 4, stage, width=width, moments=MOMENTS["adamw8bit"])
    assert plain - eight_bits == 6 * 8 // share
    away = bytes_per_gpu(0, 8, 4, stage, width=width, ema=True, offload=True)
    assert averaged - away == (8 + 4 + (4 if stage else 0)) * 8 // share


def test_every_optimizer_has_its_moments():
    assert MOMENTS.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize(
    ("stage", "zero", "json", "expected"),
    [
        (0, {"reduce_bucket_size": 5}, {}, 0),
        (1, {"reduce_bucket_size": 5}, FP32_SUMS, 0),
        (1, {"reduce_bucket_size": 5, "offload_optimizer": {"device": "cpu"}}, FP32_SUMS, 2 * 5),
        (1, {}, {"bf16": {"enabled": True}}, 2 * 500_000_000),
        (2, {"reduce_bucket_size": 10}, FP32_SUMS, 2 * 10),
        (2, {"reduce_bucket_size": 10, "overlap_comm": True}, FP32_SUMS, 2 * 20),
        (3, {"reduce_bucket_size": 10}, FP32_SUMS, 2 * (10 + 9)),
        (3, {"stage3_max_reuse_distance": 6, "stage3_prefetch_bucket_size": 1}, {}, 10**9 + 8),
    ],
)
def test_what_deepspeed_communicates_in(stage, zero, json, expected):
    """9 parameters."""
    assert buffer_bytes(9, stage, json | {"zero_optimization": zero}) == expected


@pytest.mark.parametrize(
    ("stage", "width", "expected"),
    [(1, 2, 0), (2, 2, 0), (3, 2, 4 * 8 // 4), (0, 4, 4 * 8), (1, 4, 8), (2, 4, 8), (3, 4, 8)],
)
def test_what_the_step_copies(stage, width, expected):
    """8 trained parameters on 4 GPUs."""
    assert step_bytes(8, 4, stage, {}, width=width) == expected


class New(TorchDispatchMode):
    """Counts the bytes of what is made."""

    def __init__(self, there: list[torch.Tensor]):
        super().__init__()
        self.seen = [
            value.untyped_storage() for value in there
        ]  # kept, so that no address comes again
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (list, tuple)) else [out]:
            storage = value.untyped_storage()
            if storage.data_ptr() not in [other.data_ptr() for other in self.seen]:
                self.seen.append(storage)
                self.size += storage.nbytes()
        return out


@pytest.mark.parametrize("sent", [None, "fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_reduces_in_so_many_bytes(monkeypatch, stage, sent):
    """Its own code, on 24 gradients: flat at stage 1, in three tensors at stage 0."""
    gradients = [torch.ones(24)] if stage else [torch.ones(3), torch.ones(20), torch.ones(1)]
    usual = torch.bfloat16 if stage else torch.float32
    kind = {None: usual, "fp32": torch.float32, "bf16": torch.bfloat16}[sent]
    fake = SimpleNamespace(
        flatten=_flatten_dense_tensors,
        unflatten=_unflatten_dense_tensors,
        communication_data_type=kind,
        gradient_average=True,
        postscale_gradients=lambda: True,
        gradient_predivide_factor=lambda: 1.0,
    )
    for name in ("allreduce_bucket", "allreduce_and_copy", "allreduce_no_retain"):
        setattr(fake, name, MethodType(getattr(engine.DeepSpeedEngine, name), fake))
    monkeypatch.setattr(comm, "all_reduce", lambda tensor, group: None)
    with New(gradients) as new:
        fake.allreduce_no_retain(gradients, dp_group=None, dp_world_size=2)
    assert all((value == 0.5).all() for value in gradients)
    json = (FP32_SUMS if stage else {}) | (
        {} if sent is None else {"communication_data_type": sent}
    )
    assert new.size == step_bytes(24, 2, stage, json, width=2 if stage else 4)


def test_where_it_reduces_at_all():
    """At stage 0 the trainer tells it not to on one rank; its own bucket size is a constant."""
    assert step_bytes(8, 1, 0, {}, width=4) == 0
    assert step_bytes(8, 1, 1, FP32_SUMS) == 2 * 8
    small = {"zero_optimization": {"reduce_bucket_size": 5}}
    assert step_bytes(8, 2, 0, small, width=4) == 4 * 8
    assert step_bytes(8, 2, 1, FP32_SUMS | small) == 2 * 8
    assert step_bytes(10**9, 2, 0, {}, width=4) == 4 * 5 * 10**8
    assert step_bytes(10**9, 2, 1, FP32_SUMS) == 2 * 10**9
    assert engine.MEMORY_OPT_ALLREDUCE_SIZE == REDUCED
    away = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert step_bytes(8, 2, 1, FP32_SUMS | away) == 0
