"""What a training step costs at least on a GPU, op by op, and what fusing ops could save: counted.

`python benchmarks/step_limits.py` rewrites the tables of docs/step-limits.md, where assumptions stand.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from memory_table import SHAPES, TITLES
from published import UNETS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dde_fast.activations import FlashAttention

PAGE = Path(__file__).parent.parent / "docs" / "step-limits.md"
MARKERS = re.compile(r"(<!-- (limits|ops|fusions) -->\n).*?(<!-- /\2 -->)", re.S)

RATE, BANDWIDTH = 790e12, 4.3e12
"""What an H200 was seen to do: operations per second of a large bf16 matrix product, bytes per second,
read and written, of a large copy."""
PAIRS = {"sd15": 8, "sdxl": 2}
"""Of a micro-batch."""

KINDS = {
    "convolution": r"convolution",
    "matrix product": r"mm|bmm|addmm",
    "attention": r"_scaled_dot_product",
    "GroupNorm, LayerNorm": r"native_(group|layer)_norm",
    "SiLU, GELU": r"silu|gelu",
    "other arithmetic": r"add|mul|div|sum|exp|sin|cos|neg",
    "copies": r"cat|clone|copy|_to_copy|upsample|fill|slice_backward|new_empty|zeros|arange",
}
"""What an op is called -> how its name begins."""


@dataclass
class Cost:
    """Of some ops."""

    launches: int = 0
    operations: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """Of each op the longer of its operations at `RATE` and its bytes at `BANDWIDTH`."""

    def add(self, operations: int, size: int) -> None:
        self.launches += 1
        self.operations += operations
        self.bytes += size
        self.seconds += max(operations / RATE, size / BANDWIDTH)


class CostMode(TorchDispatchMode):
    """Adds up what ops cost, by name. What only looks at memory otherwise, a view, costs nothing."""

    def __init__(self):
        super().__init__()
        self.costs: dict[str, Cost] = defaultdict(Cost)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read, written = _storages((args, kwargs)), _storages(out)
        packet = func.overloadpacket
        in_place = func._schema.is_mutable
        if not in_place and written.keys() <= read.keys() or packet.__name__.startswith("empty"):
            return out
        formula = flop_registry.get(packet)
        operations = formula(*args, **kwargs, out_val=out) if formula else 0
        size = sum(read.values()) + sum(written.values())
        self.costs[packet.__name__].add(operations, size)
        return out


def _storages(tree) -> dict[int, int]:
    """Storage -> bytes that an op touches of it."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {t.untyped_storage()._cdata: t.numel() * t.element_size() for t in tensors}


@dataclass(frozen=True)
class Step:
    """A micro-batch through a UNet in bf16."""

    training: dict[str, Cost]
    """The policy's forward and backward, by op."""
    forward: dict[str, Cost]
    """A forward alone, as the reference's."""


def count(unet: torch.nn.Module, name: str, pairs: int) -> Step:
    """Count a micro-batch of pairs through a UNet on the meta device."""
    shapes, samples = SHAPES[name], 2 * pairs

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(samples, *shape, dtype=dtype, device="meta")

    options: dict = {"return_dict": False}
    if shapes["pooled"] is not None:
        added = {"text_embeds": empty(shapes["pooled"]), "time_ids": empty(6, dtype=torch.float32)}
        options["added_cond_kwargs"] = added
    inputs = empty(*shapes["latent"]), empty(dtype=torch.int64), empty(*shapes["embedding"])
    with torch.no_grad(), CostMode() as forward, FlashAttention():
        prediction = unet(*inputs, **options)[0]
    with CostMode() as training, FlashAttention():
        unet(*inputs, **options)[0].backward(torch.empty_like(prediction))
    return Step(dict(training.costs), dict(forward.costs))


@cache
def counted(name: str) -> Step:
    """Of a published UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    return count(unet.to(torch.bfloat16), name, PAIRS[name])


def total(costs: Iterable[Cost]) -> Cost:
    """Their sum."""
    out = Cost()
    for cost in costs:
        out.launches += cost.launches
        out.operations += cost.operations
        out.bytes += cost.bytes
        out.seconds += cost.seconds
    return out


def kind_of(op: str) -> str:
    """Of `KINDS`."""
    return next(kind for kind, start in KINDS.items() if re.match(start, op))


def _named(costs: dict[str, Cost], start: str) -> float:
    """Seconds of the ops whose names begin so."""
    return sum(cost.seconds for op, cost in costs.items() if re.match(start, op))


FUSIONS: dict[str, Callable[[dict[str, Cost]], float]] = {
    # a pass of its own over memory, forward and backward, that the norm's pass could do
    "GroupNorm with SiLU": lambda costs: _named(costs, "silu"),
    # gelu (2 tensors' bytes), product (3); backward two products (6), gelu (3), joining (4): 18;
    # fused both halves in, product out; backward both halves and gradient in, two out: 8
    "GEGLU, the transformers' gated layer": lambda costs: 5 * costs["gelu"].seconds,
    "no division of residual sums by 1": lambda costs: _named(costs, "div"),
}
"""Ops made one, or left out -> seconds of these that it saves at most."""


def limits() -> str:
    """Markdown: a row per model."""
    lines = [
        "| | pairs per micro-batch | launches, with the reference | pairs/s: arithmetic alone "
        "| every op by itself | with reference scores: arithmetic alone | every op by itself |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        step, pairs = counted(name), PAIRS[name]
        training, forward = total(step.training.values()), total(step.forward.values())
        both = training.operations + forward.operations
        rates = [
            pairs / (both / RATE),
            pairs / (training.seconds + forward.seconds),
            pairs / (training.operations / RATE),
            pairs / training.seconds,
        ]
        launches = training.launches + forward.launches
        cells = " | ".join(f"{rate:.3g}" for rate in rates)
        lines.append(f"| {title} | {pairs} | {launches:,} | {cells} |")
    return "\n".join([*lines, ""])


def ops() -> str:
    """Markdown: a row per kind of op."""
    heads = [f"{title}: launches | GB | ms | share" for title in TITLES.values()]
    columns = len(TITLES) * 4
    lines = [
        f"| policy, forward and backward | {' | '.join(heads)} |",
        "|---" * (columns + 1) + "|",
    ]
    groups = {}
    for name in TITLES:
        groups[name] = defaultdict(list)
        for op, cost in counted(name).training.items():
            groups[name][kind_of(op)].append(cost)
    for kind in KINDS:
        cells = []
        for name in TITLES:
            cost, whole = total(groups[name][kind]), total(counted(name).training.values())
            share = f"{cost.seconds / whole.seconds:.0%}"
            cells += [
                f"{cost.launches:,}",
                f"{cost.bytes / 1e9:.1f}",
                f"{1e3 * cost.seconds:.1f}",
                share,
            ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def fusions() -> str:
    """Markdown: a row per fusion."""
    lines = [
        "| | "
        + " | ".join(f"{t}: saves at most, ms | of the limit" for t in TITLES.values())
        + " |",
        "|---" * (2 * len(TITLES) + 1) + "|",
    ]
    for title, saved in FUSIONS.items():
        cells = []
        for name in TITLES:
            costs = counted(name).training
            seconds = saved(costs)
            whole = total(costs.values()).seconds
            cells += [f"{1e3 * seconds:.1f}", f"{seconds / whole:.1%}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def render(page: str) -> str:
    """The page with its tables counted anew."""
    made = {"limits": limits, "ops": ops, "fusions": fusions}
    return MARKERS.sub(lambda match: match[1] + made[match[2]]() + match[3], page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
