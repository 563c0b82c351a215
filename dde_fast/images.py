"""Images of pairs: from encoded bytes to the pixels a model is trained on.

One geometry per pair: winner and loser are cropped at the same relative place and flipped alike,
even where their sizes differ.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from dde_fast import noise

CROP_Y, CROP_X, FLIP = 3, 4, 5
"""Numbers of these choices of a pair, beside those of `dde_fast.noise` and its place in an epoch."""

CROPS = ("center", "random")

MAX_PIXELS = 64 * 2**20
"""Pixels above which an image is refused unless told otherwise; 8192 x 8192 are not above."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is decoded. Pillow knows more, some of which starts other programs."""

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
_TRANSPARENT = ("LA", "PA", "RGBA", "RGBa")


class Unusable(Exception):
    """A row or an image that cannot be trained on."""

    def __init__(self, reason: str, detail: str = ""):
        # it may hold names that are no Unicode; it shall be printable anywhere
        detail = detail.encode(errors="backslashreplace").decode()[:300]
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def decode(data: bytes, *, min_side: int = 1, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image, upright by its EXIF orientation, transparent pixels on white.

    Of an animation the first frame; of 16 bits the upper 8; embedded colour profiles are ignored.

    Args:
        data: an encoded image (JPEG, PNG, WebP, … of `FORMATS`).
        min_side: pixels its shorter side must have.
        max_pixels: pixels it may have; checked before any is decoded.

    Raises:
        Unusable: no image, undecodable, truncated, of an unsupported mode, too small, over-large.
    """
    if not data:
        raise Unusable("without an image")
    file = io.BytesIO(data)
    try:
        with Image.open(file, formats=_formats()) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise Unusable("over-large image", f"{width} x {height}, above {max_pixels} pixels")
            if min(width, height) < min_side:
                raise Unusable("too small image", f"{width} x {height}, below {min_side}")
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture), picture.format)
    except Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise Unusable("over-large image", str(error)) from None
    except Exception as error:  # whatever a decoder raises on bytes made to break it
        truncated = "truncated" in str(error).lower()
        reason = "truncated image" if truncated else "undecodable image"
        # Pillow's message names the address of its buffer, which differs from run to run
        detail = "" if isinstance(error, Image.UnidentifiedImageError) else f": {error}"
        raise Unusable(reason, type(error).__name__ + detail) from None


@dataclass(frozen=True, slots=True)
class Geometry:
    """How both images of a pair are cropped and flipped."""

    y: float
    """Where the crop begins, as a fraction 0 to 1 of the room there is; 0.5 = centre."""
    x: float
    """The same from the left, of the image as it is seen: of a flipped pair in the flipped image."""
    flip: bool
    """Whether left and right are swapped."""


def geometries(pair_ids: Sequence[int], seed: int, crop: str, flip: bool) -> list[Geometry]:
    """The geometry of each pair: a function of (seed, pair id) alone.

    Args:
        pair_ids: any number of them.
        seed: 0 ≤ seed < 2**64.
        crop: "center", or "random" for a place drawn from the pair's own random stream.
        flip: whether half of the pairs, drawn likewise, are mirrored.

    Raises:
        ValueError: an unknown crop, or a seed out of range.
    """
    if crop not in CROPS:
        raise ValueError(f"crop: expected one of {', '.join(CROPS)}, got {crop!r}")
    ids = torch.tensor(list(pair_ids), dtype=torch.int64)

    def drawn(choice: int) -> list[float]:
        if not len(ids):  # the kernels expect some
            return []
        return noise.pair_uniform(choice, seed=seed, pair_ids=ids, draw=0).tolist()

    middle = [0.5] * len(ids)
    ys, xs = (drawn(CROP_Y), drawn(CROP_X)) if crop == "random" else (middle, middle)
    flips = [u <= 0.5 for u in drawn(FLIP)] if flip else [False] * len(ids)
    return [Geometry(*each) for each in zip(ys, xs, flips, strict=True)]


def fit(
    picture: Image.Image, size: tuple[int, int], geometry: Geometry
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Scale an image to cover the size, crop it there, flip it.

    Args:
        picture: RGB.
        size: (H, W) in pixels.
        geometry: the pair's.

    Returns:
        uint8 [H, W, 3] and SDXL's conditions (original height, original width, crop top, crop
        left): the former before scaling, the latter in the scaled, flipped image; all in pixels.
    """
    height, width = size
    x = 1 - geometry.x if geometry.flip else geometry.x  # the flip comes last, and is cheaper so
    cropped = ImageOps.fit(
        picture, (width, height), Image.Resampling.LANCZOS, centering=(x, geometry.y)
    )
    pixels = np.asarray(ImageOps.mirror(cropped) if geometry.flip else cropped)
    scale = max(height / picture.height, width / picture.width)
    top = geometry.y * (picture.height * scale - height)
    left = geometry.x * (picture.width * scale - width)
    return pixels, (picture.height, picture.width, round(top), round(left))


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF is not in every Pillow


def _rgb(picture: Image.Image, kind: str) -> Image.Image:
    """The image in 8-bit RGB; raises Unusable where there is no one right way to get there."""
    # a PNG of 16 bits is "I" to older versions of Pillow
    if picture.mode in _SIXTEEN_BITS or (picture.mode, kind) == ("I", "PNG"):
        # Pillow's own conversion of 16 bits clips at 255
        return Image.fromarray(
            (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)
        ).convert("RGB")
    if picture.mode not in _PLAIN + _TRANSPARENT:
        raise Unusable("unsupported mode", picture.mode)
    if picture.mode in _TRANSPARENT or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
