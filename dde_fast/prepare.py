"""Encode preference pairs once, for training to read.

    python -m dde_fast.prepare --pairs PAIRS --model MODEL --output CACHE
    torchrun --nproc_per_node 8 dde_fast/prepare.py ...    # the processes of a machine share it
    python -m dde_fast.prepare ... --shard 3/16            # machines that share nothing: 0/16 … 15/16

Every process encodes shards of its own; nobody talks to anybody. A shard that is there is never
encoded again, so after a kill the same command continues; whoever finds all of them writes the
table of pairs and the manifest. What machines that share nothing wrote, copied into one folder, is
finished there by the same command.
"""

from __future__ import annotations

import os
import sys

if not __package__:  # run by path: this folder would shadow other modules named config, cache, …
    _folder = os.path.dirname(os.path.abspath(__file__))
    _parent = os.path.dirname(_folder)
    sys.path[:] = [_parent if os.path.abspath(path) == _folder else path for path in sys.path]

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dde_fast import embedded, images, models, reference_scoring
from dde_fast.cache import Cache
from dde_fast.command_line import parse_command_line
from dde_fast.encode import encode_images, encode_prompts, read_pictures
from dde_fast.encoding_plan import Plan, Unit, count_reasons, make_plan
from dde_fast.engine import device_of_process, launch_environment, one_line_errors, say
from dde_fast.manifest import (
    DTYPES,
    MANIFEST,
    PAIRS,
    REJECTED,
    SETTINGS,
    Manifest,
    check_settings,
    fingerprint_of,
    write_index,
    write_settings,
)
from dde_fast.models import Encoders
from dde_fast.pairs import open_source
from dde_fast.reference_scoring import ScoreConfig
from dde_fast.shards import PARTIAL, Shard, check_content, open_shard, write_shard

ABANDONED = 600
"""Seconds after which a partial file of no particular process is taken for a killed one's."""


@dataclass
class PrepareConfig(ScoreConfig):
    """Encode preference pairs into a cache that training reads."""

    output: str = "cache"
    """Directory of the cache: new, or one that the same command began."""
    model: str = "embedded"
    """Model whose VAE and text encoders encode: as in training."""
    pairs: str = "faces"
    """Preference pairs: as in training."""
    split: str = "train"
    """Split of the pairs."""
    limit: int = 0
    """Use only the first pairs, this many; 0 = all."""
    resolution: int = 0
    """Pixels of each side that images are scaled and cropped to; 0 = what the model was made for."""
    crop: str = "center"
    """Where an image that is not square is cropped: center, or random, the same place for both
    images of a pair."""
    flip: bool = False
    """Mirror half of the pairs, both images alike."""
    seed: int = 0
    """Of random crops and flips; with reference_scores, of the training that reads them."""
    min_side: int = 0
    """Pixels; a pair with an image whose shorter side is below is left out; 0 = a quarter of the
    shorter side that it is scaled to."""
    max_pixels: int = images.MAX_PIXELS
    """Pixels; a pair with an image above is left out, before it is decoded."""
    dtype: str = "float16"
    """Of what is stored: float16, bfloat16 or float32."""
    shard_size: int = 1024
    """Images or prompts per file: 64 MiB of SD 1.5's images in float16."""
    batch_size: int = 8
    """Images or prompts encoded at once; the memory that the VAE takes, in float32, grows with it."""
    decode_threads: int = 4
    """Threads that decode images while others are encoded."""
    shard: str = "0/1"
    """Which part of the work is this machine's, "i/n" with i from 0 to n - 1."""
    verify: bool = False
    """Encode nothing: read every shard of the cache in `output` and compare it with its checksum."""


ENCODING = (
    "pairs split limit resolution crop flip min_side max_pixels dtype shard_size batch_size "
    "decode_threads"
).split()
SCORING = "objective timestep_low timestep_high caption_dropout precision score_batch".split()
"""Fields that only encoding, or only reference scores, use."""


