"""Picture files as people have them, made here: for each kind its bytes and what a reader must see in them."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 60, 40


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """`seen` is uint8 (Y, X, 3); `within` is how far a level may be from it, in a lossy format."""

    data: bytes
    seen: np.ndarray
    within: int = 0


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def scene() -> np.ndarray:
    """Soft colours that differ at every place, so that a turn or a mirror image is seen."""
    down, across = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([across * 4, down * 6, 255 - across * 2 - down * 2], axis=-1).astype(np.uint8)


def grey() -> np.ndarray:
    """Levels of 16 bits, each place another."""
    return (
        (np.arange(WIDTH * HEIGHT, dtype=np.uint32) * 65535 // (WIDTH * HEIGHT - 1))
        .astype(np.uint16)
        .reshape(HEIGHT, WIDTH)
    )


def three(levels_YX: np.ndarray) -> np.ndarray:
    return np.repeat(levels_YX[..., None], 3, axis=-1).astype(np.uint8)


def good_files() -> dict[str, PictureFile]:
    """All kinds that are read."""
    return {**_plain(), **_turned(), **_deep(), **_transparent(), **_of_several_frames(), **_profiled(), **_long()}


def _plain() -> dict[str, PictureFile]:
    seen, picture = scene(), Image.fromarray(scene())
    black_or_white = np.asarray(picture.convert("1"))
    cmyk = picture.convert("CMYK")
    return {
        "png": PictureFile(data=encode(picture, "PNG"), seen=seen),
        "png-interlaced": PictureFile(data=_interlaced(seen), seen=seen),
        "png-1-bit": PictureFile(data=encode(picture.convert("1"), "PNG"), seen=three(black_or_white * 255)),
        "jpeg": PictureFile(data=encode(picture, "JPEG", quality=95), seen=seen, within=16),
        "jpeg-progressive": PictureFile(
            data=encode(picture, "JPEG", quality=95, progressive=True), seen=seen, within=16
        ),
        "jpeg-grey": PictureFile(
            data=encode(picture.convert("L"), "JPEG", quality=95),
            seen=three(np.asarray(picture.convert("L"))),
            within=8,
        ),
        "jpeg-cmyk-without-profile": PictureFile(data=encode(cmyk, "JPEG", quality=95), seen=seen, within=24),
        "webp": PictureFile(data=encode(picture, "WEBP", quality=95), seen=seen, within=32),
        "webp-lossless": PictureFile(data=encode(picture, "WEBP", lossless=True), seen=seen),
        "tiff-lzw": PictureFile(data=encode(picture, "TIFF", compression="tiff_lzw"), seen=seen),
        "tiff-cmyk": PictureFile(data=encode(cmyk, "TIFF"), seen=seen),
        "bmp": PictureFile(data=encode(picture, "BMP"), seen=seen),
    }


def _turned() -> dict[str, PictureFile]:
    """Stored as a camera holds it, with the orientation that sets it upright."""
    seen = scene()
    stored = {
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen, 1),
        7: np.rot90(seen, 2).transpose(1, 0, 2),
        8: np.rot90(seen, -1),
    }

    def file(orientation: int, kind: str, **options: Any) -> bytes:
        exif = Image.Exif()
        exif[0x0112] = orientation
        return encode(Image.fromarray(np.ascontiguousarray(stored[orientation])), kind, exif=exif, **options)

    return {
        **{f"png-orientation-{number}": PictureFile(data=file(number, "PNG"), seen=seen) for number in stored},
        "jpeg-orientation-6": PictureFile(data=file(6, "JPEG", quality=95), seen=seen, within=16),
        "webp-orientation-6": PictureFile(data=file(6, "WEBP", lossless=True), seen=seen),
        "tiff-orientation-6": PictureFile(data=file(6, "TIFF"), seen=seen),
        "jpeg-damaged-exif": PictureFile(
            data=encode(Image.fromarray(seen), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
            seen=seen,
            within=16,
        ),
    }


def _deep() -> dict[str, PictureFile]:
    levels, seen = grey(), three(grey() >> 8)
    big_endian = Image.frombytes("I;16B", (WIDTH, HEIGHT), levels.astype(">u2").tobytes())
    floats = Image.fromarray((levels / 65535).astype(np.float32))
    return {
        "png-16-bit-grey": PictureFile(data=encode(Image.fromarray(levels), "PNG"), seen=seen),
        "png-16-bit-grey-transparent": PictureFile(
            data=encode(Image.fromarray(levels), "PNG", transparency=int(levels[0, 1])),
            seen=np.where(three(levels == levels[0, 1]) > 0, 255, seen).astype(np.uint8),
        ),
        "png-16-bit-colour": PictureFile(data=_png_of_16_bits(np.stack([levels] * 3, axis=-1)), seen=seen),
        "tiff-16-bit-grey": PictureFile(data=encode(Image.fromarray(levels), "TIFF"), seen=seen),
        "tiff-16-bit-big-endian": PictureFile(data=encode(big_endian, "TIFF"), seen=seen),
        "tiff-float": PictureFile(data=encode(floats, "TIFF"), seen=seen, within=1),
    }


def _transparent() -> dict[str, PictureFile]:
    """The left half is transparent, and a strip in the middle half so."""
    seen = scene().astype(int)
    alpha = np.full((HEIGHT, WIDTH), 255)
    alpha[:, :20], alpha[:, 20:40] = 0, 128
    on_white = (seen * alpha[..., None] + 255 * (255 - alpha[..., None])) / 255
    colours = Image.fromarray(np.dstack([scene(), alpha.astype(np.uint8)]))
    grey_alpha = colours.convert("LA")
    grey_levels = np.asarray(grey_alpha).astype(int)
    greys_on_white = (grey_levels[..., 0] * alpha + 255 * (255 - alpha)) / 255
    palette = Image.fromarray((np.arange(WIDTH * HEIGHT) % 3).astype(np.uint8).reshape(HEIGHT, WIDTH), "P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    index = np.asarray(palette)
    table = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]])
    white = np.where(index[..., None] == 1, 255, table[index]).astype(np.uint8)
    faded = np.where(index[..., None] == 1, 255 + (table[index] - 255) * 100 / 255, table[index])
    one_colour = Image.fromarray(scene())
    key = tuple(int(level) for level in scene()[3, 5])
    keyed = scene().copy()
    keyed[(keyed == key).all(axis=-1)] = 255
    return {
        "png-rgba": PictureFile(data=encode(colours, "PNG"), seen=on_white.round().astype(np.uint8), within=1),
        "png-grey-alpha": PictureFile(
            data=encode(grey_alpha, "PNG"), seen=three(greys_on_white.round().astype(np.uint8)), within=1
        ),
        "png-palette-transparency": PictureFile(data=encode(palette, "PNG", transparency=1), seen=white),
        "png-palette-alpha": PictureFile(
            data=encode(palette, "PNG", transparency=b"\xff\x64\xff"), seen=faded.round().astype(np.uint8), within=1
        ),
        "png-transparent-colour": PictureFile(data=encode(one_colour, "PNG", transparency=key), seen=keyed),
        "webp-rgba": PictureFile(
            data=encode(colours, "WEBP", lossless=True, exact=True), seen=on_white.round().astype(np.uint8), within=1
        ),
        "tiff-rgba": PictureFile(data=encode(colours, "TIFF"), seen=on_white.round().astype(np.uint8), within=1),
    }


def _of_several_frames() -> dict[str, PictureFile]:
    seen, first = scene(), Image.fromarray(scene())
    others = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("black", "lime")]
    several: dict[str, Any] = {"save_all": True, "append_images": others}
    return {
        "png-animated": PictureFile(data=encode(first, "PNG", **several, duration=100), seen=seen),
        "webp-animated": PictureFile(data=encode(first, "WEBP", **several, lossless=True, duration=100), seen=seen),
        "tiff-of-pages": PictureFile(data=encode(first, "TIFF", **several), seen=seen),
        "jpeg-of-several": PictureFile(data=encode(first, "MPO", **several, quality=95), seen=seen, within=16),
    }


def _profiled() -> dict[str, PictureFile]:
    """Profiles whose effect is seen: red and green change places; only the black ink is visible."""
    swapped = scene()[..., [1, 0, 2]]
    cmyk = Image.merge("CMYK", [Image.new("L", (WIDTH, HEIGHT), level) for level in (255, 0, 0, 0)])
    white = np.full_like(scene(), 255)
    picture = Image.fromarray(scene())
    return {
        "png-icc-profile": PictureFile(
            data=encode(picture, "PNG", icc_profile=swapped_profile()), seen=swapped, within=12
        ),
        "png-damaged-icc-profile": PictureFile(data=encode(picture, "PNG", icc_profile=b"junk" * 99), seen=scene()),
        "jpeg-cmyk-icc-profile": PictureFile(
            data=encode(cmyk, "JPEG", quality=95, icc_profile=ink_profile()), seen=white, within=3
        ),
        "tiff-cmyk-icc-profile": PictureFile(
            data=encode(cmyk, "TIFF", icc_profile=ink_profile()), seen=white, within=3
        ),
    }


def _long() -> dict[str, PictureFile]:
    line = np.random.default_rng(1).integers(0, 256, (1, 4000, 3), np.uint8)
    upright = np.ascontiguousarray(line.transpose(1, 0, 2))
    return {
        "png-4000-x-1": PictureFile(data=encode(Image.fromarray(line), "PNG"), seen=line),
        "png-1-x-4000": PictureFile(data=encode(Image.fromarray(upright), "PNG"), seen=upright),
    }


def bad_files() -> dict[str, tuple[bytes, str]]:
    """All kinds that are refused: the bytes, and what the error says."""
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8))
    floats = np.linspace(-1, 3, WIDTH * HEIGHT, dtype=np.float32).reshape(HEIGHT, WIDTH)
    no_number = np.full((8, 8), np.nan, np.float32)
    broad = Image.fromarray(np.full((8, 8), 70_000, np.int32))
    return {
        "empty": (b"", "is empty (0 bytes)"),
        "text": (b"not a picture at all", "20 bytes that begin with b'not a pictur'"),
        "html": (b"<!DOCTYPE html><p>404", "is an HTML page"),
        "gif": (encode(Image.new("RGB", (8, 8)), "GIF"), "is a GIF picture"),
        "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing"),
        "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC picture"),
        "avif": (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", "is an AVIF picture"),
        "sound": (b"RIFF\x24\0\0\0WAVEfmt ", "no picture that can be read"),
        "video": (b"\0\0\0\x18ftypisom\0\0\0\0", "is a video"),
        "pdf": (b"%PDF-1.7\n", "is a PDF document"),
        "png-truncated": (encode(noise, "PNG")[:-8], "PNG file that is damaged or ends early"),
        "png-header-alone": (encode(noise, "PNG")[:20], "PNG file that is damaged or ends early"),
        "jpeg-truncated": (encode(noise, "JPEG")[:-8], "JPEG file that is damaged or ends early"),
        "webp-truncated": (encode(noise, "WEBP", lossless=True)[:-8], "WebP file that is damaged or ends early"),
        "tiff-truncated": (encode(noise, "TIFF")[:-8], "TIFF file that is damaged or ends early"),
        "bmp-truncated": (encode(noise, "BMP")[:-8], "BMP file that is damaged or ends early"),
        "tiff-float-beyond-1": (encode(Image.fromarray(floats), "TIFF"), "floating-point values from -1 to 3"),
        "tiff-float-not-a-number": (encode(Image.fromarray(no_number), "TIFF"), "floating-point values from nan"),
        "tiff-32-bit-integers": (encode(broad, "TIFF"), "pixels of mode I"),
        "tiff-lab": (encode(Image.new("LAB", (8, 8)), "TIFF"), "pixels of mode LAB"),
        "png-too-many-pixels": (png_header(6000, 6000), "6000 x 6000 pixels but must have from 1 to 33554432"),
        "png-bomb": (png_header(60_000, 60_000), "must have at most 33554432 pixels"),
        "png-no-pixels": (png_header(0, 5), "PNG file that is damaged"),
    }


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *, bits: int, rows: bytes, is_interlaced: bool = False) -> bytes:
    """A PNG of colours without transparency."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, is_interlaced)
    parts = [_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width: int, height: int) -> bytes:
    """A small PNG that says that it is so large."""
    return _png(width, height, bits=8, rows=b"")


