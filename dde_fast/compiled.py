"""The compiled extension as a backend: loads the libraries of `csrc/` when first used.

The functions have the names, arguments and results of `dde_fast.reference`'s and are served by the
raw ops of `torch.ops.dde_fast_cpp`. Importing this module loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dde_fast import recycled
from dde_fast.reference import accumulation_dtype, dense_rows, empty_noised, same_layout

LINK = {"sigmoid": 0, "ipo": 1, "hinge": 2, "linear": 3}
"""Numbers of the links in csrc/preference.h."""
PREDICTION = {"epsilon": 0, "v_prediction": 1, "sample": 2}
"""Numbers of the prediction types in csrc/ddim.h."""


@cache
def _load(library: str) -> str | None:
    """Load `_cpu` or `_cuda`; why that failed, or None."""
    found = sorted(Path(__file__).parent.glob(f"{library}.*.so"))
    if not found:
        return f"dde_fast/{library} was not built (no compiler at installation?)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"dde_fast/{found[0].name} does not load: {error.__cause__ or error}"
    return None


@torch.compiler.assume_constant_result  # torch.compile asks while it traces, and must not look in
def _why_not(device_type: str, index: int | None = None) -> str | None:
    if device_type not in ("cpu", "cuda", "meta"):
        return f"the compiled extension has no kernels for {device_type} tensors"
    reason = _load("_cpu")  # holds the schemas of both
    if reason is None and device_type == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        reason = _load("_cuda")
        major, minor = torch.cuda.get_device_capability(index)
        if reason is None and major < 8:
            return f"the compiled extension has no code for sm_{major}{minor}, only from sm_80 on"
    return reason


def why_not(device: torch.device | str) -> str | None:
    """Why the extension cannot serve tensors of a device; None if it can."""
    device = torch.device(device)
    return _why_not(device.type, device.index)


@cache
def _op(name: str, device: torch.device):
    """The raw op of a name, once the library that serves the device is loaded; found once, as asking
    takes microseconds."""
    reason = _why_not(device.type, device.index)
    if reason:
        raise RuntimeError(reason)
    return getattr(torch.ops.dde_fast_cpp, name).default


def isa(wanted: str = "") -> str:
    """Name of the CPU instruction set in use: "baseline", "avx2", "avx512" or "avx512bf16".

    Args:
        wanted: a set to change to from now on, for tests and comparisons; the environment variable
            DDE_FAST_CPU does the same from the start. Without either it is the best there is.

    Raises:
        RuntimeError: this machine lacks the set, or the extension is not there.
    """
    return _op("isa", torch.device("cpu"))(wanted)


def _timesteps(timesteps: Tensor) -> Tensor:
    return timesteps.long().contiguous()


def preference_loss(
    policy: Tensor,  # [2B, C, H, W], or [B, C, H, W] shared by the pair
    reference: Tensor | None,  # as policy, or its errors [2B] in fp32 or fp64, or None
    target: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    timesteps: Tensor,  # int64 [B] or [2B]
    weights: Tensor,  # [T]
    margins: Tensor,  # [T]
    beta: float,
    lose_weight: float,
    link: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """`dde_fast.reference.preference_loss` in one pass over the inputs (CUDA: one launch)."""
    loss, logits, error, reference_error, margin = _op("preference_loss", policy.device)(
        policy,
        reference,
        target,
        timesteps,
        weights,
        margins,
        beta,
        lose_weight,
        LINK[link],
        label_smoothing,
    )
    return loss, logits, error, None if reference is None else reference_error, margin


def preference_loss_with_gradient(
    policy: Tensor,  # [2B, C, H, W], or [B, C, H, W] shared by the pair
    reference: Tensor | None,  # as policy, or its errors [2B] in fp32 or fp64, or None
    target: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    timesteps: Tensor,  # int64 [B] or [2B]
    weights: Tensor,  # [T]
    margins: Tensor,  # [T]
    beta: float,
    lose_weight: float,
    link: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`preference_loss` and, last, d loss / d policy; reference_error is [0] without a reference.

    CPU: a pair's gradient is written while its inputs are still in the cache. CUDA: in one launch
    and one pass where a pair fits a cluster of blocks (sm_90 and later), else in two launches, the
    second of which reads policy and target again.
    """
    gradient = recycled.empty_like(policy)
    results = _op("preference_loss_with_gradient", policy.device)(
        gradient,
        policy,
        reference,
        target,
        timesteps,
        weights,
        margins,
        beta,
        lose_weight,
        LINK[link],
        label_smoothing,
    )
    return *results, gradient


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:
    """`gradient.mul_(factor)` of a dense gradient and a number [], fp32 or fp64, that is looked at
    on the device: where it is 1, nothing is read or written. One launch."""
    _op("scale_gradient", gradient.device)(gradient, factor)


def preference_loss_backward(
    grad_loss: Tensor | None,  # []
    grad_logits: Tensor | None,  # [B]
    grad_policy_error: Tensor | None,  # [2B]
    policy: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    target: Tensor,  # [2B, C, H, W] or [B, C, H, W]
    timesteps: Tensor,  # int64 [B] or [2B]
    logits: Tensor,  # [B]
    weights: Tensor,  # [T]
    beta: float,
    lose_weight: float,
    link: str,
    label_smoothing: float,
) -> Tensor:
    """`dde_fast.reference.preference_loss_backward` in one pass, one launch."""
    incoming = [
        None if x is None else x.to(logits.dtype).contiguous()
        for x in (grad_loss, grad_logits, grad_policy_error)
    ]
    gradient = recycled.empty_like(policy)
    # the gradient is written in its own memory order, so the inputs must have that one too
    policy, target, out = same_layout(policy, target, gradient)
    _op("preference_loss_backward", policy.device)(
        out,
        *incoming,
        policy,
        target,
        _timesteps(timesteps),
        logits.contiguous(),
        weights.contiguous(),
        beta,
        lose_weight,
        LINK[link],
        label_smoothing,
    )
    return out if out.stride() == gradient.stride() else gradient.copy_(out)


