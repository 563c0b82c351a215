"""torch.compile of policy and reference, by name, and the seconds that it takes.

UNets are compiled in place, so that parameters, checkpoints and exports have the names of an eager
run. Training's shapes are fixed: what they need is compiled in the first optimizer step. What looks
at a run with shapes of its own, validation and grids, runs without the compiler (`eagerly`).

In 16 bits the policy's graph, which keeps what its backward needs, rounds unlike the reference's, so
that equal models do not have equal predictions to the last bit, as they have in float32 and without
the compiler. Once they differ, either way rounds them apart as far.

A CUDA graph writes what it gives, predictions and gradients, to the same memory at each replay.
inductor's graph trees keep what is alive until `begin_micro_batch`; then the next replay may
overwrite it. Predictions end with their micro-batch, as loss and log hold tensors of their own.
Gradients do not where autograd leaves them in `.grad` until the optimizer step: `keeps_gradients`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.memory import summed_at_once

GRAPHS = 64
"""Of one piece of code, before torch gives up compiling it. Its own 8 are just enough for the blocks
of Stable Diffusion 1.5 (four sizes, each with and without gradient), not for adapters or samplers."""


def _whole(module: torch.nn.Module, **options) -> None:
    # not `module.compile`, whose graph takes in DeepSpeed's hooks and their clocks
    module.forward = torch.compile(module.forward, dynamic=False, **options)


def repeated_blocks(unet: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks of a UNet, which are alike, as diffusers names them.

    Raises:
        ValueError: it has none.
    """
    names = unet._repeated_blocks
    blocks = [module for module in unet.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"compile: expected whole or none for a UNet without a {' or '.join(names)}, got 'regional'"
        )
    return blocks


def _regional(unet: UNet2DConditionModel) -> None:
    for block in repeated_blocks(unet):
        _whole(block)


COMPILE: dict[str, Callable[..., None]] = {
    "regional": _regional,
    "whole": _whole,
    "graphs": partial(_whole, mode="reduce-overhead"),
}
"""What compiles a UNet when it is first called."""


def use_compile(unet: UNet2DConditionModel, name: str) -> None:
    """Let a UNet compile itself so at its next call; "" leaves it alone."""
    if name:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        COMPILE[name](unet)


def needs_whole_weights(c: TrainConfig) -> bool:
    """Whether what is compiled reaches over more than a block, and so over ZeRO-3's gathering."""
    return c.compile not in ("", "regional")


def gather_blocks_whole(unet: torch.nn.Module, name: str) -> None:
    """Let ZeRO-3, which gathers weights module by module as they are called, gather all of a block at
    once where blocks are compiled: then nothing is gathered inside. To be called before its engine is
    made."""
    if name != "regional":
        return
    from deepspeed.utils import set_z3_leaf_module

    for block in repeated_blocks(unet):
        block.register_forward_pre_hook(_with_gradient)
        set_z3_leaf_module(block, True)


def _with_gradient(block: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # DeepSpeed takes the gradients of such a block's weights when that of its input is there: the
    # first one's has none where adapters alone are trained
    hidden, *more = args
    wanted = torch.is_grad_enabled() and not hidden.requires_grad
    return (hidden.detach().requires_grad_() if wanted else hidden, *more)


def begin_micro_batch(c: TrainConfig) -> None:
    """Tell CUDA graphs that what the last micro-batch computed may be overwritten. Called once in
    each, before any model runs: the reference's prediction must outlive the policy's forward."""
    if c.compile == "graphs":
        torch.compiler.cudagraph_mark_step_begin()


def keeps_gradients(e: EngineConfig) -> bool:
    """Whether gradients stay where the backward pass wrote them while the next micro-batch runs.

    Not so with ZeRO stage 2, which copies each into buffers of its own and lets go of it, unless
    `contiguous_gradients` is off; nor with bf16 at stage 1 whose float32 sums take it at once.
    """
    if e.accumulation == 1:
        return False
    if e.stage == 2:
        return not e.json["zero_optimization"].get("contiguous_gradients", True)
    return not summed_at_once(e.stage, e.json)


def check_graphs(c: TrainConfig, e: EngineConfig) -> None:
    """Refuse CUDA graphs that would overwrite gradients, on any machine.

    Raises:
        ValueError: saying what does not.
    """
    if c.compile == "graphs" and keeps_gradients(e):
        raise ValueError(
            "compile: expected regional or whole where gradients are kept between micro-batches, "
            "which the next replay of a CUDA graph overwrites, got 'graphs' with "
            f"{e.accumulation} of them at ZeRO stage {e.stage}; one of them, stage 2 with "
            "contiguous_gradients, or bf16 at stage 1 with data_types.grad_accum_dtype fp32 and "
            "bf16.immediate_grad_update would do"
        )


def check_compile_settings(c: TrainConfig, stage: int) -> None:
    """Refuse to compile what cannot be, on any machine.

    Args:
        c: of the run.
        stage: of ZeRO.

    Raises:
        ValueError: an unknown name, or more than blocks of a UNet whose weights are shared out.
    """
    if not c.compile:
        return
    if c.compile not in COMPILE:
        raise ValueError(f"compile: expected none or one of {list(COMPILE)}, got {c.compile!r}")
    if (stage == 3 or c.shard_reference) and needs_whole_weights(c):
        why = "shard_reference" if c.shard_reference else "ZeRO stage 3"
        raise ValueError(
            f"compile: expected regional or none with {why}, whose hooks gather weights block by "
            f"block, got {c.compile!r}"
        )


def check_compile(c: TrainConfig, e: EngineConfig, device: torch.device) -> None:
    """Refuse to compile where it cannot be.

    Raises:
        ValueError: as `check_compile_settings` and `check_graphs`, graphs without a GPU, or a machine
            without a compiler that works.
    """
    check_compile_settings(c, e.stage)
    if not c.compile:
        return
    if c.compile == "graphs" and device.type != "cuda":
        raise ValueError(
            f"compile: expected regional or whole on {device.type}, as CUDA graphs need a GPU of "
            "NVIDIA's, got 'graphs'"
        )
    check_graphs(c, e)

    def compiled_plus(x: torch.Tensor) -> torch.Tensor:
        return x + torch.compiler.is_compiling()

    try:
        works = torch.compile(compiled_plus)(torch.zeros(1, device=device)).item() == 1
        why = "torch.compile is switched off"
    except Exception as error:  # dynamo's, inductor's, triton's, the operating system's
        works, why = False, " ".join(str(error).split("\n")[:2])
    if not works:
        raise ValueError(
            f"compile: expected a machine with a compiler for {device.type} that torch finds (g++ "
            f"and Python's headers, for a GPU triton), got {c.compile!r} ({why})"
        )


@contextlib.contextmanager
def eagerly(c: TrainConfig) -> Iterator[None]:
    """Within, nothing is compiled, and what was compiled is not used."""
    with torch.compiler.set_stance("force_eager") if c.compile else contextlib.nullcontext():
        yield


class CompileTime:
    """Seconds that torch.compile takes in this process."""

    def __init__(self):
        self.before = self._total()

    @staticmethod
    def _total() -> float:
        dynamo = sys.modules.get("torch._dynamo.utils")  # not there, nothing was compiled
        return 0.0 if dynamo is None else dynamo.calculate_time_spent()["total_wall_time"]

    def lately(self) -> float:
        """Since the last time this was asked."""
        before, self.before = self.before, self._total()
        return self.before - before
