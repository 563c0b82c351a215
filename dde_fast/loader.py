"""The stream of pairs, and its batches made ready while the device works.

Position p of the endless stream is a pair of epoch p // n; the order of an epoch is a function of
(seed, epoch, shuffle_block) alone. What a pair sees in an epoch (its sample of the VAE's posterior,
its caption or none) comes from its own random stream, whoever asks: it is the pair's draw of the
epoch's number, or, with reference scores of K draws, of the epoch's number modulo K. Orders and
dropped captions are drawn on the CPU, by the thread that reads, for they decide what is read; the
sample, like timesteps and noise in `dde_fast.noising`, on the device of the batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dde_fast import noise
from dde_fast.cache import Cache
from dde_fast.packing import Mover, Packed, pack
from dde_fast.reference_scores import ReferenceScores

SHUFFLE = 2
"""Number of a pair's choice of place in its epoch, beside those of `dde_fast.noise`."""
SHUFFLE_BLOCK = 6
"""The same for a block of pairs."""
WINDOW = 4
"""Blocks whose pairs are mixed with each other."""
AHEAD = 3
"""Batches made ready, on their device, before they are asked for."""


@dataclass
class Batch:
    """B pairs of the stream on the device where they are used."""

    latents: Tensor
    """float32 [2B, C, h, w], winners first, sampled from the VAE's posterior."""
    embeddings: Tensor
    """[U, L, D] of the distinct captions, in the cache's dtype."""
    captions: Tensor
    """int64 [B], which of them is each pair's: the empty one where it was dropped."""
    pair_ids: Tensor
    """int64 [B]."""
    draws: Tensor
    """int64 [B]: which of its draws each pair sees."""
    pooled: Tensor | None = None
    """[U, P] of the captions for SDXL."""
    time_ids: Tensor | None = None
    """float32 [2B, 6] for SDXL: original height and width, top and left of the crop, height and
    width of the picture."""
    reference_errors: Tensor | None = None
    """float32 [2B], of the reference at this draw, where they were computed before."""


