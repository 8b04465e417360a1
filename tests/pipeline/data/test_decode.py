"""Decoding: every mode against a reference made by hand, torchvision's geometry, and files that must be refused."""

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.decode import (
    ChangedError,
    Geometry,
    Refused,
    decode,
    size_of,
    transform_image,
    transform_label_map,
)
from pipeline.errors import MicrotomeError

LIMIT = 1_000_000
AS_IS = Geometry()
SHARED = Path(os.environ.get("MICROTOME_SHARED", Path(__file__).parents[4] / "shared"))

rng = np.random.default_rng(0)
COLOURS = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
GREY = rng.integers(0, 256, (13, 17), dtype=np.uint8)


def write(path: Path, image: Image.Image, file_format: str = "PNG", **options) -> Path:
    image.save(path, file_format, **options)
    return path


def rows(image: np.ndarray) -> np.ndarray:
    """(3, H, W) -> (H, W, 3)"""
    return image.transpose(1, 2, 0)


def reason(path: Path, geometry: Geometry = AS_IS, limit: int = LIMIT) -> str:
    with pytest.raises(Refused) as error:
        decode(path, geometry, limit)
    return error.value.reason


def png(header: bytes, pixels: bytes) -> bytes:
    """A PNG written by hand: what IHDR and IDAT hold."""
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


# Modes


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_colours_come_back_as_they_are(tmp_path, file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = decode(write(tmp_path / "a.any", Image.fromarray(COLOURS), file_format, **options), AS_IS, LIMIT)
    assert image.dtype == np.uint8 and image.shape == (3, 13, 17) and image.flags.c_contiguous
    np.testing.assert_array_equal(rows(image), COLOURS)


def test_grey_and_one_bit_are_repeated(tmp_path):
    image = decode(write(tmp_path / "a.png", Image.fromarray(GREY)), AS_IS, LIMIT)
    np.testing.assert_array_equal(image, np.stack([GREY] * 3))
    bits = GREY > 127
    image = decode(write(tmp_path / "b.png", Image.fromarray(bits)), AS_IS, LIMIT)
    np.testing.assert_array_equal(image, np.stack([bits * np.uint8(255)] * 3))


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def test_transparency_is_composited_over_white(tmp_path):
    alpha = rng.integers(0, 256, GREY.shape, dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    path = write(tmp_path / "a.png", Image.fromarray(np.dstack([COLOURS, alpha])))
    image = rows(decode(path, AS_IS, LIMIT))
    np.testing.assert_array_equal(image[0], 255)
    np.testing.assert_array_equal(image[1], COLOURS[1])
    np.testing.assert_allclose(image, over_white(COLOURS, alpha), atol=1)
    path = write(tmp_path / "b.png", Image.fromarray(np.dstack([GREY, alpha])))
    np.testing.assert_allclose(rows(decode(path, AS_IS, LIMIT)), over_white(np.dstack([GREY] * 3), alpha), atol=1)


@pytest.mark.parametrize("transparent", [None, 3, bytes([255, 0, 128, 255, 255])])
def test_palettes_are_looked_up(tmp_path, transparent):
    indices = rng.integers(0, 5, GREY.shape, dtype=np.uint8)
    palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    source = Image.frombytes("P", (17, 13), indices.tobytes())
    source.putpalette(palette.tobytes())
    options = {} if transparent is None else {"transparency": transparent}
    image = rows(decode(write(tmp_path / "a.png", source, **options), AS_IS, LIMIT))
    opacity = np.full(256, 255)
    if isinstance(transparent, int):
        opacity[transparent] = 0
    elif transparent is not None:
        opacity[:5] = list(transparent)
    np.testing.assert_allclose(image, over_white(palette[indices], opacity[indices]), atol=1)


def test_one_transparent_colour(tmp_path):
    grey, colours = GREY.copy(), COLOURS.copy()
    grey[2, 3], colours[2, 3] = 7, (1, 2, 3)
    for source, transparent in ((grey, 7), (colours, (1, 2, 3))):
        image = rows(decode(write(tmp_path / "a.png", Image.fromarray(source), transparency=transparent), AS_IS, LIMIT))
        assert (image[2, 3] == 255).all()
        np.testing.assert_array_equal(image[0, 0], np.broadcast_to(source[0, 0], 3))


def test_cmyk_and_ycck(tmp_path):
    cmyk = Image.fromarray(COLOURS).convert("CMYK")
    path = write(tmp_path / "a.tif", cmyk, "TIFF")
    np.testing.assert_array_equal(rows(decode(path, AS_IS, LIMIT)), COLOURS)
    flat = Image.new("CMYK", (16, 16), (10, 200, 60, 30))
    path = write(tmp_path / "a.jpg", flat, "JPEG", quality=100)
    expected = [(255 - c) * (255 - 30) / 255 for c in (10, 200, 60)]
    np.testing.assert_allclose(decode(path, AS_IS, LIMIT)[:, 8, 8], expected, atol=3)
    data = path.read_bytes()
    at = data.index(b"Adobe\x00\x64") + 11  # the transform byte: 2 says YCCK
    assert data[at] == 0
    path.write_bytes(data[:at] + b"\x02" + data[at + 1 :])
    assert decode(path, AS_IS, LIMIT).shape == (3, 16, 16)


DEEP = np.array([[0, 1, 128, 129, 256, 257, 32767, 32768, 65406, 65407, 65535]], np.uint16)
DEEP_EXPECTED = np.floor(DEEP / 257 + 0.5)[0]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(DEEP).save(path)
    np.testing.assert_array_equal(decode(path, AS_IS, LIMIT)[1, 0], DEEP_EXPECTED)


def tiff(values: bytes, width: int, bits: int, photometric: int = 1, sample_format: int = 1, order: str = "<") -> bytes:
    """One row of grey as an uncompressed TIFF, written by hand."""
    tags = [
        (256, 4, width),
        (257, 4, 1),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, 1),
        (279, 4, len(values)),
        (339, 3, sample_format),
    ]
    directory = struct.pack(order + "H", len(tags))
    for tag, kind, value in tags:
        short = struct.pack(order + "H", value) + b"\0\0" if kind == 3 else struct.pack(order + "I", value)
        directory += struct.pack(order + "HHI", tag, kind, 1) + short
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(values))
    return header + values + directory + bytes(4)


