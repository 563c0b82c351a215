"""What a run is predicted to take, for each way of running it."""

import dataclasses
import json
import re
import statistics

import pytest
import tiny
import torch
from safetensors.torch import load_file
from variants import weights

from dde_fast import forecast, models
from dde_fast.cache import Cache
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig, read_engine_config


@pytest.fixture
def engine(tmp_path) -> EngineConfig:
    """fp32 without ZeRO, micro-batches of 4 pairs."""
    return read_engine_config(
        TrainConfig(deepspeed_config=str(tiny.write_ds(tmp_path / "d.json"))), 1
    )


def expected(model, cache, e, **settings) -> forecast.Forecast:
    c = TrainConfig(model=str(model), **settings)
    unet_config = models.load_unet_config(c.model)
    return forecast.of_run(c, e, unet_config, Cache(cache), torch.device("cpu"))


def test_a_run_is_predicted_as_it_is_configured(model, whole, engine):
    plain = expected(model, whole, engine)
    unet = models.load_unet(str(model))
    count = sum(value.numel() for value in unet.parameters())
    assert plain.needs["weights, gradients, optimizer"] == 16 * count
    assert plain.needs["reference"] == 4 * count
    assert plain.pairs_per_second is None  # nobody knows a CPU's peak
    twice = expected(model, whole, dataclasses.replace(engine, micro_batch=8, batch=8))
    assert twice.needs["activations"] == pytest.approx(2 * plain.needs["activations"], abs=1)
    sizes = [plain.needs["activations"]]
    for changes in ({"checkpoint_blocks": "up_blocks.0"}, {"gradient_checkpointing": True}):
        sizes.append(expected(model, whole, engine, **changes).needs["activations"])
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_speed_is_the_share_of_the_peak(model, whole, engine):
    half = expected(model, whole, engine, peak_tflops=2.0, plan_share=0.5).pairs_per_second
    whole_ = expected(model, whole, engine, peak_tflops=1.0, plan_share=1.0).pairs_per_second
    assert half == whole_ > 0
    again = expected(
        model, whole, engine, peak_tflops=1.0, plan_share=1.0, gradient_checkpointing=True
    )
    assert again.pairs_per_second < whole_


def test_what_was_is_written_beside_it(tmp_path):
    c, cpu = TrainConfig(plan_share=0.5), torch.device("cpu")
    line = forecast.outcome(
        tmp_path, c, forecast.Forecast({"activations": 2**29}, 8.0), [1, 2, 9], cpu
    )
    assert line.startswith("memory: predicted 0.5 GiB, peak ")
    assert line.endswith("pairs/s: predicted 8 at 0.5 of the peak, was 2 (--plan_share 0.125)")
    record = json.loads((tmp_path / forecast.RECORD).read_text())
    assert record["predicted"] == {"memory_gib": {"activations": 0.5}, "pairs_per_second": 8.0}
    assert record["measured"]["share_of_peak"] == 0.125
    line = forecast.outcome(tmp_path, c, forecast.Forecast({}, None), [3.0], cpu)
    assert line.endswith("pairs/s: was 3")
    assert [path.name for path in tmp_path.iterdir()] == [forecast.RECORD]


def test_a_run_ends_with_what_was_expected_and_what_it_took(variants):
    line = r"^memory: predicted (\S+) GiB, peak (\S+) GiB of the whole process; pairs/s: .*was \S+"
    found = re.findall(line, variants.printed, re.M)
    assert len(found) > 10 and all(float(whole) > 0 for _, whole in found)
    known = r"pairs/s: predicted \S+ at 0.4 of the peak, was \S+ \(--plan_share \S+\)$"
    assert len(re.findall(known, variants.printed, re.M)) == 1
    machine = json.loads((variants.path / "ema0" / forecast.RECORD).read_text())
    rates = [record["pairs_per_second"] for record in variants.metrics("ema0")]
    assert machine["measured"]["pairs_per_second"] == pytest.approx(statistics.median(rates))
    assert machine["predicted"]["pairs_per_second"] is machine["measured"]["share_of_peak"] is None
    machine = json.loads((variants.path / "lora_blocks" / forecast.RECORD).read_text())
    share = machine["measured"]["pairs_per_second"] / machine["predicted"]["pairs_per_second"]
    assert machine["measured"]["share_of_peak"] == pytest.approx(0.4 * share)


def sizes(folder, name: str, kind: str) -> int:
    """Numbers in what a run left."""
    return sum(value.numel() for value in weights(folder, name, kind).values())


@pytest.mark.parametrize(
    ("name", "width", "state", "average", "step"),
    [
        # weight, gradient, two moments; one rank reduces nothing, and the step copies nothing
        ("ema0", 4, 4 + 4 + 8, 4, 0),
        # 16 bits: weight, gradient's float32 sum, float32 weight, two moments; the sum cast whole
        ("config_zero1", 2, 2 + 4 + 4 + 8, 4, 2),
        # here, too, the 16-bit gradient is gone when the optimizer steps
        ("config_zero2", 2, 2 + 4 + 4 + 8, 4, 0),
        ("config_zero3", 2, 2 + 2 + 4 + 4 + 8, 4, 4),
        # what the optimizer steps lies elsewhere
        ("config_zero3-offload", 2, 2 + 2 + 4, 0, 4),
    ],
)
def test_a_runs_prediction_by_hand(variants, name, width, state, average, step):
    """Bytes for each parameter of the UNet that the run left, on one rank."""
    count = sizes(variants, name, "unet")
    found, total = predicted(variants, name)
    activations = found.pop("activations")
    assert activations > 0
    assert found == {
        "weights, gradients, optimizer": state * count,
        "average of the weights": average * count,
        "reference": width * count,
        "more in the optimizer step": max(0, step * count - activations),
        "DeepSpeed's buffers": 0 if name in ("ema0", "config_zero1") else width * count,
    }
    assert f"memory: predicted {total / 2**30:.3g} GiB, peak " in variants.printed


def test_adapters_prediction_by_hand(variants):
    """float32 at stage 3 on one rank: the frozen weights once, and no reference beside them."""
    adapters = sizes(variants, "lora_blocks", "lora")
    model = variants.model / "unet/diffusion_pytorch_model.safetensors"
    frozen = sum(value.numel() for value in load_file(model).values())
    found, _ = predicted(variants, "lora_blocks")
    activations = found.pop("activations")
    assert found == {
        "weights, gradients, optimizer": 4 * frozen + (4 + 4 + 8) * adapters,
        "average of the weights": 4 * adapters,
        "reference": 0,
        "more in the optimizer step": max(0, 4 * adapters - activations),
        "DeepSpeed's buffers": 4 * adapters,
    }


def predicted(folder, name: str) -> tuple[dict[str, int], int]:
    """Bytes that a run was predicted to take, by what for, and their sum."""
    record = json.loads((folder.path / name / forecast.RECORD).read_text())
    found = {key: size * 2**30 for key, size in record["predicted"]["memory_gib"].items()}
    return found, sum(found.values())
