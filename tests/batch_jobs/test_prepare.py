"""Real dataset_readers -> training rows: nothing is lost, what is broken is in the rejects with its reason."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from batch_jobs import dataset_readers
from batch_jobs import prepare as module
from batch_jobs.dataset_readers import DATASET_READERS, Source, read_items, storybook_item
from batch_jobs.prepare import Part, main, plan, runs_of, write_part, write_run
from batch_jobs.wml import macros_in, stories_in
from minigpt5.errors import StorageError
from minigpt5.objective import stored_example
from minigpt5.objective.stored_example import MAX_STORED_PIXELS, BadRow, Item, Segment, check_picture, to_row
from minigpt5.pictures import open_picture
from minigpt5.storybook.dialogues import dialogue_at
from tests.helpers.fakes import make_png
from tests.helpers.picture_files import png_header

PNG = make_png()


def jpeg(size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "orange").save(file, "JPEG", **options)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def rows_of(layout: str, source: Path, output: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows, and the reasons of rejects by id, without Ray."""
    names = DATASET_READERS[layout].files(Source(str(source)))
    for number, name in enumerate(names):
        part = Part(number=number, file=name, start=0, count=10_000)
        write_part(part, layout=layout, uri=str(source), output=str(output), seed=1)
    rows = [row for path in sorted((output / "rows").glob("*")) for row in parquet.read_table(path).to_pylist()]
    rejects = [row for path in sorted((output / "rejects").glob("*")) for row in parquet.read_table(path).to_pylist()]
    return rows, {reject["id"]: reject["reason"] for reject in rejects}


def told(row: dict[str, Any]) -> list[str]:
    """Texts, and "#" for a picture."""
    return [segment["text"] or "#" for segment in row["segments"]]


def test_cc3m_rows_and_what_is_wrong_with_the_others(tmp_path: Path) -> None:
    lines = [
        "caption\timage_path",
        "A Red fox: in the (snow)!\ttrain/0.jpg",
        "cut off\ttrain/1.jpg",
        "gone\ttrain/2.jpg",
        "...\ttrain/0.jpg",
        "a bomb\ttrain/3.png",
        "no tab",
        "up and away\t../secret.jpg",
    ]
    files = {
        "c.tsv": "\n".join(lines),
        "train/0.jpg": jpeg(),
        "train/1.jpg": jpeg()[:-200],
        "train/3.png": png_header(60_000, 60_000),
    }
    source = write(tmp_path / "in", files)  # type: ignore[arg-type]
    rows, reasons = rows_of("cc3m", source, tmp_path / "out")
    assert [told(row) for row in rows] == [["a red fox in the snow", "#"]]
    assert rows[0]["kind"] == "caption" and rows[0]["segments"][1]["caption"] == "a red fox in the snow"
    assert rows[0]["segments"][1]["picture"] == jpeg()
    assert reasons["train/1.jpg"].startswith("bad picture: train/1.jpg is a JPEG file that is damaged")
    assert reasons["train/2.jpg"] == "missing file: train/2.jpg"
    assert reasons["train/0.jpg:5"] == "empty text"
    assert "must have at most 33554432 pixels" in reasons["train/3.png"]
    assert reasons["c.tsv:7"] == "1 columns, not 2"
    assert "leads out of" in reasons["../secret.jpg"]


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def read_tar(folder: Path, content: bytes, name: str = "a.tar") -> tuple[list[list[str]], dict[str, str]]:
    rows, reasons = rows_of("cc3m-tar", write(folder / "in", {name: content}), folder / "out")
    return [told(row) for row in rows], reasons


def test_a_webdataset_of_captions(tmp_path: Path) -> None:
    content = tar_of(
        {
            "0.jpg": jpeg(),
            "0.txt": b"A fox.",
            "1.json": b'{"caption": "An owl"}',
            "1.png": PNG,
            "2.txt": b"no picture",
            "3.jpg": jpeg(),
        }
    )
    rows, reasons = read_tar(tmp_path, content)
    assert rows == [["a fox", "#"], ["an owl", "#"]]
    assert "no picture" in reasons["a.tar:2"] and "no caption" in reasons["a.tar:3"]


def test_a_key_of_a_webdataset_ends_at_the_first_dot_of_the_base_name(tmp_path: Path) -> None:
    members = {
        "1.input.jpg": jpeg(),
        "1.output.txt": b"A fox.",
        "v1.2/2.JPG": jpeg(),
        "v1.2/2.mask.png": PNG,
        "v1.2/2.txt": codecs.BOM_UTF8 + b"An owl.",
        "v1.2/2.cls": b"7",
        "3.left.jpg": jpeg(),
        "3.right.jpg": jpeg(),
        "3.txt": b"Two cats.",
        "README": b"no part of a sample",
        "._4.jpg": b"what macOS adds",
    }
    rows, reasons = read_tar(tmp_path, tar_of(members))
    assert rows == [["a fox", "#"], ["an owl", "#"]]
    assert reasons == {"a.tar:3": "several parts: left.jpg, right.jpg have this key; leave one"}


