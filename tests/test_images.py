"""From encoded bytes to pixels: what decodes, what is refused, and one geometry per pair."""

import io
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from dde_fast import images, loader, noise
from dde_fast.images import Geometry, Unusable, decode, fit, geometries

CENTRE = Geometry(0.5, 0.5, False)


def encoded(picture: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def random_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_decoding_changes_no_pixel():
    picture = random_picture(9, 7)
    assert decode(encoded(picture)).tobytes() == picture.tobytes()


def test_transparent_pixels_lie_on_white():
    for mode, colour in (("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))):
        image = encoded(Image.new(mode, (2, 2), colour))
        assert decode(image).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("P", "L"):
        assert decode(encoded(Image.new(mode, (2, 2)), transparency=0)).getpixel((1, 1)) == (
            (255,) * 3
        )
    half = decode(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))).getpixel((0, 0))
    assert half == (127, 127, 127)


SIXTEEN = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)


def converted(mode: str, kind: str) -> bytes:
    return encoded(Image.new("RGB", (4, 4), (200, 40, 90)).convert(mode), kind)


@pytest.mark.parametrize("mode, kind", [("CMYK", "tiff"), ("CMYK", "jpeg"), ("YCbCr", "tiff")])
def test_other_colour_spaces_become_rgb(mode, kind):
    found = decode(converted(mode, kind)).getpixel((1, 1))
    assert found == pytest.approx((200, 40, 90), abs=3)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(mode):
    picture = ImageOps.grayscale(random_picture(6, 6)).convert(mode)
    assert decode(encoded(picture)).tobytes() == picture.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_keep_the_upper_eight(kind):
    found = decode(encoded(Image.fromarray(SIXTEEN), kind))
    assert [found.getpixel((x, 0)) for x in range(4)] == [(v,) * 3 for v in (0, 1, 128, 255)]


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_a_mode_without_one_right_conversion_is_refused(mode):
    with pytest.raises(Unusable) as why:
        decode(encoded(Image.new(mode, (4, 4)), "tiff"))
    assert (why.value.reason, why.value.detail) == ("unsupported mode", mode)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    picture = random_picture(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]
    expected = picture if upright is None else picture.transpose(upright)
    found = decode(encoded(picture, exif=exif))
    assert found.size == expected.size and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)


def reason(data: bytes, **limits) -> str:
    with pytest.raises(Unusable) as why:
        decode(data, **limits)
    return why.value.reason


def test_sizes_are_refused_by_the_limits_themselves():
    image = encoded(random_picture(20, 10))
    assert decode(image, min_side=10, max_pixels=200).size == (20, 10)
    assert reason(image, min_side=11) == "too small image"
    assert reason(image, max_pixels=199) == "over-large image"


def bomb(side: int) -> bytes:
    """A PNG that says it is side x side, of a few bytes."""
    data = bytearray(encoded(Image.new("L", (1, 1))))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9000, 12000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    assert reason(bomb(side)) == "over-large image"


def test_what_is_cut_off_is_truncated():
    for kind in ("jpeg", "png", "webp"):
        data = encoded(random_picture(64, 64), kind)
        assert reason(data[: len(data) // 2]) in ("truncated image", "undecodable image")
    assert reason(encoded(random_picture(64, 64), "jpeg")[:-40]) == "truncated image"
    assert reason(b"") == "without an image"


@pytest.mark.parametrize("kind", ["eps", "tga"])
def test_other_formats_are_not_opened(kind, monkeypatch):
    """EPS would start Ghostscript."""
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: called.append(args))
    assert reason(encoded(Image.new("RGB", (8, 8)), kind)) == "undecodable image"
    assert not called


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "jpeg2000", "ppm"])
def test_damaged_bytes_are_an_image_or_unusable_and_nothing_else(kind):
    whole = encoded(random_picture(24, 24), kind)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        data = bytearray(whole)
        for at in random.integers(0, len(data), random.integers(1, 12)):
            data[at] = random.integers(256)
        if random.random() < 0.3:
            del data[random.integers(len(data)) :]
        try:
            assert decode(bytes(data)).mode == "RGB"
        except Unusable as why:
            refused += 1
            assert why.reason.endswith(("image", "mode"))
    assert refused


def test_geometries_are_a_function_of_seed_and_pair():
    ids = [5, 0, 2**40, 77]
    found = geometries(ids, 3, "random", True)
    assert found == geometries(ids, 3, "random", True)
    assert found[::-1] == geometries(ids[::-1], 3, "random", True)
    assert found[2:3] == geometries(ids[2:3], 3, "random", True)
    assert len(set(found)) == 4 and found != geometries(ids, 4, "random", True)


