import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import diffjax
from diffjax.data import images
from diffjax.utils import image
from diffjax.utils.errors import UserError


def random_pictures(n, size=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def test_floats_are_clipped_and_rounded():
    x = np.array([-3.0, -1.0, 0.0, 1.0, 7.0], np.float32)
    assert image.to_uint8(x).tolist() == [0, 0, 128, 255, 255]
    assert image.to_uint8(np.float32(0.25) * np.ones(1, np.float32)).tolist() == [159]


def test_bytes_go_to_floats_and_back():
    every = np.arange(256, dtype=np.uint8)
    assert (image.to_uint8(image.from_uint8(every)) == every).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_picture_and_its_text(tmp_path, channels):
    (picture,), path = random_pictures(1, channels=channels), tmp_path / "new" / "a.png"
    text = {"prompt": "ein Löwe 🦁\nwith two lines", "seed": "3"}
    image.write_png(path, picture, text)
    found, found_text = image.read_png(path)
    assert (found == picture).all() and found_text == text
    assert path.read_bytes() == image.png(picture, text)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_whatever_byte_of_a_png_is_changed_or_cut_it_is_not_whole(tmp_path):
    path = tmp_path / "a.png"
    assert not image.is_whole(path)
    whole = image.png(np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8), {"prompt": "a cat", "seed": "5"})
    path.write_bytes(whole)
    assert image.is_whole(path)
    for place in range(len(whole)):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            assert not image.is_whole(path), place


def test_reading_crops_the_middle_and_flattens_transparency(tmp_path):
    rgba = np.zeros((8, 16, 4), np.uint8)
    rgba[:, 4:12] = (200, 10, 10, 255)
    Image.fromarray(rgba).save(tmp_path / "wide.png")
    assert (images.read(tmp_path / "wide.png", (8, 8)) == (200, 10, 10)).all()
    assert (images.read(tmp_path / "wide.png", (8, 16))[:, :4] == 255).all()
    assert images.read(tmp_path / "wide.png", (4, 4), channels=1).shape == (4, 4, 1)


def test_what_is_no_picture_is_said(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    for name in ("a.png", "missing.png"):
        with pytest.raises(UserError, match="no picture that can be read"):
            images.read(tmp_path / name, (8, 8))


def test_a_picture_of_200_million_pixels_is_one_line_or_decoded_smaller(tmp_path):
    whole = image.png(random_pictures(1)[0])
    header = whole[12:16] + struct.pack(">II", 20000, 10000) + whole[24:29]
    (tmp_path / "a.png").write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    with pytest.raises(
        UserError, match=r"a.png is no picture that can be read \(has more than 178 million pixels: make it smaller\)"
    ):
        images.read(tmp_path / "a.png", (8, 8))
    Image.new("L", (20000, 10000), 77).save(tmp_path / "a.jpg")
    assert (images.read(tmp_path / "a.jpg", (8, 8)) == 77).all()


def test_psnr_is_decibels_of_the_mean_square():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a + np.array([1, 255], np.uint8)[:, None, None, None]
    np.testing.assert_allclose(image.psnr(a, b), [20 * np.log10(255), 0.0], atol=1e-12)
    assert np.isinf(image.psnr(a, a)).all()


def test_a_sheet_without_captions_holds_the_pictures_and_gaps():
    pictures, side = random_pictures(5, size=image.VISIBLE), image.VISIBLE
    sheet = image.sheet(pictures, 3)
    assert sheet.shape == (2 * side + image.GAP, 3 * side + 2 * image.GAP, 3)
    for i, picture in enumerate(pictures):
        y, x = i // 3 * (side + image.GAP), i % 3 * (side + image.GAP)
        assert (sheet[y : y + side, x : x + side] == picture).all()
    assert (sheet[side : side + image.GAP] == 255).all() and (sheet[-side:, -side:] == 255).all()


@pytest.mark.parametrize("captions", [(), ("one", "two")])
def test_a_sheet_enlarges_small_pictures_to_squares(captions):
    pictures = random_pictures(2, size=32)
    sheet = image.sheet(pictures, 2, captions)
    assert sheet.shape[1] == 2 * 4 * 32 + image.GAP
    assert (sheet[:128, :128][::4, ::4] == pictures[0]).all() and (sheet[3:128:4, 3:128:4] == pictures[0]).all()


def test_captions_in_any_script_are_legible():
    assert image._legible("red heart 2")[0] == "red heart 2"
    for caption in ("привет", "ψ"):
        said, font = image._legible(caption)
        assert said == caption and all(image._shows(font, character) for character in caption)
    assert image._legible("\U0001f436")[0] in ("\U0001f436", "dog face")
    assert image._legible("\U0001f469\u200d\U0001f680")[0] in ("\U0001f469\u200d\U0001f680", "woman rocket")
    assert image._legible("\U0001f436, \U00013000")[0] in ("\U0001f436, \U00013000", "dog face, U+13000")
    absent = "\U00013000"  # a hieroglyph
    assert image._legible(absent)[0] in (absent, "U+13000")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_becomes_no_picture(bad):
    assert image.to_uint8 is diffjax.to_uint8
    images = np.zeros((2, 4, 4, 3), np.float32)
    images[1, 2, 0, 1] = bad
    with pytest.raises(UserError, match="not finite"):
        diffjax.to_uint8(images)


def test_captions_are_written_under_enlarged_pictures():
    pictures = np.full((2, 8, 8, 1), 255, np.uint8)
    captions = ["red heart", "a very long caption that can never fit under such a small picture, whatever is done"]
    sheet = image.sheet(pictures, 2, captions)
    cell = 8 * 14
    assert sheet.shape == (cell + image.LINES * image.LINE, 2 * cell + image.GAP, 3)
    under = sheet[cell:]
    assert (under[:, :cell] < 128).any() and (under[image.LINE :, cell:] < 128).any()
    assert (sheet[:cell] == 255).all()


def test_a_caption_is_broken_and_cut_to_its_width():
    fits = lambda text: len(text) <= 8
    assert image._lines("one two three four", fits) == ["one two", "three..."]
    assert image._lines("incomprehensibilities", fits) == ["incom..."]
    assert image._lines("", fits) == []


def test_a_large_sheet_is_shrunk():
    sheet = image.sheet(np.zeros((40, 1000, 1000, 3), np.uint8), 20)
    assert 5900 < max(sheet.shape) < 6100 and sheet.shape[1] > sheet.shape[0]
