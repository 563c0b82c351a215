"""Scorers of generated images: one table, one row per reward.

A per-image reward is a callable (images [B, 3, H, W] in [0, 1], prompts list[str]) -> scores [B]; a
per-set reward takes the same and returns one number, []. Higher is better for all of them.
Everything is loaded once, when a reward is first asked for, and follows the images to their device.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dde_fast import embedded

Scorer = Callable[[Tensor, list[str]], Tensor]


class Judge(nn.Module):
    """Small convolutional classifier of 32 px faces; its last class is `other`, no face at all.

    Images [B, 3, 32, 32] in [0, 1] to logits [B, classes]; `embed` gives the unit-length feature
    [B, 128] whose scaled cosine with a class's weight is the logit.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = ((3, 32, 1), (32, 48, 2), (48, 64, 1), (64, 96, 2), (96, 96, 1))
        blocks: list[nn.Module] = []
        for inside, outside, stride in widths:
            blocks += [
                nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*blocks, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2))
        self.embedding = nn.Linear(96 * 4 * 4, 128)
        self.weight = nn.Parameter(torch.randn(classes, 128))

    def embed(self, images: Tensor) -> Tensor:  # [B, 3, 32, 32] -> [B, 128]
        return F.normalize(self.embedding(self.features(images * 2 - 1)), dim=1)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, 32, 32] -> [B, classes]
        return 20 * self.embed(images) @ F.normalize(self.weight, dim=1).T


@cache
def load_judge() -> tuple[Judge, list[str]]:
    """The shipped judge in float32, frozen, in evaluation mode, and its class names (the last is
    `other`)."""
    classes = json.loads((embedded.TINY / "judge.json").read_text())["classes"]
    judge = Judge(len(classes))
    judge.load_state_dict(load_file(embedded.TINY / "judge.safetensors"))
    return judge.eval().requires_grad_(False), classes


def _as_judged(images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 3, 32, 32]
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images: expected float [B, 3, H, W], got {images.dtype} {list(images.shape)}"
        )
    images = images.float()
    if images.shape[-2:] == (32, 32):
        return images
    return F.interpolate(images, (32, 32), mode="bilinear", antialias=True, align_corners=False)


