"""From an op to what runs: the table of backends, the choice among them, the op's registration.

A backend is a few modules of `dde_fast` with functions of the ops' names.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

BACKENDS = {
    "reference": ("reference", "ratios"),
    "triton": ("triton_kernels", "triton_ratios", "triton_noise", "triton_sampling"),
    "cpp": ("compiled",),
}
"""backend -> modules of `dde_fast` that hold its ops, searched in order."""

AUTO = {"cpu": ("cpp",), "cuda": ("cpp", "triton"), "xpu": ("triton",)}
"""device type -> backends by preference, before the reference, which serves everywhere.

On CUDA by the bytes that the loss with its gradient moves, until a GPU has measured it. In sizes of
the policy's prediction [2B, …], with a reference's prediction and a shared target [B, …]: cpp reads
2.5 and writes 1 in one launch where a pair fits a cluster (sm_90 and later) and 5 in two launches
elsewhere; triton 5 in three launches, and 6 where the cache does not hold the target for the second
half of a pair. cpp's backward is one launch more, which reads and writes a size only where the loss
was scaled. cpp is there only where nvcc was at installation.
"""


def why_not(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve tensors of a device; None if it can."""
    if backend == "cpp":
        from dde_fast import compiled  # brings torch's compiler, which takes a second

        return compiled.why_not(device)
    if backend != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type not in ("cuda", "xpu", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        return f"triton has no kernels for {device.type} tensors (TRITON_INTERPRET=1 simulates)"
    return None


_serving: dict[tuple[str, torch.device], str] = {}
"""(backend, device) -> who serves, found once per process: asking costs microseconds in every
step."""


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that serves `device`; `auto` is the first of `AUTO` that can.

    Raises:
        ValueError: an unknown backend, or one that cannot serve the device, with the reason.
    """
    found = _serving.get((backend, device))
    if found is None:
        found = _serving[backend, device] = _find_backend(backend, device)
    return found


def _find_backend(backend: str, device: torch.device) -> str:
    if backend == "auto":
        able = (name for name in AUTO.get(device.type, ()) if why_not(name, device) is None)
        return next(able, "reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {['auto', *BACKENDS]}, got {backend!r}")
    reason = why_not(backend, device)
    if reason:
        raise ValueError(f"backend: {backend!r} cannot serve this call: {reason}")
    return backend


@functools.cache
def implementation(backend: str, name: str) -> Callable:
    """The backend's own function of an op's name."""
    modules = [importlib.import_module(f"dde_fast.{module}") for module in BACKENDS[backend]]
    function = next(getattr(module, name) for module in modules if hasattr(module, name))
    return _on_their_device(function) if backend == "triton" else function


def _on_their_device(function: Callable) -> Callable:
    """The function with the current device that of its tensors: Triton launches on the current one,
    whosever the memory is."""

    @functools.wraps(function)
    def call(*args):
        tensor = next(x for x in args if isinstance(x, Tensor))
        if tensor.is_cpu:  # the interpreter's
            return function(*args)
        with torch.get_device_module(tensor.device).device(tensor.device):
            return function(*args)

    return call


def in_plain_eager(tensor: Tensor) -> bool:
    """Whether nobody but autograd is watching: no compiler, no dispatch mode, no functorch."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and not tensor.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def once_differentiable(backward: Callable) -> Callable:
    """torch's decorator of that name, left out where no graph of the backward is made: its wrapper
    costs 5 µs."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx, *gradients):
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return call


def differentiable(gradient: type[torch.autograd.Function]) -> Callable:
    """Register a function as torch.ops.dde_fast.NAME, differentiable in its first argument.

    `gradient.apply` gets what to run, a list for the results that have no gradient (each output of a
    Function costs a microsecond or two), the first argument and the others. `custom_op` and its
    `register_autograd` do the same, at 100 µs a call. What comes back is for Python callers: in
    plain eager mode it leaves out the dispatcher, which takes longer than a small batch; its
    `plain` is for those who know already that they are in it.
    """

    def register(function: Callable) -> Callable:
        name = f"dde_fast::{function.__name__}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        op = getattr(torch.ops.dde_fast, function.__name__).default

        def below_autograd(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        def with_autograd(run, apply, first, *rest):
            if torch.is_grad_enabled() and first.requires_grad:
                others: list[Tensor] = []
                return *apply(run, others, first, rest), *others
            return run(first, *rest)

        kernel = functools.partial(with_autograd, below_autograd, gradient.apply)
        torch.library.impl(name, "Autograd", kernel)
        # without Function's own way around functorch, which costs microseconds
        plain_apply = super(torch.autograd.Function, gradient).apply

        @functools.wraps(function)
        def call(first, *rest):
            return (call.plain if in_plain_eager(first) else op)(first, *rest)

        call.plain = functools.partial(with_autograd, function, plain_apply)
        return call

    return register
