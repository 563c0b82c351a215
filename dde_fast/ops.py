"""The public torch ops: schema, fake kernels, gradient.

`torch.ops.dde_fast.*` are `torch.library` ops: they pass opcheck, run under
`torch.compile(fullgraph=True)` and on the meta device. Their last argument names the backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dde_fast.backends import differentiable, implementation, in_plain_eager, once_differentiable
from dde_fast.reference import accumulation_dtype, empty_noised, number_of_pairs

WITH_GRADIENT = ("cpp",)
"""Backends that can make the gradient in the forward's pass."""


def gradient_with_forward(backend: str, policy: Tensor) -> bool:
    """Whether to make the gradient in the forward's pass: not in fp16, whose range needs the loss
    scale that only the backward knows."""
    wanted = torch.is_grad_enabled() and policy.requires_grad
    return wanted and backend in WITH_GRADIENT and policy.dtype != torch.float16


def _check_timesteps(timesteps: Tensor, pairs: int, num_timesteps: int) -> None:
    """Refuse bad timesteps on the CPU. On a GPU looking would stop the host: there a bad pair's
    logit, and with it the loss, is NaN, and so are its noisy latents."""
    if not timesteps.is_cpu:
        return
    values = timesteps.tolist()  # a microsecond, where every tensor op takes several
    low, high = min(values), max(values)
    if low < 0 or high >= num_timesteps:
        raise ValueError(
            f"timesteps: expected values in [0, {num_timesteps}), got {low if low < 0 else high}"
        )
    if len(values) > pairs and values[:pairs] != values[pairs:]:
        raise ValueError("timesteps: expected equal halves (a pair shares its timestep)")


def _explain_nan(loss: Tensor, logits: Tensor, timesteps: Tensor, weights: Tensor) -> None:
    """On the CPU, refuse the timesteps if it is they that made the loss NaN: looked at afterwards, as
    a bad one always does, and reading one number costs less than reading them all."""
    if loss.is_cpu and math.isnan(loss.item()):
        _check_timesteps(timesteps, len(logits), len(weights))


def _is_one(grad_loss: Tensor) -> bool:
    """Whether the host may look and sees 1, as after `loss.backward()`."""
    return type(grad_loss) is Tensor and grad_loss.is_cpu and grad_loss.item() == 1


def _scaled(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """Their product, in the gradient's own memory unless a compiler or a mode is watching."""
    if _is_one(factor):
        return gradient
    if not in_plain_eager(gradient):
        return gradient * factor
    implementation(backend, "scale_gradient")(gradient, factor)
    return gradient


class _LossGradient(torch.autograd.Function):
    """Gradient of a forward op's first three results in `policy`."""

    @staticmethod
    def forward(ctx, run, others, policy, rest):
        output = run(policy, *rest)
        _, target, timesteps, weights, _, *constants = rest
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(policy, target, timesteps, output[1], weights)
        ctx.constants = constants
        ctx.made = output[5] if len(output) > 5 else None
        others += output[3:]
        return output[:3]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_logits, grad_policy_error):
        # handed over once: who gets it may change it, and a second backward makes its own
        made, ctx.made = ctx.made, None
        elsewhere = grad_logits is not None or grad_policy_error is not None
        if grad_loss is None and not elsewhere:
            return None, None, None, None
        if made is not None and not elsewhere:
            return None, None, _scaled(made, grad_loss, ctx.constants[-1]), None
        policy, target, timesteps, logits, weights = ctx.saved_tensors
        incoming = grad_loss, grad_logits, grad_policy_error
        gradient = torch.ops.dde_fast.preference_loss_backward(
            *incoming, policy, target, timesteps, logits, weights, *ctx.constants
        )
        return None, None, gradient, None


