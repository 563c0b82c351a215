"""Memory on the CPU that large gradients use in turn.

torch takes memory for each from the system and gives it back afterwards, so that every step writes to
fresh pages: each of them costs a fault and is filled with zeros first, which takes longer than the
loss. On a GPU torch keeps memory by itself.
"""

from __future__ import annotations

import mmap
import sys
import threading

import torch
from torch import Tensor

from dde_fast.reference import is_dense

FROM_BYTES = 2**18
"""Smaller ones malloc hands out again by itself."""

PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""A forked process has its own."""

KEPT = 2
"""Most that are kept: callers often hold one gradient until they have the next."""

_kept: list[mmap.mmap] = []
_lock = threading.Lock()


def _references(kept: list, at: int) -> int:
    """To one of a list: the list's, the question's own, and one for each tensor in that memory, as
    long as it or a view of it lives."""
    return sys.getrefcount(kept[at])


UNUSED = _references([object()], 0)


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like(x)`, in the memory of an earlier one of that size that is gone, if there is.

    What comes back is a tensor like others, but its storage cannot be resized.
    """
    size = x.numel() * x.element_size()
    if not x.is_cpu or size < FROM_BYTES or not is_dense(x):
        return torch.empty_like(x)
    with _lock:
        for at in range(len(_kept)):
            if len(_kept[at]) == size and _references(_kept, at) == UNUSED:
                memory = _kept[at]
                break
        else:
            memory = mmap.mmap(-1, size, **PRIVATE)
            _kept[:] = [memory, *_kept[: KEPT - 1]]
        out = torch.frombuffer(memory, dtype=x.dtype, count=x.numel())
    return out.as_strided(x.shape, x.stride())