def pair_noise(
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    shape: Sequence[int],
    seed: int,
) -> Tensor:
    """`dde_fast.reference.pair_noise` in one launch, float32 [B, *shape]."""
    noise = torch.empty((len(pair_ids), *shape), dtype=torch.float32, device=pair_ids.device)
    op = _op("pair_noise", noise.device)
    op(noise, pair_ids.contiguous(), draws.contiguous(), seed)
    return noise


def pair_uniform(
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    choice: int,
    seed: int,
) -> Tensor:
    """`dde_fast.reference.pair_uniform` in one launch, float32 [B]."""
    uniform = torch.empty(len(pair_ids), dtype=torch.float32, device=pair_ids.device)
    op = _op("pair_uniform", uniform.device)
    op(uniform, pair_ids.contiguous(), draws.contiguous(), choice, seed)
    return uniform


def add_noise(
    latents: Tensor,  # [2B, C, H, W]
    timesteps: Tensor,  # int64 [B] or [2B]
    alphas_cumprod: Tensor,  # [T]
    pair_ids: Tensor,  # int64 [B]
    draws: Tensor,  # int64 [B]
    seed: int,
    dtype: torch.dtype,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """`dde_fast.reference.add_noise` in one launch: each normal is made once for both halves."""
    noisy, noise = empty_noised(latents, len(pair_ids), dtype, channels_last)
    _op("add_noise", latents.device)(
        noisy,
        noise,
        dense_rows(latents),
        _timesteps(timesteps),
        alphas_cumprod.contiguous(),
        pair_ids.contiguous(),
        draws.contiguous(),
        seed,
    )
    return noisy, noise


def ddim_step(
    prediction: Tensor,  # [B, C, H, W]
    sample: Tensor,  # [B, C, H, W]
    coefficients: Tensor,  # float32 [B, 5]
    noise: Tensor | None,  # [K·B, C, H, W]
    next_sample: Tensor | None,  # [K·B, C, H, W], instead of noise
    prediction_type: str,
) -> tuple[Tensor | None, Tensor]:
    """`dde_fast.reference.ddim_step` in one pass over the inputs (CUDA: two launches)."""
    given = next_sample if noise is None else noise
    dtype = accumulation_dtype(prediction, sample, given)
    log_prob = torch.empty(len(given), dtype=dtype, device=sample.device)
    made = out = None
    if noise is None:
        prediction, sample, given = same_layout(prediction, sample, given)
    else:
        made = torch.empty_like(noise, dtype=sample.dtype)
        prediction, sample, given, out = same_layout(prediction, sample, given, made)
    _op("ddim_step", sample.device)(
        log_prob,
        out,
        prediction,
        sample,
        given,
        coefficients.contiguous(),
        PREDICTION[prediction_type],
    )
    if made is not None and out.stride() != made.stride():
        made.copy_(out)
    return made, log_prob


def ddim_step_backward(
    grad_next: Tensor | None,  # [K·B, C, H, W]
    grad_log_prob: Tensor | None,  # [K·B]
    prediction: Tensor,  # [B, C, H, W]
    sample: Tensor,  # [B, C, H, W]
    next_sample: Tensor,  # [K·B, C, H, W]
    coefficients: Tensor,  # float32 [B, 5]
    prediction_type: str,
) -> Tensor:
    """`dde_fast.reference.ddim_step_backward` in one pass, one launch."""
    gradient = recycled.empty_like(prediction)
    tensors = [gradient, prediction, sample, next_sample]
    tensors += [] if grad_next is None else [grad_next]
    # the gradient is written in its own memory order, so the inputs must have that one too
    out, prediction, sample, next_sample, *rest = same_layout(*tensors)
    _op("ddim_step_backward", sample.device)(
        out,
        rest[0] if rest else None,
        None if grad_log_prob is None else grad_log_prob.contiguous(),
        prediction,
        sample,
        next_sample,
        coefficients.contiguous(),
        PREDICTION[prediction_type],
    )
    return out if out.stride() == gradient.stride() else gradient.copy_(out)


def observe_ratios(
    sums: Tensor,  # float64 [5, T]
    policy_error: Tensor,  # [2B]
    reference_error: Tensor,  # [2B]
    timesteps: Tensor,  # int64 [B] or [2B]
    scale: Tensor,  # [T]
) -> None:
    """`dde_fast.ratios.observe_ratios` in one launch."""
    errors = [x.to(accumulation_dtype(x)).contiguous() for x in (policy_error, reference_error)]
    _op("observe_ratios", sums.device)(sums, *errors, _timesteps(timesteps), scale.contiguous())


def update_ratios(
    ratios: Tensor,  # float32 [4, T]
    margins: Tensor,  # float32 [T]
    sums: Tensor,  # float64 [5, T]
    decay: float,
) -> None:
    """`dde_fast.ratios.update_ratios` in one launch."""
    _op("update_ratios", sums.device)(ratios, margins, sums, decay)
