"""A Stable Diffusion of random weights and a few pairs, small enough to train in a second."""

import io
import json
import string
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH, WIDTH = 8, 16


def make_model(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write a pipeline: 8 x 8 px images, latents 4 x 4 x 4."""
    torch.manual_seed(seed)
    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate([start, end, *letters])},
        merges=[],
        model_max_length=LENGTH,
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=end,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def png(seed: int, size: int = 8) -> bytes:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def rows(count: int = 12) -> list[dict]:
    """Rows in Pick-a-Pic's columns; images and captions come back in several of them."""
    return [
        {
            "caption": ("happy", "sad", "cat face")[i % 3],
            "jpg_0": png(i),
            "jpg_1": png((i + 5) % count),
            "label_0": float(i % 2),
            "label_1": float(1 - i % 2),
            "has_label": True,
            "ranking_id": i,
        }
        for i in range(count)
    ]


def write_pairs(path: Path, table: list[dict]) -> Path:
    """Write rows as parquet."""
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


def write_ds(path: Path, **settings) -> Path:
    """Write a DeepSpeed JSON: 4 pairs per micro-batch, unless told otherwise."""
    base = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0}
    path.write_text(json.dumps(base | settings))
    return path