class PairStream:
    """The endless stream of pairs: epoch after epoch, each in an order of its own.

    Args:
        pair_ids: int64 [n], on the CPU.
        seed: of the order.
        block: 0 mixes the whole set; else so many consecutive pairs stay near each other, which
            is what shards fetched from afar need: blocks in random order, and pairs mixed among
            `WINDOW` blocks at a time.
    """

    def __init__(self, pair_ids: Tensor, seed: int, block: int = 0):
        self.pair_ids, self.seed, self.block = pair_ids, seed, block
        self.orders: dict[int, Tensor] = {}

    def __getitem__(self, positions: slice) -> tuple[Tensor, Tensor]:
        """(row, epoch) at each position, both int64 [stop - start]."""
        rows, epochs, position = [], [], positions.start
        while position < positions.stop:
            epoch, at = divmod(position, len(self.pair_ids))
            part = self.order(epoch)[at : at + positions.stop - position]
            rows.append(part)
            epochs.append(torch.full_like(part, epoch))
            position += len(part)
        return torch.cat(rows), torch.cat(epochs)

    def order(self, epoch: int) -> Tensor:
        """int64 [n]: the rows sorted by one random number each, and by block where asked."""
        if epoch not in self.orders:
            key = {"seed": self.seed, "draw": epoch}
            places = noise.pair_uniform(SHUFFLE, pair_ids=self.pair_ids, **key)
            order = places.argsort(stable=True)
            if self.block:
                blocks = torch.arange(-(-len(order) // self.block))
                ranks = noise.pair_uniform(SHUFFLE_BLOCK, pair_ids=blocks, **key)
                window = ranks.argsort(stable=True).argsort() // WINDOW  # of each block
                order = order[window[order // self.block].argsort(stable=True)]
            self.orders = {epoch: order}
        return self.orders[epoch]


class InOrder(PairStream):
    """Every pair in the set's own order, over and over: position p is pair p % n in its draw p // n."""

    def order(self, epoch: int) -> Tensor:
        return torch.arange(len(self.pair_ids))


def read(
    cache: Cache,
    index: Tensor,  # int64 [B]
    epochs: Tensor,  # int64 [B]
    *,
    seed: int,
    caption_dropout: float,
    scores: ReferenceScores | None = None,
    pinned: bool = False,
) -> Packed:
    """All that a batch of these pairs is made from, out of the cache into one buffer on the CPU.

    Captions are dropped where the pair's draw drops them. With reference scores the draws are
    those that were scored, over and over, else the epochs.
    """
    ids, draws = cache.pair_ids[index], epochs if scores is None else epochs % scores.draws
    dropout = noise.pair_uniform(noise.CAPTION_DROPOUT, seed=seed, pair_ids=ids, draw=draws)
    parts = cache.rows(index, dropout <= caption_dropout)
    sizes = parts.pop("sizes")
    if "pooled" in parts:
        settings = cache.manifest.settings
        target = torch.tensor([settings["height"], settings["width"]]).expand(len(sizes), 2)
        parts["time_ids"] = torch.cat([torch.stack(sizes), target], dim=1).float()
    if scores is not None:
        parts["reference_errors"] = scores.of(index, draws)
    return pack(parts | {"pair_ids": ids, "draws": draws}, pinned)


def to_batch(tensors: dict[str, Tensor], *, seed: int, backend: str = "auto") -> Batch:
    """What `read` packed, on whichever device, with a sample of each posterior.

    The latent is mean + std · n with n the elements N … 3N-1 of the pair's normal stream, the
    winner's before the loser's; 0 … N-1 are the noise of training.
    """
    latents, std = (tensors.pop(name).float() for name in ("mean", "std"))
    key = {"seed": seed, "pair_ids": tensors["pair_ids"], "draw": tensors["draws"]}
    normal = noise.pair_noise((3, *latents.shape[1:]), **key, backend=backend)
    for half, part in enumerate(latents.chunk(2)):
        part.addcmul_(std.chunk(2)[half], normal[:, 1 + half])
    return Batch(latents=latents, **tensors)


class Loader:
    """Iterates over batches of a stream; a thread of its own reads ahead.

    Args:
        cache: where the pairs are.
        stream: their order.
        slices: (start, stop) of each batch in the stream, in the order of their use.
        seed: of posterior samples and caption dropout.
        caption_dropout: probability of the empty caption.
        device: of the batches.
        backend: of the noise on it.
        scores: the reference's errors at the draws that are cycled through, where it is not run.
    """

    def __init__(
        self,
        cache: Cache,
        stream: PairStream,
        slices: Iterable[tuple[int, int]],
        *,
        seed: int,
        caption_dropout: float,
        device: torch.device,
        backend: str = "auto",
        scores: ReferenceScores | None = None,
    ):
        self.cache, self.stream, self.scores = cache, stream, scores
        self.seed, self.caption_dropout, self.backend = seed, caption_dropout, backend
        self.waited = 0.0
        """Seconds that the caller waited for data, all in all."""
        self._mover = Mover(device)
        self._ready: queue.Queue = queue.Queue(maxsize=AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._read_ahead, args=(iter(slices),), name="dde_fast loader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        item = self._ready.get()
        self.waited += time.perf_counter() - began
        if not isinstance(item, Packed):
            self._ready.put(item)  # the end, for whoever asks again
            raise StopIteration if item is None else item
        return to_batch(self._mover.receive(item), seed=self.seed, backend=self.backend)

    def close(self) -> None:
        """End the thread and let go of what it had ready."""
        self._closed.set()
        while self._thread.is_alive():
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(timeout=0.01)

    def _read_ahead(self, slices: Iterator[tuple[int, int]]) -> None:
        options = {"seed": self.seed, "caption_dropout": self.caption_dropout}
        options |= {"scores": self.scores, "pinned": self._mover.pinned}
        try:
            self._mover.begin()
            for start, stop in slices:
                packed = read(self.cache, *self.stream[start:stop], **options)
                if not self._put(self._mover.send(packed)):
                    return
            self._put(None)
        except BaseException as error:  # raised where the batch is asked for
            self._put(error)

    def _put(self, item) -> bool:
        """False once nobody reads any longer."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
