"""The page of a human study: what it shows, what it hides, and what it lets in."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minigpt5.evaluation.study.__main__ import main
from minigpt5.evaluation.study.design import PAIRINGS, QUESTIONS
from minigpt5.evaluation.study.page import key_path
from tests.helpers.study_runs import make_png, make_row, write_run

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & <!-- \u2028 @@SCRIPT@@"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    ids = [f"row-{number}" for number in range(6)]
    first = [make_row(id, ["Once", EVIL], (200, 80, 40)) for id in ids]
    second = [make_row(id, ["Then", "End"], (40, 80, 200)) for id in ids]
    return [
        write_run(tmp_path / "secret-ours", first[:2], first[2:]),
        write_run(tmp_path / "secret-theirs", second),
    ]


def make(out: Path, *words: object) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The page's text, what its script reads, and the key."""
    main(["make", *map(str, words), "--out", str(out)])
    html = (out if out.suffix else out / "index.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data
    return html, json.loads(data[1]), json.loads(key_path(out).read_text())


def test_the_page_holds_each_run_s_stories_and_the_key_tells_them_apart(runs: list[Path], tmp_path: Path) -> None:
    _, data, key = make(tmp_path / "study.html", *runs)
    assert len(data["comparisons"]) == 6 and len(data["stories"]) == 12
    assert [one["id"] for one in data["questions"]] == list(QUESTIONS) == ["language", "image", "coherence"]
    for comparison in data["comparisons"]:
        made = [key["candidates"][name] for name in comparison["stories"]]
        assert {one["run"] for one in made} == {"secret-ours", "secret-theirs"}
        assert len({one["item"] for one in made}) == 1 and comparison["prompt"] == f"Story {made[0]['item']}"
        for name, one in zip(comparison["stories"], made, strict=True):
            texts = [page["text"] for page in data["stories"][name]]
            assert texts == (["Once", EVIL] if one["run"] == "secret-ours" else ["Then", "End"])
    assert data["study"] == key["study"]


def test_the_page_names_no_run_and_no_row(runs: list[Path], tmp_path: Path) -> None:
    html, data, key = make(tmp_path / "study.html", *runs, "--seed", 1)
    assert "secret" not in html
    data["comparisons"] = [one | {"prompt": ""} for one in data["comparisons"]]
    assert "row-" not in json.dumps(data)  # but in the prompts of these tests
    first = [key["candidates"][one["stories"][0]]["run"] for one in data["comparisons"]]
    assert len(set(first)) == 2  # neither run is always named first


def test_texts_cannot_leave_their_place(runs: list[Path], tmp_path: Path) -> None:
    html, data, _ = make(tmp_path / "study.html", *runs)
    assert html.count("<script") == html.count("</script>") == 2
    assert "onerror" not in re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.DOTALL)
    assert any(page["text"] == EVIL for story in data["stories"].values() for page in story)


def test_the_policy_admits_the_page_s_own_script_and_style_and_data_pictures(runs: list[Path], tmp_path: Path) -> None:
    html, data, _ = make(tmp_path / "study.html", *runs)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    script, style = (
        re.search(r"<script>(.*?)</script>", html, re.DOTALL),
        re.search("<style>(.*?)</style>", html, re.DOTALL),
    )
    assert policy and script and style
    hashes = [base64.b64encode(hashlib.sha256(part[1].encode()).digest()).decode() for part in (script, style)]
    assert policy[1].split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"script-src 'sha256-{hashes[0]}'",
        f"style-src 'sha256-{hashes[1]}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert all(uri.startswith("data:image/webp;base64,") for uri in data["pictures"].values())
    assert not re.search(r"https?://", html)


def test_pictures_are_made_small_and_lose_their_metadata(tmp_path: Path) -> None:
    big = make_row("row", ["Once"])
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0131] = "SecretPainter"
    Image.new("RGB", (900, 600), "red").save(file, "JPEG", exif=exif)
    big["pages"][0]["png"] = file.getvalue()
    runs = [write_run(tmp_path / "a", [big]), write_run(tmp_path / "b", [make_row("row", ["Then"])])]
    _, data, key = make(tmp_path / "study.html", *runs, "--picture-px", 300)
    name = next(name for name, one in key["candidates"].items() if one["run"] == "a")
    uri = data["pictures"][data["stories"][name][0]["picture"]]
    webp = base64.b64decode(uri.partition(",")[2])
    assert Image.open(io.BytesIO(webp)).size == (300, 200) and b"SecretPainter" not in webp


