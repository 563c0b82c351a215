"""What grids leave alone. What they show is tested with the trainer, on one and two ranks."""

import types

import pytest
import tiny
import torch

from dde_fast import grids
from dde_fast.config import TrainConfig
from dde_fast.grids import Grids
from dde_fast.models import load_unet


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank, without a process group."""
    monkeypatch.setattr(grids.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(grids.dist, "get_world_size", lambda: 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_numbers_mode_and_weights_stay(tmp_path, dtype):
    model = tiny.make_model(tmp_path / "model")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    settings = TrainConfig(grid_steps=2)
    pictures = Grids(str(model), ["happy", "sad"], settings, dtype, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    unet = load_unet(str(model), dtype)
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    modes = []
    engine = types.SimpleNamespace(
        module=unet.train(), eval=lambda: modes.append("eval"), train=lambda: modes.append("train")
    )
    picture = pictures(engine, "step 1")
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == ["eval", "train"]
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert pictures.pipeline.unet is None  # the policy is not kept alive
    # an untrained policy is the base: both rows are the same
    assert picture.crop((80, 0, 280, 96)).tobytes() == picture.crop((80, 100, 280, 196)).tobytes()
    assert len(picture.crop((80, 0, 280, 96)).getcolors(10_000)) > 10
