"""The optimizer step: whether it is one, and how far it is clipped, decided on the device.

By itself DeepSpeed's ZeRO takes the norm of each of a UNet's hundreds of gradients and waits on the
host to hear whether it is finite. Here the norm is taken of what a rank has in as few tensors as there
are, stays on the device, and is told to the optimizer inside, which skips and clips there. That one
must be able to: PyTorch's fused Adam and AdamW are.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def take_over(engine) -> None:
    """Leave the decisions of an engine's optimizer steps to `step_optimizer` where it can take them;
    to be called once, before the first."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        engine.clip_fp32_gradients = lambda: None  # the norm is known by then
        _does_as_told(engine.basic_optimizer)
    elif _sums_of_all(engine) is not None:
        _does_as_told(engine.basic_optimizer)
        _leaves_it_to_the_inner_one(optimizer)
    elif _shares_out_sums(engine):
        optimizer.check_grad_overflow = False
        optimizer.scaled_global_norm = lambda: 1.0  # no tensor, so nobody waits for one
        optimizer.unscale_and_clip_grads = lambda *_: None


def step_optimizer(engine) -> Tensor:
    """Take the optimizer step, unless the averaged gradient is not finite: then no rank takes it,
    and neither weights nor moments nor their step counts move.

    Where `averaged_gradient` finds it, its norm stays on the device, and the optimizer decides and clips
    there, if it can. Elsewhere ZeRO decides on the host.

    Returns:
        L2 norm of the averaged gradient before clipping; not finite where the step was skipped.
    """
    found = averaged_gradient(engine)
    if found is not None:
        norm = _norm(*found)
        engine.basic_optimizer.found_inf = (~norm.isfinite()).float()
        if limit := engine.gradient_clipping():
            # what a fused optimizer divides the gradient by while it reads it anyway
            engine.basic_optimizer.grad_scale = (norm / limit).clamp(min=1.0)
        engine.step()
        return norm
    engine.step()
    if not engine.was_step_applied() and engine.lr_scheduler is not None:
        engine.lr_scheduler.step()  # the learning rate is that of the step's number
    norm = engine.get_global_grad_norm()
    return norm if isinstance(norm, Tensor) else torch.full((), norm, device=engine.device)


def averaged_gradient(engine) -> tuple[list[Tensor], dist.ProcessGroup | None] | None:
    """The averaged gradient as this rank has it, in as few tensors as there are, and the ranks that
    have the rest of it: None where each has all.

    It is found without ZeRO, at stages 1 and 2 with an optimizer that can be told, and in bf16 at
    stage 1 with sums in float32; elsewhere (another optimizer, fp16, stage 3, offloading) the whole
    is None.
    """
    if engine.zero_optimization_stage() == 0:
        gradients = (parameter.grad for parameter in engine.module.parameters())
        return [gradient for gradient in gradients if gradient is not None], None
    if (sums := _sums_of_all(engine)) is not None:
        return sums, None
    if not _shares_out_sums(engine):
        return None
    parts = []
    for share in engine.optimizer.averaged_gradients.values():  # of each group: tensors
        buffer = getattr(share, "flat_partition", None)  # in which they may lie
        parts += share if buffer is None else [buffer]
    return parts, engine.optimizer.dp_process_group


def _norm(parts: list[Tensor], ranks: dist.ProcessGroup | None) -> Tensor:
    """L2, float32 [], of a vector in parts, here and on other ranks."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts, dtype=torch.float32)))
    if ranks is None or dist.get_world_size(ranks) == 1:
        return norm
    total = norm.square()
    dist.all_reduce(total, group=ranks)
    return total.sqrt()


def _sums_of_all(engine) -> list[Tensor] | None:
    """The buffers of the optimizer that DeepSpeed takes for bf16 at stage 1 with sums in float32, in
    which the averaged gradient is the same on all ranks; None of other optimizers."""
    optimizer = engine.optimizer
    buffers = getattr(optimizer, "fp32_groups_actual_gradients_flat", None)
    if not buffers or any(buffer.dtype != torch.float32 for buffer in buffers):
        return None
    # Muon's updates are made of the clipped gradient
    return None if _is_in_parts(optimizer) or optimizer._uses_muon else buffers


def _is_in_parts(optimizer) -> bool:
    """Whether the model is divided among ranks, so that each has gradients of its own."""
    return optimizer.mpu is not None or optimizer.has_moe_layers


def _shares_out_sums(engine) -> bool:
    """Whether it is DeepSpeed's optimizer for stages 1 and 2, in which each rank has its share of the
    averaged gradient in the device's memory, around one that can be told, with nothing to unscale."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer, inner = engine.optimizer, engine.basic_optimizer
    if type(optimizer) is not DeepSpeedZeroOptimizer or not _can_be_told(inner):
        return False
    if optimizer.optimizer is not inner:  # it has replaced it by one of its own
        return False
    unscaled = optimizer.dtype != torch.float16 and optimizer.torch_autocast_gradscaler is None
    return unscaled and not _is_in_parts(optimizer) and not optimizer.cpu_offload


def _can_be_told(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it obeys `found_inf` and `grad_scale` on the device: PyTorch's fused Adam and AdamW. So
    does its fused SGD, but whose first step was none takes what lay in memory for its momentum."""
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return fused and isinstance(optimizer, torch.optim.Adam)


def _leaves_it_to_the_inner_one(optimizer) -> None:
    """Let DeepSpeed's bf16 optimizer (stage 1) take each step, and the one inside decide whether it
    is one: by itself it looks at each gradient, and its host waits for the norm three times."""
    weights = optimizer.fp32_groups_flat_partition  # this rank's share, and of its gradient
    gradients = optimizer.fp32_groups_gradient_flat_partition

    @torch.no_grad()
    def step() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.optimizer.step()
        if optimizer.state:  # there is none yet where the first steps were skipped on the host
            optimizer._lazy_init_hp_params_optimizer_state()
        optimizer.update_lp_params()  # the engine then clears the gradients

    optimizer.step = step


def _does_as_told(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer obey `found_inf` and `grad_scale`; one that cannot be told on the device waits
    for the flag on the host."""
    if _can_be_told(optimizer):
        return
    step = optimizer.step

    def obedient(*args, **kwargs):
        told = vars(optimizer)  # torch's plain Adam refuses to see them
        skip, scale = told.pop("found_inf"), told.pop("grad_scale", None)
        if skip:
            return None
        if scale is not None:
            weights = (weight for group in optimizer.param_groups for weight in group["params"])
            grads = [weight.grad for weight in weights if weight.grad is not None]
            torch._foreach_div_(grads, scale)
        return step(*args, **kwargs)

    optimizer.step = obedient


class Skips:
    """Optimizer steps without an update, counted on the device."""

    def __init__(self, device: torch.device, total: int = 0):
        self.total = torch.full((), float(total), device=device)
        self.in_a_row = torch.zeros((), device=device)

    def add(self, skipped: Tensor) -> None:
        """Count one optimizer step; `skipped` is a bool [] on the device."""
        self.total += skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
