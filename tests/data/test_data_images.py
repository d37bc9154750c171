import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffjax.data import images
from diffjax.data.images import decode, flatten
from diffjax.utils.errors import UserError


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


COLOUR, GREY = (200, 40, 90), 77
DEPTHS = {"I;16": np.dtype("<u2"), "I;16B": np.dtype(">u2")}
LOSSY = ("JPEG", "WEBP", "AVIF", "JPEG2000")


def in_mode(mode: str) -> Image.Image:
    """A picture of one colour, or of one grey in modes that have no colours, in any mode of PIL."""
    coloured, grey = Image.new("RGB", (16, 16), COLOUR), Image.new("L", (16, 16), GREY)
    if mode in DEPTHS:
        return Image.fromarray(np.full((16, 16), GREY * 257, DEPTHS[mode]))
    if mode in ("F", "I"):
        return Image.fromarray(
            np.full((16, 16), GREY / 255, np.float32) if mode == "F" else np.full((16, 16), GREY * 257, np.int32)
        )
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(coloured, srgb, lab, outputMode="LAB")
    if mode == "1":
        return Image.new("1", (16, 16), 0)
    if mode in ("L", "LA", "La"):
        return (grey.convert("LA") if mode == "La" else grey).convert(mode)
    return {"RGBa": coloured.convert("RGBA"), "P": coloured.quantize(2), "PA": coloured.quantize(2)}.get(
        mode, coloured
    ).convert(mode)


MODES = "1 L LA La P PA RGB RGBA RGBX RGBa CMYK YCbCr LAB HSV I F I;16 I;16B".split()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_every_format_is_right_or_says_why(mode):
    expected = (0,) * 3 if mode == "1" else (GREY,) * 3 if mode in ("L", "LA", "La", "I", "F", *DEPTHS) else COLOUR
    read = 0
    for form in ("PNG", "TIFF", "PPM", "BMP", "GIF", *LOSSY):
        try:
            data = encoded(in_mode(mode), format=form)
        except (OSError, ValueError, KeyError, TypeError):  # PIL writes no such file
            continue
        if Image.open(io.BytesIO(data)).mode in ("L", "P", "RGB", "RGBA") and mode in ("I", "F", *DEPTHS):
            continue  # PIL has clipped it when it wrote
        try:
            found = decode(data, 16)
        except ValueError as error:
            assert (mode, form) == ("I", "TIFF") and "nobody says which is white" in str(error)
            continue
        tolerance = 6 if form in LOSSY or mode in ("YCbCr", "HSV") else 1
        np.testing.assert_allclose(found, np.broadcast_to(expected, (16, 16, 3)), atol=tolerance)
        read += 1
    assert read or mode in ("La", "RGBa", "HSV")  # in which PIL writes no file
    if not read:
        np.testing.assert_allclose(
            np.asarray(flatten(in_mode(mode), (255,) * 3))[0, 0], expected if mode != "La" else GREY, atol=3
        )


@pytest.mark.parametrize("mode, clear", [("P", 0), ("L", 7), ("RGB", (7, 7, 7)), ("1", 0), ("I;16", 7)])
def test_the_transparent_colour_of_a_png_becomes_the_background(mode, clear):
    if mode == "I;16":
        picture = Image.fromarray(np.array([[7, 65535]], np.uint16).repeat(4, 0).repeat(2, 1))
    else:
        picture = Image.new(mode, (4, 4), {"P": 0, "1": 0}.get(mode, clear))
        if mode == "P":
            picture.putpalette([9, 9, 9, 255, 255, 255])
        white = {"RGB": (255,) * 3, "P": 1}.get(mode, 255)
        picture.paste(white, (2, 0, 4, 4))
    found = decode(encoded(picture, transparency=clear), 4, background=(200, 1, 2))
    assert found[0, 0].tolist() == [200, 1, 2] and found[0, 3].tolist() == [255] * 3


def tiff(pixels: np.ndarray, bits: int, photometric: int, form: int = 1) -> bytes:
    """An uncompressed TIFF of one channel, written here since PIL writes no such file."""
    height, width = pixels.shape
    body = pixels.tobytes()
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(body)),
        (339, form),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4 if value > 65535 else 3, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_what_a_tiff_calls_white_is_white():
    ramp = np.array([[0, 13107, 65535, 65535]] * 4, "<u2")
    assert decode(tiff(ramp, 16, 1), 4, channels=1)[0, :, 0].tolist() == [0, 51, 255, 255]
    assert decode(tiff(ramp, 16, 0), 4, channels=1)[0, :, 0].tolist() == [255, 204, 0, 0]
    twelve = np.frombuffer(bytes.fromhex("000fff000fff") * 4, np.uint8).reshape(4, 6)  # 0, 4095, 0, 4095
    found = tiff(twelve, 12, 1).replace(struct.pack("<HHII", 256, 3, 1, 6), struct.pack("<HHII", 256, 3, 1, 4))
    assert decode(found, 4, channels=1)[0, :, 0].tolist() == [0, 255, 0, 255]
    floats = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    np.testing.assert_array_equal(decode(tiff(floats, 32, 1, 3), 4, channels=1)[..., 0], np.round(floats * 255))
    for wrong in (floats * 300, floats - 1, np.where(floats < 0.5, np.nan, floats)):
        with pytest.raises(ValueError, match="only those from 0 to 1 have a known white"):
            decode(tiff(wrong.astype(np.float32), 32, 1, 3), 4)


