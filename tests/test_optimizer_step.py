"""The optimizer step: without ZeRO against PyTorch's own clipping, with it against DeepSpeed's norm."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_faults import PLAIN_ADAM
from train_runs import BF16, HALF, Folder, stage

from dde_fast import optimizer_step

TWO = {"gradient_accumulation_steps": 2}
SHARED_OUT = {
    "fp32-1": stage(1, **HALF, **TWO),
    "fp32-2": stage(2, **HALF),
    "bf16-1": stage(1, **HALF, **BF16, data_types={"grad_accum_dtype": "bf16"}),
    "bf16-2": stage(2, **HALF, **TWO, **BF16, data_types={"grad_accum_dtype": "bf16"}),
    "bf16-2-sums": stage(2, **HALF, **TWO, **BF16, data_types={"grad_accum_dtype": "fp32"}),
}
"""Runs whose averaged gradient each rank has a share of; of the last one in one buffer."""


OTHERS = {"Adagrad": {}, "SGD": {"momentum": 0.9}}
"""Fused ones that are not told: DeepSpeed makes the first anew, the second is not able to."""


def micro_batches(name: str) -> int:
    return SHARED_OUT[name].get("gradient_accumulation_steps", 1)


def engine_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer, clipping: float):
    """What `step_optimizer` asks of DeepSpeed's engine at stage 0."""
    optimizer_step._does_as_told(optimizer)
    return SimpleNamespace(
        module=module,
        basic_optimizer=optimizer,
        step=lambda: optimizer.step(),
        gradient_clipping=lambda: clipping,
        zero_optimization_stage=lambda: 0,
    )


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=1.0, momentum=0.9),
    "fused SGD": partial(torch.optim.SGD, lr=1.0, momentum=0.9, fused=True),
    # whose steps grow with the gradient
    "Adam": partial(torch.optim.Adam, lr=1.0, eps=1.0),
    "fused AdamW": partial(torch.optim.AdamW, lr=1.0, eps=1.0, fused=True),
}


@pytest.mark.parametrize("clipping", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_clips_by_the_norm_of_the_whole_gradient(name, clipping):
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 3)
    for value in module.parameters():
        value.grad = torch.randn_like(value)
    expected = copy.deepcopy(module)
    for value, other in zip(module.parameters(), expected.parameters(), strict=True):
        other.grad = value.grad.clone()
    total = torch.nn.utils.clip_grad_norm_(expected.parameters(), clipping or 1e9)
    OPTIMIZERS[name](expected.parameters()).step()

    optimizer = OPTIMIZERS[name](module.parameters())
    norm = optimizer_step.step_optimizer(engine_of(module, optimizer, clipping))
    torch.testing.assert_close(norm, total)
    for value, other in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_is_no_step(name, first):
    """Nor does the next one know of it: it may have been the very first."""
    module = torch.nn.Linear(5, 3)
    twin = copy.deepcopy(module)
    steps = [engine_of(m, OPTIMIZERS[name](m.parameters()), 0.5) for m in (module, twin)]

    def step(engine, spoiled: bool) -> bool:
        for value in engine.module.parameters():
            value.grad = torch.ones_like(value)
        if spoiled:
            engine.module.bias.grad[1] = torch.inf
        return bool(optimizer_step.step_optimizer(engine).isfinite())

    if not first:
        assert all(step(engine, False) for engine in steps)
    before = copy.deepcopy(module.state_dict())
    assert not step(steps[0], True)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    for _ in range(2):
        assert all(step(engine, False) for engine in steps)
    after, expected = module.state_dict(), twin.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in after.items())
    assert not any(torch.equal(value, before[key]) for key, value in after.items())


