"""`PreferenceLoss`: the drop-in loss of every objective.

With model output o, regression target y (ε, v, x_0 or ε - x_0) and e = ‖y - o‖²/N,

    d = e_policy - e_reference                                   [2B] -> d_w, d_l
    logit = -beta · ω_t · (d_w - d_l) + beta · m_t               [B]
    loss = mean over pairs of link(logit)

with ω_t and m_t from the objective's row in `dde_fast.objectives`, or ω_t from the sampler of an
online one (`dde_fast.trajectories`). The means are over a latent's elements inside and over pairs
outside; the batch mean never goes inside the link. Conventions of beta differ between codes:
`diffusion-dpo` here is Salesforce's published one (½ in front, mean over the latent), so its beta
5000 is beta 5000 here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dde_fast import backends, ops, ratios, schedule
from dde_fast.objectives import get_objective, timestep_probabilities

LINKS = ("sigmoid", "ipo", "hinge")


@dataclass
class PreferenceOutput:
    """What a step of `PreferenceLoss` gives back."""

    loss: Tensor
    """[], differentiable."""
    logits: Tensor
    """[B], differentiable. For `sft`, minus the winner's error."""
    policy_error: Tensor
    """[2B], ‖y - o‖²/N unweighted; differentiable."""
    reference_error: Tensor | None
    """[2B], or None for an objective without a reference."""
    margin: Tensor
    """[B], m_t."""
    timesteps: Tensor
    """int64 [B], t of each pair."""

    def detach(self) -> PreferenceOutput:
        """The same without its graph."""
        tensors = {
            name: getattr(self, name).detach() for name in ("loss", "logits", "policy_error")
        }
        return replace(self, **tensors)

    def per_pair(self) -> dict[str, Tensor]:
        """Detached [B] each: what `metrics` is the mean of."""
        win, lose = self.policy_error.detach().chunk(2)
        metrics = {"policy_win_error": win, "policy_lose_error": lose}
        if self.reference_error is None:
            return metrics
        logits = self.logits.detach()
        win, lose = self.reference_error.chunk(2)
        return {
            "implicit_accuracy": 0.5 + 0.5 * logits.sign(),
            "logit": logits,
            "logit_size": logits.abs(),
            "margin": self.margin,
            **metrics,
            "reference_win_error": win,
            "reference_lose_error": lose,
        }

    def metrics(self) -> dict[str, Tensor]:
        """Detached 0-dim tensors on the device; reading one is what synchronises.

        `implicit_accuracy` is the share of pairs with logit > 0, a tie counting ½. Without a
        reference only the policy's errors are there.
        """
        return {name: values.mean() for name, values in self.per_pair().items()}


