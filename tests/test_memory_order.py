"""Runs in channels_last memory order: the default order's but for rounding, and really in it."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_compilation import ACCUMULATED, LORA, OFFLINE, ONLINE, without
from train_runs import BF16, HALF, OBJECTIVE_STEPS, Folder, fails, stage
from variants import distance, same_run, weights

from dde_fast import export, models
from dde_fast.config import TrainConfig
from dde_fast.memory_order import use_memory_order

RUNS = {
    "zero0": {},
    "zero1": {"ds": stage(1, **ACCUMULATED)},
    "checkpointing": {"ds": stage(2, **ACCUMULATED), "more": ["--gradient_checkpointing"]},
    "compiled": {"compile": "whole"},
    "v": {"model": "v", "ema_decay": 0.5},
    "lora": {"ds": stage(1), **LORA},
    "online": {"ds": stage(2), **ONLINE, "model": "v"},
    "bf16": {"ds": stage(1, **BF16)},
    "zero3": {"ds": stage(3), "more": ["--shard_reference"]},
}
"""Flags; the last one changes torch's linear for the rest of the process."""
ORDER = {"": [], "_last": ["--channels_last"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("memory_order"))
    v = tiny.make_v_model(folder.path / "v_model")
    (folder.path / "words.txt").write_text("happy\nsad\ncat\n")
    jobs = []
    for name, flags in RUNS.items():
        flags = {"steps": OBJECTIVE_STEPS, **flags}
        more = flags.pop("more", [])
        if "model" in flags:
            flags["model"] = v
        if "objective" in flags:
            flags["prompts"] = folder.path / "words.txt"
        for end, order in ORDER.items():
            if "compile" in flags and not order:
                continue  # the eager run is there
            given = folder.args(name + end, **flags)
            if "objective" in flags:
                given = without(OFFLINE, given)
            job = {"args": [*given, *more, *order]}
            if order:
                job["channels_last"] = []
            if "compile" in flags:
                job |= {"backend": ["aot_eager"], "steady": []}
            jobs.append(job)
    resumed = {"args": [*folder.args("resumed", steps=2), "--channels_last"]}
    again = [*folder.args("resumed", steps=OBJECTIVE_STEPS, resume="latest"), "--channels_last"]
    folder.work([resumed, {"args": again}, *jobs], 1, "orders")
    two = [*folder.args("two", steps=OBJECTIVE_STEPS, ds=stage(0, **HALF)), "--channels_last"]
    folder.work([{"args": two, "channels_last": []}], 2, "two")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_it_changes_rounding_alone(runs, name):
    usual = "zero0" if name == "compiled" else name
    found, expected = runs.losses(f"{name}_last"), runs.losses(usual)
    atol = 0.02 if name == "bf16" else 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)
    if name == "bf16":
        return
    for kind in ("lora", "lora_ema") if name == "lora" else ("unet",):
        found, expected = (weights(runs, run, kind) for run in (f"{name}_last", usual))
        start = None
        if kind == "unet":
            model = runs.path / "v_model" if "model" in RUNS[name] else runs.model
            start = load_file(model / "unet/diffusion_pytorch_model.safetensors")
        assert distance(found, expected, start) < 5e-3


def test_two_ranks_are_one(runs):
    assert (runs.losses("two") - runs.losses("zero0")).abs().max() < 1e-5


def test_a_resumed_run_is_the_same_to_the_bit(runs):
    same_run(runs, "resumed", "zero0_last", "unet")


def test_only_a_run_in_that_order_continues_one(runs, capfd):
    expected = "resume: channels_last: expected True"
    assert expected in fails(runs.args("other", "zero0_last", resume="latest"), capfd)


def test_a_weight_is_reordered_unless_zero_holds_it(runs):
    c, last = TrainConfig(channels_last=True), torch.channels_last
    for number in (0, 2, 3):
        unet = models.load_unet(runs.model)
        frozen = unet.conv_in.weight.requires_grad_(False)
        use_memory_order(unet, TrainConfig(), number)
        assert frozen.is_contiguous() and not unet.conv_in._forward_pre_hooks
        use_memory_order(unet, c, number)
        for weight, expected in ((unet.conv_out.weight, number == 0), (frozen, number < 3)):
            assert weight.is_contiguous(memory_format=last) == expected
            assert weight.is_contiguous() != expected
        sample, text = torch.randn(2, 4, 4, 4), torch.randn(2, tiny.LENGTH, tiny.WIDTH)
        found = unet(sample, 3, text, return_dict=False)[0]
        assert found.is_contiguous(memory_format=last) and not found.is_contiguous()


def test_weights_are_exported_in_the_default_order(runs, monkeypatch):
    unet = models.load_unet(runs.model)
    expected = {name: weight.clone() for name, weight in unet.state_dict().items()}
    use_memory_order(unet, TrainConfig(channels_last=True))
    engine = SimpleNamespace(module=unet, zero_optimization_stage=lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    found = export.trained_weights(engine)
    assert found.keys() == expected.keys()
    assert all(weight.is_contiguous() for weight in found.values())
    assert all(torch.equal(found[name], expected[name]) for name in found)
