"""Decoding of image files to uint8 arrays: upright, RGB, resized and cropped as torchvision would.

A file that cannot be used is refused with a reason. What a file may do to the process is bounded before any pixel is
decoded: regular files only, a fixed list of formats, and our own pixel limit, read from the header. Nothing is guessed
silently: if a file does not state its value range, it is refused and not clipped.
"""

import errno
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from pipeline.errors import MicrotomeError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
ORIENTATION = 0x0112  # the EXIF tag
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
WHITE_IS_ZERO = 0

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Errors that concern this one path. Any other, for example too many open files, concerns the machine and is raised.
PATH_ERRORS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ELOOP: "a loop of symbolic links",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENXIO: "not a regular file",
    errno.EIO: "the disk cannot read it",
}

# Of a file that was there when the data set was listed: it may be back in a moment.
PASSING = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)
)

# Pillow's pixel limit and Python's warning filters are global to the process.
_pillow = threading.Lock()


class Refused(MicrotomeError):  # noqa: N818 - an outcome that a stage records
    """An input that cannot be used; `reason` is short, the same on every machine, and goes to quarantine.csv."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


Stamp = tuple[int, int]
"""Size and mtime_ns of a file as it was listed; -1 if there was no regular file."""


class ChangedError(MicrotomeError):
    """A file that is not, or not now, the one that was listed: no property of the image, so it is not recorded."""


def check_listed(path: Path | str, found: os.stat_result, listed: Stamp | None) -> None:
    """Raise `ChangedError` if a file has another size or time than when it was listed; None: it was not listed."""
    if listed is not None and (found.st_size, found.st_mtime_ns) != listed:
        raise ChangedError(
            f"{path} changed after the data set was listed: run again when it is complete, with `--config rescan=true`"
        )


@dataclass(frozen=True)
class Reading:
    """How a file's pixels are read, before `Geometry`.

    upright: whether the image is turned by its EXIF orientation. composited: whether transparent pixels show white;
    otherwise, their own colour. bits: of grey with more than 8, if it uses fewer than the file has (12 of 16); or None.
    """

    upright: bool = True
    composited: bool = True
    bits: int | None = None


AS_STATED = Reading()


@dataclass(frozen=True)
class Geometry:
    """The resize and crop that turn an upright image into the array a network sees.

    resize: int, the length of the shorter side (the longer one is int(resize * long / short)); or (height, width), to
        which the image is squashed; or None. Antialiased bilinear, as torchvision's Resize on PIL images.
    crop: side of the centred square that is kept, or None. Offsets are round((size - crop) / 2), halves to even, as
        torchvision's CenterCrop. A smaller image is refused: torchvision pads it with black, and no label map covers
        black borders.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize,)
        if isinstance(self.resize, tuple) and len(self.resize) != 2:
            raise MicrotomeError(f"resize is {self.resize!r}; expected one length, or height and width")
        for side in (*sides, self.crop):
            if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
                raise MicrotomeError(f"{self} has the length {side!r}; expected a whole number of pixels, 1 or more")
        shorter = min(side for side in sides if side is not None) if self.resize is not None else None
        if self.crop is not None and shorter is not None and self.crop > shorter:
            raise MicrotomeError(f"crop {self.crop} is larger than the {shorter} pixels that resize leaves; lower it")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) after the resize, before the crop."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        longer = int(self.resize * max(height, width) / min(height, width))
        return (longer, self.resize) if height >= width else (self.resize, longer)

    def offsets(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) of the part of a resized image that is kept; `Refused` if it is smaller."""
        if self.crop is None:
            return 0, 0, height, width
        if self.crop > min(height, width):
            raise Refused(f"{width}x{height} is smaller than the crop {self.crop}x{self.crop}")
        return round((height - self.crop) / 2), round((width - self.crop) / 2), self.crop, self.crop

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the array made from an upright image of this size."""
        return self.offsets(*self.resized(height, width))[2:]


def decode(
    path: Path | str,
    geometry: Geometry,
    max_pixels: int,
    reading: Reading = AS_STATED,
    listed: Stamp | None = None,
) -> np.ndarray:
    """Return the image in `path` as uint8 (3, height, width), in RGB.

    Unless `reading` says otherwise, the image is turned upright (EXIF) before anything else. Grey is repeated, palettes
    are looked up, CMYK and YCCK are converted by Pillow's formula (colour profiles are not applied), transparency is
    composited over white, 16-bit grey is divided by 257 and rounded (other depths by their own maximum). Of an
    animation, the first frame is taken. `listed` is what the file was when the data set was listed.

    Raises `ChangedError` if the file is not what was listed, and `Refused`: not a regular file, not one of `FORMATS`,
    more than `max_pixels` before or after the resize, truncated, pixels whose range is unknown (32-bit and float), or
    values of more bits than `reading.bits`.
    """
    with opened(path, FORMATS, max_pixels, listed) as image:
        deep_colours = _has_deep_colours(image)
        if not reading.upright and image.format == "TIFF" and orientation(image) != 1:
            raise Refused("a TIFF with an orientation, which is always turned upright: save it without one")
        image.load()
        if reading.bits is not None and deep_colours:
            raise Refused(
                f"colours of 16 bits, whose upper bytes alone can be read; `bits: {reading.bits}` is for grey"
            )
        upright = to_rgb(image, reading)
        if reading.upright:
            upright = turn_upright(upright, image)
    return transform_image(upright, geometry, max_pixels)


