"""Which backend serves a device, and where its functions run."""

import contextlib
import importlib

import pytest
import torch
from conftest import BACKENDS
from torch._subclasses.fake_tensor import FakeTensorMode

from dde_fast import backends


def test_backends_resolve(monkeypatch):
    cpu = torch.device("cpu")
    there = backends.why_not("cpp", cpu) is None
    assert backends.resolve_backend("auto", cpu) == ("cpp" if there else "reference")
    assert backends.resolve_backend("auto", torch.device("meta")) == "reference"
    for absent, expected in (
        ((), "cpp"),
        (("cpp",), "triton"),
        (("triton", "cpp"), "reference"),
    ):
        monkeypatch.setattr(
            backends, "why_not", lambda name, _, absent=absent: name in absent or None
        )
        monkeypatch.setattr(backends, "_serving", {})
        assert backends.resolve_backend("auto", torch.device("cuda")) == expected
    monkeypatch.undo()
    with pytest.raises(ValueError, match="backend: expected one of"):
        backends.resolve_backend("opencl", torch.device("cpu"))


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not there")
def test_triton_runs_on_the_device_of_its_tensors(monkeypatch):
    """Not on the current one, whichever op it is and whatever comes before the first tensor."""
    entered, seen = [], []

    @contextlib.contextmanager
    def device(wanted):
        entered.append(wanted)
        yield
        entered.pop()

    for name in torch.cuda, torch.xpu:
        monkeypatch.setattr(name, "device", device)
    names = ("preference_loss_backward", "observe_ratios", "pair_noise", "ddim_step_backward")
    modules = backends.BACKENDS["triton"]
    for module, name in zip(modules, names, strict=True):
        module = importlib.import_module(f"dde_fast.{module}")
        monkeypatch.setattr(module, name, lambda *args: seen.append(list(entered)))
        run = backends.implementation.__wrapped__("triton", name)
        for wanted in ("cuda:1", "cuda:0", "xpu:1"):
            with FakeTensorMode(allow_non_fake_inputs=True):
                tensor = torch.empty(2, device=wanted)
            run(None, tensor, 1.0)
            assert seen.pop() == [tensor.device] == [torch.device(wanted)]
        run(None, torch.empty(2), 1.0)
        assert seen.pop() == [] == entered
