"""ImageReward: BLIP's vision tower and text encoder with cross attention, and linear layers on it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dde_fast import preprocess
from dde_fast.clip_rewards import LinearHead
from dde_fast.scorer import Scorer
from dde_fast.weights import expecting, find_file, from_state, read, split, tokenizer_hash

WEIGHTS, TOKENIZER = "THUDM/ImageReward/ImageReward.pt", "bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the published training set."""
TOKENS = 35
"""Every prompt is padded or cut to this many."""

VISION = {  # ViT-L/16
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,  # timm's; transformers' BLIP has 1e-5
}
TEXT = {  # BERT base with cross attention to the vision tower
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,  # transformers' BLIP has 8
    "encoder_hidden_size": VISION["hidden_size"],
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "is_decoder": True,  # builds the cross attention; it runs as an encoder
}


class ImageReward(Scorer):
    """ImageReward (Xu et al. 2023): (head(first text token after cross attention) - mean) / std.

    BLIP's text encoder reads the prompt, cut to 35 tokens, with cross attention to the image's
    patches; mean and std are the published constants, so scores are about standard normal.
    """

    differentiable = True
    libraries = ("torch", "transformers", "tokenizers")

    def __init__(self, weights: str | None) -> None:
        from transformers import AutoTokenizer, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.model, tokenizer = split(weights, WEIGHTS, TOKENIZER)
        with expecting("weights of ImageReward, a single file", self.model):
            state = from_published(read(find_file(self.model)))
            self.vision = from_state(BlipVisionModel, VISION, state["vision"])
            self.text = from_state(BlipTextModel, TEXT, state["text"], add_pooling_layer=False)
            self.head = LinearHead(TEXT["hidden_size"])
            self.head.load_state_dict(state["head"])
        with expecting("a BERT tokenizer", tokenizer):
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def each(self, images: Tensor, prompts: list[str]) -> Tensor:  # [B, 3, H, W] -> [B]
        pixels = preprocess.openai_clip(images, self.vision.config.image_size)
        patches = self.vision(pixel_values=pixels).last_hidden_state  # [B, 1 + patches, D]
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(images.device)
        hidden = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=patches,
        ).last_hidden_state
        return (self.head(hidden[:, 0]) - MEAN) / STD

    def beside(self) -> dict[str, Any]:
        return {
            "preprocessing": f"openai_clip, {self.vision.config.image_size} pixels",
            "tokenizer": tokenizer_hash(self.tokenizer),
            "tokens": TOKENS,
        }


_NAMES = (
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    ("blip.text_encoder.", "text."),
    ("mlp.layers.", "head.layers."),
)
_BLOCK = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Of BLIP's contrastive training, and a constant."""


def from_published(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights of `vision`, `text` and `head`, in their names, from ImageReward.pt's."""
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    for name, value in state.items():
        if name.startswith(_UNUSED):
            continue
        for old, new in _NAMES:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        if name.startswith("vision.encoder."):
            for old, new in _BLOCK:
                name = name.replace(old, new)
        part, _, name = name.partition(".")
        if part not in parts:
            raise ValueError(f"unknown weight {part}.{name}")
        parts[part][name] = value
    return parts
