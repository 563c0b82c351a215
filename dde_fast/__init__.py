"""Fused preference alignment of text-to-image diffusion models."""

from dde_fast.loss import PreferenceLoss, PreferenceOutput
from dde_fast.objectives import OBJECTIVES

__version__ = "0.1.0"
__all__ = ["OBJECTIVES", "PreferenceLoss", "PreferenceOutput"]
