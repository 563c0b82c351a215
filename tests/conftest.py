"""Where the tests run: on the GPU when there is one, else on the CPU with Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    # read by triton when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dde_fast import ops  # noqa: E402  (the variable comes first)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [backend for backend in ops.BACKENDS if ops.why_not(backend, DEVICE) is None]
"""What can run here; test_loss.py insists that Triton is among them."""
