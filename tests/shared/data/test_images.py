"""Images are seen as a viewer shows them; what cannot be seen says why."""

import base64
import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from shared.data.images import (
    ContentKeys,
    ImageError,
    ImageLimits,
    check_header,
    content_hash,
    decode_image,
    image_hash,
    load_images,
    open_image,
)
from shared.types import ImagePart, Message, Sample, TextPart

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what it says of broken TIFF files

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def two_pixels(*colours, mode="RGB"):
    """Two halves of 8 x 8 pixels side by side, so that JPEG keeps them apart."""
    image = Image.new(mode, (16, 8))
    for index, colour in enumerate(colours):
        image.paste(colour, (8 * index, 0, 8 * index + 8, 8))
    return image


def seen(content):
    image = decode_image(content)
    assert image.mode == "RGB"
    return image


def close(found, wanted):
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= 8


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(
    ("orientation", "size", "red"),
    [(1, (16, 8), (2, 4)), (2, (16, 8), (13, 4)), (3, (16, 8), (13, 4)), (4, (16, 8), (2, 4)),
     (5, (8, 16), (4, 2)), (6, (8, 16), (4, 2)), (7, (8, 16), (4, 13)), (8, (8, 16), (4, 13))],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_orientation_tags_are_followed(orientation, size, red, kind):
    options = {"subsampling": 0} if kind == "JPEG" else {}
    image = seen(encoded(two_pixels(RED, BLUE), kind, exif=exif(orientation), **options))
    assert image.size == size and close(image.getpixel(red), RED)


def test_orientation_of_a_mirrored_quarter_turn_by_hand():
    # 0 1      orientation 6 is shown after a quarter turn clockwise: 2 0
    # 2 3                                                             3 1
    image = Image.fromarray(np.array([[0, 80], [160, 240]], np.uint8))
    found = np.asarray(decode_image(encoded(image, exif=exif(6))))[..., 0]
    assert found.tolist() == [[160, 0], [240, 80]]


def test_palette_grey_and_bilevel():
    palette = two_pixels(RED, BLUE).quantize(4)
    assert palette.mode == "P"
    assert seen(encoded(palette)).getpixel((2, 4)) == RED
    assert seen(encoded(two_pixels(100, 200, mode="L"))).getpixel((12, 4)) == (200, 200, 200)
    assert seen(encoded(two_pixels(0, 1, mode="1"))).getpixel((12, 4)) == WHITE


def test_cmyk_jpegs():
    image = seen(encoded(two_pixels((0, 255, 255, 0), (255, 255, 0, 0), mode="CMYK"), "JPEG"))
    assert close(image.getpixel((2, 4)), RED) and close(image.getpixel((12, 4)), BLUE)


def test_transparency_lies_on_white_also_in_palettes_and_grey():
    half = two_pixels((255, 0, 0, 255), (0, 0, 255, 0), mode="RGBA")
    assert seen(encoded(half)).getpixel((2, 4)) == RED
    assert seen(encoded(half)).getpixel((12, 4)) == WHITE  # not the blue beneath
    grey = two_pixels((10, 255), (20, 0), mode="LA")
    assert [seen(encoded(grey)).getpixel((x, 4))[0] for x in (2, 12)] == [10, 255]
    palette = two_pixels(0, 1, mode="P")
    palette.putpalette([*RED, *BLUE])
    assert seen(encoded(palette, transparency=1)).getpixel((12, 4)) == WHITE
    assert seen(encoded(palette, transparency=1)).getpixel((2, 4)) == RED
    half_through = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert seen(encoded(half_through)).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind):
    image = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    assert np.asarray(seen(encoded(image, kind)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_colour():
    rows = b"\x00" + struct.pack(">3H3H", 0xFFFF, 0, 0, 0, 0x8080, 0)

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
    image = seen(content + chunk(b"IEND", b""))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [RED, (0, 128, 0)]


def test_brightness_that_nobody_defines_is_refused():
    floats = Image.fromarray(np.array([[0.5]], np.float32))
    with pytest.raises(ImageError, match=r"mode F .*Convert it to 8 bits"):
        decode_image(encoded(floats, "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert seen(content).getpixel((4, 4)) == RED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_and_corrupt_files(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, kind)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for cut in (len(content) // 2, 30):
        with pytest.raises(ImageError, match=r"truncated or corrupt|not an image that is read here"):
            decode_image(content[:cut])


def test_any_bytes_give_an_image_or_an_image_error():
    random = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        content = np.frombuffer(encoded(two_pixels(RED, BLUE), kind), np.uint8)
        for _ in range(60):
            broken = content.copy()
            where = random.integers(0, len(broken), 4)
            broken[where] = random.integers(0, 256, 4)
            with contextlib.suppress(ImageError):
                assert decode_image(broken.tobytes()).mode == "RGB"


def test_what_is_no_image():
    with pytest.raises(ImageError, match="0 bytes"):
        decode_image(b"")
    with pytest.raises(ImageError, match=r"not an image that is read here \(PNG, JPEG"):
        decode_image(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"  # would start Ghostscript
    with pytest.raises(ImageError, match="not an image that is read here"):
        decode_image(postscript)


def test_a_decompression_bomb_is_not_inflated():
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = struct.pack(">II", 30_000, 30_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    for content in (bytes(bomb), encoded(Image.new("1", (9000, 9000)))):
        with pytest.raises(ImageError, match=r"pixels, more than images\.max_pixels: 64000000"):
            check_header(content)
    with pytest.raises(ImageError, match=r"16 x 8 pixels, more than images\.max_pixels: 100 "):
        decode_image(encoded(two_pixels(RED, BLUE)), ImageLimits(max_pixels=100))
    with pytest.raises(ImageError, match=r"bytes, more than images\.max_bytes: 10"):
        decode_image(encoded(two_pixels(RED, BLUE)), ImageLimits(max_bytes=10))


def test_a_header_is_tested_without_decoding(tmp_path):
    content = encoded(two_pixels(RED, BLUE), "JPEG")
    cut = content[:-30]
    (tmp_path / "cut.jpg").write_bytes(cut)
    check_header(cut)
    check_header(tmp_path / "cut.jpg")
    with pytest.raises(ImageError, match="truncated"):
        decode_image(cut)
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match="0 bytes"):
        check_header(tmp_path / "empty.jpg")
    with pytest.raises(ImageError, match="No such file"):
        check_header(tmp_path / "absent.jpg")


def test_a_path_and_a_data_url_are_one_image(tmp_path):
    content = encoded(two_pixels(RED, BLUE))
    path = tmp_path / "a.png"
    path.write_bytes(content)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    assert np.array_equal(open_image(str(path)), open_image(url))
    assert image_hash(str(path)) == image_hash(url) == content_hash(content)
    for broken, said in {
        "data:text/plain;base64,aGk=": "written data:image/png",
        "data:image/png;base64,a*b": "not valid base64",
        "data:image/png;base64,": "0 bytes",
        "https://example.org/a.png": "was only looked up, not stored",
        str(tmp_path / "absent.png"): "No such file",
        str(tmp_path): "Is a directory",
    }.items():
        with pytest.raises(ImageError, match=said):
            open_image(broken)
    with pytest.raises(ImageError) as long:
        open_image("data:image/png;base64," + "A" * 5000)
    assert len(str(long.value)) < 300


def test_a_samples_images_in_order_and_the_row_named_where_one_fails(tmp_path):
    for name, colour in (("r.png", RED), ("b.png", BLUE)):
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (2, 2), colour)))
    parts = (ImagePart(str(tmp_path / "b.png")), TextPart("and"), ImagePart(str(tmp_path / "r.png")))
    sample = Sample("s1", (Message("user", parts),), source="rows.jsonl:7")
    assert [image.getpixel((0, 0)) for image in load_images(sample)] == [BLUE, RED]
    (tmp_path / "r.png").unlink()
    with pytest.raises(ImageError, match=r"sample 's1' \(rows\.jsonl:7\): image '.*r\.png': cannot be read"):
        load_images(sample)


def test_a_prompts_key_is_that_of_its_images_content(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(two_pixels(RED, BLUE)))
    (tmp_path / "b.png").write_bytes(encoded(two_pixels(RED, BLUE)))
    (tmp_path / "c.png").write_bytes(encoded(two_pixels(BLUE, RED)))

    def key(name, keys=None):
        parts = (TextPart("x"), ImagePart(str(tmp_path / name)))
        return (keys or ContentKeys())(Sample("s", (Message("user", parts),), source="r:1"))

    assert key("a.png") == key("b.png") != key("c.png")
    assert key("a.png")[0]["parts"][0] == {"text": "x"}
    keys = ContentKeys()
    key("a.png", keys)
    (tmp_path / "a.png").unlink()
    assert key("a.png", keys) == key("b.png")  # read once
    with pytest.raises(ImageError, match=r"sample 's' \(r:1\): cannot be read"):
        key("a.png")