def test_states_are_linked_once_there_are_any():
    """ZeRO-1's first steps may be skipped, by an optimizer that makes its states when it takes one."""
    weight, linked = torch.nn.Parameter(torch.zeros(3)), []
    inner = torch.optim.AdamW([weight], fused=False)
    outer = SimpleNamespace(
        fp32_groups_flat_partition=[weight],
        fp32_groups_gradient_flat_partition=[torch.ones(3)],
        optimizer=inner,
        state=inner.state,
        update_lp_params=lambda: None,
        _lazy_init_hp_params_optimizer_state=lambda: linked.append(set(inner.state[weight])),
    )
    optimizer_step._does_as_told(inner)
    optimizer_step._leaves_it_to_the_inner_one(outer)
    for skipped in (1.0, 1.0, 0.0):
        assert not linked and not weight.any()
        inner.found_inf = torch.tensor(skipped)
        outer.step()
    assert linked == [{"step", "exp_avg", "exp_avg_sq"}] and weight.all()


@pytest.fixture(scope="module", params=[1, 2])
def runs(request, tmp_path_factory) -> Folder:
    """Each compared with DeepSpeed's norm, and watched; one that cannot be told on the device."""
    folder, jobs = Folder(tmp_path_factory.mktemp("steps")), []
    for name, ds in SHARED_OUT.items():
        flags = {"ds": ds | {"gradient_clipping": 1e-3}, "steps": 5}
        third = 2 * micro_batches(name)
        compared = folder.args(name, **flags)
        watched = folder.args(f"{name}-watched", **flags, log_every=5)
        syncs = str(folder.path / f"{name}.syncs")
        jobs.append({"args": compared, "norms": [], "poison": [0, third, third]})
        jobs.append({"args": watched, "count_syncs": syncs, "poison": [0, third, third]})
    for name, more in (("theirs", PLAIN_ADAM), ("ours", {})):
        ds = SHARED_OUT["fp32-2"] | more | {"gradient_clipping": 1e-3}
        jobs.append({"args": folder.args(name, ds=ds, steps=5), "poison": [0, 2, 2]})
    for name, params in OTHERS.items():
        optimizer = {"type": name, "params": params | {"lr": 1e-3, "fused": True}}
        ds = SHARED_OUT["fp32-2"] | {"optimizer": optimizer, "zero_allow_untested_optimizer": True}
        args = folder.args(name, ds=ds, steps=3)
        jobs.append({"args": args, "poison": [0, 0, 0]})
    folder.ranks = request.param
    folder.work(jobs, request.param, "steps")
    return folder


@pytest.mark.parametrize("name", SHARED_OUT)
def test_the_norm_of_shares_is_deepspeeds(runs, name):
    """Which `faults.norms` looks at in every step; clipping is of the whole gradient."""
    records = runs.metrics(name)
    assert [record["grad_norm"] is None for record in records] == [i == 2 for i in range(5)]
    assert records[-1]["skipped_steps"] == 1
    assert all(record["grad_norm"] > 1e-3 for record in records if record["grad_norm"])


@pytest.mark.parametrize("name", SHARED_OUT)
def test_the_host_reads_nothing_of_it(runs, name):
    """Of five steps the first loads everything, the third is skipped, the last logs and saves. Two
    ranks ask each other before each micro-batch whether to stop, of the CPU alone."""
    counts = json.loads((runs.path / f"{name}.syncs").read_text())
    assert counts["control"] == 1 and counts["steps"][0] > 0
    assert counts["steps"][1:-1] == [micro_batches(name) * (runs.ranks - 1)] * 3
    assert runs.metrics(f"{name}-watched")[-1]["skipped_steps"] == 1


def test_it_is_the_step_that_deepspeed_decides_on_the_host(runs):
    assert runs.distance("ours", "theirs") < 1e-4
    ours, theirs = ([r["grad_norm"] for r in runs.metrics(name)] for name in ("ours", "theirs"))
    assert ours.count(None) == theirs.count(None) == 1
    assert [x for x in ours if x] == pytest.approx([x for x in theirs if x], rel=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_where_another_optimizer_cannot_be_told_deepspeed_decides(runs, name):
    records = runs.metrics(name)
    assert [record["skipped_steps"] for record in records] == [1, 1, 1]
    assert [record["grad_norm"] is None for record in records] == [True, False, False]
    assert all(value.isfinite().all() for value in runs.unet(name).values())
