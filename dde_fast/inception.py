"""Inception Score: the network of 2015-12-05 in torch-fidelity's names, and the score over splits.

torch-fidelity itself cannot be used: its import needs torchvision, and it unpickles its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dde_fast import preprocess
from dde_fast.scorer import Scorer
from dde_fast.weights import expecting, find_file, read

WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
SIZE, CLASSES, SPLITS = 299, 1008, 10
SHUFFLE_SEED = 2020
"""torch-fidelity's: images made prompt after prompt must not stay together in a split."""


class Unit(nn.Module):
    """Convolution, batch normalisation, ReLU; sides halved by stride 2 without padding."""

    def __init__(self, inside: int, outside: int, kernel, stride: int = 1, padding=None) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding is None:
            padding = 0 if stride == 2 else tuple(side // 2 for side in sides)
        self.conv = nn.Conv2d(inside, outside, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    """TensorFlow's average pool: the border's zeros are not counted."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def largest(x: Tensor) -> Tensor:
    """The last block pools the maximum, probably an error of that network, which is kept."""
    return F.max_pool2d(x, 3, 1, 1)


def halve(x: Tensor) -> Tensor:
    """The pool of a block that halves the sides."""
    return F.max_pool2d(x, 3, 2)


class Block(nn.Module):
    """Branches on the same input and a pool, concatenated.

    A branch is a chain of steps (name, outputs, kernel, stride); a step of several is units side by
    side, concatenated. `pooled` are the outputs of the pool's unit; 0: it has none.
    """

    def __init__(self, inside: int, branches: Sequence, pool, pooled: int) -> None:
        super().__init__()
        self.branches, self.pool, self.outside = [], pool, pooled or inside
        for steps in branches:
            width, names = inside, []
            for step in steps:
                units = step if isinstance(step, list) else [step]
                for name, outside, *shape in units:
                    self.add_module(name, Unit(width, outside, *shape))
                width = sum(unit[1] for unit in units)
                names.append([unit[0] for unit in units])
            self.branches.append(names)
            self.outside += width
        self.branch_pool = Unit(inside, pooled, 1) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for steps in self.branches:
            y = x
            for names in steps:
                y = torch.cat([getattr(self, name)(y) for name in names], 1)
            results.append(y)
        return torch.cat([*results, self.branch_pool(self.pool(x))], 1)


def _a(pooled: int) -> tuple:
    triple = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    double = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    return [[("branch1x1", 64, 1)], double, triple], average, pooled


def _c(width: int) -> tuple:
    across, down, name = (1, 7), (7, 1), "branch7x7"
    single = [(f"{name}_1", width, 1), (f"{name}_2", width, across), (f"{name}_3", 192, down)]
    kernels = (1, down, across, down, across)
    widths = (width, width, width, width, 192)
    double = [(f"{name}dbl_{i + 1}", widths[i], kernels[i]) for i in range(5)]
    return [[("branch1x1", 192, 1)], single, double], average, 192


def _e(pool) -> tuple:
    def fork(name: str) -> list:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    single = [("branch3x3_1", 384, 1), fork("branch3x3_2")]
    double = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")]
    return [[("branch1x1", 320, 1)], single, double], pool, 192


_B = (
    [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    ],
    halve,
    0,
)
_D = (
    [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
    ],
    halve,
    0,
)

STEM = {  # name: outputs, kernel, stride, padding; None: a pool
    "Conv2d_1a_3x3": (32, 3, 2),
    "Conv2d_2a_3x3": (32, 3, 1, 0),
    "Conv2d_2b_3x3": (64, 3),
    "MaxPool_1": None,
    "Conv2d_3b_1x1": (80, 1),
    "Conv2d_4a_3x3": (192, 3, 1, 0),
    "MaxPool_2": None,
}
BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _B,
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _D,
    "Mixed_7b": _e(average),
    "Mixed_7c": _e(largest),
}


class Inception(nn.Sequential):
    """Pixels [B, 3, 299, 299] to logits [B, 1008] without the last bias, as the score wants them."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for name, unit in STEM.items():
            self.add_module(name, Unit(width, *unit) if unit else nn.MaxPool2d(3, 2))
            width = unit[0] if unit else width
        for name, block in BLOCKS.items():
            self.add_module(name, Block(width, *block))
            width = self[-1].outside
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        for layer in list(self)[:-1]:
            pixels = layer(pixels)
        return F.linear(pixels.mean((2, 3)), self.fc.weight)


class InceptionScore(Scorer):
    """Inception Score (Salimans et al. 2016): exp(mean KL(p(y|x) ‖ p(y))), the mean of 10 splits.

    As torch-fidelity computes it: the 2015 network, pixels rounded to 8 bits, images shuffled by a
    fixed seed, `with_std` gives the (population) standard deviation over the splits too. It does not
    read the prompts. Raises ValueError for fewer images than splits.
    """

    libraries = ("torch", "numpy")

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        self.model = weights or WEIGHTS
        with expecting("weights of the Inception network, a single file", self.model):
            state = read(find_file(self.model))
            self.network = Inception()
            self.network.load_state_dict(state)

    def each(self, images: Tensor, prompts: list[str]) -> Tensor:  # [B, 3, H, W] -> [B, 1008]
        return self.network(preprocess.inception(images, SIZE))

    def whole(self, values: Tensor) -> Tensor:  # [N, 1008] -> []
        return split_scores(values).mean()

    def with_std(self, values: Tensor) -> tuple[Tensor, Tensor]:  # [N, 1008] -> [], []
        """Mean and standard deviation over the splits."""
        scores = split_scores(values)
        return scores.mean(), scores.std(correction=0)

    def beside(self) -> dict[str, Any]:
        return {"preprocessing": f"inception, {SIZE} pixels", "splits": SPLITS}


def split_scores(logits: Tensor) -> Tensor:  # [N, classes] -> [SPLITS], float64
    """exp(mean over images of Σ_y p(y|x) (ln p(y|x) - ln p(y))) of each split."""
    count = len(logits)
    if count < SPLITS:
        raise ValueError(f"images: expected at least {SPLITS}, one per split, got {count}")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    logits = logits[torch.from_numpy(order).to(logits.device)].double()
    scores = []
    for i in range(SPLITS):
        log_p = logits[i * count // SPLITS : (i + 1) * count // SPLITS].log_softmax(1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
    return torch.stack(scores)
