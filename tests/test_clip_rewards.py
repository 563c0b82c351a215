"""CLIP score, PickScore, HPS and the aesthetic predictor against the published code's formula."""

import copy
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from longhand_rewards import (
    MEAN,
    STD,
    directional,
    head,
    head_shapes,
    open_clip_cosine,
    open_clip_shapes,
    random_state,
)
from PIL import Image
from safetensors.torch import save_file
from scorer_models import CONTEXT, PROMPTS, clip_arguments, clip_folder, clip_tokenizer
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from dde_fast import clip_rewards, rewards
from dde_fast.clip_rewards import VIT_H, VIT_L, Aesthetic, ClipReward, from_open_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory):
    """HPS's kind of file, a small ViT in open_clip's names, with a tokenizer beside it."""
    place = tmp_path_factory.mktemp("hps")
    shapes = open_clip_shapes((8, 2), (12, 2), 6, CONTEXT, 58, side=3, patch=4)
    state = random_state(shapes)
    torch.save({"epoch": 3, "state_dict": state}, place / "hps.pt")
    return state, place / "hps.pt", clip_tokenizer(place / "tokenizer")


@pytest.fixture(scope="module")
def small_hps(open_clip):
    _, file, tokenizer = open_clip
    published = dataclasses.replace(
        clip_rewards.HPS_V2, architecture=clip_arguments("gelu"), tokenizer=str(tokenizer)
    )
    return ClipReward(published, str(file)).eval()


def pictures(count: int, height: int = 20, width: int = 31) -> tuple[torch.Tensor, list]:
    """Each of another colour, with noise, as tensors and as PIL images."""
    generator = np.random.default_rng(1)
    colours = generator.integers(0, 200, (count, 1, 1, 3))
    noise = generator.integers(0, 56, (count, height, width, 3))
    arrays = (colours + noise).astype(np.uint8)
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    return images, [Image.fromarray(array) for array in arrays]


@pytest.mark.parametrize("name", ["clip_score", "pickscore"])
def test_scores_are_those_of_transformers_own_code(folder, name):
    """CLIPModel's logits are exp(logit_scale) cos: PickScore's; CLIP score is 100 cos."""
    images, pil = pictures(5)
    scorer = rewards.load_reward(f"{name}={folder}")
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 12}, crop_size=12)
    text = tokenizer(
        PROMPTS, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    with torch.no_grad():
        pixels = processor(pil, return_tensors="pt").pixel_values
        logits = model(pixel_values=pixels, **text).logits_per_image.diagonal()
    cosine = logits / torch.tensor(1.5).exp()
    expected = logits if name == "pickscore" else 100 * cosine
    result = scorer(images, PROMPTS)
    assert cosine.std() > 0.03
    # rounding to 8 bits, which only their preprocessing does
    assert torch.allclose(result, expected, atol=0.02 * expected.std().item())
    one = torch.cat([scorer(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    assert torch.allclose(result, one, atol=1e-4)
    assert torch.allclose(rewards.score(scorer, images, PROMPTS, 2), result, atol=1e-4)
    assert result.requires_grad is False and scorer.identity()["model"] == str(folder)


def test_hps_of_an_open_clip_file_is_100_cosines(open_clip, small_hps):
    """Of the published network written out on its own names, the images between black bars."""
    state, _, place = open_clip
    tokenizer = AutoTokenizer.from_pretrained(place)
    images = torch.rand(5, 3, 6, 12, generator=torch.Generator().manual_seed(2))
    bars = torch.zeros(5, 3, 12, 12)
    bars[:, :, 3:9] = images
    clean = [p.replace("&amp;", "&").replace("&lt;", "<") for p in PROMPTS]
    rows = [tokenizer(p, truncation=True, max_length=CONTEXT).input_ids for p in clean]
    tokens = torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows])
    ends = [len(row) - 1 for row in rows]
    cosine = open_clip_cosine(state, (bars - MEAN) / STD, tokens, ends, heads=(2, 2))
    assert cosine.std() > 0.1
    assert torch.allclose(small_hps(images, PROMPTS), 100 * cosine, atol=1e-3)


def test_the_scorer_follows_the_images_to_their_device(small_hps):
    scorer = copy.deepcopy(small_hps)
    assert scorer(torch.rand(2, 3, 12, 12, device="meta"), PROMPTS[:2]).device.type == "meta"


def test_gradients_are_those_of_finite_differences(small_hps, folder):
    images = torch.rand(2, 3, 9, 17, generator=torch.Generator().manual_seed(4)).double()
    images = 0.3 + 0.4 * images
    for scorer in (small_hps, rewards.load_reward(f"pickscore={folder}")):
        scorer.differentiable = True
        try:
            exact, measured = directional(scorer.double(), images, PROMPTS[:2])
        finally:
            scorer.float()
        assert abs(exact) > 1e-3 and exact == pytest.approx(measured, rel=1e-5)


def test_vit_h_is_open_clips_of_full_size():
    """Each published name goes to one of transformers', shapes fit, none is left over."""
    shapes = open_clip_shapes((1280, 32), (1024, 24), 1024)
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**VIT_H))
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    converted = {name: value.shape for name, value in from_open_clip(state).items()}
    assert converted == {name: value.shape for name, value in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 986_109_441
    # 80 wide, as its configuration says
    vision = model.config.vision_config
    assert vision.hidden_size // vision.num_attention_heads == 80
    assert vision.hidden_act == model.config.text_config.hidden_act == "gelu"


def test_vit_l_is_openais_of_full_size():
    shapes = open_clip_shapes((1024, 24), (768, 12), 768)
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**VIT_L))
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    converted = {name: value.shape for name, value in from_open_clip(state).items()}
    assert converted == {name: value.shape for name, value in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 427_616_513
    assert model.config.text_config.hidden_act == "quick_gelu"


def test_aesthetic_is_its_linear_layers_on_the_unit_embedding(tmp_path, folder):
    state = random_state(head_shapes("", width=6))
    file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)  # as it was published
    scorer = rewards.load_reward(f"aesthetic={file}+{folder}")
    images, pil = pictures(5, 20, 20)  # square: both crops agree
    processor = CLIPImageProcessor(size={"shortest_edge": 12}, crop_size=12)
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        pixels = processor(pil, return_tensors="pt").pixel_values
        embeds = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        expected = head(state, "", embeds / embeds.norm(dim=1, keepdim=True))
    result = scorer(images, ["anything"] * 5)
    assert expected.std() > 1e-3
    assert torch.allclose(result, expected, atol=0.05 * expected.std().item())
    smooth = 0.3 + 0.4 * images.double()
    exact, measured = directional(scorer.double(), smooth, [""] * 5)
    assert exact == pytest.approx(measured, rel=1e-5)
    one = torch.cat([scorer(image[None], [""]) for image in smooth])
    assert torch.allclose(scorer(smooth, [""] * 5), one, atol=1e-9)


