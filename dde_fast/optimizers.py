"""The table of optimizers, each from its own library; the DeepSpeed JSON may name one instead."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer."""

    module: str
    """Where it is imported from."""
    name: str
    """Of its class there."""
    package: str
    """What pip installs it with."""
    options: Callable[[TrainConfig], dict[str, Any]]
    """Its keyword arguments, learning rate included."""
    partitions: bool = True
    """Whether it may be given the flat slices that ZeRO cuts the parameters into."""
    splits: bool = False
    """Whether DeepSpeed can split its states for another number of ranks: those of Adam alone."""


def _adam(c: TrainConfig) -> dict[str, Any]:
    betas = (c.adam_beta1, c.adam_beta2)
    return {
        "lr": c.learning_rate,
        "betas": betas,
        "eps": c.adam_eps,
        "weight_decay": c.weight_decay,
    }


def _lion(c: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in _adam(c).items() if key != "eps"}


def _adafactor(c: TrainConfig) -> dict[str, Any]:
    # the learning rate is the configuration's, not relative to step and weights
    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return {"lr": c.learning_rate, "weight_decay": c.weight_decay, **fixed}


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw": OptimizerRow(
        "torch.optim", "AdamW", "torch", lambda c: _adam(c) | {"fused": True}, splits=True
    ),
    "adamw8bit": OptimizerRow("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", _adam),
    "lion8bit": OptimizerRow("bitsandbytes.optim", "Lion8bit", "bitsandbytes", _lion),
    # on flat slices it would keep a full second moment, and clip by the slice
    "adafactor": OptimizerRow("transformers", "Adafactor", "transformers", _adafactor, False),
}


def unsplittable(c: TrainConfig, e: EngineConfig) -> str | None:
    """What of the optimizer's states DeepSpeed would lose when it splits a ZeRO checkpoint for
    another number of ranks, where it keeps Adam's two moments and nothing else; None = nothing."""
    if c.ema_decay:
        return "the average that ema_decay keeps"
    if "optimizer" not in e.json:
        name = "adamw" if c.optimizer == "auto" else c.optimizer
        return None if OPTIMIZERS[name].splits else f"the states of {name}"
    kind, params = e.json["optimizer"]["type"], e.json["optimizer"]["params"]
    if kind.lower() not in ("adam", "adamw"):
        return f"the states of {kind}"
    return "the maxima of amsgrad" if params.get("amsgrad") else None


def check_optimizer(c: TrainConfig, ds: Mapping[str, Any]) -> None:
    """Refuse an optimizer that is not in the table, or beside the DeepSpeed JSON's own.

    Args:
        c: of the run.
        ds: the JSON, checked.

    Raises:
        ValueError: naming those that are.
    """
    if c.optimizer not in ("auto", *OPTIMIZERS):
        raise ValueError(
            f"optimizer: expected auto or one of {list(OPTIMIZERS)}, got {c.optimizer!r}"
        )
    if "optimizer" in ds and c.optimizer != "auto":
        raise ValueError(
            f"optimizer: expected auto beside {c.deepspeed_config!r}, which names "
            f"{ds['optimizer']['type']!r}, got {c.optimizer!r}"
        )


def load_optimizer(
    c: TrainConfig, e: EngineConfig
) -> Callable[[Any], torch.optim.Optimizer] | None:
    """The configuration's optimizer as a function of the parameters; None = the JSON's own.

    Raises:
        ValueError: an unknown name, a package that is not installed, or a contradiction to the
            DeepSpeed JSON.
    """
    check_optimizer(c, e.json)
    if "optimizer" in e.json:
        return None
    name = "adamw" if c.optimizer == "auto" else c.optimizer
    row = OPTIMIZERS[name]
    if e.stage > 0 and not row.partitions:
        raise ValueError(
            f"optimizer: expected one that works on the flat slices of ZeRO stage {e.stage}, got "
            f"{name!r}; use stage 0, or another optimizer"
        )
    try:
        kind = getattr(importlib.import_module(row.module), row.name)
    except ImportError as error:
        raise ValueError(
            f"optimizer: expected {row.package} to be installed for {name!r} (pip install "
            f"{row.package}), got {error}"
        ) from None
    return functools.partial(kind, **row.options(c))
