"""The public torch ops: schema, fake kernels, gradient, and the choice of backend.

`torch.ops.dde_fast.*` are `torch.library` ops: they pass opcheck, run under
`torch.compile(fullgraph=True)` and on the meta device. A backend is a few modules with functions
of the ops' names; `BACKENDS` is the table of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dde_fast.reference import accumulation_dtype, empty_noised, number_of_pairs

BACKENDS = {
    "reference": ("reference", "ratios"),
    "triton": ("triton_kernels", "triton_ratios", "triton_noise"),
    "cpp": ("compiled",),
}
"""backend -> modules of `dde_fast` that hold its ops, searched in order."""

WITH_GRADIENT = ("cpp",)
"""Backends that can make the gradient in the forward's pass."""


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
    """The backend that serves `device`: `auto` takes triton on a GPU and the reference elsewhere.

    Raises:
        ValueError: an unknown backend, or one that cannot serve the device, with the reason.
    """
    if backend == "auto":
        on_gpu = device.type in ("cuda", "xpu")
        return "triton" if on_gpu and why_not("triton", device) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {['auto', *BACKENDS]}, got {backend!r}")
    reason = why_not(backend, device)
    if reason:
        raise ValueError(f"backend: {backend!r} cannot serve this call: {reason}")
    return backend


def gradient_with_forward(backend: str, policy: Tensor) -> bool:
    """Whether to make the gradient in the forward's pass: not in fp16, whose range needs the loss
    scale that only the backward knows."""
    wanted = torch.is_grad_enabled() and policy.requires_grad
    return wanted and backend in WITH_GRADIENT and policy.dtype != torch.float16


@functools.cache
def _op(backend: str, name: str) -> Callable:
    """The backend's own function of an op's name."""
    modules = [importlib.import_module(f"dde_fast.{module}") for module in BACKENDS[backend]]
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def _check_timesteps(timesteps: Tensor, pairs: int, num_timesteps: int) -> None:
    """Refuse bad timesteps on the CPU. On a GPU looking would stop the host: there a bad pair's
    logit, and with it the loss, is NaN."""
    if timesteps.device.type != "cpu":
        return
    low, high = (int(x) for x in timesteps.aminmax())
    if low < 0 or high >= num_timesteps:
        raise ValueError(
            f"timesteps: expected values in [0, {num_timesteps}), got {low if low < 0 else high}"
        )
    if len(timesteps) > pairs and not torch.equal(timesteps[:pairs], timesteps[pairs:]):
        raise ValueError("timesteps: expected equal halves (a pair shares its timestep)")


def _forward_op(function: Callable) -> Callable:
    """Register a forward of the loss as torch.ops.dde_fast.NAME, with `_LossGradient` as its gradient.

    What `custom_op` and its `register_autograd` do, without the 100 µs that they take at each call.
    """
    name = f"dde_fast::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "CompositeExplicitAutograd", function)
    op = getattr(torch.ops.dde_fast, function.__name__).default

    def with_autograd(policy, *rest):
        if torch.is_grad_enabled() and policy.requires_grad:
            return _LossGradient.apply(op, policy, *rest)
        with torch._C._AutoDispatchBelowAutograd():
            return op(policy, *rest)

    torch.library.impl(name, "Autograd", with_autograd)
    return op


