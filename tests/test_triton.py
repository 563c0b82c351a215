"""Every Triton kernel compiles for GPUs that are not here, with accesses as wide as they can be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_triton.py")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_ahead_of_time(arch, tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(arch)], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 6 * (4 + 4) + 3
    for row in rows:
        assert row["cubin_bytes"] > 0 and row["local"] == 0, row
        assert row["shared_bytes"] <= 48 * 1024, row
        if row["kernel"] == "pair_errors_kernel" and not row["variant"]:
            # policy, reference and target are read in 128-bit pieces and in nothing else
            assert set(row["loads"]) == {128} and len(row["loads"]) >= 3, row
        if row["kernel"] == "preference_loss_backward_kernel":
            assert row["loads"].count(128) >= 2 and set(row["stores"]) == {128}, row
        if row["kernel"] == "add_noise_kernel" and row["dtype"] != "fp64":
            # three stores of noise and both halves (or of the noise alone), as wide as they go
            assert set(row["stores"]) == {128}, row