class PreferenceLoss(nn.Module):
    """Preference loss over pairs of predictions: DDE, Diffusion-DPO, Discounted, SFT, TailorPO, D3PO.

    Args:
        objective: a row of `dde_fast.objectives.OBJECTIVES`.
        alphas_cumprod: [T], ᾱ of the noise schedule, least noise first.
        prediction_type: `epsilon`, `v_prediction`, `sample` or `flow`.
        beta: DPO temperature (the paper: 5000, Sec. 8.1).
        link: `sigmoid`, `ipo` or `hinge`; `sft` has none.
        label_smoothing: 0 ≤ s < ½, with `sigmoid` only.
        ratio_decay: share of the old value that an update of the importance ratios keeps. The
            paper gives one constant, μ = 0.1, read as the update rate: decay 0.9.
        backend: `auto`, `reference`, `triton` or `cpp`.
        weights: [T], ω_t of an online objective: `DDIMSteps.loss` gives those of its sampler.

    Buffers: `ratios` [4, T] (in `state_dict()`) and tables derived from the schedule. They follow
    `.to(device)`, never a change of dtype: a table rounded to 16 bits is a different loss.

    In training mode each forward updates the ratio table by itself, after its logits are taken.
    With gradient accumulation set `auto_update = False` and call `update_ratios()` once per
    optimizer step, after the last micro-batch.

    Raises:
        ValueError: an argument out of range; the message names it.
    """

    auto_update = True

    def __init__(
        self,
        objective: str = "dde",
        *,
        alphas_cumprod: Tensor,  # [T]
        prediction_type: str = "epsilon",
        beta: float = 5000.0,
        link: str = "sigmoid",
        label_smoothing: float = 0.0,
        ratio_decay: float = 0.9,
        backend: str = "auto",
        weights: Tensor | None = None,  # [T]
    ):
        super().__init__()
        self.objective = get_objective(objective)
        if (weights is not None) != self.objective.online:
            expected = "ω_t of its sampler (DDIMSteps.loss)" if weights is None else "none"
            got = "none" if weights is None else list(weights.shape)
            raise ValueError(f"weights: objective {objective!r} expected {expected}, got {got}")
        table = schedule.check_alphas_cumprod(alphas_cumprod, prediction_type)
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta: expected a finite number above 0, got {beta}")
        if link not in LINKS:
            raise ValueError(f"link: expected one of {list(LINKS)}, got {link!r}")
        if link != "sigmoid" and not self.objective.needs_reference:
            raise ValueError(f"link: objective {objective!r} has none, got {link!r}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: expected 0 <= s < 0.5, got {label_smoothing}")
        if label_smoothing and link != "sigmoid":
            raise ValueError(
                f"label_smoothing: expected 0 with link {link!r}, got {label_smoothing}"
            )
        if not 0 <= ratio_decay < 1:
            raise ValueError(f"ratio_decay: expected 0 <= decay < 1, got {ratio_decay}")
        if backend not in ("auto", *backends.BACKENDS):
            raise ValueError(
                f"backend: expected one of {['auto', *backends.BACKENDS]}, got {backend!r}"
            )
        self.prediction_type, self.ratio_decay, self.backend = prediction_type, ratio_decay, backend
        preference = self.objective.needs_reference
        self.beta = float(beta) if preference else 1.0
        self.link = link if preference else "linear"
        self.label_smoothing = float(label_smoothing)

        steps = len(table)
        k = schedule.reconstruction_scale(table, prediction_type)
        observation = schedule.observation_scale(table, prediction_type)
        self.register_buffer("ratios", torch.zeros(4, steps))
        for name, value in {
            "weights": (self.objective.weight(k) if weights is None else weights).float(),  # ω_t
            "observation_scale": observation.float(),  # ½ g_t² k_t²
            "margins": torch.zeros(steps),  # m_t, derived from ratios
            "ratio_sums": torch.zeros(5, steps, dtype=torch.float64),  # since the last update
        }.items():
            self.register_buffer(name, value, persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module._derive_margins())

    @classmethod
    def from_scheduler(cls, scheduler, objective: str = "dde", **kwargs) -> PreferenceLoss:
        """The loss for a diffusers scheduler: one with `alphas_cumprod`, or a flow-matching one.

        Its prediction type is the scheduler's unless `prediction_type` is given; `**kwargs` are the
        constructor's.
        """
        alphas_cumprod = schedule.alphas_cumprod_of(scheduler)
        if "prediction_type" not in kwargs:
            kwargs["prediction_type"] = schedule.prediction_type_of(scheduler)
        return cls(objective, alphas_cumprod=alphas_cumprod, **kwargs)

    def forward(
        self,
        policy: Tensor,  # [2B, C, H, W], or [B, C, H, W]
        reference: Tensor | None,  # like policy, or its errors float32 [2B]
        target: Tensor,  # [2B, C, H, W], or [B, C, H, W]
        timesteps: Tensor,  # [B], or [2B] with equal halves
    ) -> PreferenceOutput:
        """Loss of B pairs, winners first, losers second.

        Args:
            policy: the trained model's predictions [2B, …]; the only differentiable input. With
                a target [2B, …] they may be [B, …], one prediction that both halves judge.
            reference: the frozen model's predictions, shaped like policy, or its errors e,
                float32 [2B] (from a cache). `sft` ignores it: None will do.
            target: what the models should predict, [2B, …], or [B, …] shared by the pair.
            timesteps: integers in [0, T), [B], or [2B] with equal halves.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; a gradient wanted of reference
                or target; on the CPU, timesteps out of range or different in the two halves (on a
                GPU, where looking would stop the host, the loss is then NaN).
        """
        if not self.objective.needs_reference:
            reference = None
        elif reference is None:
            raise ValueError(f"reference: objective {self.objective.name!r} needs it, got None")
        # straight from the dictionary: nn.Module's attributes cost a microsecond each
        weights, margins = self._buffers["weights"], self._buffers["margins"]
        backend = backends.resolve_backend(self.backend, policy.device)
        inputs = (policy, reference, target, timesteps, weights)
        # that one looks at them by itself, in less time
        plain = backend == "cpp" and backends.in_plain_eager(policy)
        if not plain or _wants_gradient(reference, target):
            _check_inputs(*inputs)
        if timesteps.dtype == torch.int32:
            timesteps = timesteps.long()
        with_gradient = ops.gradient_with_forward(backend, policy)
        op = ops.preference_loss_with_gradient if with_gradient else ops.preference_loss
        if plain:
            op = op.plain
        constants = (self.beta, self.objective.lose_weight, self.link, self.label_smoothing)
        try:
            loss, logits, policy_error, reference_error, margin, *_ = op(
                policy, reference, target, timesteps, weights, margins, *constants, backend
            )
        except RuntimeError:
            _check_inputs(*inputs)  # says what was wrong in the caller's terms
            raise
        if reference is None:
            reference_error = None
        if self.training and self.objective.correction:
            ops.observe_ratios(
                self.ratio_sums,
                policy_error.detach(),
                reference_error,
                timesteps,
                self.observation_scale,
                backend,
            )
            if self.auto_update:
                self.update_ratios()
        if timesteps.numel() > logits.numel():  # equal halves
            timesteps = timesteps[: logits.numel()]
        return PreferenceOutput(loss, logits, policy_error, reference_error, margin, timesteps)

    @torch.no_grad()
    def update_ratios(self, group=None, skipped: Tensor | None = None) -> None:
        """Fold the observations since the last update into `ratios`, once for all ranks.

        With `skipped` (a bool [] on the device) true, as after an optimizer step that was not
        taken, they are forgotten instead. One small all-reduce over `group` (default: all) where
        torch.distributed is initialised, so every rank of it must call. Nothing is read back to
        the host.
        """
        if not self.objective.correction:
            return
        if skipped is not None:
            self.ratio_sums.mul_(~skipped)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.ratio_sums, group=group)
        backend = backends.resolve_backend(self.backend, self.ratios.device)
        ops.update_ratios(self.ratios, self.margins, self.ratio_sums, self.ratio_decay, backend)

    def timestep_probabilities(self, low: int = 0, high: int | None = None) -> Tensor:
        """The objective's distribution of t restricted to low ≤ t < high, float64 [T], sum 1."""
        return timestep_probabilities(self.objective, len(self.weights), low, high)

    def extra_repr(self) -> str:
        return (
            f"objective={self.objective.name!r}, prediction_type={self.prediction_type!r}, "
            f"beta={self.beta}, link={self.link!r}, backend={self.backend!r}"
        )

    @torch.no_grad()
    def _derive_margins(self, *_) -> None:
        if self.objective.correction:
            self.margins.copy_(ratios.margins_of(self.ratios))

    def _apply(self, fn, recurse=True):
        """Move buffers, never cast them: `.half()` or `.to(dtype)` is meant for models."""
        before = {name: buffer for name, buffer in self._buffers.items()}
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(buffer.device)
        return self