def test_a_picture_is_read_from_where_its_row_says(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(make_png((0, 255, 0)))
    row = make_row("row", ["Once"])
    row["pages"][0] |= {"png": None, "uri": str(tmp_path / "page.png")}
    other = make_row("row", ["Then"])
    other["pages"][0]["png"] = None  # a run without pictures
    runs = [write_run(tmp_path / "a", [row]), write_run(tmp_path / "b", [other])]
    _, data, _ = make(tmp_path / "study.html", *runs)
    assert sorted(page["picture"] is None for pages in data["stories"].values() for page in pages) == [False, True]
    [uri] = data["pictures"].values()
    pixel = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB").getpixel((9, 9))
    assert isinstance(pixel, tuple) and pixel[1] > 200 > 60 > pixel[0]
    (tmp_path / "page.png").unlink()
    with pytest.raises(SystemExit, match=r"its picture .*page.png is gone"):
        make(tmp_path / "again.html", *runs)


def test_a_folder_has_pictures_as_files_and_the_key_outside(runs: list[Path], tmp_path: Path) -> None:
    html, data, _ = make(tmp_path / "site", *runs)
    assert "img-src 'self'" in html and "data:" not in html
    assert all((tmp_path / "site" / place).is_file() for place in data["pictures"].values())
    assert not list((tmp_path / "site").rglob("*key*")) and (tmp_path / "site.key.json").is_file()


def test_the_folder_may_be_the_one_where_one_is(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    main(["make", *map(str, runs), "--out", "."])
    assert (tmp_path / "here" / "index.html").is_file() and (tmp_path / "here.key.json").is_file()
    with pytest.raises(SystemExit, match="error: / has no name"):
        main(["make", *map(str, runs), "--out", "/"])


def test_a_seed_makes_the_same_study_and_no_seed_another(runs: list[Path], tmp_path: Path) -> None:
    again = [
        make(tmp_path / f"{name}.html", *runs, "--items", 3, *seed)[1]
        for name, seed in {"a": ["--seed", 7], "b": ["--seed", 7], "c": [], "d": []}.items()
    ]
    assert again[0] == again[1] and again[2]["study"] != again[3]["study"]
    assert [len(one["comparisons"]) for one in again] == [3, 3, 3, 3]


def test_the_key_of_another_study_is_never_replaced(runs: list[Path], tmp_path: Path) -> None:
    """Raters may be answering it."""
    out = tmp_path / "study.html"
    _, first, key = make(out, *runs, "--seed", 7)
    page = out.read_text()
    with pytest.raises(SystemExit, match="is the key of another study: name another --out, or move it"):
        make(out, *runs)
    assert json.loads(key_path(out).read_text()) == key and out.read_text() == page
    assert make(out, *runs, "--seed", 7)[1] == first, "the same study may be written again"


def test_pairs_of_more_than_two_runs() -> None:
    runs, items = ["a", "b", "c"], [f"row-{number}" for number in range(7)]
    balanced = Counter(pair for _, pair in PAIRINGS["balanced"](items, runs))
    assert len(balanced) == 3 and sorted(balanced.values()) == [2, 2, 3]
    assert len(PAIRINGS["all"](items, runs)) == 21
    assert {pair for _, pair in PAIRINGS["first"](items, runs)} == {("a", "b"), ("a", "c")}


def test_rows_that_a_run_lacks_or_failed_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "a", [make_row("x", ["1"]), make_row("y", ["1"]), make_row("z", ["1"])])
    second = write_run(tmp_path / "b", [make_row("x", ["2"]), make_row("y", ["2"], error="no picture")])
    _, data, key = make(tmp_path / "study.html", first, second)
    assert [one["prompt"] for one in data["comparisons"]] == ["Story x"]
    assert key["left_out"] == {"missing": {"a": 0, "b": 1}, "failed": {"a": 0, "b": 1}}
    said = capsys.readouterr().out
    assert "1 rows that b lacks" in said and "1 rows that b failed at" in said


def test_runs_that_make_no_study_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [make_row("x", ["1"])])
    for name, rows, complaint in (
        ("other", [make_row("y", ["1"])], "none was finished by every run"),
        ("prompt", [make_row("x", ["1"], prompt="Else")], "row 'x' has another prompt"),
        ("twice", [make_row("x", ["1"])] * 2, "more than once"),
        ("empty", None, "no part-"),
    ):
        second = write_run(tmp_path / name, rows) if rows else tmp_path / name
        second.mkdir(exist_ok=True)
        with pytest.raises(SystemExit, match=complaint):
            make(tmp_path / "study.html", first, second)
    for words, complaint in (
        ([first], "at least two"),
        ([first, first], "2 runs are called 'a'"),
        ([first, tmp_path / "nowhere"], "nowhere cannot be read"),
    ):
        with pytest.raises(SystemExit, match=complaint):
            make(tmp_path / "study.html", *words)
    assert not (tmp_path / "study.html").exists()
    assert make(tmp_path / "study.html", f"one={first}", f"two={first}")[2]["runs"] == ["one", "two"]


def test_a_page_that_would_be_too_large_is_refused(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt5.evaluation.study.page.MAX_BYTES", 1000)
    with pytest.raises(SystemExit, match="lower --items or --picture-px"):
        make(tmp_path / "study.html", *runs)
    make(tmp_path / "site", *runs)