CAPTIONS = tar_of({f"{n}.{suffix}": data for n in range(3) for suffix, data in (("jpg", jpeg()), ("txt", b"A fox."))})
SAMPLE_BYTES = 512 + -(-len(jpeg()) // 512) * 512 + 512 + 512
"""Two headers, the picture and the text, each filled up to whole blocks."""


@pytest.mark.parametrize(
    ("end", "whole", "place"),
    [
        (SAMPLE_BYTES + 100, 1, SAMPLE_BYTES),  # in a header
        (SAMPLE_BYTES + 512, 1, SAMPLE_BYTES),  # behind a header
        (SAMPLE_BYTES + 700, 1, SAMPLE_BYTES),  # in a picture
        (2 * SAMPLE_BYTES - 510, 1, 2 * SAMPLE_BYTES - 1024),  # in a text
        (2 * SAMPLE_BYTES - 1024, 1, 2 * SAMPLE_BYTES - 1024),  # between a picture and its text
        (2 * SAMPLE_BYTES, 2, 2 * SAMPLE_BYTES),  # between two samples
        (3 * SAMPLE_BYTES, 3, 3 * SAMPLE_BYTES),  # before the end mark
        (0, 0, 0),
    ],
)
@pytest.mark.parametrize("is_packed", [False, True], ids=["tar", "tar.gz"])
def test_a_tar_that_ends_early_gives_its_whole_samples_and_names_the_byte(
    tmp_path: Path, end: int, whole: int, place: int, is_packed: bool
) -> None:
    name = "a.tar.gz" if is_packed else "a.tar"
    content = gzip.compress(CAPTIONS[:end]) if is_packed else CAPTIONS[:end]
    rows, reasons = read_tar(tmp_path, content, name)
    assert rows == [["a fox", "#"]] * whole
    assert list(reasons) == [name]
    assert reasons[name].startswith(f"damaged file: {name} is whole up to byte {place} and no further (")


def test_a_gzip_of_a_tar_that_ends_early_gives_its_whole_samples(tmp_path: Path) -> None:
    pictures = {f"{n}.{suffix}": data for n in range(9) for suffix, data in (("jpg", noise(n)), ("txt", b"A fox."))}
    packed = gzip.compress(tar_of(pictures))
    rows, reasons = read_tar(tmp_path, packed[: len(packed) // 2], "a.tgz")
    assert 1 <= len(rows) < 9
    assert list(reasons) == ["a.tgz"] and "before the end-of-stream marker" in reasons["a.tgz"]


def noise(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def test_a_damaged_header_in_a_tar_is_named_and_not_the_end(tmp_path: Path) -> None:
    damaged = CAPTIONS[:SAMPLE_BYTES] + b"x" * 512 + CAPTIONS[SAMPLE_BYTES + 512 :]
    rows, reasons = read_tar(tmp_path, damaged)
    assert rows == [["a fox", "#"]]
    assert reasons["a.tar"].startswith(f"damaged file: a.tar is whole up to byte {SAMPLE_BYTES} and no further")


def test_a_second_archive_behind_the_end_of_a_tar_is_named(tmp_path: Path) -> None:
    rows, reasons = read_tar(tmp_path, CAPTIONS + CAPTIONS)
    assert rows == [["a fox", "#"]] * 3
    assert "there is more behind its end" in reasons["a.tar"]


def test_a_tar_is_not_read_into_memory_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_jobs.webdataset.MAX_PART_BYTES", 2000)
    large = {"0.jpg": jpeg() + b"x" * 2000, "0.txt": b"A fox.", "1.jpg": jpeg(), "1.txt": b"An owl."}
    rows, reasons = read_tar(tmp_path, tar_of(large))
    assert rows == [["an owl", "#"]]
    assert reasons == {"a.tar:0": f"too large: jpg has {len(jpeg()) + 2000} bytes"}


def pairs(names: list[str], picture: bytes) -> bytes:
    return tar_of(
        {f"{name}.{suffix}": data for name in names for suffix, data in (("jpg", picture), ("txt", b"A fox."))}
    )


def test_names_with_a_dot_before_the_number_are_one_short_reject_in_bounded_memory(tmp_path: Path) -> None:
    names = [f"v1.0_{number:06d}" for number in range(1000)]
    source = Source(str(write(tmp_path, {"a.tar": pairs(names, b"\xff\xd8" + b"x" * 20_000)})))
    tracemalloc.start()
    (item,) = read_items("cc3m-tar", source, "a.tar")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert item.id == "a.tar:v1" and item.problem.startswith("too many parts: 2000 have this key")
    assert "a key ends at the first dot" in item.problem and len(item.problem) < 300
    assert peak_bytes < 12e6  # the file has 21 MB


def test_the_pictures_of_a_key_have_a_bounded_size_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_readers, "MAX_KEY_BYTES", 2 * len(jpeg()))
    members = {"0.jpg": jpeg(), "0.txt": b"A fox.", "0.a.jpg": jpeg(), "1.jpg": jpeg(), "1.txt": b"An owl."}
    rows, reasons = read_tar(tmp_path, tar_of(members))
    assert rows == [["an owl", "#"]]
    assert reasons["a.tar:0"].startswith("too large: the parts of this key have ")


def test_a_reason_is_short_however_long_a_name_is(tmp_path: Path) -> None:
    members = {f"1.{letter * 5000}.jpg": jpeg() for letter in "ab"} | {"1.txt": b"A fox."}
    _, reasons = read_tar(tmp_path, tar_of(members))
    (reason,) = reasons.values()
    assert reason.startswith("several parts: aaa") and len(reason) == dataset_readers.MAX_PROBLEM


ROW = json.dumps({"id": "s1", "caption": "A fox", "picture": "1.png"})
TALK = json.dumps(
    {
        "conversation_id": "t1",
        "conversation": [
            {"turn": [{"__TEXT__": "Hi"}]},
            {"turn": [{"__TEXT__": "Look"}, {"__MEDIA__": "a"}]},
            {"turn": [{"__TEXT__": "Nice"}]},
        ],
    }
)
CFG = """[story]
[part]
story="a"
background=story/1.png
[/part]
[/story]"""
SOURCES: dict[str, tuple[str, str, dict[str, bytes | str]]] = {
    "cc3m": ("c.tsv", "caption\timage_path\nA fox\t1.png\n", {"1.png": PNG}),
    "folder": ("story.jsonl", ROW, {"1.png": PNG}),
    "mmdialog": ("talks.jsonl", TALK, {"a.jpg": jpeg()}),
    "tuxpaint": ("fox.txt", "A fox", {"fox.png": PNG}),
    "wesnoth": ("a/1.cfg", CFG, {"a/images/story/1.png": PNG}),
    "vist": (
        "a_cleaned.json",
        json.dumps({"7": [{"caption": "One.", "image_id": "1", "sequence_index": 0}]}),
        {"a_image_mapping.json": '\ufeff{"1": "1.png"}', "1.png": PNG},
    ),
}


@pytest.mark.parametrize("layout", SOURCES)
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, layout: str) -> None:
    name, text, others = SOURCES[layout]
    rows, reasons = rows_of(layout, write(tmp_path / "marked", {name: "\ufeff" + text, **others}), tmp_path / "1")
    plain, none = rows_of(layout, write(tmp_path / "plain", {name: text, **others}), tmp_path / "2")
    assert len(rows) == 1 and rows == plain and reasons == none == {}


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
@pytest.mark.parametrize("layout", SOURCES)
def test_utf_16_is_named_and_not_read_as_noise(tmp_path: Path, layout: str, encoding: str) -> None:
    name, text, others = SOURCES[layout]
    source = write(tmp_path / "in", {name: text.encode(encoding), **others})
    rows, reasons = rows_of(layout, source, tmp_path / "out")
    assert not rows
    (reason,) = reasons.values()
    assert reason.startswith("damaged file: ") and f"{name} is in {encoding}: save it in UTF-8" in reason


@pytest.mark.parametrize("layout", ["cc3m", "folder", "mmdialog"])
def test_a_gzipped_source_that_ends_early_gives_the_rows_before(tmp_path: Path, layout: str) -> None:
    name, text, others = SOURCES[layout]
    packed = gzip.compress(text.encode())
    rows, reasons = rows_of(layout, write(tmp_path / "whole", {f"{name}.gz": packed, **others}), tmp_path / "1")
    assert len(rows) == 1 and not reasons
    noise_lines = "\n".join(str(number) for number in np.random.default_rng(0).integers(0, 2**62, 2000))
    packed = gzip.compress(f"{text.rstrip()}\n{noise_lines}".encode())[:-1000]
    rows, reasons = rows_of(layout, write(tmp_path / "cut", {f"{name}.gz": packed, **others}), tmp_path / "2")
    assert len(rows) == 1 and len(reasons) > 100
    assert reasons[f"{name}.gz"].startswith(f"damaged file: {name}.gz ends early, after line ")


def test_lines_of_another_encoding_are_rejects(tmp_path: Path) -> None:
    text = "caption\timage_path\nein Bär\t1.png\nein Fuchs\t1.png\n".encode("latin-1")
    rows, reasons = rows_of("cc3m", write(tmp_path / "in", {"c.tsv": text, "1.png": PNG}), tmp_path / "out")
    assert [told(row) for row in rows] == [["ein fuchs", "#"]]
    assert reasons == {"c.tsv:2": "it is not UTF-8: save the file in UTF-8"}


def test_half_a_surrogate_pair_and_deep_json_are_rejects(tmp_path: Path) -> None:
    lines = ['{"id": "\\ud83e", "caption": "a \\ud83e", "picture": "1.png"}', "[" * 100_000, ROW]
    source = write(tmp_path / "in", {"story.jsonl": "\n".join(lines), "1.png": PNG})
    rows, reasons = rows_of("folder", source, tmp_path / "out")
    assert [row["id"] for row in rows] == ["s1"]
    assert reasons == {
        "?": "half of a surrogate pair: write it as UTF-8",
        "story.jsonl:2": "not a row: it is nested too deeply",
    }


def test_broken_vist_files_and_stories_are_rejects(tmp_path: Path) -> None:
    step = {"caption": "One.", "image_id": "1", "sequence_index": 0}
    files: dict[str, bytes | str] = {
        "a_cleaned.json": json.dumps({"1": [step], "2": [{"caption": "x"}], "3": None}),
        "a_image_mapping.json": '{"1": "1.png"}',
        "b_cleaned.json": "{}",
        "c_cleaned.json": "[" * 100_000,
        "d_cleaned.json": "[]",
        "d_image_mapping.json": "{}",
        "1.png": PNG,
    }
    rows, reasons = rows_of("vist", write(tmp_path / "in", files), tmp_path / "out")
    assert [row["id"] for row in rows] == ["1"]
    assert reasons["2"].startswith("not a story: KeyError") and reasons["3"].startswith("not a story: TypeError")
    assert "has no b_image_mapping.json beside it" in reasons["b_cleaned.json"]
    assert "is not JSON: it is nested too deeply" in reasons["c_cleaned.json"]
    assert "must each hold a JSON object" in reasons["d_cleaned.json"]


def test_vist_stories_are_in_sequence(tmp_path: Path) -> None:
    steps = [{"caption": f"Step {n}.", "image_id": str(n), "sequence_index": n} for n in (2, 0, 1)]
    files = {
        "train_cleaned.json": json.dumps({"7": steps, "8": [{**steps[0], "image_id": "9"}]}),
        "train_image_mapping.json": json.dumps({str(n): f"images/{n}.png" for n in range(3)}),
        **{f"images/{n}.png": PNG for n in range(3)},
    }
    rows, reasons = rows_of("vist", write(tmp_path / "in", files), tmp_path / "out")  # type: ignore[arg-type]
    assert [told(row) for row in rows] == [["Step 0.", "#", "Step 1.", "#", "Step 2.", "#"]]
    assert reasons == {"8": "missing file: image 9 is not in the mapping"}


def test_mmdialog_is_cut_where_it_cannot_be_learnt(tmp_path: Path) -> None:
    def turn(text: str, media: str = "") -> dict[str, Any]:
        return {"turn": [{"__TEXT__": text}, *([{"__MEDIA__": media}] if media else [])]}

    talks = {
        "1": [turn("Hi"), turn("Look", "a"), turn("Nice"), turn("", "a"), turn("late")],
        "2": [turn("Hi"), turn("word " * 51)],
        "3": [turn("Hi"), turn("Look", "gone")],
    }
    lines = [json.dumps({"conversation_id": key, "conversation": value}) for key, value in talks.items()]
    files = {"train/conversations.jsonl": "\n".join([*lines, "not json", "[]"]), "train/a.jpg": jpeg()}
    rows, reasons = rows_of("mmdialog", write(tmp_path / "in", files), tmp_path / "out")  # type: ignore[arg-type]
    assert [told(row) for row in rows] == [["Hi", "Look", "#", "Nice"]]
    assert [segment["speaker"] for segment in rows[0]["segments"]] == ["Human", "Assistant", None, "Human"]
    assert reasons["2"] == "no picture" and reasons["3"] == "missing file: train/gone.jpg"
    assert sum("not a conversation" in reason for reason in reasons.values()) == 2


def test_tux_paint_stamps(tmp_path: Path) -> None:
    glass = io.BytesIO()
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(glass, "PNG")
    files = {
        "animals/fox.png": glass.getvalue(),
        "animals/fox.txt": "A red fox.\nde.utf8=Ein Fuchs.",
        "animals/fox_mirror.png": PNG,
        "food/plum.png": PNG,
    }
    rows, reasons = rows_of("tuxpaint", write(tmp_path / "in", files), tmp_path / "out")  # type: ignore[arg-type]
    assert [told(row) for row in rows] == [["A red fox.", "#"]]
    assert open_picture(rows[0]["segments"][1]["picture"]).getpixel((3, 3)) == (255, 255, 255)
    assert reasons == {"food/plum.png": "missing file: food/plum.txt"}


def test_a_stamp_that_is_a_drawing_says_what_it_needs_wherever_it_lies(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"food/pear.svg": "<svg/>", "food/pear.txt": "A pear.", "plants/elm.png": PNG}
    files |= {"plants/elm.txt": "An elm."}
    source = write(tmp_path / "in", files)
    rows, reasons = rows_of("tuxpaint", source, tmp_path / "out")
    assert [told(row) for row in rows] == [["An elm.", "#"]]
    assert list(reasons) == ["food/pear.svg"] and "put a food/pear.png beside it" in reasons["food/pear.svg"]
    write(source, {"food/pear.png": PNG})
    rows, reasons = rows_of("tuxpaint", source, tmp_path / "out2")
    assert [told(row) for row in rows] == [["A pear.", "#"], ["An elm.", "#"]] and not reasons


def test_wesnoth_campaigns(tmp_path: Path) -> None:
    config = """
[scenario]
    [story]
        [part]
            show_title=yes
            story= _ "In the year <i>350</i> there was a ""great"" storm."
            background=story/storm.jpg
        [/part]
        [part]
            story= _ "The ships sailed" + _ " far away."
            [background_layer]
                image=maps/none.png
            [/background_layer]
        [/part]
        [part]
            background=story/storm.jpg
        [/part]
    [/story]
[/scenario]
"""
    files = {
        "campaigns/Rise/scenarios/01.cfg": config,
        "campaigns/Rise/images/story/storm.jpg": jpeg(),
        "campaigns/Rise/scenarios/02.cfg": config.replace("story/storm.jpg", "story/gone.jpg"),
        "campaigns/Rise/scenarios/03.cfg": config.replace("background=story/storm.jpg", ""),
    }
    rows, reasons = rows_of("wesnoth", write(tmp_path / "in", files), tmp_path / "out")  # type: ignore[arg-type]
    assert [told(row) for row in rows] == [
        ['In the year 350 there was a "great" storm.', "#", "The ships sailed far away."]
    ]
    assert reasons.pop("campaigns/Rise/scenarios/02.cfg#0").startswith("missing file: story/gone.jpg is in no images/")
    assert reasons == {"campaigns/Rise/scenarios/03.cfg#0": "no picture"}


def test_wesnoth_paintings_and_pages_in_macros(tmp_path: Path) -> None:
    macros = """
#define PAINTED IMAGE # wmllint: ignore
    [background_layer]
        image=story/{IMAGE}
    [/background_layer]
#enddef
#define SAYS WHO WORDS
    [part]
        story={CAPTION {WHO}} + {WORDS}
        {PAINTED storm.jpg}
    [/part]
#enddef
#define GREY: WORDS
    story=<span color='{GREY}'> + {WORDS} + </span> # wmllint: ignore
#enddef
"""
    config = """
[story]
    {SAYS (_ "Ada II") (_ "It is (so) dark.")}
    # {SAYS (_ "Nobody") (_ "Not said.")}
#ifdef MULTIPLAYER
    {SAYS _"Crowd" _"Nor this."}
#else
    {SAYS _"Ada" _"We are alone."}
#endif
    [part]
        {GREY: _"A grey "} # a "comment" at the end
        {UNKNOWN 1 2}
        {PAINTED storm.jpg}
    [/part]
    [part]
        [if]
            {CONDITION}
            [then]
                story=_ "One"+
                      _ "word."
            [/then]
            [else]
                story=_ "Another."
            [/else]
        [/if]
    [/part]
[/story]
"""
    files = {
        "Rise/_main.cfg": "",
        "Rise/utils/macros.cfg": macros,
        "Rise/scenarios/01.cfg": config,
        "Rise/images/story/storm.jpg": jpeg(),
        "Fall/_main.cfg": "",
        "Fall/utils/macros.cfg": macros.replace("story/", "maps/"),  # of another campaign
    }
    rows, reasons = rows_of("wesnoth", write(tmp_path / "in", files), tmp_path / "out")  # type: ignore[arg-type]
    said = ["Ada II: It is (so) dark.", "#", "Ada: We are alone.", "#", "A grey", "#", "Oneword."]
    assert [told(row) for row in rows] == [said] and not reasons


def test_a_wesnoth_page_shows_its_painting_and_not_what_lies_over_it() -> None:
    text = """
[story]
    [part]
        story=a
        background="misc/blank.png~SCALE(9,9)~BLIT(story/Green Isle.jpg,6,0)"
        [image]
            file=story/title.png
        [/image]
    [/part]
    [part]
        story=_ "b"
        [background_layer]
            image=story/black-background.png
        [/background_layer]
        [image]
            file=icons/coin.png~CROP(4,4,50,50)
        [/image]
        [image]
            file=portraits/ada.png~FL()
        [/image]
    [/part]
[/story]
"""
    (pages,) = stories_in(text, {})
    assert [page.text for page in pages] == ["a", "b"]
    assert [page.paintings for page in pages] == [("story/Green Isle.jpg", "story/title.png"), ("portraits/ada.png",)]


def test_a_wesnoth_macro_that_stands_for_itself_ends() -> None:
    text = '#define LOOP\n{LOOP}{LOOP}{\n#enddef\n[story][part]story="x" {LOOP}[/part][/story]'
    assert [[page.text for page in pages] for pages in stories_in(text, macros_in(text))] == [["x"]]


def test_a_users_own_folder(tmp_path: Path) -> None:
    shown = {"text": "Ho", "picture": "p/1.png"}
    own = [
        {"id": "s1", "pages": [{"text": "One.", "picture": "p/1.png", "caption": "a fox"}, {"text": "Two."}]},
        {"caption": "A fox", "picture": "p/1.png"},
        {"id": "d1", "turns": [{"speaker": "Human", "text": "Hi"}, {"speaker": "Assistant", **shown}]},
        {"id": "bad", "pages": [{"text": "One.", "picture": "p/9.png"}]},
        {"id": "odd", "pages": [{"words": "One."}]},
        {"id": "who", "turns": [{"speaker": "Fox", **shown}, {"speaker": "Human", "text": "Hi"}]},
        {"id": "more", "colour": 1},
    ]
    files = {"mine/story.jsonl": "\n".join(map(json.dumps, own)) + "\n{", "mine/p/1.png": PNG}
    rows, reasons = rows_of("folder", write(tmp_path / "in", files), tmp_path / "out")  # type: ignore[arg-type]
    assert [(row["id"], row["kind"], told(row)) for row in rows] == [
        ("s1", "story", ["One.", "#", "Two."]),
        ("mine/story.jsonl:2", "caption", ["A fox", "#"]),
        ("d1", "dialogue", ["Hi", "Ho", "#"]),
    ]
    assert rows[0]["segments"][1]["caption"] == "a fox"
    assert reasons["bad"] == "missing file: mine/p/9.png"
    assert reasons["odd"] == "not a row: missing 'text'"
    assert reasons["who"] == "turn 1 is Fox's but must be Human's"
    assert "colour is not a field" in reasons["more"] and "not a row" in reasons["mine/story.jsonl:8"]


@pytest.mark.parametrize("kind", ["caption", "story", "dialogue"])
def test_the_picture_world(kind: str) -> None:
    items = [storybook_item(kind, index, 5) for index in range(40)]
    rows = []
    for item in items:
        try:
            rows.append(to_row(item, source="storybook", read=lambda name: b""))
        except BadRow as reason:
            assert kind == "dialogue" and str(reason) == "no picture"  # a talk that calls for none
    assert len(rows) >= 25 and {row["kind"] for row in rows} == {kind}
    assert storybook_item(kind, 3, 5) == items[3]
    if kind == "dialogue":
        lengths = {len(dialogue_at(index, seed=5)) for index in range(200)}
        assert lengths == {4, 6, 8} and all("#" in told(row) for row in rows)


def test_pictures_are_stored_as_they_are_and_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_picture(PNG, name="p") == PNG
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = jpeg((40, 30), exif=exif)
    assert check_picture(turned, name="p") == turned  # training sets it upright when it reads the row
    large = Image.open(io.BytesIO(check_picture(jpeg((3000, 1500), exif=exif), name="p")))
    assert large.format == "JPEG" and not large.getexif()
    assert large.height == pytest.approx(2 * large.width, abs=2)
    assert 0.99 * MAX_STORED_PIXELS < large.width * large.height <= MAX_STORED_PIXELS
    monkeypatch.setattr(stored_example, "MAX_STORED_BYTES", len(turned) - 1)
    smaller = check_picture(turned, name="p")
    assert smaller.startswith(b"\x89PNG") and open_picture(smaller).tobytes() == open_picture(turned).tobytes()
    for data in (b"", b"GIF89a", PNG[:40], png_header(60_000, 60_000), b"<svg/>"):
        with pytest.raises(BadRow):
            check_picture(data, name="p")


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ((), "empty text"),
        ((Segment(text="a"),), "no picture"),
        ((Segment(picture=PNG), Segment(text="a")), "begins with a picture"),
        ((Segment(text="a"), Segment(picture=PNG), Segment(picture=PNG)), "two pictures"),
        ((Segment(text="a" * 5000), Segment(picture=PNG)), "5000 characters"),
        ((Segment(text="a"), Segment(picture=PNG)) * 65, "130 segments"),
    ],
)
def test_a_row_has_a_form(segments: tuple[Segment, ...], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        to_row(Item(id="x", kind="story", segments=segments), source="s", read=lambda name: PNG)


def tsv(paths: list[str]) -> str:
    return "".join(f"caption number {number}\t{path}\n" for number, path in enumerate(paths))


def test_captions_of_one_picture_are_rows_of_their_own(tmp_path: Path) -> None:
    """COCO has five captions of each picture."""
    source = write(tmp_path / "in", {"c.tsv": tsv(["1.png", "2.png", *["1.png"] * 4]), "1.png": PNG, "2.png": PNG})
    rows, reasons = rows_of("cc3m", source, tmp_path / "out")
    assert [row["id"] for row in rows] == ["1.png", "2.png", "1.png:3", "1.png:4", "1.png:5", "1.png:6"]
    assert not reasons


def test_captions_of_one_picture_have_other_ids_in_other_parts(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"c.tsv": tsv(["1.png"] * 4), "1.png": PNG})
    halves = [Part(number=number, file="c.tsv", start=2 * number, count=2) for number in (0, 1)]
    for part in reversed(halves):
        write_part(part, layout="cc3m", uri=str(source), output=str(tmp_path / "out"), seed=1)
    assert ids_in(tmp_path / "out") == ["1.png", "1.png:2", "1.png:3", "1.png:4"]


