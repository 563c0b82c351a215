"""The optimizer step without ZeRO, against PyTorch's own clipping."""

import copy
from types import SimpleNamespace

import pytest
import torch

from dde_fast import engine


def engine_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer, clipping: float):
    """What `step_optimizer` asks of DeepSpeed's engine at stage 0."""
    engine._does_as_told(optimizer)
    return SimpleNamespace(
        module=module,
        basic_optimizer=optimizer,
        step=lambda: optimizer.step(),
        gradient_clipping=lambda: clipping,
        zero_optimization_stage=lambda: 0,
    )


@pytest.mark.parametrize("clipping", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_clips_by_the_norm_of_the_whole_gradient(fused, clipping):
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 3)
    for value in module.parameters():
        value.grad = torch.randn_like(value)
    expected = copy.deepcopy(module)
    for value, other in zip(module.parameters(), expected.parameters(), strict=True):
        other.grad = value.grad.clone()
    total = torch.nn.utils.clip_grad_norm_(expected.parameters(), clipping or 1e9)
    torch.optim.SGD(expected.parameters(), lr=1.0).step()

    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, fused=fused)
    norm = engine.step_optimizer(engine_of(module, optimizer, clipping))
    torch.testing.assert_close(norm, total)
    for value, other in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_not_finite_is_no_step(fused):
    module = torch.nn.Linear(5, 3)
    before = copy.deepcopy(module.state_dict())
    for value in module.parameters():
        value.grad = torch.ones_like(value)
    module.bias.grad[1] = torch.inf
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, fused=fused)
    one = engine_of(module, optimizer, 0.5)
    assert not engine.step_optimizer(one).isfinite()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.bias.grad[1] = 1.0  # and the next one is
    assert engine.step_optimizer(one).isfinite()
    assert not any(torch.equal(value, before[name]) for name, value in module.state_dict().items())


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
    engine._does_as_told(inner)
    engine._leaves_it_to_the_inner_one(outer)
    for skipped in (1.0, 1.0, 0.0):
        assert not linked and not weight.any()
        inner.found_inf = torch.tensor(skipped)
        outer.step()
    assert linked == [{"step", "exp_avg", "exp_avg_sq"}] and weight.all()


def test_processes_leave_their_group_before_they_end(monkeypatch):
    """About one in five two-rank runs aborted on exit, gloo's threads still running."""
    kept, groups = [], []
    monkeypatch.setattr(engine.atexit, "register", kept.append)
    monkeypatch.setattr(engine.dist, "is_initialized", lambda: bool(groups))
    monkeypatch.setattr(engine.dist, "init_process_group", lambda kind, **_: groups.append(kind))
    monkeypatch.setattr(engine.dist, "destroy_process_group", groups.clear)
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine.Ranks()
    assert groups == ["gloo"] and len(kept) == 1
    kept[0]()
    assert groups == []
    kept[0]()  # left already
