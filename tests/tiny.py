"""A Stable Diffusion of random weights and a few pairs, small enough to train in a second."""

import io
import json
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

LENGTH, WIDTH = 8, 16


def make_model(
    folder: Path, prediction_type: str = "epsilon", seed: int = 0, **scheduler: object
) -> Path:
    """Write a pipeline of the architecture of SD 1.x: 8 x 8 px images, latents 4 x 4 x 4."""
    torch.manual_seed(seed)
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text(layers=1)),
        tokenizer=_tokenizer(),
        unet=_unet(cross_attention_dim=WIDTH, attention_head_dim=8),
        scheduler=_scheduler(prediction_type=prediction_type, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_v_model(folder: Path, **scheduler: object) -> Path:
    """Write a pipeline of the architecture of SD 2.1: v-prediction, OpenCLIP's text encoder, heads
    per block, linear projections."""
    torch.manual_seed(1)
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text(layers=2, hidden_act="gelu", projection_dim=8)),
        tokenizer=_tokenizer(pad_token="!"),
        unet=_unet(
            cross_attention_dim=WIDTH, attention_head_dim=(1, 2), use_linear_projection=True
        ),
        scheduler=_scheduler(prediction_type="v_prediction", **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_sdxl_model(folder: Path, **options: object) -> Path:
    """Write a pipeline of the architecture of SDXL: two text encoders, of which the second pools,
    and a UNet that reads the pooled caption and six time ids."""
    torch.manual_seed(2)
    pooled, per_id = 12, 8
    StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(_text(layers=3)),
        text_encoder_2=CLIPTextModelWithProjection(
            _text(layers=3, width=8, hidden_act="gelu", projection_dim=pooled)
        ),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(pad_token="!"),
        unet=_unet(
            cross_attention_dim=WIDTH + 8,
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=per_id,
            projection_class_embeddings_input_dim=pooled + 6 * per_id,
        ),
        scheduler=_scheduler(),
        **options,
    ).save_pretrained(folder)
    return folder


def _tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate([start, end, *letters, "!"])},
        merges=[],
        model_max_length=LENGTH,
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=pad_token,
    )


def _text(layers: int, width: int = WIDTH, **options: object) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(_tokenizer()),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **options,
    )


def _vae(**options: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        **options,
    )


def _unet(**options: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **options,
    )


def _scheduler(**options: object) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        **options,
    )


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