def test_paths_of_captions_are_known_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_readers, "KEPT_PATHS", 4)
    known = dataset_readers._Paths()
    for path in "abcd":
        assert not known.has(path)
    for path in "efghijklmnopqrstuvwxyz":
        assert known.has("a") and not known.has(path)
        assert len(known._newer) + len(known._older) <= 8
    assert not known.has("b")


def test_an_id_that_is_null_is_missing(tmp_path: Path) -> None:
    lines = [json.dumps({"id": None, "caption": f"fox {number}", "picture": "1.png"}) for number in range(3)]
    rows, reasons = rows_of("folder", write(tmp_path / "in", {"story.jsonl": "\n".join(lines), "1.png": PNG}), tmp_path)
    assert [row["id"] for row in rows] == ["story.jsonl:1", "story.jsonl:2", "story.jsonl:3"] and not reasons
    talk = json.dumps({**json.loads(TALK), "conversation_id": None})
    source = write(tmp_path / "talks", {"t.jsonl": f"{talk}\n{talk}\n", "a.jpg": jpeg()})
    rows, reasons = rows_of("mmdialog", source, tmp_path / "out")
    assert [row["id"] for row in rows] == ["t.jsonl:1", "t.jsonl:2"] and not reasons


def ids_in(output: Path) -> list[str]:
    return [row for path in sorted((output / "rows").iterdir()) for row in parquet.read_table(path)["id"].to_pylist()]


