"""What a finished run leaves, loaded by the libraries it is for."""

import re
import shutil

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from train_runs import STEPS
from variants import LORA, WIDE, weights

from dde_fast import embedded, evaluate, export, lora
from dde_fast.config import TrainConfig


def pipeline_of(folder, **parts) -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder.model, **parts)


@torch.no_grad()
def output(unet) -> torch.Tensor:
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([10, 700]), torch.randn(2, 8, 16)
    return unet.eval()(*inputs, return_dict=False)[0]


def trained(folder, name: str, step: int, targets: str = TrainConfig.lora_targets):
    """The policy of a run at stage 0, from its checkpoint."""
    unet = pipeline_of(folder).unet
    lora.add_adapters(unet, TrainConfig(lora_rank=4, lora_alpha=8, lora_targets=targets))
    path = folder.path / f"{name}/checkpoints/step-{step:08d}/mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)["module"]
    trainable = {key for key, weight in unet.named_parameters() if weight.requires_grad}
    assert state.keys() == trainable
    unet.load_state_dict(state, strict=False)
    return unet


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", export.KOHYA])
@pytest.mark.parametrize("name", ["lora0", "lora_wide"])
def test_adapters_load_in_both_formats(variants, name, file):
    given = (2, WIDE) if name == "lora_wide" else (STEPS,)
    expected, base = output(trained(variants, name, *given)), output(pipeline_of(variants).unet)
    assert (expected - base).abs().max() > 1e-4
    pipeline = pipeline_of(variants)
    pipeline.load_lora_weights(variants.path / name / "lora", weight_name=file)
    assert (output(pipeline.unet) - expected).abs().max() < 1e-6
    pipeline.disable_lora()
    assert torch.equal(output(pipeline.unet), base)


def test_kohya_keys_and_alpha(variants):
    state = load_file(variants.path / "lora0/lora" / export.KOHYA)
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert state[f"{name}.alpha"] == LORA["lora_alpha"]
    assert state[f"{name}.lora_down.weight"].shape[0] == LORA["lora_rank"]
    assert state[f"{name}.lora_up.weight"].shape[1] == LORA["lora_rank"]
    assert len(state) * 2 == 3 * len(weights(variants, "lora0", "lora"))


def test_the_average_of_adapters_is_another_file(variants):
    first, second = (weights(variants, "lora0", kind) for kind in ("lora", "lora_ema"))
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("kind", ["unet", "unet_ema"])
def test_a_whole_unet_goes_into_its_pipeline(variants, kind):
    unet = diffusers.UNet2DConditionModel.from_pretrained(variants.path / "ema2" / kind)
    assert unet.dtype == torch.float32
    pipeline = pipeline_of(variants, unet=unet)
    image = pipeline("sad", num_inference_steps=1, height=8, width=8, output_type="np").images
    assert image.shape == (1, 8, 8, 3)


def test_evaluation_takes_adapters(variants):
    device = torch.device("cpu")
    folder = str(variants.path / "lora0/lora")
    pipeline = evaluate.load_pipeline(str(variants.model), folder, device)
    assert (output(pipeline.unet) - output(trained(variants, "lora0", STEPS))).abs().max() < 1e-6
    hashes = {evaluate.model_hash(str(variants.model), str(f)) for f in (variants.model, folder)}
    assert len(hashes) == 2


@pytest.mark.parametrize("name", ["ema2", "lora0"])
def test_the_card_says_what_was_trained_and_how_to_load_it(variants, name):
    card = ModelCard.load(variants.path / name / "README.md")
    assert card.data.library_name == "diffusers" and card.data.base_model is None
    assert "dde" in card.data.tags and ("lora" in card.data.tags) == (name == "lora0")
    settings = (variants.path / name / "config.json").read_text()
    assert settings.strip() in card.text
    for line in ("base model: ", "(weights ", "(content ", "| step | 6 |", "| loss | 0.6"):
        assert line in card.text, line
    snippet, names = re.search(r"```python\n(.*?)```", card.text, re.S).group(1), {}
    exec(compile(snippet, "README.md", "exec"), names)
    left = diffusers.UNet2DConditionModel.from_pretrained(variants.path / "ema2/unet")
    expected = trained(variants, "lora0", STEPS) if name == "lora0" else left
    assert (output(names["pipeline"].unet) - output(expected)).abs().max() < 1e-6


def test_a_card_names_the_hub_model_and_the_data(variants, tmp_path):
    for file in ("metrics.jsonl", "config.json"):
        shutil.copy(variants.path / "ema0" / file, tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/manifest.json").write_text('{"pairs": 12}')
    c = TrainConfig(model="someone/a-model", pairs="somewhere", output=str(tmp_path))
    export.write_card(c, {"model": "weights 12", "pairs": "content 34"}, [tmp_path / "unet"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/a-model"
    c.model = "embedded"
    export.write_card(c, {"model": "weights 12", "pairs": "content 34"}, [tmp_path / "unet"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None and "- base model: `embedded`" in card.text
    assert str(embedded.model_path()) in card.text
    assert '## Data\n\n```json\n{"pairs": 12}\n```' in card.text


def test_nothing_is_half_written(tmp_path):
    place = tmp_path / "unet"
    with export._replacing(place) as folder:
        (folder / "weights").write_text("first")
    with pytest.raises(RuntimeError), export._replacing(place) as folder:
        (folder / "weights").write_text("sec")
        raise RuntimeError
    assert (place / "weights").read_text() == "first"
    with export._replacing(place) as folder:
        (folder / "weights").write_text("second")
    assert (place / "weights").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]
