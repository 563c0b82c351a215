"""Tensors side by side in one buffer of bytes: one copy takes them all to a device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: the widest load of a kernel."""


@dataclass(frozen=True)
class Packed:
    """Named tensors in one buffer."""

    buffer: Tensor
    """uint8 [bytes]."""
    places: Mapping[str, tuple[int, Sequence[int], torch.dtype]]
    """name -> first byte, shape, dtype."""
    copied: torch.cuda.Event | None = None
    """Happens once the buffer's content is on its device; None: it is there."""

    def tensors(self) -> dict[str, Tensor]:
        """Views of the buffer."""
        found = {}
        for name, (start, shape, dtype) in self.places.items():
            end = start + math.prod(shape) * dtype.itemsize
            found[name] = self.buffer[start:end].view(dtype).reshape(shape)
        return found


def pack(parts: Mapping[str, Tensor | list[Tensor]], pinned: bool = False) -> Packed:
    """Copy tensors of the CPU, and stacks of rows of one shape and dtype, into a buffer, each once.

    Args:
        parts: name -> a tensor, or the rows [...] of a tensor [rows, ...].
        pinned: whether a GPU may read the buffer by itself.
    """
    places, end = {}, 0
    for name, part in parts.items():
        stacked = not isinstance(part, Tensor)
        shape = (len(part), *part[0].shape) if stacked else part.shape
        dtype = part[0].dtype if stacked else part.dtype
        places[name] = (end, shape, dtype)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    packed = Packed(buffer, places)
    for name, view in packed.tensors().items():
        part = parts[name]
        if isinstance(part, Tensor):
            view.copy_(part)
        else:
            torch.stack(part, out=view)
    return packed


class Mover:
    """Takes packed tensors to a device, by one copy each, which a GPU makes beside its other work.

    One thread sends, the one that computes receives. Each batch has buffers of its own: PyTorch's
    allocators give pinned memory away again once the copy out of it is done, and the device's once
    the stream that received it has used it, so nothing is overwritten too early and nobody waits.

    Args:
        device: where the tensors are needed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def pinned(self) -> bool:
        """Whether what is sent should be packed into pinned memory."""
        return self.stream is not None

    def begin(self) -> None:
        """To be called first in the thread that sends: a new thread's current device is the first one,
        where this process may have nothing to do."""
        if self.stream is not None:
            torch.cuda.set_device(self.device)

    def send(self, packed: Packed) -> Packed:
        """Begin to copy; on the CPU there is nothing to copy."""
        if self.stream is None:
            return replace(packed, buffer=packed.buffer.to(self.device))
        with torch.cuda.stream(self.stream):
            buffer = packed.buffer.to(self.device, non_blocking=True)
            return replace(packed, buffer=buffer, copied=self.stream.record_event())

    def receive(self, packed: Packed) -> dict[str, Tensor]:
        """The tensors, for work on the current stream, which waits for their copy in the host's
        stead."""
        if packed.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(packed.copied)
            packed.buffer.record_stream(stream)
        return packed.tensors()
