"""What a result was made with: commit, versions, machine, content."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import dde_fast

PACKAGES = ("torch", "diffusers", "transformers", "deepspeed")
"""What the numbers depend on; those that are not installed are left out."""


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from, with "-dirty" if it was changed; else
    None."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def version(package: str) -> str | None:
    """Of a package, without importing it; None if it is not installed."""
    if package == "torch":
        return str(torch.__version__)  # the wheel's need not tell CPU and CUDA builds apart
    if package == "dde-fast":
        return dde_fast.__version__  # it may run from a folder on PYTHONPATH, not installed
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """What the numbers were made with; nothing is imported for it."""
    found = {"dde_fast": dde_fast.__version__}
    found |= {name: known for name in PACKAGES if (known := version(name))}
    found["python"] = platform.python_version()
    found["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def content_hash(tensors: Iterable[tuple[str, Tensor]], beside: str = "") -> str:
    """SHA-256 of tensors: of each its label, its shape and the bytes of its values.

    Args:
        tensors: (label, values), in an order that is part of the hash.
        beside: what is hashed before them.
    """
    digest = hashlib.sha256(beside.encode())
    for label, tensor in tensors:
        digest.update(f"{label} {list(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy())  # NumPy knows no bfloat16
    return digest.hexdigest()