@_forward_op
def preference_loss(
    policy: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    reference: Tensor | None,  # like policy, or its errors float32 [2B], or None
    target: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    timesteps: Tensor,  # int64 [B] or [2B]
    weights: Tensor,  # float32 [T], ω_t
    margins: Tensor,  # float32 [T], m_t
    beta: float,
    lose_weight: float,
    link: str,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [], logits [B], policy_error [2B], reference_error [2B] ([0] without one), margin [B].

    The formula is `dde_fast.reference.preference_loss`'s. Differentiable in `policy` alone.
    """
    _check_timesteps(timesteps, number_of_pairs(policy, target), len(weights))
    constants = (beta, lose_weight, link, label_smoothing)
    out = _op(backend, "preference_loss")(
        policy, reference, target, timesteps, weights, margins, *constants
    )
    return _owned(out, reference)


def _owned(out, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results as an op may return them: all there, none an alias of an input."""
    loss, logits, policy_error, reference_error, margin = out
    if reference_error is None:
        reference_error = policy_error.new_empty(0)
    elif reference_error is reference:
        reference_error = reference.clone()
    return loss, logits, policy_error, reference_error, margin


@torch.library.register_fake("dde_fast::preference_loss")
def _fake_results(policy, reference, target, timesteps, weights, margins, *_):
    rows = 2 * number_of_pairs(policy, target)
    cached = reference is not None and reference.dim() == 1
    dtype = accumulation_dtype(policy, None if cached else reference, target)
    shapes = ((), (rows // 2,), (rows,), (0 if reference is None else rows,), (rows // 2,))
    return tuple(policy.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op("dde_fast::preference_loss_backward", mutates_args=())
def preference_loss_backward(
    grad_loss: Tensor | None,  # []
    grad_logits: Tensor | None,  # [B]
    grad_policy_error: Tensor | None,  # [2B]
    policy: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    target: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    timesteps: Tensor,  # int64 [B] or [2B]
    logits: Tensor,  # [B]
    weights: Tensor,  # float32 [T]
    beta: float,
    lose_weight: float,
    link: str,
    label_smoothing: float,
    backend: str,
) -> Tensor:
    """Gradient of the policy's prediction, in its shape and dtype."""
    return _op(backend, "preference_loss_backward")(
        grad_loss,
        grad_logits,
        grad_policy_error,
        policy,
        target,
        timesteps,
        logits,
        weights,
        beta,
        lose_weight,
        link,
        label_smoothing,
    )


@preference_loss_backward.register_fake
def _(grad_loss, grad_logits, grad_policy_error, policy, *_):
    return torch.empty_like(policy)


@_forward_op
def preference_loss_with_gradient(
    policy: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    reference: Tensor | None,  # like policy, or its errors float32 [2B], or None
    target: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    timesteps: Tensor,  # int64 [B] or [2B]
    weights: Tensor,  # float32 [T]
    margins: Tensor,  # float32 [T]
    beta: float,
    lose_weight: float,
    link: str,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`preference_loss`, and d loss / d policy made in the same pass for the backward to come.

    For backends in `WITH_GRADIENT`; differentiable in `policy` alone, through the first five.
    """
    constants = (beta, lose_weight, link, label_smoothing)
    _check_timesteps(timesteps, number_of_pairs(policy, target), len(weights))
    *out, gradient = _op(backend, "preference_loss_with_gradient")(
        policy, reference, target, timesteps, weights, margins, *constants
    )
    return *_owned(out, reference), gradient


@torch.library.register_fake("dde_fast::preference_loss_with_gradient")
def _(policy, *args):
    return *_fake_results(policy, *args), torch.empty_like(policy)


def _is_one(grad_loss: Tensor) -> bool:
    """Whether the host may look and sees 1, as after `loss.backward()`."""
    return type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and grad_loss.item() == 1


class _LossGradient(torch.autograd.Function):
    """Gradient of a forward op's first three results in `policy`."""

    @staticmethod
    def forward(ctx, op, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        policy, _, target, timesteps, weights, _, *constants = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(policy, target, timesteps, output[1], weights, *output[5:])
        ctx.constants = constants
        return output

    @staticmethod
    def backward(ctx, grad_loss, grad_logits, grad_policy_error, *_):
        policy, target, timesteps, logits, weights, *made = ctx.saved_tensors
        none, elsewhere = (None,) * 10, grad_logits is not None or grad_policy_error is not None
        if grad_loss is None and not elsewhere:
            return None, None, *none
        if made and not elsewhere:
            return None, made[0] if _is_one(grad_loss) else made[0] * grad_loss, *none
        gradient = torch.ops.dde_fast.preference_loss_backward(
            grad_loss,
            grad_logits,
            grad_policy_error,
            policy,
            target,
            timesteps,
            logits,
            weights,
            *ctx.constants,
        )
        return None, gradient, *none


@torch.library.custom_op("dde_fast::observe_ratios", mutates_args=("sums",))
def observe_ratios(
    sums: Tensor,  # float64 [5, T]
    policy_error: Tensor,  # [2B]
    reference_error: Tensor,  # [2B]
    timesteps: Tensor,  # int64 [B] or [2B]
    scale: Tensor,  # float32 [T]
    backend: str,
) -> None:
    """Add a batch's observations to the sums: `dde_fast.ratios.observe_ratios`."""
    _op(backend, "observe_ratios")(sums, policy_error, reference_error, timesteps, scale)


@torch.library.custom_op("dde_fast::update_ratios", mutates_args=("ratios", "margins", "sums"))
def update_ratios(
    ratios: Tensor,  # float32 [4, T]
    margins: Tensor,  # float32 [T]
    sums: Tensor,  # float64 [5, T]
    decay: float,
    backend: str,
) -> None:
    """Fold the sums into the table and derive m_t: `dde_fast.ratios.update_ratios`."""
    _op(backend, "update_ratios")(ratios, margins, sums, decay)


@torch.library.custom_op("dde_fast::pair_noise", mutates_args=())
def pair_noise(
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    shape: Sequence[int],
    seed: int,
    backend: str,
) -> Tensor:
    """Standard normals float32 [B, *shape]: `dde_fast.noise.pair_noise`."""
    return _op(backend, "pair_noise")(pair_ids, draws, shape, seed)


@torch.library.custom_op("dde_fast::pair_uniform", mutates_args=())
def pair_uniform(
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    choice: int,
    seed: int,
    backend: str,
) -> Tensor:
    """One uniform float32 [B] per pair: `dde_fast.noise.pair_uniform`."""
    return _op(backend, "pair_uniform")(pair_ids, draws, choice, seed)


@torch.library.custom_op("dde_fast::add_noise", mutates_args=())
def add_noise(
    latents: Tensor,  # [2B, C, H, W]
    timesteps: Tensor,  # int64 [B] or [2B]
    alphas_cumprod: Tensor,  # [T]
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    seed: int,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """noisy [2B, …] and noise [B, …]: `dde_fast.noise.add_noise`."""
    _check_timesteps(timesteps, len(pair_ids), len(alphas_cumprod))
    return _op(backend, "add_noise")(
        latents, timesteps, alphas_cumprod, pair_ids, draws, seed, dtype, channels_last
    )


observe_ratios.register_fake(lambda *_: None)
update_ratios.register_fake(lambda *_: None)


@pair_noise.register_fake
def _(pair_ids, draws, shape, seed, backend):
    return pair_ids.new_empty((pair_ids.shape[0], *shape), dtype=torch.float32)


@pair_uniform.register_fake
def _(pair_ids, draws, choice, seed, backend):
    return pair_ids.new_empty(pair_ids.shape[0], dtype=torch.float32)


@add_noise.register_fake
def _(latents, timesteps, alphas_cumprod, pair_ids, draws, seed, dtype, channels_last, backend):
    return empty_noised(latents, pair_ids.shape[0], dtype, channels_last)
