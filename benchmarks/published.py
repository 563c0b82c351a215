"""The UNets of published models, by their configurations."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

UNETS = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Published configurations (stable-diffusion-v1-5, stable-diffusion-xl-base-1.0), where they differ
from the class's defaults."""

PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}


def make_unet(name: str, **changes) -> UNet2DConditionModel:
    """A UNet of the published configuration, with random weights."""
    return UNet2DConditionModel(**UNETS[name] | changes)