def test_sixteen_bit_colours_keep_their_upper_byte(tmp_path):
    values = rng.integers(0, 65536, (2, 3, 3))
    rows_of_png = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0), rows_of_png))
    np.testing.assert_array_equal(rows(decode(tmp_path / "a.png", AS_IS, LIMIT)), values >> 8)


def test_tiffs_of_other_depths(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(DEEP.astype(">u2").tobytes(), 11, 16, order=">"))
    np.testing.assert_array_equal(decode(path, AS_IS, LIMIT)[0, 0], DEEP_EXPECTED)
    path.write_bytes(tiff(DEEP.astype("<u2").tobytes(), 11, 16, photometric=0))
    np.testing.assert_array_equal(decode(path, AS_IS, LIMIT)[0, 0], 255 - DEEP_EXPECTED)
    path.write_bytes(tiff(bytes([0x00, 0x0F, 0xFF]), 2, 12))  # two values of 12 bits: 0 and 4095
    np.testing.assert_array_equal(decode(path, AS_IS, LIMIT)[0, 0], [0, 255])


@pytest.mark.parametrize(
    "data",
    [
        tiff(np.array([0, 255, 70_000], "<u4").tobytes(), 3, 32),
        tiff(np.array([0, 1, -5], "<i4").tobytes(), 3, 32, sample_format=2),
        tiff(np.array([0, 1, -5], "<i2").tobytes(), 3, 16, sample_format=2),
        tiff(np.array([0, 0.5, 1], "<f4").tobytes(), 3, 32, sample_format=3),
    ],
)
def test_values_without_a_known_range_are_refused(tmp_path, data):
    (tmp_path / "a.tif").write_bytes(data)
    assert "range is not known" in reason(tmp_path / "a.tif")


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "green", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "w" in name else {})
        )
        image = decode(tmp_path / name, AS_IS, LIMIT)
        assert image.shape == (3, 6, 8)
        np.testing.assert_array_equal(image[:, 3, 3], [255, 0, 0])


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation(tmp_path, turn, file_format):
    """The stored picture of each orientation, made by numpy, comes back as the upright one."""
    upright = np.kron(rng.integers(0, 2, (2, 3, 3)) * 255, np.ones((16, 16, 1))).astype(np.uint8)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    image = Image.fromarray(np.ascontiguousarray(stored))
    path = write(tmp_path / "a", image, file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))
    decoded = rows(decode(path, AS_IS, LIMIT)).astype(int)
    assert decoded.shape == upright.shape and size_of(path, LIMIT) == upright.shape[:2]
    assert np.abs(decoded - upright).mean() < 30  # JPEG blurs colours at the edges


