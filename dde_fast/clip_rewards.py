"""Published scorers on CLIP: CLIP score, PickScore, HPS v2 and v2.1, the LAION aesthetic predictor.

transformers' CLIP holds them all; a single file in open_clip's (and OpenAI's) names is converted.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dde_fast import preprocess
from dde_fast.scorer import Scorer
from dde_fast.weights import expecting, find_file, pretrained, read, split, tokenizer_hash


def _architecture(vision: dict[str, Any], text: dict[str, Any], projection: int, act: str) -> dict:
    """A CLIPConfig's arguments."""
    towers = {
        f"{tower}_config": {"hidden_act": act, "projection_dim": projection} | sizes
        for tower, sizes in (("vision", vision), ("text", text))
    }
    return {"projection_dim": projection} | towers


def _tower(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads} | more


VIT_L = _architecture(
    _tower(1024, 24, 16, image_size=224, patch_size=14), _tower(768, 12, 12), 768, "quick_gelu"
)
"""OpenAI's ViT-L/14: 427.6 M parameters."""
VIT_H = _architecture(
    _tower(1280, 32, 16, image_size=224, patch_size=14), _tower(1024, 24, 16), 1024, "gelu"
)
"""open_clip's ViT-H-14 (heads of 80 in the vision tower): 986.1 M parameters."""

OPENAI_L, LAION_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True)
class Published:
    """A scorer that is scale · cosine(image, text) of some CLIP."""

    weights: str
    """The published weights: hub name, or `OWNER/NAME/FILE` of a single file."""
    tokenizer: str
    """Hub name of its tokenizer."""
    architecture: dict
    """What a single file is of: arguments of transformers' CLIPConfig."""
    pixels: Callable[[Tensor, int], Tensor] = preprocess.clip
    """From images to the vision tower's input of a size."""
    scale: float | None = 100.0
    """Factor of the cosine; None: the model's own exp(logit_scale)."""
    clean: Callable[[str], str] = str
    """Applied to each prompt before the tokenizer."""


def _unescape(prompt: str) -> str:
    return html.unescape(html.unescape(prompt))


_HPS = {"pixels": preprocess.hps, "clean": _unescape}
CLIP_SCORE = Published(OPENAI_L, OPENAI_L, VIT_L)
PICKSCORE = Published("yuvalkirstain/PickScore_v1", LAION_H, VIT_H, scale=None)
HPS_V2 = Published("xswu/HPSv2/HPS_v2_compressed.pt", LAION_H, VIT_H, **_HPS)
HPS_V21 = Published("xswu/HPSv2/HPS_v2.1_compressed.pt", LAION_H, VIT_H, **_HPS)

AESTHETIC = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac+logos+ava1-l14-linearMSE.pth"
)


class ClipReward(Scorer):
    """scale · cosine of CLIP's image and text embeddings, of images and their prompts.

    CLIP score: 100 cos with OpenAI's ViT-L/14 (torchmetrics' CLIPScore per pair, not clamped at 0).
    PickScore (Kirstain et al. 2023, Eq. 1): exp(logit_scale) · cos. HPS v2 and v2.1 (Wu et al. 2023):
    100 cos as in its benchmark's tables; its function `hpsv2.score` gives the cosine. Its prompts
    are HTML-unescaped as published, but broken encodings and curly quotes stay (no ftfy).
    """

    differentiable = True
    libraries = ("torch", "transformers", "tokenizers")

    def __init__(self, published: Published, weights: str | None) -> None:
        from transformers import AutoTokenizer, CLIPModel

        super().__init__()
        self.published = published
        self.model, tokenizer = split(weights, published.weights, published.tokenizer)
        self.clip = pretrained(CLIPModel, self.model, published.architecture, from_open_clip)
        with expecting("a CLIP tokenizer", tokenizer):
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def each(self, images: Tensor, prompts: list[str]) -> Tensor:  # [B, 3, H, W] -> [B]
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        index = torch.tensor([distinct[prompt] for prompt in prompts], device=images.device)
        cosine = (self.image_features(images) * self.text_features(list(distinct))[index]).sum(1)
        scale = self.published.scale
        return cosine * (self.clip.logit_scale.exp() if scale is None else scale)

    def image_features(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, D], unit length
        pixels = self.published.pixels(images, self.clip.config.vision_config.image_size)
        pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=1)

    def text_features(self, prompts: list[str]) -> Tensor:  # -> [P, D], unit length
        tokens = self.tokenizer(
            [self.published.clean(prompt) for prompt in prompts],
            padding=True,  # after the end: causal attention and pooling there do not see it
            truncation=True,
            max_length=self.clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids
        pooled = self.clip.text_model(input_ids=tokens.to(self.place.device)).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=1)

    def beside(self) -> dict[str, Any]:
        towers = (self.clip.config.vision_config, self.clip.config.text_config)
        return {
            "preprocessing": f"{self.published.pixels.__name__}, {towers[0].image_size} pixels",
            "tokenizer": tokenizer_hash(self.tokenizer),
            "activations": [tower.hidden_act for tower in towers],
            "scale": self.published.scale or "exp(logit_scale)",
        }


