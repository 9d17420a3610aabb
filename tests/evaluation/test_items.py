"""Items of published benchmarks: small ones in the forms of their repositories, and answers in those forms."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minigpt5.errors import InvalidRequest
from minigpt5.evaluation.protocols.interleave import golden_pattern
from minigpt5.evaluation.protocols.items import file_name, parse_items, steps_in, submit, to_row
from tests.helpers.fakes import make_png

OPENING = {
    "total_uid": "0302005",
    "meta_task_id": "3",
    "meta_task_name": "Multimodal Content Completion",
    "subtask_id": "2",
    "subtask_name": "Multimodal Report Completion",
    "data_id": "5",
    "conversations": [
        {
            "input": [
                {"image": "./images/Report/5-i-1.png", "text": "<BEGIN> Complete this <image> report."},
                {"image": None, "text": "Be short."},
            ]
        },
        {"output": [{"image": "./images/Report/5-o-1.png", "text": "First. <image>"}, {"image": None, "text": "End."}]},
    ],
}
MMIE = {
    "id": "7",
    "question": [{"text": "What comes next?", "image": "images/0.png"}, {"text": None, "image": "images/1.png"}],
    "gt_answer": [{"text": "A fox.", "image": None}],
}
ISG = {
    "id": "0000",
    "Category": "Prediction",
    "Query": [
        {"type": "text", "content": "Show two pictures."},
        {"type": "image", "content": "images/0000_q1.png"},
    ],
    "Golden": [
        {"type": "text", "content": "The hands are clean."},
        {"type": "image", "content": "images/0000_g1.png"},
        {"type": "image", "content": "images/0000_g2.png"},
    ],
    "predict": {"structural": {"Answer": ["<gen_text1>", "<gen_img1>", "<gen_img2>"]}},
}
INTERLEAVEDBENCH = {
    "id": 3,
    "task_name": "report_generation",
    "goal": "Report on a bridge",
    "category": [],
    "dataset_id": "",
    "image": ["report/3_0.png", "report/3_1.png"],
    "conversations": [
        {"from": "human", "value": "<BEGIN> Write a report. <image>. It goes on: <image>"},
        {"from": "gpt", "value": "The bridge is old. <image>"},
    ],
}
RED = Image.new("RGB", (6, 4), "red")


def told(row: dict[str, Any]) -> list[str]:
    return [segment["text"] or "#" for segment in row["segments"]]


def one_row(item: dict[str, Any]) -> dict[str, Any]:
    (found,) = parse_items(json.dumps([item]).encode(), name="items.json")
    return to_row(found, lambda place: make_png())


def test_opening_items_have_pictures_where_their_texts_say() -> None:
    row = one_row(OPENING)
    assert (row["id"], row["source"], row["kind"]) == ("0302005", "opening", "question")
    assert told(row) == ["Complete this", "#", "report.", "Be short."]
    assert golden_pattern(row) == ("text", "picture", "text")


def test_mmie_items_have_a_picture_after_its_text() -> None:
    row = one_row(MMIE)
    assert (row["source"], told(row), golden_pattern(row)) == ("mmie", ["What comes next?", "#", "#"], ("text",))
    assert golden_pattern(one_row({key: value for key, value in MMIE.items() if key != "gt_answer"})) == ()


def test_two_items_of_one_id_are_refused_with_their_places() -> None:
    data = json.dumps([MMIE, ISG, MMIE | {"question": [{"text": "And then?", "image": None}]}]).encode()
    with pytest.raises(InvalidRequest, match="items 1 and 3 of data.json both have the id '7': give each its own"):
        parse_items(data, name="data.json")


def test_isg_items_are_typed_parts() -> None:
    row = one_row(ISG)
    assert (row["source"], told(row)) == ("isg", ["Show two pictures.", "#"])
    assert golden_pattern(row) == ("text", "picture", "picture")


def test_interleavedbench_items_have_the_next_picture_wherever_they_say() -> None:
    row = one_row(INTERLEAVEDBENCH)
    assert (row["source"], told(row)) == ("interleavedbench", ["Write a report.", "#", ". It goes on:", "#"])
    assert golden_pattern(row) == ("text", "picture")
    first, second = parse_items(json.dumps([INTERLEAVEDBENCH] * 2).encode(), name="x.json")
    assert (first.id, second.id) == ("0", "1"), "items are named by their places"
    assert [part.picture for part in first.asked if part.picture] == [
        "zipped_images/report/3_0.png",
        "zipped_images/report/3_1.png",
    ]
    unanswered = {**INTERLEAVEDBENCH, "conversations": INTERLEAVEDBENCH["conversations"][:1]}  # type: ignore[index]
    assert golden_pattern(one_row(unanswered)) == ()


def test_line_separators_within_texts_end_no_line() -> None:
    items = [{**MMIE, "question": [{"text": "One\u2028two\u0085three\x1c", "image": None}]}]
    data = "\n".join(json.dumps(item, ensure_ascii=False) for item in items).encode()
    assert told(to_row(parse_items(data, name="x.jsonl")[0], lambda place: b"")) == ["One\u2028two\u0085three"]


def test_an_empty_text_is_no_part() -> None:
    row = one_row({**ISG, "Golden": [{"type": "text", "content": ""}, *ISG["Golden"]]})  # type: ignore[misc]
    assert golden_pattern(row) == ("text", "picture", "picture")


def test_json_lines_and_lists_are_read_alike() -> None:
    items = [OPENING, MMIE, ISG]
    lines = "\n".join(json.dumps(item) for item in items) + "\n\n"
    assert [one.id for one in parse_items(lines.encode(), name="a.jsonl")] == ["0302005", "7", "0000"]
    assert parse_items(lines.encode(), name="a.jsonl") == parse_items(json.dumps(items).encode(), name="a.json")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{broken", "neither a JSON list nor JSON lines"),
        (b"\xff\xfe", "neither a JSON list nor JSON lines"),
        (b"", "has no items"),
        (b'[{"id": "1"}]', "item 1 of x.json is not of the form of opening, mmie, isg, interleavedbench"),
        (b'[{"id": "1", "question": []}]', "0 parts asked"),
        (b'[{"id": "1", "Query": [{"type": "video", "content": "a"}]}]', "type 'video'"),
        (b'[{"id": "1", "Query": [{"type": "image", "content": ""}]}]', "a picture without a place"),
        (b'[{"image": [], "conversations": [{"value": "<image> a"}]}]', "more <image> than pictures"),
        (b'[["id"]]', "item 1"),
    ],
)
def test_a_damaged_file_is_refused_and_the_item_named(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        parse_items(data, name="x.json")


def test_a_picture_that_is_not_there_is_named() -> None:
    def read(place: str) -> bytes:
        raise FileNotFoundError("no such file")

    (item,) = parse_items(json.dumps([MMIE]).encode(), name="x.json")
    with pytest.raises(InvalidRequest, match="images/0.png cannot be read"):
        to_row(item, read)


# Answers


def test_parts_become_steps() -> None:
    steps = steps_in(("a", "b", RED, RED, "c"))
    assert [(text, picture is not None) for text, picture in steps] == [("a b", True), ("", True), ("c", False)]


def test_an_opening_answer_is_a_file_with_its_pictures_beside_it() -> None:
    made = submit("opening", "0302005", OPENING, ("One.", RED, "Two."), model="ours")
    assert made.file == "0302005.json" and list(made.pictures) == ["0302005-o-0.jpg"]
    assert made.entry["conversations"][1]["output"] == [
        {"text": "One.", "image": "0302005-o-0.jpg"},
        {"text": "Two.", "image": None},
    ]
    assert made.entry["conversations"][0] == OPENING["conversations"][0] and made.entry["total_uid"] == "0302005"
    assert OPENING["conversations"][1]["output"][0]["text"] == "First. <image>", "the item is not changed"  # type: ignore[index]
    with Image.open(io.BytesIO(made.pictures["0302005-o-0.jpg"])) as picture:
        assert (picture.format, picture.size) == ("JPEG", (6, 4))


def test_an_mmie_answer_names_the_model() -> None:
    made = submit("mmie", "7", MMIE, ("One.", RED), model="ours")
    assert made.file == "" and made.entry["model"] == "ours" and made.entry["gt_answer"] == MMIE["gt_answer"]
    assert made.entry["answer"] == [{"text": "One.", "image": None}, {"text": None, "image": "images/7-1.png"}]
    assert list(made.pictures) == ["images/7-1.png"]


def test_an_interleavedbench_answer_is_named_by_its_place() -> None:
    made = submit("interleavedbench", "0", INTERLEAVEDBENCH, ("One.", RED), model="ours")
    assert made.file == "" and made.entry["task_name"] == "report_generation"
    assert made.entry["answer"] == [{"text": "One.", "image": None}, {"text": None, "image": "images/0-1.png"}]


def test_an_isg_answer_is_its_output() -> None:
    made = submit("isg", "0000", ISG, ("One.", RED), model="ours")
    assert made.entry["output"] == [
        {"type": "text", "content": "One."},
        {"type": "image", "content": "images/0000-1.png"},
    ]
    assert made.entry["Golden"] == ISG["Golden"], "ISG-eval.py reads Query and Golden beside it"


def test_an_id_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    made = submit("mmie", "../../evil", MMIE, (RED,), model="ours")
    (name,) = made.pictures
    assert (tmp_path / name).resolve().is_relative_to(tmp_path) and ".." not in name
    assert file_name("a-1_B") == "a-1_B" and file_name("ü") != "ü" and len(file_name("x" * 200)) == 32