def deepest(path: Path | str, max_pixels: int) -> tuple[Literal["grey", "colours"], int] | None:
    """Return the largest value of an image of 16-bit grey, or the largest upper byte of one of 16-bit colours.

    None for others. Raises `Refused` as `decode`.
    """
    with opened(path, FORMATS, max_pixels) as image:
        kind: Literal["grey", "colours"] = "grey" if _is_deep_grey(image) else "colours"
        if kind == "colours" and not _has_deep_colours(image):
            return None
        image.load()
        colours = image if kind == "grey" else image.convert("RGB")
        return kind, int(np.asarray(colours).max())


def size_of(path: Path | str, max_pixels: int, reading: Reading = AS_STATED) -> tuple[int, int]:
    """Return (height, width) of the image as `reading` turns it, from the header.

    A PNG is read to its end, since its EXIF may be there. Raises `Refused` as `decode`.
    """
    return size_and_orientation(path, max_pixels, reading)[0]


def size_and_orientation(
    path: Path | str,
    max_pixels: int,
    reading: Reading = AS_STATED,
    formats: tuple[str, ...] = FORMATS,
    listed: Stamp | None = None,
) -> tuple[tuple[int, int], int]:
    """Return (height, width) as `size_of`, and the EXIF orientation, 1 to 8."""
    with opened(path, formats, max_pixels, listed) as image:
        width, height = image.size
        turned = orientation(image)
        # Pillow has already swapped the sides of a TIFF.
        swap = turned >= 5 and reading.upright and image.format != "TIFF"
        return ((width, height) if swap else (height, width)), turned


def transform_image(image: Image.Image, geometry: Geometry, max_pixels: int) -> np.ndarray:
    """Return an upright RGB image, resized and cropped, as uint8 (3, height, width)."""
    height, width = geometry.resized(image.height, image.width)
    if height * width > max_pixels:  # a strip of 1 x 1,000,000 pixels grows to gigabytes
        raise Refused(f"too many pixels after the resize: {width}x{height} > {max_pixels:,}")
    top, left, rows, columns = geometry.offsets(height, width)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)[top : top + rows, left : left + columns]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def transform_array(image: np.ndarray, geometry: Geometry, max_pixels: int) -> np.ndarray:
    """Return uint8 (3, height, width), resized and cropped like a file with the same pixels."""
    if geometry == Geometry():
        return image
    return transform_image(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), geometry, max_pixels)


