"""Images of a model: its pipeline, the sampler, and the folder that keeps them.

A model is what `models.locate` takes, or the directory of a UNet or of adapters, which go into a
base's pipeline.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from dde_fast import models
from dde_fast.noise import pair_noise
from dde_fast.shards import sweep, write_file

LORA = "pytorch_lora_weights.safetensors"
"""The file that makes a directory one of adapters."""

MODEL = "model.json"
"""What a folder of images was sampled with."""

_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def part_of(model: str) -> str | None:
    """ "unet" or "lora" for a directory of one, None for anything else."""
    folder = Path(model)
    if (folder / LORA).is_file():
        return "lora"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return "unet" if config["_class_name"] == "UNet2DConditionModel" else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def load_pipeline(
    base: str, model: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """The pipeline of a model with a DDIM sampler.

    Args:
        base: as in `models.locate`.
        model: the same, or the directory of a UNet, which replaces the base's, or of adapters,
            which are added to it.
        device: where it samples.
        dtype: of everything but the VAE, which stays in float32.
    """
    part = part_of(model)
    own = {}
    if part == "unet":
        own["unet"] = UNet2DConditionModel.from_pretrained(
            model, torch_dtype=torch.float32, use_safetensors=True
        )
    pipeline = ddim_pipeline(base if part else model, **own)
    if part == "lora":
        pipeline.load_lora_weights(model, weight_name=LORA)
    return cast(pipeline, dtype).to(device)


def ddim_pipeline(model: str, **parts: Any) -> DiffusionPipeline:
    """As `models.load_pipeline`, with a DDIM sampler and without its progress bar."""
    pipeline = models.load_pipeline(model, **parts)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cast(pipeline: DiffusionPipeline, dtype: torch.dtype) -> DiffusionPipeline:
    """Everything but the VAE in that dtype: SDXL's overflows in 16 bits."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name != "vae":
            part.to(dtype)
    return pipeline


def model_hash(pipeline: DiffusionPipeline) -> str:
    """SHA-256 (first 16 digits) of all weights that make the images, in the dtype they have."""
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module):
            digest.update(f"{name} {models.fingerprint(part)}\n".encode())
    return digest.hexdigest()[:16]


def sample(pipeline: DiffusionPipeline, prompts: Sequence[str], **options: Any) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] on the CPU, one per prompt; options as in `sample_batches`."""
    return torch.cat(list(sample_batches(pipeline, prompts, **options)))


@torch.no_grad()
def sample_batches(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int,
    guidance: float,
    batch: int,
    indices: Sequence[int] | None = None,
    draws: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Images by DDIM (η = 0) with classifier-free guidance, a batch at a time.

    Image i starts from the noise of (seed, indices[i], draws[i]), whatever batch it is in.

    Args:
        pipeline: of Stable Diffusion or SDXL.
        prompts: N, one per image.
        seed, steps, guidance: of the noise; of the sampler; 1 is none.
        batch: images at a time.
        indices: numbers of the prompts; 0 … N-1 by default.
        draws: which image of its prompt each is; the first by default.

    Yields:
        float32 [≤ batch, 3, H, W] in [0, 1] on the CPU.

    Raises:
        ValueError: an image is not finite.
    """
    ids = torch.tensor(range(len(prompts)) if indices is None else indices, dtype=torch.int64)
    counts = torch.tensor(draws or [0] * len(prompts), dtype=torch.int64)
    shape = models.latent_shape(pipeline.unet.config)
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        noise = pair_noise(shape, seed=seed, pair_ids=ids[rows], draw=counts[rows])
        latents = pipeline(
            list(prompts[rows]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise.to(pipeline.device, pipeline.unet.dtype),
            output_type="latent",
        ).images
        images = models.decode(pipeline.vae, latents).cpu()
        if not images.isfinite().all():
            dtype = str(pipeline.unet.dtype).removeprefix("torch.")
            raise ValueError(f"dtype: expected finite images of the model in {dtype}, got others")
        yield images


class Images:
    """The images of a model in a folder, NNNNN.png, each whole or not there.

    Args:
        folder: of this model alone.
        count: images that it shall hold.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.png"

    def claim(self, model: dict[str, str]) -> None:
        """Note which model's images these are.

        Raises:
            ValueError: the folder holds images of other weights, or of weights that nobody noted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / MODEL
        try:
            found = json.loads(note.read_text(encoding="utf-8"))["sha256"]
        except FileNotFoundError:
            if any(self.folder.glob("*.png")):
                raise ValueError(f"output: expected {MODEL} beside {str(self.path(0))!r}") from None
            return write_file(note, (json.dumps(model, indent=1) + "\n").encode())
        except (ValueError, LookupError, TypeError):
            found = "a damaged file"
        if found != model["sha256"]:
            raise ValueError(
                f"output: {str(self.folder)!r} holds images of other weights: expected "
                f"{model['sha256']}, as of {model['path']!r}, got {found}; choose another output"
            )

    def model(self) -> dict[str, str]:
        """Path and sha256 of the model that was claimed."""
        return json.loads((self.folder / MODEL).read_text(encoding="utf-8"))

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of the numbers whose images are not there; what killed processes left of them is
        removed."""
        lacking = [number for number in numbers if not is_whole(self.path(number))]
        for number in lacking:
            sweep(self.folder, f"{number:05d}.png.*")
        return lacking

    def write(self, number: int, image: Tensor) -> None:  # [3, H, W] in [0, 1]
        pixels = (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png", compress_level=1)
        write_file(self.path(number), file.getvalue())

    def read(self, numbers: Iterable[int]) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: one of them is damaged.
        """
        found = []
        for number in numbers:
            try:
                with Image.open(self.path(number), formats=["PNG"]) as picture:
                    pixels = np.array(picture.convert("RGB"))
            except (OSError, SyntaxError) as error:
                path = str(self.path(number))
                raise ValueError(
                    f"output: expected an image in {path!r}, got {error}; delete it"
                ) from None
            found.append(torch.from_numpy(pixels).permute(2, 0, 1))
        return torch.stack(found).float() / 255


def is_whole(path: Path) -> bool:
    """Whether a PNG is there up to its last byte."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), io.SEEK_END)
            return file.read() == _PNG_END
    except OSError:  # none, or one that is shorter
        return False
