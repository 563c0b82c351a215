"""What a UNet keeps for its backward pass, and which of its blocks compute it again instead.

diffusers recomputes a block piece by piece: a resnet, a transformer layer. Of each it keeps the
inputs; what is between them and its last kept tensor is computed once more in the backward pass.
`count` runs forward and backward on the meta device, where nothing is computed, lets diffusers name
the pieces, and notes what autograd saves in each. From that one run follow memory and recomputed
operations for any choice of blocks.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dde_fast.config import TrainConfig

SAMPLES = 64
"""Counted together, so that what does not grow with the batch (the gradient of one weight) hardly
shows in a sample's share."""


def blocks_of(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The blocks that can compute their activations again, by name, in the order of their calls."""
    able = [(n, m) for n, m in unet.named_modules() if hasattr(m, "gradient_checkpointing")]
    inner = {n for n, _ in able for outer, _ in able if n.startswith(f"{outer}.")}
    return dict(sorted((n, m) for n, m in able if n not in inner))


def recomputed_blocks(c: TrainConfig, there: Iterable[str]) -> list[str]:
    """Names of the blocks that a configuration wants to compute again, of those that are there.

    Raises:
        ValueError: `checkpoint_blocks` names another.
    """
    there = list(there)
    if not c.checkpoint_blocks:
        return there if c.gradient_checkpointing else []
    wanted = {name.strip() for name in c.checkpoint_blocks.split(",")}
    if unknown := sorted(wanted - set(there)):
        raise ValueError(
            f"checkpoint_blocks: expected some of {','.join(there)}, got {','.join(unknown)!r}"
        )
    return [name for name in there if name in wanted]


def recompute(unet: torch.nn.Module, names: Collection[str]) -> None:
    """Let these blocks of a UNet, and no others, compute their activations again.

    As diffusers' `enable_gradient_checkpointing`, which does it to all: not reentrant, so that a
    block whose inputs need no gradient still gives its weights theirs.
    """
    if not names:
        return
    unet.enable_gradient_checkpointing()
    for name, block in blocks_of(unet).items():
        for module in block.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = name in names


@dataclass(frozen=True)
class Option:
    """A choice of blocks to recompute, and what it costs one sample."""

    blocks: tuple[str, ...]
    operations: float
    """Recomputed in the backward pass."""
    peak: float
    """Bytes at the worst moment."""


@dataclass(frozen=True)
class Activations:
    """Bytes and operations of one sample's forward and backward pass.

    The forward pass is a row of places: pieces that can be recomputed, and what lies between them.
    """

    blocks: tuple[str, ...]
    """That can be recomputed."""
    pieces: tuple[str | None, ...]
    """Of each place the block that the piece belongs to; None between pieces."""
    kept: dict[tuple[tuple[int, bool], ...], float]
    """Bytes of all storages that the same places keep: as the input of a piece (True), or inside."""
    working: tuple[float, ...]
    """Of each place: most bytes alive in its forward and backward that no place keeps."""
    again: tuple[float, ...]
    """Of each place: operations that recomputing it costs."""
    forward: float
    """Operations."""
    backward: float
    """Operations, without recomputation."""

    def operations(self, recomputed: Collection[str] = ()) -> float:
        """That recomputing these blocks costs."""
        places = zip(self.pieces, self.again, strict=True)
        return sum(count for block, count in places if block in recomputed)

    def held(self, recomputed: Collection[str] = ()) -> float:
        """Bytes kept when the forward pass is over."""
        return sum(self._held(recomputed)[0])

    def peak(self, recomputed: Collection[str] = ()) -> float:
        """Bytes at the worst moment of forward and backward: what places up to this one keep, a
        recomputed piece's own, and the gradients on their way."""
        held, inside = self._held(recomputed)
        sums = itertools.accumulate(held)
        return max(map(sum, zip(sums, inside, self.working, strict=True)))

    def of_block(self, name: str) -> tuple[float, float]:
        """Bytes that a block keeps, and that it keeps when it is recomputed."""
        own = {place for place, block in enumerate(self.pieces) if block == name}
        inside = [
            size
            for places, size in self.kept.items()
            if any(place in own and not given for place, given in places)
        ]
        return sum(inside), sum(inside) - (self.held() - self.held([name]))

    def options(self) -> list[Option]:
        """The choices worth having: each keeps less than every one that recomputes less."""
        subsets = itertools.chain.from_iterable(
            itertools.combinations(self.blocks, n) for n in range(len(self.blocks) + 1)
        )
        found = [Option(some, self.operations(some), self.peak(some)) for some in subsets]
        best: list[Option] = []
        for option in sorted(found, key=lambda o: (o.operations, o.peak)):
            if not best or option.peak < best[-1].peak:
                best.append(option)
        return best

    def _held(self, recomputed: Collection[str]) -> tuple[list[float], list[float]]:
        """Of each place: bytes that are kept from there on, and those that a recomputed piece has
        for itself."""
        held, inside = ([0.0] * len(self.pieces) for _ in range(2))
        for places, size in self.kept.items():
            # an input is kept if its piece is recomputed, what is inside if it is not
            first = [p for p, given in places if given == (self.pieces[p] in recomputed)][:1]
            for place in first:
                held[place] += size
            for place, given in places:
                again = not given and self.pieces[place] in recomputed
                if again and not (first and first[0] <= place):
                    inside[place] += size
        return held, inside


def count(
    unet: torch.nn.Module,
    *,
    latent: Sequence[int],
    embedding: Sequence[int],
    pooled: int | None = None,
    attention: str = "sdpa",
) -> Activations:
    """Count one sample's forward and backward pass.

    PyTorch's attention counts as its flash kernel, which keeps queries, keys, values, output and
    the logarithms of the sums, O(n): so do the kernels that GPUs use for it at any precision, that
    of xformers, and the CPU's. Meta tensors would take the one that keeps all weights, O(n²), as
    `eager` attention does.

    Args:
        unet: on the meta device, in the dtype it is trained in; frozen parameters keep less.
        latent: (C, H, W).
        embedding: (L, D).
        pooled: size of the pooled embedding of a model that takes one (SDXL).
        attention: as in `attention.use_attention`.
    """
    dtype = next(unet.parameters()).dtype

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(SAMPLES, *shape, dtype=dtype, device="meta")

    options: dict = {"return_dict": False}
    if pooled is not None:
        added = {"text_embeds": empty(pooled), "time_ids": empty(6, dtype=torch.float32)}
        options["added_cond_kwargs"] = added
    unet.set_attn_processor(AttnProcessor() if attention == "eager" else AttnProcessor2_0())
    ledger = _Ledger(unet)
    unet.enable_gradient_checkpointing(ledger.piece)
    # gradients go as soon as they come: the trainer's are counted with its weights
    drop = [
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        for weight in unet.parameters()
        if weight.requires_grad
    ]
    try:
        with (
            ledger,
            torch.autograd.graph.saved_tensors_hooks(ledger.pack, ledger.unpack),
            FlashAttention(),
        ):
            inputs = (empty(*latent), empty(dtype=torch.int64), empty(*embedding))
            prediction = unet(*inputs, **options)[0]
            forward = ledger.operations
            prediction.sum().backward()
    finally:
        unet.disable_gradient_checkpointing()
        for hook in drop:
            hook.remove()
    return ledger.result(forward)


class FlashAttention(TorchFunctionMode):
    """PyTorch's attention by the flash kernel, which meta tensors would not get."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


class _Ledger(TorchDispatchMode):
    """Notes what is kept where, what else is alive, and the operations so far.

    A tensor is its storage: views share one, and those of the parameters are not looked at.
    """

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.blocks = blocks_of(unet)
        self.block = {m: name for name, block in self.blocks.items() for m in block.modules()}
        self.unet = {_key(t) for t in itertools.chain(unet.parameters(), unet.buffers())}
        self.pieces: list[str | None] = [None]
        self.place, self.operations, self.last = 0, 0, 0
        self.again: dict[int, int] = {}
        self.kept: list[tuple[int, set[tuple[int, bool]]]] = []  # bytes, places
        self.notes: dict[int, set[tuple[int, bool]]] = {}  # of those alive
        self.others: dict[int, int] = {}  # alive and not kept -> bytes
        self.other = 0
        self.working: dict[int, int] = defaultdict(int)

    def piece(self, module: torch.nn.Module, *args):
        """What diffusers calls in place of a checkpoint."""
        self.enter(self.block[module])
        place, start = self.place, self.operations
        for tensor in args:
            if isinstance(tensor, Tensor):
                self.note(tensor, given=True)
        self.last = start
        out = module(*args)
        self.again[place] = self.last - start  # recomputation ends with what is kept last
        self.enter(None)
        return out

    def enter(self, block: str | None) -> None:
        self.pieces.append(block)
        self.place = len(self.pieces) - 1

    def pack(self, tensor: Tensor) -> tuple[int, Tensor]:
        self.note(tensor, given=False)
        self.forget_other(_key(tensor))
        self.last = self.operations
        return self.place, tensor

    def unpack(self, packed: tuple[int, Tensor]) -> Tensor:
        self.place, tensor = packed
        return tensor

    def note(self, tensor: Tensor, given: bool) -> None:
        key = _key(tensor)
        if key in self.unet:
            return
        if key not in self.notes:
            storage = tensor.untyped_storage()
            self.notes[key] = set()
            self.kept.append((storage.nbytes(), self.notes[key]))
            weakref.finalize(storage, self.notes.pop, key, None)
        self.notes[key].add((self.place, given))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            formula = flop_registry[func.overloadpacket]
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return out

    def see(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self.unet or key in self.notes or key in self.others:
            return
        storage = tensor.untyped_storage()
        self.others[key] = storage.nbytes()
        self.other += storage.nbytes()
        weakref.finalize(storage, self.forget_other, key)
        self.working[self.place] = max(self.working[self.place], self.other)

    def forget_other(self, key: int) -> None:
        self.other -= self.others.pop(key, 0)

    def result(self, forward: int) -> Activations:
        together: Counter = Counter()
        for size, places in self.kept:
            together[tuple(sorted(places))] += size
        places = range(len(self.pieces))
        return Activations(
            blocks=tuple(self.blocks),
            pieces=tuple(self.pieces),
            kept={key: size / SAMPLES for key, size in together.items()},
            working=tuple(self.working[place] / SAMPLES for place in places),
            again=tuple(self.again.get(place, 0) / SAMPLES for place in places),
            forward=forward / SAMPLES,
            backward=(self.operations - forward) / SAMPLES,
        )


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