def transform_label_map(
    label_map: np.ndarray, geometry: Geometry, image_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Return a label map (height, width) of any integer type, resized and cropped like its image, without new labels.

    Each pixel takes the label at its centre (half-pixel centres): pixel i of `n` takes source pixel floor((i + 1/2) * m
    / n) of `m`; a centre on the border of two pixels takes the later one.

    image_size: (height, width) of the upright image, if it may differ from the label map's (for example with a map of
        half the resolution). The map then covers the same area, so both must have one shape up to one pixel of
        rounding.

    Raises `Refused` if the shapes differ, or the crop does not fit.
    """
    height, width = label_map.shape
    image_height, image_width = image_size or (height, width)
    if not same_shape(height, width, image_height, image_width):
        raise Refused(f"the label map is {width}x{height}, but its image is {image_width}x{image_height}")
    target_height, target_width = geometry.resized(image_height, image_width)
    top, left, rows, columns = geometry.offsets(target_height, target_width)
    y = _nearest(height, target_height)[top : top + rows]
    x = _nearest(width, target_width)[left : left + columns]
    return label_map[y[:, None], x[None, :]]


def _nearest(source: int, target: int) -> np.ndarray:
    """Return int64 (target,): for each pixel, the source pixel under its centre, in whole numbers without rounding."""
    return (2 * np.arange(target, dtype=np.int64) + 1) * source // (2 * target)


def same_shape(height: int, width: int, image_height: int, image_width: int) -> bool:
    """Return whether a label map has the shape of its image, up to less than one pixel of the map."""
    difference = abs(height * image_width - width * image_height)
    return difference < image_width or difference < image_height


@contextmanager
def opened(
    path: Path | str, formats: tuple[str, ...], max_pixels: int, listed: Stamp | None = None
) -> Iterator[ImageFile.ImageFile]:
    """Open an image with Pillow and check its header and size against `max_pixels`; every failure is `Refused`.

    With `listed`, a file that is another one than was listed, or that changes while it is read, raises `ChangedError`.

    Pillow's own limits, which also guard a WebP canvas and a TIFF tile before they are allocated, are set to
    `max_pixels`. That limit and the warning filters are global, so one thread per process decodes at a time.
    """
    with _open_regular(path, listed) as file:
        try:
            with _image_in(file, formats, max_pixels) as image:
                yield image
        except OSError as error:
            if listed is None:
                raise Refused(_reason(error)) from error
            raise _unreadable(path, error) from error
        finally:  # what was found while somebody wrote the file is no finding
            check_listed(path, os.fstat(file.fileno()), listed)


@contextmanager
def _image_in(file: BinaryIO, formats: tuple[str, ...], max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Open an image in an open file; every failure is `Refused`, but that of a disk or of a network."""
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels / 2  # type: ignore[assignment]  # errors at twice
        try:
            with Image.open(file, formats=formats) as image:
                yield image
        except (Refused, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            pixels = re.search(r"\((\d+) pixels\)", str(error))
            found = f"{int(pixels[1]):,} > " if pixels else "more than "
            raise Refused(f"too many pixels: {found}{max_pixels:,}") from error
        except UnidentifiedImageError as error:
            raise Refused(f"not an image; expected {', '.join(formats)}") from error
        except Exception as error:  # with damaged files, Pillow raises nearly every type of error
            if isinstance(error, OSError) and error.errno in PASSING:
                raise
            raise Refused(_reason(error)) from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _open_regular(path: Path | str, listed: Stamp | None = None) -> BinaryIO:
    """Open a regular file that is not empty, without ever blocking on a named pipe or a device."""
    there = listed is not None and listed[0] >= 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if there and error.errno in PASSING:
            raise _unreadable(path, error) from error
        if error.errno not in PATH_ERRORS:
            raise
        raise Refused(PATH_ERRORS[error.errno]) from error
    status = os.fstat(descriptor)
    regular = stat.S_ISREG(status.st_mode)
    try:
        if regular or there:
            check_listed(path, status, listed)
        if not regular or status.st_size == 0:
            raise Refused("empty file" if regular else "not a regular file")
    except MicrotomeError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _unreadable(path: Path | str, error: OSError) -> ChangedError:
    return ChangedError(
        f"{path} cannot be read now ({error.strerror}): run again when it can, or remove it from the data set"
    )


def _reason(error: Exception) -> str:
    message = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))  # an address would differ between runs
    if "truncat" in message.lower():
        return "truncated"
    return f"unreadable: {message or type(error).__name__}"


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is absent, out of range or damaged."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF does not make the pixels unusable
        return 1
    return value if isinstance(value, int) and value in UPRIGHT else 1


def turn_upright(image: Image.Image, source: Image.Image) -> Image.Image:
    """Return `image` turned by the EXIF of `source`, the loaded file it was converted from."""
    turn = UPRIGHT.get(orientation(source))
    return image if turn is None else image.transpose(turn)


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _has_deep_colours(image: ImageFile.ImageFile) -> bool:
    """Return whether colours, or grey with transparency, have 16 bits, of which Pillow reads the upper bytes alone."""
    return bool(image.tile) and ";16" in str(image.tile[0][3]) and not _is_deep_grey(image)


def to_rgb(image: Image.Image, reading: Reading = AS_STATED) -> Image.Image:
    """Return a loaded image of any mode in RGB; `Refused` if the range of its values is unknown."""
    if _is_deep_grey(image):
        return _deep_grey_to_rgb(image, reading)
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "float"
        raise Refused(f"{kind} pixels: their range is not known; save them with 8 or 16 bits")
    if reading.composited and (image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info):
        coloured = image.convert("RGBA")
        background = Image.new("RGBA", coloured.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, coloured).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image, reading: Reading) -> Image.Image:
    """Return grey of more than 8 bits in RGB: the largest value becomes 255, rounded (16 bits: value / 257)."""
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    bits = reading.bits or tags.get(BITS_PER_SAMPLE, (16,))[0]
    largest = 2**bits - 1
    if values.max(initial=0) > largest:
        raise Refused(f"the value {values.max():,} in an image of `bits: {bits}`, whose largest is {largest:,}")
    grey = (values * 255 + largest // 2) // largest
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow keeps 16 bits as stored
        grey = 255 - grey
    if reading.composited and isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = BACKGROUND[0]
    return Image.fromarray(np.repeat(grey[..., None].astype(np.uint8), 3, axis=2))
