"""A picture file -> pixels: the one function that opens pictures from outside. docs/http-api.md has its table.

HTTP requests, bulk jobs, training and the model all open pictures here, so that a file looks the same to each of them.
No torch here.
"""

from __future__ import annotations

import io
import re
import threading

import numpy as np
from PIL import Image, ImageCms, ImageOps

from minigpt5.errors import BadPicture

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
ACCEPTED = "PNG, JPEG, WebP, TIFF or BMP"
MAX_PIXELS = 2**25
"""Largest width times height: a phone's 24 million pixels fit."""
MAX_BYTES = 2**27
"""Largest file: an uncompressed TIFF of half of MAX_PIXELS."""
_DECODED_AT_ONCE = threading.BoundedSemaphore(2)
"""Bounds memory: a picture of MAX_PIXELS takes about 260 MiB while it is decoded."""
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_DAMAGED = "file that is damaged or ends early"
_PNG_END = b"IEND\xaeB`\x82"
_KINDS = {
    re.compile(pattern, re.DOTALL): kind
    for pattern, kind in {
        rb"\x89PNG": f"a PNG {_DAMAGED}",
        rb"\xff\xd8\xff": f"a JPEG {_DAMAGED}",
        rb"RIFF....WEBP": f"a WebP {_DAMAGED}",
        rb"II\*\0|MM\0\*": f"a TIFF {_DAMAGED}",
        rb"BM....\0\0\0\0": f"a BMP {_DAMAGED}",
        rb"GIF8": "a GIF picture",
        rb"....ftyp(hei[cmsx]|hevc|mif1|msf1)": "a HEIC picture",
        rb"....ftypavi[fs]": "an AVIF picture",
        rb"....ftyp": "a video",
        rb"\0\0\0\x0cJXL |\xff\x0a": "a JPEG XL picture",
        rb"\0\0\0\x0cjP  ": "a JPEG 2000 picture",
        rb"\0\0\x01\0": "an ICO picture",
        rb"8BPS": "a Photoshop picture",
        rb"%PDF": "a PDF document",
        rb"PK\x03\x04": "a ZIP file",
        rb"\x1f\x8b": "a gzip file",
        rb"(?i:\W*<(!doctype )?html)": "an HTML page",
        rb"(?i:\W*<(svg|[?!].{0,4000}<svg))": "an SVG drawing",
    }.items()
}
"""Beginnings of files that are not read, as patterns, and what the error calls them. The first that fits counts."""


def open_picture(data: bytes, *, name: str = "picture") -> Image.Image:
    """Decode a picture file: upright, in sRGB, on white, 8 bits; mode RGB. Of an animation it is the first frame.

    `name` is the picture's place in a request or a data set, for the error. Raises BadPicture, which names the fault.
    """
    if not data:
        raise BadPicture(name, f"{name} is empty (0 bytes): send a {ACCEPTED} picture")
    if len(data) > MAX_BYTES:
        raise BadPicture(name, f"{name} has {len(data)} bytes but must have at most {MAX_BYTES}: send a smaller file")
    picture = _open(data, name)
    try:
        if picture.format == "PNG" and _PNG_END not in data:  # the other decoders look for the end themselves
            raise EOFError("no end mark")
        with _DECODED_AT_ONCE:
            picture.load()
            orientation = _orientation(picture)
            colours = _to_rgb(picture, name)
            upright = colours.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else colours
    except BadPicture:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over in foreign bytes
        fault = f"{name} is a {picture.format} {_DAMAGED} ({str(error)[:80]})"
        raise BadPicture(name, f"{fault}: send the whole file") from error
    upright.info = {}  # else a copy that is saved would carry the old colour profile
    return upright


def resample(data: bytes, size: tuple[int, int]) -> bytes:
    """A PNG file that we drew -> one of this width and height. If the shapes differ, it is cropped to its middle."""
    file = io.BytesIO()
    with _DECODED_AT_ONCE, Image.open(io.BytesIO(data)) as picture:
        ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS).save(file, "PNG")
    return file.getvalue()


def _open(data: bytes, name: str) -> Image.Image:
    """Read the file's header; nothing is decoded yet. Raises BadPicture."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's limits are above ours
        raise BadPicture(name, f"{name} must have at most {MAX_PIXELS} pixels: {error}") from error
    except Exception as error:  # as above
        raise BadPicture(name, f"{name} is {_kind_of(data)}: send a {ACCEPTED} picture") from error
    if not 1 <= picture.width * picture.height <= MAX_PIXELS:
        size = f"{picture.width} x {picture.height}"
        raise BadPicture(name, f"{name} has {size} pixels but must have from 1 to {MAX_PIXELS}: resize it")
    return picture


def _kind_of(data: bytes) -> str:
    """Name a file that Pillow cannot open."""
    found = (kind for pattern, kind in _KINDS.items() if pattern.match(data, 0, 5000))
    return next(found, f"no picture that can be read ({len(data)} bytes that begin with {data[:12]!r})")


def _orientation(picture: Image.Image) -> int:
    """Read the EXIF orientation, from 1 to 8. Damaged EXIF data is ignored."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # as above
        return 1


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """Convert any mode to RGB: on white, and in sRGB where colours have a profile. Raises BadPicture."""
    profile = picture.info.get("icc_profile")
    if picture.mode in _SIXTEEN_BITS:
        picture = _from_16_bits(picture)
    elif picture.mode == "F":
        picture = _from_floats(picture, name)
    elif picture.mode not in _EIGHT_BITS:
        raise BadPicture(name, f"{name} has pixels of mode {picture.mode}, which is not read: save it as RGB")
    if picture.mode in ("1", "L"):
        profile = None  # of grey: what a screen shows without it hardly differs
    if picture.mode in _WITH_ALPHA or "transparency" in picture.info:
        picture = _on_white(picture)
    if picture.mode != "CMYK":
        picture = picture.convert("RGB")
    return _to_srgb(picture, profile) if profile else picture.convert("RGB")


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """Keep the high byte of grey levels, as Pillow does for 16-bit colours."""
    levels_YX = np.asarray(picture)
    grey = Image.fromarray((levels_YX >> 8).astype(np.uint8))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(levels_YX == transparent, 0, 255).astype(np.uint8)))
    return grey


def _from_floats(picture: Image.Image, name: str) -> Image.Image:
    """Map 0 to black and 1 to white. Other values have no agreed meaning. Raises BadPicture."""
    levels_YX = np.array(picture)
    least, most = float(levels_YX.min()), float(levels_YX.max())
    if not 0 <= least <= most <= 1:  # false for values that are not numbers, too
        values = f"floating-point values from {least:g} to {most:g}"
        raise BadPicture(name, f"{name} has {values} but must have them from 0 (black) to 1 (white): scale them")
    levels_YX *= 255
    return Image.fromarray(np.rint(levels_YX, out=levels_YX).astype(np.uint8))


def _on_white(picture: Image.Image) -> Image.Image:
    """Composite a picture with transparency on white; mode RGB."""
    picture = picture.convert("RGBA")
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(picture, mask=picture)
    return ground


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """Convert RGB or CMYK by its colour profile. A profile that cannot be used is ignored."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if picture.mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return picture
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        converted = None
    return converted or picture.convert("RGB")
