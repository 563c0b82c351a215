"""What bounds a step on a GPU (docs/step-limits.md), and the script that measures its levers there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dde_fast.flops import flops_per_pair

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import memory_table  # noqa: E402  (scripts' folder)
import step_limits  # noqa: E402


def test_the_page_is_counted_from_the_published_unets():
    page = step_limits.PAGE.read_text(encoding="utf-8")
    assert page == step_limits.render(page)
    for name in step_limits.TITLES:  # as the log's MFU counts, but for attention's second look
        step, pairs = step_limits.counted(name), step_limits.PAIRS[name]
        unet, shapes = memory_table.unet_on_meta(name), memory_table.SHAPES[name]
        policy, both = (flops_per_pair(unet, **shapes, reference=ran) for ran in (False, True))
        again = step.forward["_scaled_dot_product_flash_attention"].operations / 2
        assert step_limits.total(step.forward.values()).operations == pairs * (both - policy)
        assert step_limits.total(step.training.values()).operations == pairs * policy + again


def test_ops_cost_their_operations_and_bytes():
    """By hand: [4, 6] x [6, 8] in bf16, its GELU, a view, a sum in place."""
    a, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((4, 6), (6, 8)))
    with step_limits.CostMode() as mode:
        product = a @ b
        torch.nn.functional.gelu(product).view(-1)
        product.add_(1)
    costs = mode.costs
    assert costs.keys() == {"mm", "gelu", "add_"}
    assert (costs["mm"].operations, costs["mm"].bytes) == (2 * 4 * 6 * 8, 2 * (24 + 48 + 32))
    assert (costs["gelu"].launches, costs["gelu"].bytes) == (1, 2 * 2 * 32)
    assert costs["add_"].bytes == 2 * 2 * 32  # read and written
    assert costs["gelu"].seconds == pytest.approx(128 / step_limits.BANDWIDTH)
    assert step_limits.kind_of("native_group_norm_backward") == "GroupNorm, LayerNorm"


def test_the_ways_to_run_a_unet_are_measured(tmp_path):
    output = tmp_path / "levers.json"
    ways = ["flash attention", "channels_last", "cudnn attention"]
    script = [sys.executable, str(BENCHMARKS / "unet_levers.py"), "sd15", "--small"]
    command = [*script, "--rounds", "2", "--output", str(output), "--ways", *ways]
    subprocess.run(command, check=True, timeout=300)
    rows = {row["name"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ["default", *ways]
    assert rows["default"]["difference"] == 0
    for name in ways[:2]:
        assert rows[name]["train_seconds"] > 0 and rows[name]["infer_seconds"] > 0
        assert rows[name]["difference"] < 0.05  # bf16's rounding
    if not torch.cuda.is_available():
        assert "cudnn" in rows["cudnn attention"]["failed"]


LOOKED_AT = """
import contextlib, torch, unet_levers
from types import SimpleNamespace

model = SimpleNamespace(train=lambda: None, infer=lambda: torch.ones(2), flops=1)
model.running = lambda way: contextlib.nullcontext()
for name, way in unet_levers.WAYS.items():
    if way.compile:
        print(name, "step_GiB" in unet_levers.look(model, way, 2), sep="=")
"""


def test_memory_of_cuda_graphs_is_not_said_to_be_none():
    """They hold it all the time, so that a step asks for nothing."""
    command = [sys.executable, "-c", LOOKED_AT]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=300)
    said = dict(line.split("=") for line in done.stdout.splitlines())
    assert said.pop("compiled, whole, CUDA graphs") == "False", done.stderr
    assert said and set(said.values()) == {"True"}


def test_after_a_way_the_default_is_the_default_again():
    """Else the next way would be measured beside another one."""
    code = """
import torch, unet_levers
model = unet_levers.Model("sd15", 1, True, torch.device("cpu"))
with model.running(unet_levers.WAYS["channels_last"]):
    print(model.infer().is_contiguous(), model.inputs[0].is_contiguous())
print(model.infer().is_contiguous(), model.inputs[0].is_contiguous())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False", "False", "True", "True"], done.stderr