def check(c: PrepareConfig) -> None:
    """Refuse values out of range."""
    for name, valid, expected in (
        ("limit", c.limit >= 0, "0 (all) or a number of pairs"),
        ("resolution", c.resolution >= 0, "0 (the model's) or pixels"),
        ("crop", c.crop in images.CROPS, f"one of {', '.join(images.CROPS)}"),
        ("seed", 0 <= c.seed < 2**63, "0 or more, below 2**63"),
        ("min_side", c.min_side >= 0, "0 (a quarter) or pixels"),
        ("max_pixels", c.max_pixels >= 1, "at least 1"),
        ("dtype", c.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        ("shard_size", c.shard_size >= 1, "at least 1"),
        ("batch_size", c.batch_size >= 1, "at least 1"),
        ("decode_threads", c.decode_threads >= 1, "at least 1"),
        ("reference_scores", c.reference_scores >= 0, "0 (encode) or a number of draws"),
        ("caption_dropout", 0 <= c.caption_dropout <= 1, "a probability"),
        ("precision", c.precision in DTYPES, f"one of {', '.join(DTYPES)}"),
        ("score_batch", c.score_batch >= 1, "at least 1"),
        ("shard", _part(c.shard) is not None, '"i/n" with 0 <= i < n'),
    ):
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {getattr(c, name)!r}")


def check_used(c: PrepareConfig) -> None:
    """Refuse what a command line asks for and would not get."""
    for names, used, why in (
        (ENCODING, not c.reference_scores, "with reference_scores, which encodes nothing"),
        (SCORING, c.reference_scores, "without reference_scores"),
    ):
        for name in names:
            if not used and getattr(c, name) != getattr(PrepareConfig, name):
                raise ValueError(f"{name}: expected none {why}, got {getattr(c, name)!r}")


def _part(shard: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    part = (int(match[1]), int(match[2])) if match else (1, 0)
    return part if part[0] < part[1] else None


def _age(path: Path) -> float:
    """Seconds since a file was last written; 0 for one that its writer finished meanwhile."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


class Preparation:
    """A cache in the making, or one that is made already.

    Args:
        c: what to make.
        encoders: of `c.model`, on the device that encodes.
        latent_shape: (C, h, w) that the model's UNet was made for.

    Raises:
        ValueError: a value out of range, or the source cannot be read.
    """

    def __init__(self, c: PrepareConfig, encoders: Encoders, latent_shape: Sequence[int]):
        check(c)
        self.c, self.encoders, self.folder = c, encoders, Path(c.output)
        pairs = embedded.pairs_path(c.pairs, c.split) if c.pairs in embedded.SETS else c.pairs
        self.source = open_source(pairs, c.split, c.limit)
        channels, *sides = latent_shape
        self.size = tuple(c.resolution or side * encoders.scale for side in sides)
        if c.resolution % encoders.scale:
            raise ValueError(
                f"resolution: expected a multiple of {encoders.scale}, got {c.resolution}"
            )
        self.latent_shape = (channels, *(side // encoders.scale for side in self.size))
        self.min_side = c.min_side or max(1, min(self.size) // 4)
        same = ("limit", "crop", "flip", "seed", "max_pixels", "dtype")
        self.settings = {
            "source": self.source.fingerprint(),
            "encoders": encoders.identity(),
            "height": self.size[0],
            "width": self.size[1],
            "min_side": self.min_side,
            "shard_size": c.shard_size,
            **{name: getattr(c, name) for name in same},
        }
        """What the content follows from."""
        self.fingerprint = fingerprint_of(self.settings)

    def __str__(self) -> str:
        manifest = self.manifest()
        if manifest is not None:
            return f"{manifest} in {self.c.output}"
        return f"{self.plan}, to be encoded in {self.c.output}"

    @cached_property
    def plan(self) -> Plan:
        """What there is to do; reads the source's metadata."""
        c = self.c
        return make_plan(self.source, seed=c.seed, crop=c.crop, flip=c.flip)

    @cached_property
    def units(self) -> list[Unit]:
        """The shards of the plan."""
        return self.plan.units(self.c.shard_size)

    def manifest(self) -> Manifest | None:
        """Of the finished cache, or None as long as something is missing.

        Raises:
            ValueError: the folder holds something else, or a damaged cache.
        """
        check_settings(self.folder, self.settings, "a cache")
        path = self.folder / MANIFEST
        if not path.is_file():
            return None
        manifest = Manifest.from_json(path.read_bytes(), str(self.folder))
        there = all((self.folder / name).is_file() for name in manifest.shards)
        return manifest if there else None

    def missing(self) -> list[str]:
        """Names of the shards that nobody has written yet."""
        return [unit.name for unit in self.units if not (self.folder / unit.name).is_file()]

    def encode(self, part: int = 0, parts: int = 1) -> None:
        """Encode what is missing of one part of the shards."""
        units = self.units[part::parts]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep(units)
        write_settings(self.folder, self.settings)
        todo = [unit for unit in units if self._finished(unit) is None]
        total, rows = sum(map(len, units)), sum(map(len, todo))
        with (
            ThreadPoolExecutor(self.c.decode_threads) as pool,
            tqdm(
                desc="encoding",
                total=total,
                initial=total - rows,
                unit="row",
                disable=not todo or os.environ.get("LOCAL_RANK", "0") != "0",
                mininterval=0.1 if sys.stderr.isatty() else 30,
            ) as bar,
        ):
            for unit in todo:
                tensors, unusable = self._encode(unit, pool, bar.update)
                write_shard(self.folder / unit.name, tensors, self.fingerprint, unusable)

    def finish(self) -> Manifest:
        """Write the table of pairs, what was rejected and, last, the manifest.

        Raises:
            ValueError: a shard is missing, damaged or of another cache, or no pair is left.
        """
        shards = {unit.name: self._finished(unit) for unit in self.units}
        if missing := [name for name, shard in shards.items() if shard is None]:
            raise ValueError(f"output: {self._lacking(missing)}")
        unusable = {
            unit.start + int(row): why
            for unit in self.units
            for row, why in shards[unit.name].facts.items()
        }
        plan = self.plan.without(unusable)
        return write_index(
            self.folder,
            settings=self.settings,
            shards=shards,
            columns={name: torch.tensor(rows) for name, rows in plan.pairs.items()},
            counts=plan.counts,
            rejected=map(asdict, plan.rejected),
            reasons=count_reasons(plan.rejected),
            made_from={"model": self.c.model, "pairs": self.c.pairs},
        )

    def run(self, part: int = 0, parts: int = 1) -> str:
        """Do one part of the work and finish the cache if it was the last; what there is to say."""
        manifest = self.manifest()
        if manifest is None:
            self.encode(part, parts)
            if missing := self.missing():
                return f"part {part} of {parts} is done: {self._lacking(missing)}"
            manifest = self.finish()
        return f"cache: {manifest} in {self.c.output}"

    def _lacking(self, missing: list[str]) -> str:
        some = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
        return (
            f"expected {len(self.units)} shards in {self.c.output!r}, got all but {len(missing)} "
            f"({some}), which the other parts make"
        )

    def _sweep(self, units: list[Unit]) -> None:
        """Remove what killed processes left: of these shards all, of other files what is old."""
        own = tuple(f"{unit.name}." for unit in units)
        common = tuple(f"{n}." for n in (SETTINGS, PAIRS, REJECTED, MANIFEST))
        for path in self.folder.glob(f"*{PARTIAL}"):
            old = path.name.startswith(common) and _age(path) > ABANDONED
            if old or path.name.startswith(own):
                path.unlink(missing_ok=True)

    def _finished(self, unit: Unit) -> Shard | None:
        """A shard that is there, refused if it is damaged or was made with other settings."""
        path = self.folder / unit.name
        if not path.is_file():
            return None
        shard = open_shard(path)
        if shard.fingerprint != self.fingerprint:
            raise ValueError(
                f"output: expected shards of one cache in {str(self.folder)!r}, got {path.name}, "
                "made of other pairs, with another model or other settings"
            )
        return shard

    def _encode(
        self, unit: Unit, pool: ThreadPoolExecutor, progress
    ) -> tuple[dict[str, Tensor], Any]:
        """Tensors of a shard, and which of its rows are unusable and why."""
        c, rows = self.c, slice(unit.start, unit.stop)
        options = {"dtype": DTYPES[c.dtype], "progress": progress}
        if unit.kind == "prompts":
            prompts = self.plan.prompts[rows]
            return encode_prompts(self.encoders, prompts, batch_size=c.batch_size, **options), {}
        pictures = read_pictures(
            self.source,
            self.plan.images[rows],
            pool,
            size=self.size,
            min_side=self.min_side,
            max_pixels=c.max_pixels,
            batch_size=c.batch_size,
        )
        return encode_images(self.encoders, pictures, (len(unit), *self.latent_shape), **options)


def start(c: PrepareConfig, device: torch.device) -> Preparation:
    """Load the model's encoders, open the source and see what is there already."""
    encoders = Encoders.load(c.model, device)
    return Preparation(c, encoders, models.latent_shape(models.load_unet_config(c.model)))


def verify(folder: str) -> Manifest:
    """Read every shard of a finished cache.

    Raises:
        ValueError: one is missing, or is not what the manifest says.
    """
    opened = Cache(folder)
    for name in tqdm(opened.manifest.shards, desc="verifying", unit="shard"):
        check_content(opened.shards[name], Path(folder) / name)
    return opened.manifest


def main(args: Sequence[str] | None = None) -> None:
    """Prepare as a command line says. What is wrong with it ends in one line and exit code 2."""
    launch_environment()
    models.quiet_libraries()
    with one_line_errors():
        c = parse_command_line(PrepareConfig, args)
        check(c)
        check_used(c)
        if c.verify:
            return say(f"whole: {verify(c.output)}")
        part, parts = _part(c.shard)
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device, share = device_of_process(), (part * ranks + rank, parts * ranks)
        done = (
            reference_scoring.run(c, device, *share)
            if c.reference_scores
            else start(c, device).run(*share)
        )
        print(done, flush=True)


if __name__ == "__main__":
    main()