class LinearHead(nn.Module):
    """The linear layers of the aesthetic predictor and of ImageReward: [B, D] -> [B]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # the numbers of the dropouts between them are part of the published names
        linear = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        self.layers = nn.ModuleDict({str(i): nn.Linear(*sizes) for i, sizes in linear.items()})

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(1)


class Aesthetic(Scorer):
    """LAION's aesthetic predictor "sac+logos+ava1-l14-linearMSE": linear layers on the unit-length
    image embedding of OpenAI's ViT-L/14; about 1 … 10. It does not read the prompts."""

    differentiable = True
    libraries = ("torch", "transformers")

    def __init__(self, weights: str | None) -> None:
        from transformers import CLIPVisionModelWithProjection

        super().__init__()
        self.model, clip = split(weights, AESTHETIC, OPENAI_L)
        with expecting("weights of the aesthetic predictor, a single file", self.model):
            head = read(find_file(self.model))
        self.vision = pretrained(CLIPVisionModelWithProjection, clip)
        self.head = LinearHead(self.vision.config.projection_dim)
        with expecting("weights of the aesthetic predictor for that CLIP", self.model):
            self.head.load_state_dict(head)

    def each(self, images: Tensor, prompts: list[str]) -> Tensor:  # [B, 3, H, W] -> [B]
        pixels = preprocess.openai_clip(images, self.vision.config.image_size)
        return self.head(F.normalize(self.vision(pixel_values=pixels).image_embeds, dim=1))

    def beside(self) -> dict[str, Any]:
        config = self.vision.config
        return {
            "preprocessing": f"openai_clip, {config.image_size} pixels",
            "activations": [config.hidden_act],
        }


_OUTER = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_LAYERS = {"visual.transformer.resblocks.": "vision_model", "transformer.resblocks.": "text_model"}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TRANSPOSED = ("text_projection", "visual.proj")


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names (and OpenAI's) to transformers'; a file in transformers' stays as it is."""
    if "visual.proj" not in state:
        return state
    converted = {}
    for name, value in state.items():
        if name in _OUTER:
            converted[_OUTER[name]] = value.T if name in _TRANSPOSED else value
        elif prefix := next((p for p in _LAYERS if name.startswith(p)), None):
            number, _, inner = name.removeprefix(prefix).partition(".")
            layer = f"{_LAYERS[prefix]}.encoder.layers.{number}"
            module, _, kind = inner.rpartition(".")
            if module == "attn":  # in_proj_weight, in_proj_bias: query, key and value in one
                kind = kind.removeprefix("in_proj_")
                for part, chunk in zip("qkv", value.chunk(3), strict=True):
                    converted[f"{layer}.self_attn.{part}_proj.{kind}"] = chunk
            else:
                converted[f"{layer}.{_INNER[module]}.{kind}"] = value
    return converted
