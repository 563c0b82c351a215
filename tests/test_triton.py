"""Every Triton kernel compiles for GPUs that are not here, with accesses as wide as they can be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from test_noise import PUBLISHED

from dde_fast import triton_configs, triton_noise

SCRIPT = Path(__file__).with_name("compile_triton.py")


SHARED_BYTES = {"sm_80": 48 << 10, "sm_90": 48 << 10, "sm_100": 48 << 10, "gfx942": 64 << 10}
"""GPUs to compile for, and what a program gets there without asking for more."""


IN_FLOAT32 = (
    "pair_errors_kernel",
    "pair_logits_kernel",
    "preference_loss_backward_kernel",
    "add_noise_kernel",
)
"""Kernels that compute in float32 unless something is float64."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What came out for every target, from one process: importing Triton takes as long as one."""
    env = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), *SHARED_BYTES]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_kernels_compile_ahead_of_time(target, compiled):
    rows = [row for row in compiled if row["target"] == target and not row["candidate"]]
    with_variants = target in ("sm_90", "gfx942")
    # more where the table's row depends on N
    assert len(rows) >= 8 * (4 + 6 * with_variants) + 5
    for row in rows:
        # one program, whose every load waits for the last: some ptxas park a value or two, so that 32
        # registers do
        parked = 32 if row["kernel"] == "pair_logits_kernel" else 0
        assert row["binary_bytes"] > 0 and row["spilled"] <= parked, row
        assert row["shared_bytes"] <= SHARED_BYTES[target], row
        if row["kernel"] in IN_FLOAT32 and row["dtype"] != "fp64":
            # the arguments are narrowed and no arithmetic is done in float64, which GPUs do slowly
            assert all("cvt" in name for name in row["doubles"]), row
        if row["kernel"] == "pair_errors_kernel" and not row["variant"]:
            # policy, reference and target are read in 128-bit pieces and in nothing else
            assert set(row["loads"]) == {128} and len(row["loads"]) >= 3, row
        if row["kernel"] == "preference_loss_backward_kernel":
            assert row["loads"].count(128) >= 2 and set(row["stores"]) == {128}, row
        if row["kernel"] == "add_noise_kernel" and row["dtype"] != "fp64":
            # three stores of noise and both halves (or of the noise alone), as wide as they go
            assert set(row["stores"]) == {128}, row
        if row["kernel"] == "ddim_step_kernel" and not row["variant"]:
            # prediction, sample and noise, beside five coefficients (which AMD reads as scalars);
            # next, beside the partial sum
            narrow = [32] * 5 if target.startswith("sm_") else []
            assert [bits for bits in row["loads"] if bits < 128] == narrow, row
            assert row["loads"].count(128) >= 3 and row["stores"].count(128) >= 1, row
            assert len(row["stores"]) == row["stores"].count(128) + 1, row
        if row["kernel"] == "ddim_step_backward_kernel":
            assert row["loads"].count(128) >= 1 and set(row["stores"]) == {128}, row


def test_what_tuning_may_take_fits(compiled):
    rows = [row for row in compiled if row["candidate"]]
    assert {row["kernel"].removesuffix("_kernel") for row in rows} == {*triton_configs.TUNED}
    for row in rows:
        assert row["binary_bytes"] > 0 and row["spilled"] == 0, row
        assert row["shared_bytes"] <= SHARED_BYTES[row["target"]], row


@triton.jit
def words_kernel(p_input, p_words):  # int64 [6], the counter and the key; int64 [4]
    c0, c1 = tl.load(p_input).to(tl.uint32), tl.load(p_input + 1).to(tl.uint32)
    c2, c3 = tl.load(p_input + 2).to(tl.uint32), tl.load(p_input + 3).to(tl.uint32)
    k0, k1 = tl.load(p_input + 4).to(tl.uint32), tl.load(p_input + 5).to(tl.uint32)
    x0, x1, x2, x3 = triton_noise.philox4x32(c0, c1, c2, c3, k0, k1)
    tl.store(p_words, x0.to(tl.int64))
    tl.store(p_words + 1, x1.to(tl.int64))
    tl.store(p_words + 2, x2.to(tl.int64))
    tl.store(p_words + 3, x3.to(tl.int64))


@pytest.mark.parametrize(("counter", "seed", "expected"), PUBLISHED)
def test_published_vectors(counter, seed, expected):
    """All four words of the stream's generator."""
    given = torch.tensor([*counter, seed & 0xFFFFFFFF, seed >> 32], device=DEVICE)
    words = torch.empty(4, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](given, words)
    assert " ".join(f"{w:08x}" for w in words.tolist()) == expected