def test_the_aesthetic_heads_names_are_the_published_ones():
    expected = {name: torch.Size(shape) for name, shape in head_shapes("").items()}
    head_ = clip_rewards.LinearHead(768)
    assert {name: value.shape for name, value in head_.state_dict().items()} == expected


def test_half_precision_files_and_safetensors_are_read_in_float32(tmp_path, open_clip, small_hps):
    state, _, _ = open_clip
    save_file({k: v.half().contiguous() for k, v in state.items()}, tmp_path / "hps.safetensors")
    scorer = ClipReward(small_hps.published, str(tmp_path / "hps.safetensors")).eval()
    assert {value.dtype for value in scorer.state_dict().values()} == {torch.float32}
    images = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(scorer(images, PROMPTS[:2]), small_hps(images, PROMPTS[:2]), atol=0.5)
    assert scorer.identity()["sha256"] != small_hps.identity()["sha256"]


def test_identity_covers_tokenizer_and_preprocessing(folder, tmp_path):
    """The same weights with another vocabulary, activation or scale give other scores."""
    scorer = rewards.load_reward(f"clip_score={folder}")
    plain = scorer.identity()
    assert plain["preprocessing"] == "clip, 12 pixels" and plain["scale"] == 100
    assert plain["activations"] == ["quick_gelu"] * 2 and len(plain["tokenizer"]) == 64
    shutil.copytree(folder, tmp_path / "other")
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    swap = {"a": vocabulary["b"], "b": vocabulary["a"]}
    other = CLIPTokenizer(vocab=vocabulary | swap, merges=[], unk_token="<|endoftext|>")
    other.save_pretrained(tmp_path / "other")
    changed = {
        "tokenizer": rewards.load_reward(f"clip_score={tmp_path / 'other'}"),
        "scale": rewards.load_reward(f"pickscore={folder}"),
        "activations": rewards.load_reward(f"clip_score={clip_folder(tmp_path / 'gelu', 'gelu')}"),
    }
    for name, reward in changed.items():
        found = reward.identity()
        assert found["sha256"] != plain["sha256"] and found[name] != plain[name], name
        weights = zip(scorer.state_dict().values(), reward.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights)
    assert rewards.load_reward(f"clip_score={folder}").identity() == plain


def test_an_incomplete_file_is_refused(tmp_path, open_clip, small_hps):
    state = {k: v for k, v in open_clip[0].items() if k != "visual.ln_post.bias"}
    torch.save(state, tmp_path / "hps.pt")
    with pytest.raises(ValueError, match="missing keys: 1, the first vision_model.post_layernorm"):
        ClipReward(small_hps.published, str(tmp_path / "hps.pt"))


def test_an_aesthetic_head_of_another_shape_is_refused(tmp_path, folder):
    torch.save(random_state(head_shapes("", width=5)), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="rewards: expected weights of the aesthetic predictor"):
        Aesthetic(f"{tmp_path / 'head.pth'}+{folder}")