def test_geometries_of_many_pairs_are_uniform_and_independent():
    many = geometries(range(4000), 0, "random", True)
    y, x, flip = (np.array([getattr(g, name) for g in many], float) for name in ("y", "x", "flip"))
    assert (y > 0).all() and (y <= 1).all() and (x > 0).all() and (x <= 1).all()
    for values, std in ((y, 12**-0.5), (x, 12**-0.5), (flip, 0.5)):
        assert values.mean() == pytest.approx(0.5, abs=4 * std / 4000**0.5)
        assert values.std() == pytest.approx(std, rel=0.05)
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / 4000**0.5  # next pair's
    for a, b in ((y, x), (y, flip), (x, flip)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / 4000**0.5


def test_choices_are_not_those_of_timestep_dropout_and_order():
    taken = {noise.TIMESTEP, noise.CAPTION_DROPOUT, loader.SHUFFLE}
    assert len(taken | {images.CROP_Y, images.CROP_X, images.FLIP}) == 6


def test_the_centre_without_flip_is_the_default_of_both_choices():
    assert geometries([1, 2], 0, "center", False) == [CENTRE, CENTRE]
    assert {g.flip for g in geometries(range(50), 0, "center", True)} == {True, False}
    with pytest.raises(ValueError, match="crop: expected one of center, random, got 'left'"):
        geometries([1], 0, "left", False)
    assert geometries([], 0, "random", True) == []


@pytest.mark.parametrize("size", [(64, 40), (40, 64), (33, 47), (8, 8), (5, 6)])
def test_the_centre_is_what_pillow_fits(size):
    picture = random_picture(*size)
    pixels, _ = fit(picture, (8, 12), CENTRE)
    expected = ImageOps.fit(picture, (12, 8), Image.Resampling.LANCZOS)
    assert pixels.shape == (8, 12, 3) and pixels.dtype == np.uint8
    assert pixels.tobytes() == expected.tobytes()


def test_crop_and_flip_in_pixels():
    """Without scaling every pixel is known."""
    picture = random_picture(30, 8)
    whole = np.asarray(picture)
    pixels, conditions = fit(picture, (8, 10), Geometry(0.5, 0.25, False))
    assert (pixels == whole[:, 5:15]).all() and conditions == (8, 30, 0, 5)
    pixels, conditions = fit(picture, (8, 10), Geometry(0.5, 0.25, True))
    assert (pixels == whole[:, ::-1][:, 5:15]).all() and conditions == (8, 30, 0, 5)
    tall = Image.fromarray(whole.transpose(1, 0, 2))
    pixels, conditions = fit(tall, (10, 8), Geometry(1.0, 0.3, False))
    assert (pixels == np.asarray(tall)[20:]).all() and conditions == (30, 8, 20, 0)


@pytest.mark.parametrize(
    "size, target, geometry, expected",
    [
        # (width, height), (H, W) -> original height, original width, crop top, crop left
        ((1024, 1024), (1024, 1024), (0.5, 0.5), (1024, 1024, 0, 0)),
        ((512, 512), (1024, 1024), (0.9, 0.1), (512, 512, 0, 0)),  # enlarged: nothing to crop
        ((1536, 1024), (1024, 1024), (0.5, 0.5), (1024, 1536, 0, 256)),
        ((768, 512), (1024, 1024), (0.5, 0.5), (512, 768, 0, 256)),  # scaled by 2 to 1536 x 1024
        ((512, 768), (1024, 1024), (0.25, 0.5), (768, 512, 128, 0)),
        ((3000, 1000), (500, 500), (1.0, 1.0), (1000, 3000, 0, 1000)),  # by ½ to 1500 x 500
        ((1000, 1000), (512, 1024), (0.5, 0.5), (1000, 1000, 256, 0)),  # to 1024 x 1024
    ],
)
def test_sdxl_conditions_by_hand(size, target, geometry, expected):
    picture = Image.new("RGB", size)
    assert fit(picture, target, Geometry(*geometry, False))[1] == expected


def test_both_images_of_a_pair_show_the_same_part():
    """The same scene at three sizes: after one geometry they differ by resampling alone."""
    scene = Image.linear_gradient("L").resize((96, 48))
    scene = Image.merge(
        "RGB", (scene, Image.linear_gradient("L").rotate(90).resize((96, 48)), scene)
    )
    for geometry in geometries(range(8), 0, "random", True):
        crops = [
            fit(scene.resize(size, Image.Resampling.LANCZOS), (16, 16), geometry)[0].astype(int)
            for size in ((96, 48), (192, 96), (64, 32))
        ]
        for crop in crops[1:]:
            assert abs(crop - crops[0]).max() <= 12
    mirrored = [g for g in geometries(range(8), 0, "random", True) if g.flip]
    assert 0 < len(mirrored) < 8
