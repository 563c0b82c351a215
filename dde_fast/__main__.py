"""`python -m dde_fast`: versions, what is there, and which backend is used here and why."""

from __future__ import annotations

import platform

import torch

import dde_fast
from dde_fast import backends, compiled
from dde_fast.provenance import version

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "deepspeed",
    "xformers",
    "peft",
    "bitsandbytes",
)


def main() -> None:
    print(f"dde-fast {dde_fast.__version__}, Python {platform.python_version()}")
    for package in PACKAGES:
        print(f"  {package:<13}{version(package) or 'not installed'}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for name in devices:
        device = torch.device(name)
        what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        print(f"{name} ({what}): backend {backends.resolve_backend('auto', device)}")
        for backend in backends.BACKENDS:
            state = backends.why_not(backend, device) or "available"
            if state == "available" and backend == "cpp" and device.type == "cpu":
                state += f", {compiled.isa()}"
            print(f"  {backend:<13}{state}")


if __name__ == "__main__":
    main()
