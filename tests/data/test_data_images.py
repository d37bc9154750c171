import io

import numpy as np
import pytest
from PIL import Image

from diffjax.data.images import decode
from diffjax.errors import UserError


def encoded(picture: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def test_a_picture_of_the_right_size_is_returned_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 8), pixels)


def test_transparent_parts_take_the_background_colour():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (10, 20, 30, 255)
    found = decode(encoded(Image.fromarray(pixels)), 4, background=(1, 2, 3))
    np.testing.assert_array_equal(found[0, 0], (10, 20, 30))
    np.testing.assert_array_equal(found[3, 3], (1, 2, 3))


def test_sixteen_bit_greys_are_scaled_not_clipped():
    pixels = np.full((4, 4), 32768, np.uint16)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 4, channels=1), np.full((4, 4, 1), 127))


def test_palettes_and_cmyk_become_rgb():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    np.testing.assert_array_equal(decode(encoded(red.convert("P")), 4)[0, 0], (255, 0, 0))
    assert decode(encoded(red.convert("CMYK"), format="JPEG"), 4).shape == (4, 4, 3)


def test_the_exif_orientation_is_applied():
    pixels = np.zeros((6, 6, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    found = decode(encoded(Image.fromarray(pixels), exif=exif), 6)
    assert found[5].min() == 255 and found[0].max() == 0


@pytest.mark.parametrize("at, start", [((0.0, 0.0), 0), ((0.5, 0.5), 6), ((1.0, 1.0), 12)])
def test_the_crop_is_taken_along_the_longer_side(at, start):
    columns = np.repeat(np.arange(20, dtype=np.uint8)[None], 8, axis=0)
    found = decode(encoded(Image.fromarray(columns)), 8, channels=1, at=at)
    np.testing.assert_array_equal(found[0, :, 0], np.arange(start, start + 8))


def test_reduction_averages_instead_of_picking():
    checkers = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
    found = decode(encoded(Image.fromarray(checkers)), 8, channels=1).astype(int)
    assert abs(found - 127).max() <= 2


def test_a_picture_too_small_is_refused_unless_it_may_be_enlarged():
    small = encoded(Image.new("RGB", (8, 6)))
    with pytest.raises(UserError, match="8 x 6 pixels, smaller than data.size=16.*data.enlarge"):
        decode(small, 16)
    assert decode(small, 16, enlarge=True).shape == (16, 16, 3)


def test_bytes_that_are_no_picture_say_so():
    with pytest.raises(OSError, match="no picture"):
        decode(b"nothing", 8)
