"""Models of the three kinds: what is encoded, from which files, and what is refused."""

import shutil

import diffusers
import original
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from dde_fast import models
from dde_fast.attention import use_attention
from dde_fast.models import Encoders

CPU = torch.device("cpu")
MAKE = {"sd": tiny.make_model, "v": tiny.make_v_model, "sdxl": tiny.make_sdxl_model}
CAPTIONS = ["cat face", "", "a caption that is longer than the encoder reads"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    return {name: make(tmp_path_factory.mktemp("models") / name) for name, make in MAKE.items()}


@pytest.fixture(scope="module")
def encoders(made) -> dict:
    return {name: Encoders.load(str(path), CPU) for name, path in made.items()}


def pixels(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", MAKE)
def test_prompts_are_the_pipelines(made, encoders, name):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(made[name])
    found = encoders[name].prompts(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        encoded = pipeline.encode_prompt(
            caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        # what guidance samples against where there is no caption
        chosen = (encoded[0], encoded[2:3]) if caption else (encoded[1], encoded[3:4])
        torch.testing.assert_close(found["embeddings"][i : i + 1], chosen[0])
        for pooled in chosen[1]:
            torch.testing.assert_close(found["pooled"][i : i + 1], pooled)
    assert ("pooled" in found) == (name == "sdxl")
    assert found["embeddings"][1].any() == (name != "sdxl")


def test_an_empty_caption_is_encoded_where_the_pipeline_does_so(tmp_path):
    model = tiny.make_sdxl_model(tmp_path / "model", force_zeros_for_empty_prompt=False)
    found = Encoders.load(model, CPU).prompts([""])
    assert found["embeddings"].any() and found["pooled"].any()


@pytest.mark.parametrize("name", MAKE)
def test_the_posterior_is_what_the_pipeline_decodes(made, encoders, name):
    vae = diffusers.AutoencoderKL.from_pretrained(made[name], subfolder="vae")
    expected = vae.encode(pixels()).latent_dist
    mean, std = encoders[name].posterior(pixels())
    scale = {"sdxl": 0.13025}.get(name, 0.18215)
    torch.testing.assert_close(mean, expected.mean * scale)
    torch.testing.assert_close(std, expected.std * scale)
    assert mean.shape == (3, *models.latent_shape(models.load_unet_config(made[name])))
    assert encoders[name].scale == 2


def test_a_vae_with_statistics_is_shifted_as_sdxl_decodes(tmp_path):
    model = tiny.make_sdxl_model(tmp_path / "model")
    encoders = Encoders.load(model, CPU)
    plain, _ = encoders.posterior(pixels())
    shift, spread = [1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 2.0, 4.0]
    encoders.vae.register_to_config(latents_mean=shift, latents_std=spread)
    mean, _ = encoders.posterior(pixels())
    column = lambda values: torch.tensor(values).reshape(1, -1, 1, 1)  # noqa: E731
    # diffusers decodes latents · std / scaling + mean
    torch.testing.assert_close(
        mean * column(spread) / 0.13025 + column(shift), plain / 0.13025, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", MAKE)
def test_images_are_what_the_pipeline_decodes(made, encoders, name, monkeypatch):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(made[name])
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(decoded, output_type="pt")
    assert expected.min() >= 0 and expected.max() <= 1
    torch.testing.assert_close(encoders[name].decode(latents), expected)
    monkeypatch.setattr(models, "DECODED_AT_ONCE", 2 * 8 * 8)  # two images
    latents.requires_grad_()
    images = encoders[name].decode(latents)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    images[2].sum().backward()
    assert latents.grad[2].any() and not latents.grad[:2].any()


def test_a_vae_with_statistics_decodes_its_own_posterior(tmp_path):
    encoders = Encoders.load(tiny.make_sdxl_model(tmp_path / "model"), CPU)
    plain, _ = encoders.posterior(pixels())
    expected = encoders.decode(plain)
    encoders.vae.register_to_config(
        latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 4.0]
    )
    found = encoders.decode(encoders.posterior(pixels())[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_overflow_is_named(made):
    encoders = Encoders.load(made["sdxl"], CPU)
    bad = pixels()
    bad[1] = torch.inf
    with pytest.raises(ValueError, match=r"expected finite latents from its VAE, .* at \[1\]"):
        encoders.posterior(bad)
    encoders.text_encoders[1].text_projection.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="expected finite text embeddings.*pooled"):
        encoders.prompts(["cat"])


@pytest.mark.parametrize("name", MAKE)
def test_identity_tells_encoders_apart(made, encoders, name, tmp_path):
    found = encoders[name].identity()
    parts = {"vae", "tokenizer", "text_encoder"}
    assert set(found) == parts | ({"tokenizer_2", "text_encoder_2"} if name == "sdxl" else set())
    shutil.copytree(made[name], tmp_path / "copy")
    other = Encoders.load(tmp_path / "copy", CPU)
    assert other.identity() == found
    with torch.no_grad():
        other.text_encoders[-1].get_input_embeddings().weight.add_(0.1)
    other.tokenizers[0].model_max_length = 4
    other.vae.register_to_config(scaling_factor=0.5)
    changed = {part for part, value in other.identity().items() if value != found[part]}
    assert changed == {"vae", "tokenizer", "text_encoder" + "_2" * (name == "sdxl")}


@pytest.mark.parametrize("name", MAKE)
def test_half_precision_files_load_in_float32(made, name, tmp_path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(made[name], torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half").rglob("*model.safetensors"))
    unet = models.load_unet(tmp_path / "half")
    exact = models.load_unet(made[name])
    for key, value in unet.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, exact.state_dict()[key].half().float())
    encoders = Encoders.load(tmp_path / "half", CPU)
    assert all(p.dtype == torch.float32 for p in encoders.vae.parameters())


def test_pickled_weights_are_refused(made, tmp_path):
    shutil.copytree(made["sd"], tmp_path / "model")
    (tmp_path / "model/unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(
        models.load_unet(made["sd"]).state_dict(),
        tmp_path / "model/unet/diffusion_pytorch_model.bin",
    )
    with pytest.raises(ValueError, match="model: expected a whole UNet2D.*safetensors"):
        models.load_unet(tmp_path / "model")


def test_other_pipelines_are_refused(made, tmp_path):
    shutil.copytree(made["sd"], tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(ValueError, match="model: expected .*StableDiffusionXLPipeline.* FluxPipe"):
        models.locate(tmp_path / "model")
    index.write_text("{")
    with pytest.raises(ValueError, match="model: expected a diffusers directory"):
        models.locate(tmp_path / "model")


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_every_attention_gives_the_same(made, name):
    unet = models.load_unet(made[name])
    inputs = {
        "sample": torch.randn(2, 4, 4, 4),
        "timestep": torch.tensor([3, 900]),
        "encoder_hidden_states": torch.randn(2, 8, unet.config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 12), "time_ids": torch.ones(2, 6)},
    }
    expected = unet(**inputs).sample
    kinds = {"eager": "AttnProcessor", "sdpa": "AttnProcessor2_0", "flash": "KernelAttnProcessor"}
    for attention, kind in kinds.items():  # the others need a GPU
        use_attention(unet, attention, torch.float32, CPU)
        assert {type(p).__name__ for p in unet.attn_processors.values()} == {kind}
        torch.testing.assert_close(unet(**inputs).sample, expected, rtol=1e-4, atol=1e-5)


def test_attention_that_cannot_be_served_is_named(made):
    unet = models.load_unet(made["sd"])
    with pytest.raises(ValueError, match="attention: expected one of .*sdpa.*, got 'paged'"):
        use_attention(unet, "paged", torch.float32, CPU)
    if not torch.cuda.is_available():
        for name in ("xformers", "cudnn", "efficient"):
            with pytest.raises(
                ValueError, match=f"runs here in torch.float32 on cpu, got '{name}'"
            ):
                use_attention(unet, name, torch.float32, CPU)
    with pytest.raises(ValueError, match="runs here in torch.int64 on cpu, got 'flash'"):
        use_attention(unet, "flash", torch.int64, CPU)


@pytest.fixture(scope="module")
def single(made, tmp_path_factory) -> dict:
    """The models as original single files, and their configurations without weights."""
    found = {}
    for name, path in made.items():
        folder = tmp_path_factory.mktemp(name)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(path)
        file = original.write(pipeline, folder / "weights.safetensors")
        shutil.copytree(path, folder / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
        found[name] = f"{file}+{folder / 'configs'}"
    return found


@pytest.mark.parametrize("name", MAKE)
def test_a_single_file_holds_the_same_model(made, single, encoders, name):
    exact = models.load_unet(made[name]).state_dict()
    found = models.load_unet(single[name]).state_dict()
    assert exact.keys() == found.keys()
    for key, value in found.items():
        assert value.dtype == torch.float32 and torch.equal(value, exact[key].half().float()), key
    from_file = Encoders.load(single[name], CPU)
    for ours, theirs in zip(
        from_file.posterior(pixels()), encoders[name].posterior(pixels()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    encoded, expected = from_file.prompts(CAPTIONS), encoders[name].prompts(CAPTIONS)
    assert encoded.keys() == expected.keys()
    for key, value in encoded.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-2, atol=1e-2)
    assert (
        models.load_scheduler(single[name]).config.prediction_type
        == models.load_scheduler(made[name]).config.prediction_type
    )


def test_a_single_file_that_fits_other_configurations_is_refused(single):
    (sd, _), (_, sdxl) = (single[name].split("+") for name in ("sd", "sdxl"))
    with pytest.raises(ValueError, match="model: "):
        models.load_unet(f"{sd}+{sdxl}")
    with pytest.raises(ValueError, match="expected a .safetensors file, got 'away.safetensors'"):
        models.locate("away.safetensors+configs")


def test_a_single_file_without_a_part_is_refused(single, tmp_path):
    file, configs = single["sd"].split("+")
    state = load_file(file)
    del state["model.diffusion_model.out.2.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="expected a file with every weight of the StableDiff"):
        models.load_unet(f"{tmp_path / 'part.safetensors'}+{configs}")
    del state["cond_stage_model.transformer.text_model.final_layer_norm.weight"]
    save_file(state, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="expected a file with every weight of the StableDiff"):
        Encoders.load(f"{tmp_path / 'text.safetensors'}+{configs}", CPU)


def test_a_single_file_alone_asks_for_the_published_configurations(single, monkeypatch):
    asked = []

    def offline(name, **options):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", offline)
    with pytest.raises(ValueError, match=r"without a network name one .*\+DIRECTORY \(no network"):
        models.locate(single["sd"].split("+")[0])
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]
