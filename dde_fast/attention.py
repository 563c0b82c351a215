"""How the UNets compute attention, by name.

diffusers' own `set_attention_backend` does nothing to a UNet2DConditionModel, whose processors do
not ask it; these are set as its processors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""PyTorch's own, by name."""


class KernelAttnProcessor(AttnProcessor2_0):
    """PyTorch's attention by one kernel alone, in a checkpoint's recomputation too."""

    def __init__(self, kernel: SDPBackend):
        super().__init__()
        self.kernel = kernel

    def __call__(self, *args, **kwargs):
        with sdpa_kernel(self.kernel):
            return super().__call__(*args, **kwargs)


def _sdpa(unet: UNet2DConditionModel, dtype: torch.dtype, device: torch.device) -> None:
    unet.set_attn_processor(AttnProcessor2_0())


def _eager(unet: UNet2DConditionModel, dtype: torch.dtype, device: torch.device) -> None:
    unet.set_attn_processor(AttnProcessor())


def _xformers(unet: UNet2DConditionModel, dtype: torch.dtype, device: torch.device) -> None:
    unet.enable_xformers_memory_efficient_attention()


def _kernel(
    unet: UNet2DConditionModel, dtype: torch.dtype, device: torch.device, kernel: SDPBackend
) -> None:
    widths = {m.inner_dim // m.heads for m in unet.modules() if isinstance(m, Attention)}
    for width in widths:  # what the kernel refuses, it should refuse before a run begins
        q, k, v = torch.zeros(3, 1, 1, 8, width, dtype=dtype, device=device, requires_grad=True)
        with sdpa_kernel(kernel):
            scaled_dot_product_attention(q, k, v)
    unet.set_attn_processor(KernelAttnProcessor(kernel))


ATTENTION: dict[str, Callable[[UNet2DConditionModel, torch.dtype, torch.device], None]] = {
    "sdpa": _sdpa,
    **{name: partial(_kernel, kernel=kernel) for name, kernel in KERNELS.items()},
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
