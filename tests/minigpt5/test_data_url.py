"""Data URLs as browsers, client libraries and careless hands write them."""

from __future__ import annotations

import base64

import pytest

from minigpt5 import data_url

DATA = bytes(range(256)) + b"\xfb\xff\xfe?"  # its base64 has + and / and one = at the end
TEXT = base64.b64encode(DATA).decode()
READ = {
    "as RFC 2397 has it": f"data:image/png;base64,{TEXT}",
    "upper-case scheme": f"DATA:image/png;base64,{TEXT}",
    "upper-case base64": f"data:image/png;BASE64,{TEXT}",
    "upper-case media type": f"data:IMAGE/PNG;base64,{TEXT}",
    "no media type": f"data:;base64,{TEXT}",
    "a charset": f"data:image/png;charset=utf-8;base64,{TEXT}",
    "space before base64": f"data:image/png; base64,{TEXT}",
    "space around the header": f"data: image/png;base64 ,{TEXT}",
    "lines of 76 letters": "data:image/png;base64,\n" + base64.encodebytes(DATA).decode(),
    "CRLF": "data:image/png;base64," + base64.encodebytes(DATA).decode().replace("\n", "\r\n"),
    "line break in the header": f"data:image/png;\nbase64,{TEXT}",
    "spaces and tabs": f"data:image/png;base64, {TEXT[:9]}\t {TEXT[9:]} ",
    "form feed": f"data:image/png;base64,{TEXT[:9]}\f{TEXT[9:]}",
    "space before it": f" \n data:image/png;base64,{TEXT}",
    "missing padding": f"data:image/png;base64,{TEXT.rstrip('=')}",
    "URL-safe alphabet": "data:image/png;base64," + base64.urlsafe_b64encode(DATA).decode(),
    "URL-safe, missing padding": "data:image/png;base64," + base64.urlsafe_b64encode(DATA).decode().rstrip("="),
    "%2B, %2F and %3D": "data:image/png;base64," + TEXT.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    "%2b and %0a": "data:image/png;base64,%0a" + TEXT.replace("+", "%2b"),
    "a fragment": f"data:image/png;base64,{TEXT}#page=1",
    "percent escapes without base64": "data:image/png," + "".join(f"%{byte:02X}" for byte in DATA),
}


@pytest.mark.parametrize("name", READ)
def test_a_data_url_is_read(name: str) -> None:
    assert data_url.is_data_url(READ[name])
    assert data_url.decode(READ[name]) == DATA


@pytest.mark.parametrize(
    ("url", "data"),
    [
        ("data:,", b""),
        ("data:;base64,", b""),
        ("data:,a%20b+c", b"a b+c"),
        ("data:text/plain,100%", b"100%"),
        ("data:;base64,YQ", b"a"),
        ("data:;base64,YR==", b"a"),  # the bits that are left over say nothing
        ("data:text/plain;base64x,YQ", b"YQ"),
        ("data:,\u00e9", b"\xc3\xa9"),
    ],
)
def test_a_corner_of_the_standard_is_kept(url: str, data: bytes) -> None:
    assert data_url.decode(url) == data


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png;base64", "a comma"),
        ("https://example.com/a,b", "data:"),
        ("", "data:"),
        ("data:;base64,YWJjZ", "no file is encoded as 5 letters"),
        ("data:;base64,YQ===", "b'='"),
        ("data:;base64,YQ=", "b'='"),
        ("data:;base64,Y=Q=", "b'='"),
        ("data:;base64,YWJj!", "b'!' at byte 4"),
        ("data:;base64,%ZZ00", "b'%'"),
        ("data:;base64," + "%" * 2**22, "percent escapes"),
        ("data:;base64,\ud800", "surrogates"),
    ],
    ids=lambda value: value[:24].encode("ascii", "replace").decode(),
)
def test_a_data_url_that_is_broken_says_how(url: str, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        data_url.decode(url)


def test_the_size_is_bounded_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_url, "MAX_CHARACTERS", 20)
    assert data_url.decode("data:;base64," + "YWJj") == b"abc"
    with pytest.raises(ValueError, match="29 characters but at most 20"):
        data_url.decode("data:;base64," + "YWJj" * 4)


@pytest.mark.parametrize("text", ["fox.png", "file:///etc/passwd", "http://x/data:", "/data:image/png", "", "dat"])
def test_a_path_and_another_scheme_are_no_data_url(text: str) -> None:
    assert not data_url.is_data_url(text)
