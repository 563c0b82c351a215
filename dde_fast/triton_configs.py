"""Block sizes and numbers of warps of the Triton kernels: a fixed table, and tuning on request.

With DDE_FAST_AUTOTUNE=1 in the environment the first call of a kernel of `TUNED` on a device, for a
number of elements and a dtype, times a few configurations and takes the fastest for the rest of the
process, for all batch sizes and memory orders. It prints a line to stderr whose tuple can be put
into `FIXED`, before the rows there. It costs a few compilations, and meanwhile the 256 MB with
which `do_bench` clears the GPU's cache.

Kernels that sum may differ in the last bits between configurations: the partial sums are those of
blocks. So tuned runs, and the ranks of one, may differ there. Without the variable nothing is
timed, and the same inputs give the same bits.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor
from triton.testing import do_bench


class Config(NamedTuple):
    block: int
    num_warps: int


FIXED: dict[str, list[tuple[str, float, int, int]]] = {
    "pair_errors": [("gfx9", inf, 1024, 2), ("", inf, 1024, 4)],
    "pair_logits": [("gfx9", inf, 32, 2), ("", inf, 32, 4)],
    "preference_loss_backward": [("gfx9", inf, 1024, 2), ("", inf, 1024, 4)],
    "add_noise": [("gfx9", inf, 256, 2), ("", inf, 256, 4)],
    "pair_uniform": [("", inf, 256, 4)],
    "ddim_step": [("gfx9", inf, 1024, 2), ("", inf, 1024, 4)],
    "ddim_density": [("", inf, 256, 1)],
    "ddim_step_backward": [("gfx9", inf, 1024, 2), ("", inf, 1024, 4)],
    "observe_ratios": [("", inf, 256, 4)],
    "update_ratios": [("", inf, 256, 4)],
}
"""kernel -> (start of the architecture's name, largest N, block, warps); the first row that fits
serves.

N: elements of a latent; pairs for `pair_uniform`, timesteps for the ratios.
block: elements that a program has at a time; for `add_noise`, which makes `pair_noise` too, fours
of them; for `pair_logits` and `ddim_density` an upper bound.

Nothing here has been measured. 128 threads with 8 elements each make one 128-bit access in 16
bits and two in float32. AMD's gfx9 has warps of 64 threads: four would halve the width in 16 bits.
"""

TUNED = ("pair_errors", "preference_loss_backward", "add_noise", "ddim_step", "ddim_step_backward")
"""Kernels whose work is per element of the latents; none writes what it reads."""

_fastest: dict[tuple[str, torch.device, int, torch.dtype], Config] = {}


def serving(kernel: str, architecture: str, n: float) -> Config:
    """The table's configuration for an architecture ("sm_90", "gfx942", …) and N elements."""
    rows = (row for row in FIXED[kernel] if architecture.startswith(row[0]) and n <= row[1])
    return Config(*next(rows)[2:])


def architecture(device: torch.device) -> str:
    """Name of a GPU's architecture; the device's type if it is none."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def fixed(kernel: str, device: torch.device, n: int) -> Config:
    """`serving` on a device."""
    return serving(kernel, architecture(device), n)


def candidates(usual: Config) -> list[Config]:
    """What tuning tries: the usual one first, then 4 to 16 elements per thread around its 8."""
    scales = ((2, 2), (1, 1), (1, 2), (2, 4), (4, 2), (4, 4))  # halves of block and warps
    tried = (Config(usual.block * b // 2, max(1, usual.num_warps * w // 2)) for b, w in scales)
    return list(dict.fromkeys(tried))


@functools.cache
def requested() -> bool:
    """Whether the environment asks for tuning; read once.

    Raises:
        ValueError: DDE_FAST_AUTOTUNE is neither 0 nor 1.
    """
    value = os.environ.get("DDE_FAST_AUTOTUNE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"DDE_FAST_AUTOTUNE: expected 0 or 1, got {value!r}")
    return value == "1"


def may_time(device: torch.device) -> bool:
    """Whether a kernel can be timed now: not in the interpreter, nor while a graph is recorded."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return False
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return capturing is None or not capturing()


def choose(kernel: str, tensor: Tensor, n: int, launch: Callable[[Config], object]) -> Config:
    """The configuration to launch a kernel of `TUNED` with.

    Args:
        tensor: on the device of all, of the dtype that most of them have.
        n: elements of a latent.
        launch: runs the kernel in a configuration, as often as asked.
    """
    if not requested():
        return fixed(kernel, tensor.device, n)
    key = kernel, tensor.device, n, tensor.dtype
    if key in _fastest:
        return _fastest[key]
    usual = fixed(kernel, tensor.device, n)
    if not may_time(tensor.device):
        return usual
    times = {}  # median milliseconds, with cold caches
    for config in candidates(usual):
        run = functools.partial(launch, config)
        times[config] = do_bench(run, warmup=5, rep=20, return_mode="median")
    best = _fastest[key] = min(times, key=times.__getitem__)
    row = architecture(tensor.device), n, *best
    note = f"{tensor.dtype}, {times[best]:.4f} ms; {tuple(usual)}: {times[usual]:.4f} ms"
    print(f"dde_fast: triton_configs.FIXED: {kernel}: {row},  # {note}", file=sys.stderr)
    return best
