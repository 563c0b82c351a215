"""Published models by their configurations, with random weights, and pairs of random pictures."""

from __future__ import annotations

import io
import string
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

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


VAES = {
    "sd15": {"sample_size": 512, "scaling_factor": 0.18215},
    "sdxl": {"sample_size": 1024, "scaling_factor": 0.13025},
}
TEXTS = {
    "sd15": ({},),
    "sdxl": (
        {},
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
    ),
}
"""Text encoders, where they differ from OpenAI's CLIP ViT-L/14."""

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
SMALL = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "projection_dim": 16}
"""A text encoder for a test."""


def small_unet(name: str) -> dict:
    """Changes that make a published UNet one for a test."""
    blocks = len(UNETS[name]["block_out_channels"])
    changes = {"block_out_channels": (32,) * blocks, "attention_head_dim": 4}
    return changes | {"transformer_layers_per_block": 1, "layers_per_block": 1}


def write_pipeline(folder: Path, name: str, latent: int, small: bool = False) -> Path:
    """Write a pipeline of the published configuration with random weights, in float16.

    Its tokenizers know letters alone: no text encoder takes longer for that.

    Args:
        folder: a new directory.
        name: of `UNETS`.
        latent: height and width of its latents.
        small: make every part small, for a test.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = [CLIP_L | changes | (SMALL if small else {}) for changes in TEXTS[name]]
    width = sum(text["hidden_size"] for text in texts)
    changes: dict = {"sample_size": latent}
    if small:
        changes |= {"cross_attention_dim": width, **small_unet(name)}
        if name == "sdxl":
            changes |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    channels = (32,) * 4 if small else (128, 256, 512, 512)
    ends = tuple(f"<|{word}oftext|>" for word in ("start", "end"))
    words = [
        *ends,
        *string.ascii_lowercase,
        *(f"{letter}</w>" for letter in string.ascii_lowercase),
    ]
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[],
        model_max_length=77,
        bos_token=ends[0],
        eos_token=ends[1],
        unk_token=ends[1],
        pad_token=ends[1],
    )
    known = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    with device:
        encoders = [
            kind(CLIPTextConfig(**text | known)) for kind, text in zip(kinds, texts, strict=False)
        ]
        vae = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1 if small else 2,
            latent_channels=4,
            **VAES[name],
        )
        unet = make_unet(name, **changes)
    parts = {
        "vae": vae,
        "unet": unet,
        "scheduler": DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
        ),
        "tokenizer": tokenizer,
        "text_encoder": encoders[0],
    }
    if name == "sdxl":
        pair = {"tokenizer_2": tokenizer, "text_encoder_2": encoders[1]}
        pipeline = StableDiffusionXLPipeline(**parts, **pair)
    else:
        checker = {"safety_checker": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **checker, feature_extractor=None)
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    return folder


def write_random_pairs(path: Path, *, size: int, pairs: int, images: int) -> Path:
    """Write pairs of random pictures in Pick-a-Pic's columns; pictures come back in several."""
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(images):
        file = io.BytesIO()
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "jpeg")
        pictures.append(file.getvalue())
    rows = [
        {
            "caption": f"picture {string.ascii_lowercase[i % 26]}",
            "jpg_0": pictures[i % images],
            "jpg_1": pictures[(i + 1) % images],
            "label_0": float(i % 2),
            "label_1": float(1 - i % 2),
            "has_label": True,
            "ranking_id": i,
        }
        for i in range(pairs)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
