"""Every Triton kernel compiles for GPUs that are not here, with accesses as wide as they can be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    rows = [row for row in compiled if row["target"] == target]
    with_variants = target in ("sm_90", "gfx942")
    assert len(rows) == 8 * (4 + 6 * with_variants) + 5
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
