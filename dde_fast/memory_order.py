"""channels_last: the memory order of both UNets and of what they are asked and should answer.

Each convolution is given its input in that order, as diffusers' transformers and PyTorch's
GroupNorm on CUDA leave theirs in the default one. DeepSpeed broadcasts weights in the default order
alone, and ZeRO keeps those under training in flat buffers of that order: those the convolutions
convert at each call. So an engine's weights are reordered once it has started, and only those that
ZeRO does not hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dde_fast.config import TrainConfig


def memory_order(c: TrainConfig) -> torch.memory_format:
    """Of noised latents and targets."""
    return torch.channels_last if c.channels_last else torch.contiguous_format


def use_memory_order(unet: torch.nn.Module, c: TrainConfig, stage: int = 0) -> None:
    """Let a UNet's convolutions run in that order, and hold its weights in it where they can be.

    Args:
        unet: in its engine, if it has one.
        c: of the run.
        stage: of ZeRO in that engine.
    """
    if not c.channels_last:
        return
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(_reorder_input)
            held = stage == 3 or (stage > 0 and module.weight.requires_grad)
            if not held:
                module.weight.data = _reordered(module.weight.data)


def _reordered(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _reorder_input(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (_reordered(args[0]), *args[1:])
