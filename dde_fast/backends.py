"""The choice of backend: which there are, what each needs, and which one serves a tensor.

A backend is a few modules of `dde_fast` with functions of the ops' names.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

BACKENDS = {
    "reference": ("reference", "ratios"),
    "triton": ("triton_kernels", "triton_ratios", "triton_noise", "triton_sampling"),
    "cpp": ("compiled",),
}
"""backend -> modules of `dde_fast` that hold its ops, searched in order."""

AUTO = {"cpu": ("cpp",), "cuda": ("triton", "cpp"), "xpu": ("triton",)}
"""device type -> backends by preference, before the reference, which serves everywhere."""


def why_not(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve tensors of a device; None if it can."""
    if backend == "cpp":
        from dde_fast import compiled

        return compiled.why_not(device)
    if backend != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type not in ("cuda", "xpu", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        return f"triton has no kernels for {device.type} tensors (TRITON_INTERPRET=1 simulates)"
    return None


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that serves `device`; `auto` is the first of `AUTO` that can.

    Raises:
        ValueError: an unknown backend, or one that cannot serve the device, with the reason.
    """
    if backend == "auto":
        able = (name for name in AUTO.get(device.type, ()) if why_not(name, device) is None)
        return next(able, "reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {['auto', *BACKENDS]}, got {backend!r}")
    reason = why_not(backend, device)
    if reason:
        raise ValueError(f"backend: {backend!r} cannot serve this call: {reason}")
    return backend


@functools.cache
def implementation(backend: str, name: str) -> Callable:
    """The backend's own function of an op's name."""
    modules = [importlib.import_module(f"dde_fast.{module}") for module in BACKENDS[backend]]
    return next(getattr(module, name) for module in modules if hasattr(module, name))