def _png_of_16_bits(levels_YXC: np.ndarray) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels_YXC)
    return _png(levels_YXC.shape[1], levels_YXC.shape[0], bits=16, rows=rows)


def _interlaced(levels_YXC: np.ndarray) -> bytes:
    """A PNG in the seven passes of Adam7."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts = [levels_YXC[top::down, left::across] for top, left, down, across in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts for row in part)
    return _png(levels_YXC.shape[1], levels_YXC.shape[0], bits=8, rows=rows, is_interlaced=True)


def swapped_profile() -> bytes:
    """A colour profile of RGB whose red is sRGB's green and the other way round."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    # sRGB's primaries for a white of D50, and its curve as a gamma of 2.2.
    red, green, blue = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    colours = {b"rXYZ": green, b"gXYZ": red, b"bXYZ": blue}
    tags = {name: b"XYZ \0\0\0\0" + fixed(*value) for name, value in colours.items()}
    return _profile(b"mntr", b"RGB ", b"XYZ ", {**tags, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)})


def ink_profile() -> bytes:
    """A colour profile of CMYK where only the black ink is visible."""
    identity = struct.pack(">9i", *(65536 if place in (0, 4, 8) else 0 for place in range(9)))
    ramp = bytes(range(256))
    # A corner of the four inks -> L, a, b; the last ink changes fastest.
    corners = b"".join(bytes([0 if corner % 2 else 255, 128, 128]) for corner in range(16))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + corners + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


def _profile(device: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2."""
    name = b"a test"
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(4 + 4 + 2 + 1 + 67)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"desc": text, b"wtpt": white, **tags}
    place, index, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        index += tag + struct.pack(">II", place + len(body), len(content))
        body += padded
    size = place + len(body)
    header = struct.pack(">I", size) + b"lcms" + struct.pack(">I", 0x02400000) + device + space + connection
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(4 * 7) + struct.pack(">3i", 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + index + body
