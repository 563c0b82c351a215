"""Stable Diffusion's parts through diffusers, loaded one by one so that each can be freed.

A model is named by one string: "embedded"; a diffusers directory or hub name; or an original
single file, FILE.safetensors, or FILE.safetensors+CONFIG where CONFIG is a diffusers directory or
hub name whose configurations and tokenizers go with it (its weights are not read). Without CONFIG
diffusers names the published pipeline that the file's keys belong to, and fetches its
configurations, some kilobytes.

The encoders are needed once, before training; the policy is the UNet in float32; the frozen
reference is the same UNet in the compute dtype.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from torch import Tensor

from dde_fast.provenance import content_hash
from dde_fast.weights import expecting, tokenizer_hash


def quiet_libraries() -> None:
    """Let the libraries report errors alone: not image processors that nobody needs, casts that
    change nothing, or a bar for every part that is read."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


@dataclass(frozen=True)
class Family:
    """What a kind of pipeline needs beside its VAE, UNet and scheduler."""

    text: tuple[tuple[str, str], ...]
    """Its (tokenizer, text encoder) parts; their hidden states are joined along the last axis."""
    hidden: Callable[[Any], Tensor]
    """From a text encoder's output to the hidden states [B, L, D] that the UNet reads."""
    pooled: bool
    """Whether the UNet reads the last text encoder's projection [B, P] and six time ids."""
    options: dict[str, Any]
    """For loading: no part that neither training nor evaluation uses."""


_UNUSED = {"feature_extractor": None, "image_encoder": None}

