"""The formula of docs/memory.md, by hand."""

import pytest

from dde_fast.memory import MOMENTS, buffer_bytes, bytes_per_gpu, step_bytes
from dde_fast.optimizers import OPTIMIZERS

FP32_SUMS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("stage", "width", "expected"),
    [
        (1, 2, 2 * 3 + (2 + 2 + 4) * 8 + 12 * 8 // 4),
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
    ("stage", "ranks", "zero", "json", "expected"),
    [
        (0, 1, {}, {}, 0),
        (0, 2, {}, {}, 4 * 7),
        (1, 1, {}, FP32_SUMS, 0),
        (1, 2, {"reduce_bucket_size": 5}, FP32_SUMS, 4 * 5),
        (1, 1, {}, {"bf16": {"enabled": True}}, 2 * 500_000_000),
        (2, 1, {"reduce_bucket_size": 10}, FP32_SUMS, 2 * 10),
        (2, 8, {"reduce_bucket_size": 10, "overlap_comm": True}, FP32_SUMS, 2 * 20),
        (3, 8, {"reduce_bucket_size": 10}, FP32_SUMS, 2 * (10 + 9)),
        (3, 8, {"stage3_max_reuse_distance": 6, "stage3_prefetch_bucket_size": 1}, {}, 10**9 + 8),
    ],
)
def test_what_deepspeed_communicates_in(stage, ranks, zero, json, expected):
    """9 parameters, 7 of them trained."""
    assert buffer_bytes(9, 7, ranks, stage, json | {"zero_optimization": zero}) == expected


@pytest.mark.parametrize(
    ("stage", "width", "expected"),
    [(1, 2, 0), (2, 2, 0), (3, 2, 4 * 8 // 4), (0, 4, 0), (1, 4, 8), (2, 4, 8), (3, 4, 8)],
)
def test_what_the_step_copies(stage, width, expected):
    """8 trained parameters on 4 GPUs."""
    assert step_bytes(8, 4, stage, width) == expected