class Here:
    """What the job uses of a Ray dataset, in this process."""

    def __init__(self, rows: list[dict[str, Any]], **_: Any) -> None:
        self.rows = rows

    def map(self, work: Callable[[dict[str, Any]], dict[str, Any]]) -> Here:
        return Here([work(row) for row in self.rows])

    def take_all(self) -> list[dict[str, Any]]:
        return self.rows

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray.data, "from_items", Here)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(module, "connect", lambda num_engines: None)


def book(source: Path, name: str, count: int) -> None:
    lines = [json.dumps({"id": f"{name}-{n}", "caption": f"fox {n}", "picture": "1.png"}) for n in range(count)]
    write(source / name, {"story.jsonl": "\n".join(lines), "1.png": PNG})


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda source: book(source, "a", 4), "(a/story.jsonl is new)"),
        (lambda source: (source / "b" / "story.jsonl").unlink(), "(b/story.jsonl is gone)"),
        (lambda source: book(source, "c", 3), "(c/story.jsonl had 2 items, and has 3)"),
        (lambda source: book(source, "c/", 2), "(c/story.jsonl had 107 bytes, and has 109)"),
    ],
)
def test_a_source_that_has_changed_is_refused_and_nothing_is_lost(
    change: Callable[[Path], object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    book(source, "b", 3)
    book(source, "c", 2)
    command = ["folder", str(source), "--output", str(output)]
    assert main(command) == main(command) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    change(source)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert words in error and "name another --output" in error and error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert main(["folder", str(source), "--output", str(tmp_path / "another")]) == 0


def as_earlier(output: Path) -> None:
    """Write the plan as version 0.2.0 did."""
    noted = json.loads((output / "plan.json").read_text())
    del noted["files"]
    (output / "plan.json").write_text(json.dumps({**noted, "format": 3}))


@pytest.mark.usefixtures("without_ray")
def test_an_output_of_an_earlier_version_goes_on_where_that_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PART_ITEMS", 2)
    source, output = tmp_path / "in", tmp_path / "out"
    book(source, "b", 3)
    book(source, "c", 2)
    command = ["folder", str(source), "--output", str(output)]
    assert main(command) == 0
    noted, ids = json.loads((output / "plan.json").read_text()), ids_in(output)
    assert noted["format"] == 4 and noted["files"]["c/story.jsonl"]["items"] == 2
    for kind, suffix in (("rows", "parquet"), ("parts", "json")):
        (output / kind / f"part-000001.{suffix}").unlink()
    as_earlier(output)
    assert main(command) == 0
    assert ids_in(output) == ids and json.loads((output / "plan.json").read_text()) == noted
    as_earlier(output)
    book(source, "d", 1)
    assert main(command) == 2
    assert "d/story.jsonl is newer" in capsys.readouterr().err
    book(source, "a", 1)
    assert main(command) == 2
    assert "part-000000 has 2 items, not 1" in capsys.readouterr().err


@pytest.mark.usefixtures("without_ray")
def test_an_output_of_an_earlier_version_that_rejected_captions_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write(tmp_path / "in", {"c.tsv": tsv(["1.png"] * 2), "1.png": PNG}), tmp_path / "out"
    command = ["cc3m", str(source), "--output", str(output)]
    assert main(command) == 0
    done = output / "parts" / "part-000000.json"
    counts = {**json.loads(done.read_text()), "rows": 1, "rejects": 1, "reasons": {"a second row with this id": 1}}
    done.write_text(json.dumps(counts))
    as_earlier(output)
    assert main(command) == 2
    assert "rejected rows that repeat an id: name another --output" in capsys.readouterr().err


@pytest.mark.usefixtures("without_ray")
def test_the_same_rows_come_in_the_same_parts_however_they_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_ITEMS", 3)
    files: dict[str, bytes | str] = {f"{name}.tsv": tsv([f"{n}.png" for n in range(size)]) for name, size in SIZES}
    source = write(tmp_path / "in", {**files, **{f"{n}.png": PNG for n in range(20)}})
    assert main(["cc3m", str(source), "--limit", "33", "--output", str(tmp_path / "out")]) == 0
    sizes = {f"{name}.tsv": size for name, size in SIZES}
    for part in plan(sizes, limit=33):
        write_part(part, layout="cc3m", uri=str(source), output=str(tmp_path / "single"), seed=1)
    for kind in ("rows", "rejects", "parts"):
        found = {path.name: path.read_bytes() for path in (tmp_path / "out" / kind).glob("*")}
        assert found == {path.name: path.read_bytes() for path in (tmp_path / "single" / kind).glob("*")}
    assert len(ids_in(tmp_path / "out")) == 32  # one picture of b is not there


SIZES = (("a", 7), ("b", 21), ("c", 8))


@pytest.mark.parametrize("num_done", [0, 1, 4])
def test_a_run_reads_its_file_once_and_what_is_written_not_at_all(
    num_done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_ITEMS", 5)
    names = [f"{number}.png" for number in range(20)]
    source = write(tmp_path / "in", {"c.tsv": tsv(names), **dict.fromkeys(names, PNG)})
    how = {"layout": "cc3m", "uri": str(source), "output": str(tmp_path / "out"), "seed": 1}
    parts = plan({"c.tsv": 20}, limit=None)
    for part in parts[:num_done]:
        write_part(part, **how)  # type: ignore[arg-type]
    read: list[str] = []

    def counted(*arguments: Any) -> Iterator[Item]:
        for item in read_items(*arguments):
            read.append(item.id)
            yield item

    monkeypatch.setattr(module, "read_items", counted)
    assert [counts["rows"] for counts in write_run(parts, **how)] == [5, 5, 5, 5]  # type: ignore[arg-type]
    assert len(read) == (20 if num_done < 4 else 0)


def test_runs_share_out_large_files_and_read_none_of_them_often() -> None:
    parts = plan({"a": 3_300_000, "b": 1, "c": 2_500}, limit=None)
    for num_tasks, expected in ((1, 1), (8, 8), (1000, 16)):
        runs = runs_of(parts, num_tasks=num_tasks)
        assert [part for run in runs for part in run] == parts
        assert all(len({part.file for part in run}) == 1 for run in runs)
        assert sum(run[0].file == "a" for run in runs) == expected


@pytest.mark.cluster
@pytest.mark.slow
def test_the_job_on_ray_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setattr(module, "PART_ITEMS", 8)
    lines = ["caption\timage_path", *(f"fox number {n}\t{n}.png" for n in range(20))]
    files: dict[str, bytes | str] = {"c.tsv": "\n".join(lines), **{f"{n}.png": PNG for n in range(19)}}
    source, output = write(tmp_path / "in", files), tmp_path / "out"
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    try:
        assert main(["cc3m", str(source / "c.tsv"), "--output", str(output)]) == 0
        assert "19 rows with 19 pictures" in capsys.readouterr().out
        manifest = json.loads((output / "manifest.json").read_text())
        assert (manifest["rows"], manifest["rejects"], manifest["reasons"]) == (19, 1, {"missing file": 1})
        before = {path: path.stat().st_mtime_ns for path in (output / "rows").iterdir()}
        lost = sorted(before)[1]
        lost.unlink()
        (output / "parts" / f"{lost.stem}.json").unlink()
        assert main(["cc3m", str(source / "c.tsv"), "--output", str(output)]) == 0
        again = {path: path.stat().st_mtime_ns for path in (output / "rows").iterdir()}
        assert {path for path in again if again[path] != before[path]} == {lost}
        assert json.loads((output / "manifest.json").read_text()) == manifest
        assert main(["vist", str(source), "--output", str(output)]) == 2
        assert "holds another data set (layout, source differ)" in capsys.readouterr().err
        assert main(["vist", str(source), "--output", str(tmp_path / "o2")]) == 2
        assert "nothing of layout vist" in capsys.readouterr().err
        assert main(["storybook:story", "--limit", "12", "--output", str(tmp_path / "stories")]) == 0
        assert "12 rows" in capsys.readouterr().out
        (source / "empty.tsv").touch()
        assert main(["cc3m", str(source / "empty.tsv"), "--output", str(tmp_path / "o3")]) == 2
        assert "its files of layout cc3m have no rows" in capsys.readouterr().err
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject"), StorageError),
        (OSError(5, "Input/output error"), StorageError),
        (PermissionError(13, "denied"), BadRow),
        (OSError("AWS Error ACCESS_DENIED during HeadObject"), BadRow),
        (OSError(36, "File name too long"), BadRow),
    ],
)
def test_only_what_no_time_mends_becomes_a_reject(failure: OSError, outcome: type[Exception]) -> None:
    def read(name: str) -> bytes:
        raise failure

    segments = (Segment(text="a fox"), Segment(picture="fox.png", caption="a fox"))
    with pytest.raises(outcome, match=r"fox\.png"):
        to_row(Item(id="x", kind="story", segments=segments), source="s", read=read)


def test_a_limit_is_a_number_from_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["storybook:caption", "--limit", "-2", "--output", str(tmp_path / "rows")])
    assert "-2 but must be 1 or more" in capsys.readouterr().err and not (tmp_path / "rows").exists()