FAMILIES = {
    # SD 1.x and 2.x
    "StableDiffusionPipeline": Family(
        text=(("tokenizer", "text_encoder"),),
        hidden=lambda output: output[0],
        pooled=False,
        options={"safety_checker": None, "requires_safety_checker": False, **_UNUSED},
    ),
    "StableDiffusionXLPipeline": Family(
        text=(("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
        hidden=lambda output: output.hidden_states[-2],
        pooled=True,
        options={"add_watermarker": False, **_UNUSED},
    ),
}
"""The pipelines that can be trained, by their class in diffusers."""

DECODED_AT_ONCE = 2**21
"""Pixels in one call of the VAE's decoder, in float32: 8 images of 512 x 512."""

_VARIANTS = (None, "fp16")
"""Names that weight files go by: model.safetensors, model.fp16.safetensors."""

_expecting = partial(expecting, argument="model", hint="")


@dataclass(frozen=True)
class Source:
    """Where a model's parts are."""

    configs: str
    """A diffusers directory or hub name."""
    file: str | None
    """The single file that holds the weights; None: they are beside the configurations."""
    pipeline: str
    """Class of the pipeline, a key of `FAMILIES`."""

    def load(self, kind: type, dtype: torch.dtype, subfolder: str | None = None, **options) -> Any:
        """A part of the model, or its pipeline (no `subfolder`), whatever dtype its files hold.

        Raises:
            ValueError, OSError: files missing or broken, or a single file and configurations that
                are not of one model.
        """
        if subfolder is not None:
            options["subfolder"] = subfolder
        options["torch_dtype"] = dtype
        with warnings.catch_warnings():
            # its new name, `dtype`, is unknown to the oldest diffusers that this package supports
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
            with _expecting(f"a whole {kind.__name__}", self.file or self.configs):
                if self.file:
                    return self._load_file(kind, options)
                return self._load_parts(kind, options)

    def _load_file(self, kind: type, options: dict[str, Any]) -> Any:
        try:
            part = kind.from_single_file(self.file, config=self.configs, **options)
            return part.to("cpu")  # a weight that the file lacks was left on the meta device
        except (single_file_utils.SingleFileComponentError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"model: expected a file with every weight of the {self.pipeline} that "
                f"{self.configs!r} describes, got {self.file!r} ({error})"
            ) from None

    def _load_parts(self, kind: type, options: dict[str, Any]) -> Any:
        failures = []
        for variant in _VARIANTS:
            try:
                part = kind.from_pretrained(
                    self.configs, variant=variant, use_safetensors=True, **options
                )
                # a weight that the files lack was left on the meta device
                return part.to("cpu") if isinstance(part, torch.nn.Module) else part
            except (OSError, ValueError) as error:
                failures.append(error)
        raise failures[0]


def locate(model: str | Path) -> Source:
    """Where the parts of a named model are; nothing large is loaded.

    Raises:
        ValueError: no such directory, hub name or file, or a pipeline that is not in `FAMILIES`.
    """
    if model == "embedded":
        from dde_fast import embedded

        model = embedded.model_path()
    model = str(model)
    expected = f"model: expected a diffusers directory or hub name of a {' or '.join(FAMILIES)}"
    file, suffix, configs = model.partition(".safetensors")
    single = bool(suffix) and not Path(model).is_dir()
    file, configs = (file + suffix, configs.removeprefix("+")) if single else (None, model)
    if single and not Path(file).is_file():
        raise ValueError(f"model: expected a .safetensors file, got {file!r}")
    if not model:
        raise ValueError(f"{expected}, got ''")
    try:
        configs = configs or _published(file)
        if Path(configs).is_dir():
            index = json.loads((Path(configs) / "model_index.json").read_text(encoding="utf-8"))
        else:
            index = DiffusionPipeline.load_config(configs)
    except (OSError, ValueError, RecursionError) as error:
        hint = "; without a network name one that fits: FILE.safetensors+DIRECTORY" if file else ""
        raise ValueError(f"{expected}, got {configs!r}{hint} ({error})") from None
    kind = str(index.get("_class_name") if isinstance(index, dict) else type(index).__name__)
    if kind not in FAMILIES:
        raise ValueError(f"{expected}, got a {kind} in {configs!r}")
    return Source(configs, file, index["_class_name"])


def _published(file: str) -> str:
    """Hub name of the published pipeline that a single file has the keys of."""
    checkpoint = single_file_utils.load_single_file_checkpoint(file)
    return single_file_utils.fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]


def load_scheduler(model: str) -> DDPMScheduler:
    """The model's noise schedule, whichever sampler it ships."""
    configs = locate(model).configs
    with _expecting("a scheduler that DDPMScheduler can be made from", configs):
        return DDPMScheduler.from_pretrained(configs, subfolder="scheduler")


def load_unet(model: str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The model's UNet in that dtype, whatever its files hold."""
    return locate(model).load(UNet2DConditionModel, dtype, "unet")


def load_unet_config(model: str) -> dict[str, Any]:
    """The configuration of the model's UNet; its weights are not read."""
    configs = locate(model).configs
    with _expecting("the configuration of a UNet2DConditionModel", configs):
        found = UNet2DConditionModel.load_config(configs, subfolder="unet")
        needed = ("sample_size", "in_channels", "cross_attention_dim")
        if missing := [key for key in needed if key not in found]:
            raise KeyError(f"none of {missing}")
        return found


def load_reference(model: str, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """The frozen UNet: always the model's own weights, never those of a resumed run."""
    return load_unet(model, dtype).to(device).eval().requires_grad_(False)


def load_pipeline(model: str, **parts: Any) -> DiffusionPipeline:
    """The model's pipeline in float32.

    Args:
        model: as in `locate`.
        parts: components to use instead of the model's own; None leaves one out.
    """
    source = locate(model)
    options = FAMILIES[source.pipeline].options | parts
    return source.load(getattr(diffusers, source.pipeline), torch.float32, **options)


@dataclass
class Encoders:
    """What turns images and captions into the UNet's inputs; float32, without gradient.

    SDXL's VAE overflows in 16 bits, so float32 it is for every model.
    """

    family: Family
    vae: AutoencoderKL
    tokenizers: list[Any]
    text_encoders: list[torch.nn.Module]
    zero_empty: bool
    """Whether guidance samples against zeros instead of the empty caption's embedding."""
    device: torch.device

    @classmethod
    def load(cls, model: str, device: torch.device) -> Encoders:
        """The model's encoders on a device."""
        family = FAMILIES[locate(model).pipeline]
        pipeline = load_pipeline(model, unet=None)
        encoders = cls(
            family=family,
            vae=pipeline.vae,
            tokenizers=[getattr(pipeline, name) for name, _ in family.text],
            text_encoders=[getattr(pipeline, name) for _, name in family.text],
            zero_empty=pipeline.config.get("force_zeros_for_empty_prompt", False),
            device=device,
        )
        for module in (encoders.vae, *encoders.text_encoders):
            module.to(device).eval().requires_grad_(False)
        return encoders

    @property
    def scale(self) -> int:
        """Pixels per latent element, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def posterior(
        self,
        pixels: Tensor,  # float [B, 3, H, W] in [-1, 1]
    ) -> tuple[Tensor, Tensor]:
        """(mean, std), float32 [B, C, h, w]: mean + std·n with standard normal n is a sample of
        the VAE's posterior as the UNet reads it, scaled and shifted.

        Raises:
            ValueError: the VAE's output is not finite.
        """
        pixels = pixels.to(self.device, torch.float32)
        posterior = self.vae.encode(pixels).latent_dist
        mean, std = posterior.mean, posterior.std
        config = self.vae.config
        factor = torch.full((1,), config.scaling_factor, device=self.device)
        if getattr(config, "latents_mean", None) is not None:
            shift, spread = (
                torch.tensor(values, device=self.device).reshape(1, -1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            mean, factor = mean - shift, factor / spread
        mean, std = mean * factor, std * factor
        finite = (mean.isfinite() & std.isfinite()).flatten(1).all(1)
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise ValueError(f"model: expected finite latents from its VAE, got others at {bad}")
        return mean, std

    def decode(self, latents: Tensor) -> Tensor:  # [B, C, h, w] -> [B, 3, H, W]
        """As the function `decode`, by this VAE."""
        return decode(self.vae, latents)

    def prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """float32 `embeddings` [B, L, D] of the padded captions and, for SDXL, `pooled` [B, P].

        The empty caption's are those that guidance samples against: zeros where the pipeline has
        `force_zeros_for_empty_prompt`.

        Raises:
            ValueError: they are not finite.
        """
        encoded = self.encode(captions)
        if bad := [name for name, value in encoded.items() if not value.isfinite().all()]:
            raise ValueError(f"model: expected finite text embeddings, got others in {bad}")
        return encoded

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """As `prompts`, and the host does not wait to look at what came out."""
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            output = encoder(tokens.to(self.device), output_hidden_states=True)
            hidden.append(self.family.hidden(output))
        encoded = {"embeddings": torch.cat(hidden, dim=-1)}
        if self.family.pooled:
            encoded["pooled"] = output[0]
        if self.zero_empty and "" in captions:
            empty = [i for i, caption in enumerate(captions) if caption == ""]
            for value in encoded.values():
                value[empty] = 0
        return encoded

    def identity(self) -> dict[str, str]:
        """SHA-256 of each encoder's content, by name: what encoded pairs depend on."""
        names = ("scaling_factor", "latents_mean", "latents_std")
        values = [fingerprint(self.vae), *(self.vae.config.get(name) for name in names)]
        found = {"vae": _sha256(json.dumps(values))}
        for (tokenizer, encoder), own, module in zip(
            self.family.text, self.tokenizers, self.text_encoders, strict=True
        ):
            found[tokenizer] = tokenizer_hash(own)
            found[encoder] = fingerprint(module)
        return found


def decode(
    vae: AutoencoderKL,
    latents: Tensor,  # float [B, C, h, w], as the UNet reads them
) -> Tensor:
    """Images float32 [B, 3, H, W] in [0, 1]; differentiable where they are not cut off."""
    config, latents = vae.config, latents.float() / vae.config.scaling_factor
    if getattr(config, "latents_mean", None) is not None:
        shift, spread = (
            latents.new_tensor(values).reshape(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        latents = latents * spread + shift
    pixels = latents[0, 0].numel() * 4 ** (len(config.block_out_channels) - 1)
    parts = latents.split(max(1, DECODED_AT_ONCE // pixels))
    return torch.cat([(vae.decode(part).sample / 2 + 0.5).clamp(0, 1) for part in parts])


def latent_shape(unet_config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, h, w) of the latents that a UNet of this configuration was made for."""
    size = unet_config["sample_size"]
    return (unet_config["in_channels"], *((size, size) if isinstance(size, int) else size))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of names, shapes and values of all parameters, in whatever dtype they are."""
    return content_hash((name, value.float()) for name, value in module.named_parameters())