def _wants_gradient(reference: Tensor | None, target: Tensor) -> bool:
    return target.requires_grad or (reference is not None and reference.requires_grad)


def _check_inputs(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    timesteps: Tensor,
    weights: Tensor,
) -> None:
    """Refuse what cannot be meant; looks at no tensor's values."""
    device, shape = policy.device, policy.shape
    for name, tensor in (("policy", policy), ("target", target), ("reference", reference)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.requires_grad and tensor is not policy:
            raise ValueError(
                f"{name}: expected a tensor without gradient (the gradient reaches policy only), "
                "got one that requires it; detach it or compute it under torch.no_grad()"
            )
        if tensor.device != device:
            raise ValueError(f"{name}: expected on {device}, where policy is, got {tensor.device}")
    for name, tensor in (("timesteps", timesteps), ("this loss", weights)):
        if tensor.device != device:
            raise ValueError(f"{name}: expected on {device}, where policy is, got {tensor.device}")
    pairs = _check_shapes(shape, target.shape)
    if reference is not None and reference.shape != shape:
        if reference.shape != (2 * pairs,):
            raise ValueError(
                f"reference: expected {list(shape)}, or errors [{2 * pairs}], "
                f"got {list(reference.shape)}"
            )
        if reference.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"reference: expected its errors in float32, got {reference.dtype}: 16 bits make "
                "logits out of rounding"
            )
    if timesteps.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"timesteps: expected int64, got {timesteps.dtype}")
    if timesteps.shape != (pairs,) and timesteps.shape != (2 * pairs,):
        raise ValueError(
            f"timesteps: expected [{pairs}] or [{2 * pairs}], got {list(timesteps.shape)}"
        )


def _check_shapes(policy: torch.Size, target: torch.Size) -> int:
    """The number of pairs of predictions and target of these shapes."""
    if len(policy) > 1 and policy.numel() and not policy[0] % 2 and target[1:] == policy[1:]:
        pairs = policy[0] // 2
        if target[0] == pairs or target[0] == policy[0]:
            return pairs
    shared = bool(policy) and target == (2 * policy[0], *policy[1:])
    if len(policy) < 2 or 0 in policy or (policy[0] % 2 and not shared):
        raise ValueError(
            "policy: expected an even, non-empty batch [2B, ...], winners first, "
            f"got {list(policy)}"
        )
    pairs = policy[0] if shared else policy[0] // 2
    if len(policy) > 2 and target[1:] == (policy[1] // 2, *policy[2:]) and policy[1] % 2 == 0:
        raise ValueError(
            f"policy: expected {target[1]} channels like target, got {policy[1]}: a learned "
            "variance; pass policy[:, :C] and reference[:, :C]"
        )
    if not shared and target not in (policy, (pairs, *policy[1:])):
        raise ValueError(
            f"target: expected {list(policy)} or {[pairs, *policy[1:]]}, got {list(target)}"
        )
    return pairs