def test_grey_stays_grey_and_colours_are_those_of_their_profile():
    assert flatten(Image.new("LA", (4, 4), (90, 255)), (255, 255, 255)).mode == "L"
    assert flatten(Image.new("LA", (4, 4), (90, 0)), (255, 0, 0)).mode == "RGB"
    lab = ImageCms.createProfile("LAB")
    profile = ImageCms.ImageCmsProfile(lab).tobytes()
    wide = ImageCms.ImageCmsProfile(io.BytesIO(swapped_srgb())).tobytes()
    pixels = Image.new("RGB", (4, 4), (250, 10, 10))
    assert decode(encoded(pixels, icc_profile=wide), 4)[0, 0].argmax() == 2  # its red is called blue
    for unusable in (b"nothing", profile):
        assert decode(encoded(pixels, icc_profile=unusable), 4)[0, 0].tolist() == [250, 10, 10]


def swapped_srgb() -> bytes:
    """The profile of sRGB under another name, its red and blue exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return (
        profile.replace(b"rXYZ", b"?XYZ")
        .replace(b"bXYZ", b"rXYZ")
        .replace(b"?XYZ", b"bXYZ")
        .replace(b"s\0R\0G\0B", b"m\0i\0n\0e")
    )


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt"])
def test_a_png_with_more_text_than_pil_reads_is_read(kind):
    from PIL.PngImagePlugin import PngInfo

    info, text = PngInfo(), "workflow " * 2**18
    info.add_itxt("a", text, zip=True) if kind == "iTXt" else info.add_text("a", text, zip=kind == "zTXt")
    data = encoded(Image.new("RGB", (4, 4), COLOUR), pnginfo=info)
    assert decode(data, 4)[0, 0].tolist() == list(COLOUR)
    with pytest.raises(OSError):
        decode(data[: len(data) // 2], 4)


def test_a_thin_picture_is_cropped_before_it_is_enlarged():
    thin = np.zeros((1, 60000), np.uint8)
    thin[0, 29990:30010] = 255
    found = decode(encoded(Image.fromarray(thin)), 256, channels=1, enlarge=True)  # 60000 x 256 x 256 pixels otherwise
    assert found.shape == (256, 256, 1) and found.min() == 255
    assert decode(encoded(Image.fromarray(thin.T)), 256, channels=1, enlarge=True).min() == 255


def test_more_pixels_than_memory_are_refused_or_decoded_smaller(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2)
    monkeypatch.setattr(images, "MOST_PIXELS", 64 * 64)
    picture = Image.new("RGB", (128, 128), COLOUR)
    np.testing.assert_allclose(decode(encoded(picture, format="JPEG"), 16)[0, 0], COLOUR, atol=5)
    for data, size in ((encoded(picture), 16), (encoded(picture, format="JPEG"), 100)):
        with pytest.raises(OSError, match="million pixels: make it smaller"):
            decode(data, size)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_what_is_cut_off_is_no_picture(form):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    whole = encoded(Image.fromarray(pixels), format=form)
    for part in (0, 0.02, 0.3, 0.5, 0.9):
        with pytest.raises(Exception) as raised:
            decode(whole[: int(len(whole) * part)], 16)
        assert not isinstance(raised.value, UserError)
    if form == "JPEG":
        progressive = encoded(Image.fromarray(pixels), format=form, progressive=True)
        with pytest.raises(OSError, match="truncated"):
            decode(progressive[: len(progressive) // 2], 16)


def test_a_broken_orientation_is_no_reason_to_leave_a_picture_out():
    data = encoded(Image.new("RGB", (4, 4), COLOUR), exif=b"Exif\0\0nothing of the kind")
    assert decode(data, 4)[0, 0].tolist() == list(COLOUR)
    deep = np.zeros((6, 6), np.uint16)
    deep[0] = 65535
    exif = Image.Exif()
    exif[0x0112] = 3
    assert decode(encoded(Image.fromarray(deep), exif=exif), 6, channels=1)[5].min() == 255


def test_several_pictures_in_one_file_are_counted():
    pages = [Image.new("L", (4, 4), shade) for shade in (10, 90, 200)]
    for form in ("GIF", "TIFF", "WEBP", "PNG", "AVIF"):
        data = encoded(pages[0], format=form, save_all=True, append_images=pages[1:])
        assert images.frames(images.open_picture(data, 4)) == 3
    assert images.frames(images.open_picture(encoded(pages[0], format="JPEG"), 4)) == 1


def test_heif_names_its_remedy_or_is_read():
    head = b"\0\0\0\x18ftypheic" + bytes(16)
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        with pytest.raises(OSError, match="pip install pillow-heif"):
            decode(head, 4)
    assert images.looks_like_picture(head) and not images.looks_like_picture(b"\0\0\0\x18ftypmp42")


def test_heif_is_read_with_its_plugin():
    pytest.importorskip("pillow_heif").register_heif_opener()
    data = encoded(Image.new("RGB", (64, 64), COLOUR), format="HEIF")
    images.formats.cache_clear()
    np.testing.assert_allclose(decode(data, 32)[0, 0], COLOUR, atol=3)