class NearestDrawing:
    """Finds the real drawing of the base's designers that the judge finds most like an image
    (largest cosine)."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows
        judge, _ = load_judge()
        pixels = [np.asarray(Image.open(io.BytesIO(row["png"])).convert("RGB")) for row in rows]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        self.bank = judge.to(images.device).embed(images)  # [N, 128]

    def __call__(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B] int64, an index into rows
        judge, _ = load_judge()
        with torch.no_grad():
            features = judge.to(images.device).embed(_as_judged(images))
        return (features @ self.bank.to(images.device).T).argmax(dim=1)


def _base_rows() -> list[dict]:
    return [row for row in embedded.art() if row["role"] == "base"]


def human_score() -> Scorer:
    """Human sentiment, in [-1, 1], of the real emoji nearest to the image.

    What it measures is the sentiment of the tweets that use that emoji (see `dde_fast.embedded`),
    not taste in pictures. Only annotated emojis count as neighbours. Raises ImportError without the
    package emoji-sentiment.
    """
    ranking = embedded.sentiment()
    nearest = NearestDrawing([row for row in _base_rows() if row["codepoint"] in ranking])
    scores = torch.tensor([ranking[row["codepoint"]].score for row in nearest.rows])

    def score(images: Tensor, prompts: list[str]) -> Tensor:  # [B, 3, H, W], [B] -> [B]
        index = nearest(images)
        return scores.to(images.device)[index]

    return score


def colourfulness() -> Scorer:
    """Colourfulness after Hasler and Süsstrunk, "Measuring colourfulness in natural images" (2003),
    metric M³.

    With R, G, B in 0 … 255, rg = R - G and yb = (R + G)/2 - B: M = √(σ²_rg + σ²_yb) + 0.3 √(μ²_rg +
    μ²_yb), 0 for a grey image, about 100 for an extremely colourful one. Washed-out blotches score
    too: read it beside `prompt_match`.
    """

    def root(x: Tensor) -> Tensor:
        # the gradient of a square root at 0 is infinite: grey images get 0 instead
        return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0)

    def score(images: Tensor, prompts: list[str]) -> Tensor:  # [B, 3, H, W], [B] -> [B]
        red, green, blue = (255 * images.float()).flatten(2).unbind(1)
        rg, yb = red - green, (red + green) / 2 - blue
        spread = rg.var(1, correction=0) + yb.var(1, correction=0)
        return root(spread) + 0.3 * root(rg.mean(1).square() + yb.mean(1).square())

    return score


def prompt_match() -> Scorer:
    """The judge's probability that the image shows what the prompt names, in [0, 1].

    For the prompt "face" it is the probability of being any face, 1 - p(other): noise, mush and
    shuffled parts were trained as `other`, so a collapsed model shows. A probability, not its
    logarithm: a few hopeless images would own the mean of a logarithm. Raises ValueError for a
    prompt that names no known emoji.
    """
    _, classes = load_judge()
    index = {name: i for i, name in enumerate(classes[:-1])}

    def score(images: Tensor, prompts: list[str]) -> Tensor:  # [B, 3, H, W], [B] -> [B]
        if len(prompts) != len(images):
            raise ValueError(f"prompts: expected {len(images)}, one per image, got {len(prompts)}")
        unknown = [p for p in prompts if p != embedded.PLAIN_PROMPT and p not in index]
        if unknown:
            raise ValueError(
                f"prompts: prompt_match knows {embedded.PLAIN_PROMPT!r} and {len(index)} emoji "
                f"names, got {unknown[0]!r}"
            )
        judge, _ = load_judge()
        probability = judge.to(images.device)(_as_judged(images)).softmax(dim=1)
        plain = torch.tensor([p == embedded.PLAIN_PROMPT for p in prompts], device=images.device)
        column = torch.tensor([index.get(p, 0) for p in prompts], device=images.device)
        named = probability.gather(1, column[:, None]).squeeze(1)
        return torch.where(plain, 1 - probability[:, -1], named)

    return score


def distinct() -> Scorer:
    """How many different emojis a set of images shows: distinct names among the nearest real
    drawings."""
    rows = _base_rows()
    nearest = NearestDrawing(rows)
    names = sorted({row["name"] for row in rows})
    index = torch.tensor([names.index(row["name"]) for row in rows])

    def score(images: Tensor, prompts: list[str]) -> Tensor:  # [B, 3, H, W], [B] -> []
        seen = nearest(images)
        return index.to(images.device)[seen].unique().numel() * torch.ones((), device=images.device)

    return score


@dataclass(frozen=True)
class Reward:
    """One row of the table."""

    build: Callable[[], Scorer]
    """Loads what the reward needs and returns the callable."""
    differentiable: bool
    """Whether a gradient reaches the images."""
    per: str
    """`image`: scores [B]; `set`: one number for all images, []."""
    about: str
    """One line for tables and `--help`."""


REWARDS: dict[str, Reward] = {
    "human_score": Reward(human_score, False, "image", "human sentiment of the nearest real emoji"),
    "colourfulness": Reward(colourfulness, True, "image", "Hasler-Süsstrunk colourfulness"),
    "prompt_match": Reward(prompt_match, True, "image", "judge's probability of the prompt"),
    "distinct": Reward(distinct, False, "set", "different emojis among the images"),
}


@cache
def load_reward(name: str) -> Scorer:
    """The callable of one reward, loaded once. Raises ValueError for an unknown name, with the
    list."""
    if name not in REWARDS:
        raise ValueError(f"rewards: expected some of {', '.join(REWARDS)}, got {name!r}")
    return REWARDS[name].build()