def test_damaged_exif_does_not_matter(tmp_path):
    for exif in (
        b"Exif\x00\x00garbage",
        b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff",
    ):
        path = write(tmp_path / "a.jpg", Image.fromarray(COLOURS), "JPEG", exif=exif)
        assert decode(path, AS_IS, LIMIT).shape == (3, 13, 17)
        assert size_of(path, LIMIT) == (13, 17)


# What is refused


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is this large."""
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), bytes(10_000))


def bombs() -> dict[str, bytes]:
    gif = io.BytesIO()
    Image.new("P", (4, 4)).save(gif, "GIF")
    frame = gif.getvalue().index(b",")
    webp = io.BytesIO()
    Image.new("RGB", (4, 4)).save(webp, "WEBP", lossless=True)
    stream = webp.getvalue()[12:]
    canvas = struct.pack("<I", 16383)[:3] * 2
    extended = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + stream
    return {
        "png": png_header(100_000, 100_000),
        "gif": gif.getvalue()[: frame + 5] + struct.pack("<HH", 60_000, 60_000) + gif.getvalue()[frame + 9 :],
        "webp": b"RIFF" + struct.pack("<I", len(extended)) + extended,
        "ppm": b"P6 90000 90000 255\n123",
        "bmp": b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 70_000, 70_000, 1, 24, *[0] * 6),
    }


@pytest.mark.parametrize("file_format", bombs())
def test_bombs_are_refused_before_memory_is_taken(tmp_path, file_format):
    path = tmp_path / "bomb"
    path.write_bytes(bombs()[file_format])
    tracemalloc.start()
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(path, limit=64_000_000).startswith("too many pixels: ")
        with pytest.raises(Refused, match="too many pixels"):
            size_of(path, 64_000_000)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_exact_and_the_only_one(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", Image.fromarray(COLOURS))
    assert decode(path, AS_IS, 13 * 17).shape == (3, 13, 17)
    assert reason(path, limit=13 * 17 - 1) == "too many pixels: 221 > 220"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(path, AS_IS, LIMIT).shape == (3, 13, 17)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_strip_does_not_grow_beyond_the_limit(tmp_path):
    path = write(tmp_path / "a.png", Image.new("RGB", (1, 60_000)))
    assert reason(path, Geometry(256, 224), 64_000_000) == "too many pixels after the resize: 256x15360000 > 64,000,000"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run", "not an image"),
        (b"\xff\xd8\xff\xe0garbage", ""),
        (b"\x89PNG\r\n\x1a\n", ""),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, content, expected):
    (tmp_path / "a.jpg").write_bytes(content)
    assert reason(tmp_path / "a.jpg").startswith(expected)


def test_paths_that_are_no_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    write(tmp_path / "file.png", Image.fromarray(COLOURS))
    assert reason(tmp_path / "pipe") == "not a regular file"
    assert reason(tmp_path) == "not a regular file"
    assert reason(Path("/dev/zero")) == "not a regular file"
    assert reason(tmp_path / "loop") == "a loop of symbolic links"
    assert reason(tmp_path / "broken") == "no such file"
    assert reason(tmp_path / "file.png" / "x") == "no such file"
    assert reason(tmp_path / ("x" * 300)) == "the name is too long"


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    def deny(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)  # chmod does not stop root
    assert reason(tmp_path / "a.png") == "permission denied"


def stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def test_a_listed_file_is_decoded_as_it_was_listed(tmp_path):
    path = write(tmp_path / "a.png", Image.fromarray(COLOURS))
    listed = stamp(path)
    np.testing.assert_array_equal(rows(decode(path, AS_IS, LIMIT, listed=listed)), COLOURS)
    for other in ((listed[0] + 1, listed[1]), (listed[0], listed[1] - 1), (-1, -1)):
        with pytest.raises(ChangedError, match=r"a\.png changed after .* rescan=true"):
            decode(path, AS_IS, LIMIT, listed=other)
    path.write_bytes(b"")
    with pytest.raises(ChangedError, match="changed after"):
        decode(path, AS_IS, LIMIT, listed=listed)
    assert reason(path) == "empty file"
    with pytest.raises(Refused, match="empty file"):
        decode(path, AS_IS, LIMIT, listed=stamp(path))


def test_a_listed_file_that_is_written_while_it_is_read_is_no_outcome(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", Image.fromarray(COLOURS))
    listed, load = stamp(path), Image.Image.load

    def overtaken(image):
        path.write_bytes(path.read_bytes()[:60])
        return load(image)

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", overtaken)
    with pytest.raises(ChangedError, match="changed after"):
        decode(path, AS_IS, LIMIT, listed=listed)


@pytest.mark.parametrize("number", [2, 5, 20, 116], ids=["gone", "EIO", "no folder", "stale handle"])
def test_a_listed_file_that_is_away_for_a_moment_is_no_outcome(tmp_path, monkeypatch, number):
    path = write(tmp_path / "a.png", Image.fromarray(COLOURS))
    listed, refused = stamp(path), OSError(number, os.strerror(number))

    def fails(*_, **__):
        raise refused

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        with pytest.raises(ChangedError, match=r"a\.png cannot be read now \(.*\): run again when it can, or remove"):
            decode(path, AS_IS, LIMIT, listed=listed)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", fails)
        with pytest.raises(ChangedError, match="cannot be read now"):
            decode(path, AS_IS, LIMIT, listed=listed)
    broken = tmp_path / "broken.png"
    broken.symlink_to("nothing")
    with pytest.raises(Refused, match="no such file"):  # as it was listed
        decode(broken, AS_IS, LIMIT, listed=(-1, -1))


def test_the_machines_own_errors_are_not_the_images(tmp_path, monkeypatch):
    def exhausted(*arguments):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", exhausted)
    with pytest.raises(OSError, match="Too many open files"):
        decode(tmp_path / "a.png", AS_IS, LIMIT)


KINDS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("GIF", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("PPM", {}),
]


@pytest.mark.parametrize(("file_format", "options"), KINDS)
def test_a_truncated_file_is_refused_or_whole(tmp_path, file_format, options):
    """Never half grey: of no length of prefix does another picture come out."""
    whole = write(tmp_path / "whole", Image.fromarray(COLOURS), file_format, **options)
    expected = decode(whole, AS_IS, LIMIT)
    data = whole.read_bytes()
    cut = tmp_path / "cut"
    refused = 0
    for length in range(1, len(data), max(1, len(data) // 80)):
        cut.write_bytes(data[:length])
        try:
            image = decode(cut, AS_IS, LIMIT)
        except Refused as error:
            refused += 1
            assert "0x" not in error.reason
        else:
            np.testing.assert_array_equal(image, expected)
    assert refused > 40


@pytest.mark.parametrize(("file_format", "options"), KINDS)
def test_damage_never_raises_anything_but_refused(tmp_path, file_format, options):
    data = write(tmp_path / "a", Image.fromarray(COLOURS), file_format, **options).read_bytes()
    damage = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for at in damage.integers(0, len(data), 3):
            broken[at] = damage.integers(256)
        (tmp_path / "b").write_bytes(broken)
        try:
            image = decode(tmp_path / "b", AS_IS, LIMIT)
        except Refused:
            continue
        assert image.dtype == np.uint8 and image.shape[0] == 3


def test_no_file_stays_open(tmp_path):
    write(tmp_path / "good.png", Image.fromarray(COLOURS))
    write(tmp_path / "good.tif", Image.fromarray(COLOURS), "TIFF", compression="tiff_lzw")
    (tmp_path / "bad.png").write_bytes(png_header(50, 50)[:60])
    (tmp_path / "large.png").write_bytes(png_header(50_000, 50_000))
    for _ in range(2):
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for path in sorted(tmp_path.iterdir()):
            for read in (lambda p: decode(p, AS_IS, LIMIT), lambda p: size_of(p, LIMIT)):
                try:
                    read(path)
                except Refused:
                    continue
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# Geometry


def test_geometry_is_torchvisions():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transforms = pytest.importorskip("torchvision.transforms")
    for seed, (height, width) in enumerate([(13, 17), (40, 40), (97, 31), (31, 98), (64, 257), (225, 300)]):
        picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
        for resize, crop in [
            (64, 56),
            (64, 57),
            (63, 32),
            ((50, 70), None),
            ((50, 71), 40),
            (64, None),
            (None, 13),
            (None, 12),
        ]:
            steps = [transforms.Resize(resize)] if resize is not None else []
            steps += [transforms.CenterCrop(crop)] if crop is not None else []
            expected = np.asarray(transforms.Compose(steps)(picture)).transpose(2, 0, 1)
            geometry = Geometry(resize, crop)
            np.testing.assert_array_equal(transform_image(picture, geometry, LIMIT), expected)
            assert geometry.output_size(height, width) == expected.shape[1:]


def test_a_crop_larger_than_the_image_is_refused_and_not_padded(tmp_path):
    path = write(tmp_path / "a.png", Image.fromarray(COLOURS))
    assert reason(path, Geometry(None, 14)) == "17x13 is smaller than the crop 14x14"


@pytest.mark.parametrize(
    "arguments", [(0,), (-3,), (True,), (2.5,), ((4, 5, 6),), ((4, 0),), (20, 21), ((20, 30), 21), (None, 0)]
)
def test_impossible_geometries_are_errors(arguments):
    with pytest.raises(MicrotomeError):
        Geometry(*arguments)


geometries = st.one_of(
    st.builds(Geometry, st.integers(8, 40), st.none() | st.integers(1, 8)),
    st.builds(Geometry, st.tuples(st.integers(8, 40), st.integers(8, 40)), st.none() | st.integers(1, 8)),
    st.builds(Geometry, st.none(), st.none() | st.integers(1, 8)),
)


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 50), st.integers(8, 50), geometries)
def test_label_maps_take_the_label_under_each_centre(height, width, geometry):
    """Against a float64 twin, pixel by pixel."""
    labels = np.arange(height * width).reshape(height, width)
    moved = transform_label_map(labels, geometry)
    target = geometry.resized(height, width)
    top, left, rows_kept, columns_kept = geometry.offsets(*target)
    assert moved.shape == (rows_kept, columns_kept) == geometry.output_size(height, width)
    for y in range(rows_kept):
        for x in range(columns_kept):
            # the centre in source pixels; a hair later, for a centre on a border in float64
            source_y = int((y + top + 0.5) * height / target[0] + 1e-9)
            source_x = int((x + left + 0.5) * width / target[1] + 1e-9)
            assert moved[y, x] == labels[source_y, source_x]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(16, 60), st.integers(16, 60), geometries)
def test_label_maps_stay_aligned_with_their_images(rows_of_regions, columns_of_regions, height, width, geometry):
    """An image whose colours are its labels, moved with it: they differ at most at pixels that see an edge."""
    y = np.arange(height) * rows_of_regions // height
    x = np.arange(width) * columns_of_regions // width
    labels = y[:, None] * columns_of_regions + x[None, :]
    picture = Image.fromarray(np.repeat((labels * 15)[..., None], 3, axis=2).astype(np.uint8))
    resized = Geometry(geometry.resize)
    image, moved = transform_image(picture, resized, LIMIT)[0], transform_label_map(labels, resized)
    assert image.shape == moved.shape
    # bilinear interpolation reaches one source pixel or one target pixel, whichever is larger; and one for the nearest
    reach_y, reach_x = (int(np.ceil(max(1, n / m))) + 1 for n, m in zip(moved.shape, labels.shape, strict=True))
    padded = np.pad(moved, ((reach_y, reach_y), (reach_x, reach_x)), mode="edge")
    seen = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach_y + 1, 2 * reach_x + 1))
    lowest, highest = seen.min(axis=(2, 3)), seen.max(axis=(2, 3))
    np.testing.assert_array_equal(image[lowest == highest], moved[lowest == highest] * 15)
    assert (image >= lowest * 15).all() and (image <= highest * 15).all()
    # the crop takes the same part of both
    top, left, rows_kept, columns_kept = geometry.offsets(*moved.shape)
    part = np.s_[top : top + rows_kept, left : left + columns_kept]
    np.testing.assert_array_equal(transform_image(picture, geometry, LIMIT)[0], image[part])
    np.testing.assert_array_equal(transform_label_map(labels, geometry), moved[part])


def test_edges_and_corners_of_label_maps_fall_within_one_pixel():
    """Four quadrants of odd sizes: the corner lies where the image has it, to half a pixel, at every resolution."""
    labels = np.zeros((60, 80), int)
    labels[27:, :33], labels[:27, 33:], labels[27:, 33:] = 1, 2, 3
    for geometry in (Geometry(30), Geometry(120), Geometry((50, 50)), Geometry(47, 41), Geometry((200, 100))):
        moved = transform_label_map(labels, geometry)
        target = geometry.resized(60, 80)
        top, left, _, _ = geometry.offsets(*target)
        edge_y, edge_x = np.argmax(moved[:, 0] == 1), np.argmax(moved[0] == 2)
        assert abs(edge_y + top - 27 * target[0] / 60) <= 0.5
        assert abs(edge_x + left - 33 * target[1] / 80) <= 0.5
        assert (moved[:edge_y, :edge_x] == 0).all() and (moved[edge_y:, edge_x:] == 3).all()


def test_a_label_map_of_another_resolution_covers_the_same_area():
    half = np.arange(94 * 125).reshape(94, 125)  # of 187 x 250, rounded up
    assert transform_label_map(half, AS_IS, (187, 250)).shape == (187, 250)
    full = np.repeat(np.repeat(half, 2, axis=0), 2, axis=1)
    for geometry in (AS_IS, Geometry(64, 56), Geometry((40, 30))):
        np.testing.assert_array_equal(
            transform_label_map(half, geometry, (188, 250)), transform_label_map(full, geometry, (188, 250))
        )
    with pytest.raises(Refused, match="125x94, but its image is 250x250"):
        transform_label_map(half, AS_IS, (250, 250))
    with pytest.raises(Refused, match="125x94, but its image is 94x125"):
        transform_label_map(half, AS_IS, (125, 94))


# Real files


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared real data are not on this machine")
def test_real_files_decode_as_pillow_does():
    for path, size in (
        (sorted((SHARED / "data/camvid/images").glob("*.jpg"))[0], (180, 240)),
        (sorted((SHARED / "data/cifar10/test/cat").glob("*.png"))[0], (32, 32)),
    ):
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(decode(path, AS_IS, LIMIT), expected)
        assert size_of(path, LIMIT) == size
