"""What every reward is once it is loaded: a module that scores images."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from dde_fast.provenance import content_hash, version


class Scorer(nn.Module):
    """Base of the scorers: checks the input, follows the images to their device, says what it is.

    Called with images, float [B, 3, H, W] in [0, 1], and one prompt per image; returns scores [B],
    or one number [] for all images if `per` is "set". Higher is better. `batch` images are scored at
    a time, all by default. A subclass computes them in `each`, and a set's number in `whole`; its
    weights are parameters and buffers, which `identity` hashes. A set's scorer may have
    `with_std(values) -> (score, its standard deviation)` beside `whole`, both [].

    Raises:
        ValueError: images of another dtype or shape, not one prompt per image, or a subclass that does
            not give one score per image.
    """

    name: str = ""
    """Its row in `rewards.REWARDS`, which sets this and the next two."""
    differentiable: bool = False
    """Whether a gradient reaches the images."""
    per: str = "image"
    """`image` or `set`."""
    model: str = "none"
    """Where its weights come from: a hub name, a path, or the file of this package."""
    libraries: tuple[str, ...] = ("torch",)
    """Packages that its scores depend on."""

    def __init__(self) -> None:
        super().__init__()
        # tells the device and dtype of a scorer, with weights or without
        self.register_buffer("place", torch.empty(0), persistent=False)

    def each(self, images: Tensor, prompts: list[str]) -> Tensor:  # [B, 3, H, W] -> [B, ...]
        """Scores of images that are on the scorer's device and in its dtype, or what `whole` needs of
        each."""
        raise NotImplementedError

    def whole(self, values: Tensor) -> Tensor:  # [B, ...] -> [B] or []
        """The result from what `each` gave."""
        return values

    def forward(self, images: Tensor, prompts: list[str], batch: int | None = None) -> Tensor:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return self.whole(self.values(images, prompts, batch))

    def values(self, images: Tensor, prompts: list[str], batch: int | None) -> Tensor:
        """What `each` gives for all images, [B, ...]."""
        images = self.prepared(images, prompts)
        step, parts = batch or len(images), []
        for i in range(0, len(images), step):
            shown = images[i : i + step]
            part = self.each(shown, prompts[i : i + step])
            expected = (len(shown), *part.shape[1:]) if self.per == "set" else (len(shown),)
            if part.shape != expected:
                raise ValueError(
                    f"rewards: expected scores {list(expected)} of {self.name}, one per image, got "
                    f"{list(part.shape)}"
                )
            parts.append(part)
        return torch.cat(parts)

    def check(self, prompts: list[str]) -> None:
        """Raise ValueError for prompts that cannot be scored, before there are images."""

    def prepared(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The images in the scorer's dtype, checked; the scorer moves to their device."""
        rgb = images.ndim == 4 and images.shape[1] == 3 and images.numel() > 0
        if not (rgb and images.is_floating_point()):
            raise ValueError(
                f"images: expected float [B, 3, H, W], got {images.dtype} {list(images.shape)}"
            )
        if len(prompts) != len(images):
            raise ValueError(f"prompts: expected {len(images)}, one per image, got {len(prompts)}")
        if self.place.device != images.device:
            self.to(images.device)
        return images.to(self.place.dtype)

    def beside(self) -> dict[str, Any]:
        """What the scores follow from beside the weights, JSON-able: tokenizer, preprocessing, …"""
        return {}

    def identity(self) -> dict[str, Any]:
        """For results: name, model, what is `beside` the weights, library versions, and the sha256 of
        all weights as they are loaded, and of what is beside them where there is anything."""
        beside = self.beside()
        weights = ((f"{name} {value.dtype}", value) for name, value in self.state_dict().items())
        noted = json.dumps(beside, sort_keys=True) if beside else ""
        versions = {library: version(library) for library in self.libraries}
        found = {"name": self.name, "model": self.model, "sha256": content_hash(weights, noted)}
        return found | beside | versions
