"""Every kind of picture file is seen as its owner means it, or refused by the name of its fault."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from minigpt5 import pictures
from minigpt5.errors import BadPicture
from minigpt5.pictures import open_picture
from tests.helpers.picture_files import bad_files, encode, good_files, grey, scene, swapped_profile

GOOD, BAD = good_files(), bad_files()
pytestmark = pytest.mark.filterwarnings("ignore:.*(EXIF|Truncated|Metadata).*:UserWarning")  # Pillow's, of bad files


@pytest.mark.parametrize("kind", GOOD)
def test_a_picture_is_seen_upright_on_white_and_in_srgb(kind: str) -> None:
    file = GOOD[kind]
    picture = open_picture(file.data)
    assert picture.mode == "RGB" and not picture.info
    pixels = np.asarray(picture).astype(int)
    assert pixels.shape == file.seen.shape
    assert np.abs(pixels - file.seen).max() <= file.within


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_refused_by_the_name_of_its_fault(kind: str) -> None:
    data, fault = BAD[kind]
    with pytest.raises(BadPicture, match="prompt") as refusal:
        open_picture(data, name="prompt[1].image")
    assert refusal.value.field == "prompt[1].image" and str(refusal.value).startswith("prompt[1].image ")
    assert fault in str(refusal.value) and len(str(refusal.value)) < 250


def test_the_files_are_what_their_names_say() -> None:
    def opened(kind: str) -> Image.Image:
        return Image.open(io.BytesIO(GOOD[kind].data))

    modes = {"tiff-16-bit-big-endian": "I;16B", "tiff-float": "F", "png-grey-alpha": "LA", "png-1-bit": "1"}
    modes |= {"jpeg-cmyk-icc-profile": "CMYK", "png-palette-transparency": "P", "png-16-bit-grey": "I;16"}
    assert {kind: opened(kind).mode for kind in modes} == modes
    assert all(opened(kind).n_frames == 3 for kind in GOOD if "animated" in kind or "of-" in kind)  # type: ignore[attr-defined]
    assert opened("png-interlaced").info["interlace"] and opened("jpeg-progressive").info["progressive"]


def test_16_bit_grey_keeps_its_levels() -> None:
    assert len(np.unique(np.asarray(open_picture(GOOD["png-16-bit-grey"].data)))) == len(np.unique(grey() >> 8)) == 256


def test_a_copy_that_is_saved_has_no_colour_profile() -> None:
    """Else its colours would be converted twice."""
    once = open_picture(encode(Image.fromarray(scene()), "PNG", icc_profile=swapped_profile()))
    assert (np.asarray(open_picture(encode(once, "PNG"))) == np.asarray(once)).all()


@pytest.mark.parametrize("kind", ["png", "jpeg", "jpeg-progressive", "webp", "tiff-lzw", "tiff-cmyk", "bmp"])
@pytest.mark.parametrize("missing", [1, 2, 4, 8, 40])
def test_a_file_that_is_truncated_by_a_few_bytes_is_refused(kind: str, missing: int) -> None:
    with pytest.raises(BadPicture, match="file that is damaged or ends early"):
        open_picture(GOOD[kind].data[:-missing])


def test_a_file_over_the_limit_of_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    with pytest.raises(BadPicture, match="has 101 bytes but must have at most 100"):
        open_picture(b"x" * 101)


def test_no_more_than_two_pictures_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = 0, 0, threading.Lock()
    two_are_in = threading.Event()

    def slow(picture: Image.Image) -> int:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
            if running == 2:
                two_are_in.set()
        assert two_are_in.wait(10)
        with lock:
            running -= 1
        return 1

    monkeypatch.setattr(pictures, "_orientation", slow)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(open_picture, [GOOD["png"].data] * 8))
    assert most == 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_damaged_bytes_are_refused_or_read_and_nothing_else(kind: str) -> None:
    rng = np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = np.frombuffer(encode(Image.fromarray(scene()), kind, exif=exif, icc_profile=swapped_profile()), np.uint8)
    for _ in range(300):
        damaged = whole.copy()
        places = rng.integers(0, min(len(whole), 1500), 4)
        damaged[places] = rng.integers(0, 256, 4)
        try:
            assert open_picture(damaged.tobytes()).mode == "RGB"
        except BadPicture as refusal:
            assert str(refusal).startswith("picture ")
