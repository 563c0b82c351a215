"""Within an optimizer step the host never waits for the device.

Tensors of the meta device have no values: whoever asks for one (item, tolist, bool, nonzero, a
boolean index) gets an error. So a step that can be taken there reads nothing back; and like a GPU it
is no CPU, where alone the loss looks at timesteps. On a GPU PyTorch itself is told to complain.
"""

import contextlib
import json
from types import SimpleNamespace

import caches
import pytest
import tiny
import torch
import train_worker
from train_runs import BF16, HALF, STEPS, Folder, stage

from dde_fast import models, train
from dde_fast.cache import Cache
from dde_fast.config import TrainConfig
from dde_fast.forward import PairForward
from dde_fast.loader import Loader, PairStream
from dde_fast.loss import PreferenceLoss
from dde_fast.metrics import Meter
from dde_fast.objectives import OBJECTIVES
from dde_fast.optimizer_step import Skips
from dde_fast.reference_scores import ReferenceScores

META = torch.device("meta")
OFFLINE = [(name, row) for name, row in OBJECTIVES.items() if not row.online]
STOP = SimpleNamespace(on_errors=contextlib.nullcontext, agreed=lambda: False)
PAIRS = 8


class PlainEngine:
    """What `train.take_step` asks of DeepSpeed's engine at stage 0, with plain gradient descent
    that is told to skip and to clip as a fused optimizer is."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.basic_optimizer = module, SimpleNamespace()

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def zero_optimization_stage(self) -> int:
        return 0

    def gradient_clipping(self) -> float:
        return 1.0

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def step(self) -> None:
        told = self.basic_optimizer
        scale = (1 - told.found_inf) / told.grad_scale
        for weight in self.module.parameters():
            weight -= 0.1 * scale * weight.grad
            weight.grad = None


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A model and pairs of its shapes."""
    path = tmp_path_factory.mktemp("sd")
    shape = (tiny.LENGTH, tiny.WIDTH)
    cache = caches.write_random(path / "cache", pairs=PAIRS, images=PAIRS, text=shape)
    return tiny.make_model(path / "model"), Cache(cache)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    path = tmp_path_factory.mktemp("sdxl")
    options = {"text": (tiny.LENGTH, tiny.WIDTH + 8), "pooled": 12}
    cache = caches.write_random(path / "cache", pairs=PAIRS, images=PAIRS, **options)
    return tiny.make_sdxl_model(path / "model"), Cache(cache)


def take_steps(model, cache: Cache, objective: str, device: torch.device, scored: bool):
    """Two optimizer steps on a device; the forward, and the meter that observed them."""
    scheduler, c = models.load_scheduler(model), TrainConfig(seed=3)
    loss_fn = PreferenceLoss.from_scheduler(scheduler, objective, beta=100.0).to(device)
    loss_fn.auto_update = False
    inputs = SimpleNamespace(
        alphas_cumprod=scheduler.alphas_cumprod, timesteps=loss_fn.timestep_probabilities()
    )
    unets = [models.load_unet(model).to(device) for _ in range(2)]
    reference = None if scored else unets[1].requires_grad_(False)
    e = SimpleNamespace(dtype=torch.float32, accumulation=1)
    forward = PairForward(c, e, inputs, PlainEngine(unets[0]), reference, loss_fn)
    meter, skips = Meter(device, len(inputs.alphas_cumprod)), Skips(device)
    scores = ReferenceScores(torch.rand(2, PAIRS, 2)) if scored else None
    options = {"seed": 3, "caption_dropout": 0.3, "device": device, "scores": scores}
    batches = Loader(cache, PairStream(cache.pair_ids, 3), [(0, 4), (4, 8)], **options)
    for _ in range(2):
        assert train.take_step(forward, e, batches, meter, skips, STOP)
    batches.close()
    return forward, meter


def test_the_meta_device_tells_who_reads():
    values = torch.ones(3, device=META)
    for look in (
        lambda: values[0].item(),
        lambda: values.tolist(),
        lambda: bool(values[0] > 0),
        lambda: values.cpu(),
        lambda: values.nonzero(),
        lambda: values[values > 0],
    ):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            look()


@pytest.mark.parametrize(
    ("objective", "scored"),
    [
        (name, scored)
        for name, row in OFFLINE
        for scored in (False, True)[: 1 + row.needs_reference]
    ],
)
def test_a_step_reads_nothing_back(sd, objective, scored):
    forward, meter = take_steps(*sd, objective, META, scored)
    assert meter.sums and all(part.device == META for part in meter.bins.values())
    assert forward.loss_fn.ratios.device == META


def test_nor_does_sdxls(sdxl):
    take_steps(*sdxl, "dde", META, False)


def test_the_step_that_has_no_values_there_is_a_step(sd):
    """The same on the CPU, where it has values: it trains."""
    before = models.load_unet(sd[0]).state_dict()
    forward, meter = take_steps(*sd, "dde", torch.device("cpu"), False)
    after = forward.engine.module.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert meter.sums["loss",][1] == PAIRS
    assert forward.loss_fn.ratios.abs().max() > 0


BF16_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "gradient_accumulation_steps": 2}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("ds", "flags"),
    [(stage(0), {"objective": name}) for name in ("dde", "diffusion-dpo", "sft")]
    + [(stage(1, **BF16, **HALF, **BF16_SUMS), {"ema_decay": 0.9})]
    + [(stage(number, **half), {}) for number in (1, 2) for half in ({}, BF16)],
    ids=["dde", "diffusion-dpo", "sft", "bf16 sums at stage 1"]
    + [f"{half} at stage {number}" for number in (1, 2) for half in ("fp32", "bf16")],
)
def test_on_a_gpu_the_trainers_steps_wait_for_nothing(tmp_path, ds, flags):
    """With stages 0 to 2; logging is outside of the steps."""
    folder = Folder(tmp_path)
    job = {"args": folder.args("run", ds=ds, beta=100.0, **flags)}
    folder.work([job | {"no_waiting": str(tmp_path / "steps.json")}], 1, "run", gpu=True)
    assert json.loads((tmp_path / "steps.json").read_text()) == STEPS - 2


@pytest.mark.parametrize("at", [None, "micro-batch", "optimizer", "synchronize"])
def test_the_watch_of_this_one(tmp_path, monkeypatch, at):
    """Four steps on a GPU that is not there: it may not be waited for in any place."""
    modes = ["default"]

    def wait() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def take_step(number: int) -> None:
        if at == "micro-batch":
            wait()
        if at == "synchronize":
            torch.cuda.synchronize()
        train.step_optimizer(None)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(train, "take_step", take_step)
    monkeypatch.setattr(train, "step_optimizer", lambda _: wait() if at == "optimizer" else None)
    monkeypatch.setattr(train, "main", lambda _: [train.take_step(n) for n in range(4)])
    path = tmp_path / "steps.json"
    if at is None:
        train_worker.without_waiting([], path)
        assert json.loads(path.read_text()) == 2
    else:
        with pytest.raises(RuntimeError, match="waits|synchronizing"):
            train_worker.without_waiting([], path)
        assert not path.exists()
    assert modes[-1] == "default"
