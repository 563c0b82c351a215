"""Low-rank adapters on the UNet (peft); the reference is the same UNet with them switched off."""

from __future__ import annotations

import torch

from dde_fast.config import TrainConfig

ADAPTER = "default"
"""peft's name of the one adapter."""


def targets_of(c: TrainConfig) -> list[str]:
    """The names in `lora_targets`."""
    return [name for name in (part.strip() for part in c.lora_targets.split(",")) if name]


def require_peft() -> None:
    """Raise a ValueError if peft is missing, before anything is loaded for it."""
    try:
        import peft  # noqa: F401  (to see whether it is there)
    except ImportError as error:
        raise ValueError(
            f"lora_rank: expected peft to be installed (pip install peft), got {error}"
        ) from None


def add_adapters(unet: torch.nn.Module, c: TrainConfig) -> None:
    """Freeze the UNet and put adapters on its target layers: ΔW = alpha / rank · B A, with B = 0.

    Raises:
        ValueError: a target names no layer that can have an adapter.
    """
    from peft import LoraConfig

    layers = [f".{name}" for name, _ in unet.named_modules()]
    for target in targets_of(c):
        if not any(layer.endswith(f".{target}") for layer in layers):
            raise ValueError(
                f"lora_targets: expected ends of names of the UNet's layers, such as to_q, got "
                f"{target!r}"
            )
    unet.requires_grad_(False)
    settings = LoraConfig(
        r=c.lora_rank, lora_alpha=c.lora_alpha or c.lora_rank, target_modules=targets_of(c)
    )
    with torch.random.fork_rng(devices=[]):  # A is random: equal on every rank and in every run
        torch.manual_seed(c.seed)
        try:
            unet.add_adapter(settings, ADAPTER)
        except ValueError as error:  # of a layer such as a norm
            raise ValueError(f"lora_targets: {error}; got {c.lora_targets!r}") from None


class AdaptersOff:
    """The frozen reference within the policy: called like a UNet, it runs without its adapters.

    No second model in memory, and exactly the base: a layer whose adapters are off is its base.
    """

    def __init__(self, engine):
        self.unet = engine.module

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        self.unet.disable_adapters()
        try:
            return self.unet(*args, **kwargs)
        finally:
            self.unet.enable_adapters()