@differentiable(_LossGradient)
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
    constants = (beta, lose_weight, link, label_smoothing)
    out = implementation(backend, "preference_loss")(
        policy, reference, target, timesteps, weights, margins, *constants
    )
    _explain_nan(out[0], out[1], timesteps, weights)
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
    return implementation(backend, "preference_loss_backward")(
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


@differentiable(_LossGradient)
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

    For backends in `WITH_GRADIENT`; differentiable in `policy` alone, through the first three. The
    gradient is the backward's, which scales it in place.
    """
    constants = (beta, lose_weight, link, label_smoothing)
    out = implementation(backend, "preference_loss_with_gradient")(
        policy, reference, target, timesteps, weights, margins, *constants
    )
    _explain_nan(out[0], out[1], timesteps, weights)
    return out


@torch.library.register_fake("dde_fast::preference_loss_with_gradient")
def _(policy, *args):
    return *_fake_results(policy, *args), torch.empty_like(policy)


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
    implementation(backend, "observe_ratios")(sums, policy_error, reference_error, timesteps, scale)


@torch.library.custom_op("dde_fast::update_ratios", mutates_args=("ratios", "margins", "sums"))
def update_ratios(
    ratios: Tensor,  # float32 [4, T]
    margins: Tensor,  # float32 [T]
    sums: Tensor,  # float64 [5, T]
    decay: float,
    backend: str,
) -> None:
    """Fold the sums into the table and derive m_t: `dde_fast.ratios.update_ratios`."""
    implementation(backend, "update_ratios")(ratios, margins, sums, decay)


@torch.library.custom_op("dde_fast::pair_noise", mutates_args=())
def pair_noise(
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    shape: Sequence[int],
    seed: int,
    backend: str,
) -> Tensor:
    """Standard normals float32 [B, *shape]: `dde_fast.noise.pair_noise`."""
    return implementation(backend, "pair_noise")(pair_ids, draws, shape, seed)


@torch.library.custom_op("dde_fast::pair_uniform", mutates_args=())
def pair_uniform(
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    choice: int,
    seed: int,
    backend: str,
) -> Tensor:
    """One uniform float32 [B] per pair: `dde_fast.noise.pair_uniform`."""
    return implementation(backend, "pair_uniform")(pair_ids, draws, choice, seed)


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
    return implementation(backend, "add_noise")(
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


class _StepGradient(torch.autograd.Function):
    """Gradient of `ddim_step`'s results in `prediction`."""

    @staticmethod
    def forward(ctx, run, others, prediction, rest):
        made, log_prob = run(prediction, *rest)
        sample, coefficients, _, next_sample, *constants = rest
        ctx.set_materialize_grads(False)
        if next_sample is not None:
            ctx.mark_non_differentiable(made)
        judged = made if next_sample is None else next_sample
        ctx.save_for_backward(prediction, sample, judged, coefficients)
        ctx.constants = constants
        return made, log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_next, grad_log_prob):
        if grad_next is None and grad_log_prob is None:
            return None, None, None, None
        gradient = torch.ops.dde_fast.ddim_step_backward(
            grad_next, grad_log_prob, *ctx.saved_tensors, *ctx.constants
        )
        return None, None, gradient, None


@differentiable(_StepGradient)
def ddim_step(
    prediction: Tensor,  # [B, C, H, W]
    sample: Tensor,  # [B, C, H, W]
    coefficients: Tensor,  # float32 [B, 5]
    noise: Tensor | None,  # [K·B, C, H, W]
    next_sample: Tensor | None,  # [K·B, C, H, W], instead of noise
    prediction_type: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """next [K·B, …] ([0] where it was given) and log_prob [K·B].

    The formula is `dde_fast.sampling.ddim_step`'s. Differentiable in `prediction` alone; next has
    the memory order of `noise`.
    """
    made, log_prob = implementation(backend, "ddim_step")(
        prediction, sample, coefficients, noise, next_sample, prediction_type
    )
    # an op's result may not alias its input
    return sample.new_empty(0) if made is None else made, log_prob


@torch.library.register_fake("dde_fast::ddim_step")
def _(prediction, sample, coefficients, noise, next_sample, *_):
    dtype = accumulation_dtype(prediction, sample, noise, next_sample)
    if noise is None:
        return sample.new_empty(0), sample.new_empty(next_sample.shape[0], dtype=dtype)
    made = torch.empty_like(noise, dtype=sample.dtype)
    return made, sample.new_empty(noise.shape[0], dtype=dtype)


@torch.library.custom_op("dde_fast::ddim_step_backward", mutates_args=())
def ddim_step_backward(
    grad_next: Tensor | None,  # [K·B, C, H, W]
    grad_log_prob: Tensor | None,  # [K·B]
    prediction: Tensor,  # [B, C, H, W]
    sample: Tensor,  # [B, C, H, W]
    next_sample: Tensor,  # [K·B, C, H, W]
    coefficients: Tensor,  # float32 [B, 5]
    prediction_type: str,
    backend: str,
) -> Tensor:
    """Gradient of the prediction, in its shape and dtype."""
    return implementation(backend, "ddim_step_backward")(
        grad_next, grad_log_prob, prediction, sample, next_sample, coefficients, prediction_type
    )


@ddim_step_backward.register_fake
def _(grad_next, grad_log_prob, prediction, *_):
    return torch.empty_like(prediction)
