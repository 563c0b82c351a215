"""Stable Diffusion's parts through diffusers, loaded one by one so that each can be freed.

A model is a diffusers directory (or hub name) of a StableDiffusionPipeline: vae, text_encoder,
tokenizer, unet, scheduler. The encoders are needed once, before training; the policy is the UNet
in float32; the frozen reference is the same UNet in the compute dtype.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dde_fast.pairs import decode

PIPELINE = "StableDiffusionPipeline"


def check_model(model: str) -> None:
    """Refuse what is no Stable Diffusion pipeline, before anything large is loaded.

    Raises:
        ValueError: no such directory or hub name, or a pipeline of another kind.
    """
    expected = f"model: expected a diffusers directory or hub name of a {PIPELINE}"
    try:
        if Path(model).is_dir():
            index = json.loads((Path(model) / "model_index.json").read_text(encoding="utf-8"))
        else:
            index = DiffusionPipeline.load_config(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{expected}, got {model!r} ({error})") from None
    if index.get("_class_name") != PIPELINE:
        raise ValueError(f"{expected}, got a {index.get('_class_name')} in {model!r}")


def load_scheduler(model: str) -> DDPMScheduler:
    """The model's noise schedule, whichever sampler it ships."""
    return DDPMScheduler.from_pretrained(model, subfolder="scheduler")


def load_unet(model: str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The model's UNet in that dtype, whatever its files hold."""
    return UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=dtype)


def load_reference(model: str, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """The frozen UNet: always the model's own weights, never those of a resumed run."""
    return load_unet(model, dtype).to(device).eval().requires_grad_(False)


@dataclass
class Encoders:
    """What turns images and captions into the UNet's inputs; float32, without gradient."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    device: torch.device

    @classmethod
    def load(cls, model: str, device: torch.device) -> Encoders:
        """The model's encoders on a device."""
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(
            model, subfolder="text_encoder", dtype=torch.float32
        )
        tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
        vae.to(device).eval().requires_grad_(False)
        text_encoder.to(device).eval().requires_grad_(False)
        return cls(vae, text_encoder, tokenizer, device)

    @torch.no_grad()
    def latents(self, images: Sequence[bytes], latent_size: int | Sequence[int]) -> Tensor:
        """[B, C, H, W]: mean of the VAE's posterior times its scaling factor.

        An image of another size is scaled to cover the model's and cropped at its centre.
        """
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        sides = (latent_size,) * 2 if isinstance(latent_size, int) else latent_size
        height, width = (side * scale for side in sides)
        pixels = torch.stack([_pixels(image, (width, height)) for image in images])
        posterior = self.vae.encode(pixels.to(self.device)).latent_dist
        return posterior.mode() * self.vae.config.scaling_factor

    @torch.no_grad()
    def embeddings(self, captions: Sequence[str]) -> Tensor:
        """[B, L, D]: the text encoder's last hidden state of the padded caption."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(tokens.to(self.device))[0]


def _pixels(image: bytes, size: tuple[int, int]) -> Tensor:
    """float32 [3, H, W] in [-1, 1]."""
    picture = decode(image)
    if picture.size != size:
        picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of names, shapes and values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        values = parameter.detach().float().cpu().contiguous().numpy()
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(values)
    return digest.hexdigest()


def save_unet(engine, checkpoint: Path, directory: Path) -> None:
    """Write the engine's UNet for diffusers, in exact float32. Rank 0 only; not a collective.

    Args:
        engine: the DeepSpeed engine.
        checkpoint: a complete checkpoint of this very step: under ZeRO it holds the float32
            weights that the ranks share, while the engine's own may be 16-bit or partitioned.
        directory: where to write.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if engine.zero_optimization_stage() == 0:
        state = engine.module.state_dict()
    else:
        talk = io.StringIO()  # it prints every parameter group and draws progress bars
        with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
            state = get_fp32_state_dict_from_zero_checkpoint(checkpoint.parent, checkpoint.name)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(engine.module.config)
    unet.load_state_dict(state, assign=True)
    unet.save_pretrained(directory)
