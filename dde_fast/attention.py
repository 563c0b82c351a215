"""How the UNets compute attention, by name.

diffusers' own `set_attention_backend` does nothing to a UNet2DConditionModel, whose processors do
not ask it; these are set as its processors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


class FlashAttnProcessor(AttnProcessor2_0):
    """PyTorch's attention by its flash kernel alone, in a checkpoint's recomputation too."""

    def __call__(self, *args, **kwargs):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().__call__(*args, **kwargs)


def _sdpa(unet: UNet2DConditionModel, dtype: torch.dtype, device: torch.device) -> None:
    unet.set_attn_processor(AttnProcessor2_0())


def _eager(unet: UNet2DConditionModel, dtype: torch.dtype, device: torch.device) -> None:
    unet.set_attn_processor(AttnProcessor())


def _xformers(unet: UNet2DConditionModel, dtype: torch.dtype, device: torch.device) -> None:
    unet.enable_xformers_memory_efficient_attention()


def _flash(unet: UNet2DConditionModel, dtype: torch.dtype, device: torch.device) -> None:
    widths = {m.inner_dim // m.heads for m in unet.modules() if isinstance(m, Attention)}
    for width in widths:  # what the kernel refuses, it should refuse before a run begins
        q, k, v = torch.zeros(3, 1, 1, 8, width, dtype=dtype, device=device, requires_grad=True)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            scaled_dot_product_attention(q, k, v)
    unet.set_attn_processor(FlashAttnProcessor())


ATTENTION: dict[str, Callable[[UNet2DConditionModel, torch.dtype, torch.device], None]] = {
    "sdpa": _sdpa,
    "flash": _flash,
    "xformers": _xformers,
    "eager": _eager,
}
"""What sets a UNet's attention, and raises where it cannot be served."""


def check_attention(name: str) -> None:
    """Refuse a name that is not in the table.

    Raises:
        ValueError: listing those that are.
    """
    if name not in ATTENTION:
        raise ValueError(f"attention: expected one of {list(ATTENTION)}, got {name!r}")


def use_attention(
    unet: UNet2DConditionModel, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Let a UNet, about to run in that dtype on that device, compute attention so.

    Raises:
        ValueError: an unknown name, or one that cannot be served here.
    """
    check_attention(name)
    try:
        ATTENTION[name](unet, dtype, device)
    except (RuntimeError, ValueError, ImportError) as error:
        raise ValueError(
            f"attention: expected one that runs here in {dtype} on {device.type}, got {name!r} "
            f"({error})"
        ) from None
