"""Where the tests run: on the GPU when there is one, else on the CPU with Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    # read by triton when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402  (the variable comes first)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device() -> torch.device:
    return DEVICE
