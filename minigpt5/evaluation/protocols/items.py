"""Items of published benchmarks for interleaved answers -> rows, and answers -> the files that they are judged from.

The forms are those of the benchmarks' repositories:

    opening           LanceZPF/OpenING, OpenING-benchmark/test_data.jsonl; gen_outputs/MODEL_output/UID.json for answers
    mmie              Lillianwei-h/MMIE, README.md: data.json, questions and answers in one list
    isg               Dongping-Chen/ISG, readme.md: ISG-Bench.jsonl, and JSON lines with `output` for answers
    interleavedbench  mqliu/InterleavedBench, interleaved_bench.json as public loaders read it; answers are as MMIE's
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from minigpt5.errors import InvalidRequest
from minigpt5.evaluation.systems.face import AnswerPart

MAX_FILE_BYTES = 2**28
MAX_PARTS = 128
FORMS = ("opening", "mmie", "isg", "interleavedbench")
PICTURES = "zipped_images"
"""InterleavedBench's folder of pictures, beside its items."""


@dataclass(frozen=True, kw_only=True)
class ItemPart:
    """A text, or the place of a picture beside the file."""

    text: str = ""
    picture: str = ""


@dataclass(frozen=True, kw_only=True)
class Item:
    """An item; `golden` is the annotators' answer, empty where there is none."""

    id: str
    form: str
    asked: tuple[ItemPart, ...]
    golden: tuple[ItemPart, ...]
    raw: dict[str, Any]


def parse_items(data: bytes, *, name: str) -> list[Item]:
    """All items of a JSON list or of JSON lines. Raises InvalidRequest, which names the item."""
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest("data", f"{name} has more than {MAX_FILE_BYTES} bytes: split it")
    try:
        text = data.decode()
        if text.lstrip().startswith("["):
            values = json.loads(text)
        else:
            values = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise InvalidRequest("data", f"{name} is neither a JSON list nor JSON lines: {error}") from error
    items = []
    for number, value in enumerate(values, start=1):
        try:
            items.append(_parse(value, number))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InvalidRequest(
                "data", f"item {number} of {name} is not of the form of {', '.join(FORMS)} ({error!r}): correct it"
            ) from error
    if not items:
        raise InvalidRequest("data", f"{name} has no items")
    places: dict[str, int] = {}
    for number, item in enumerate(items, start=1):
        if (first := places.setdefault(item.id, number)) != number:
            twice = f"items {first} and {number} of {name} both have the id {item.id!r}"
            raise InvalidRequest("data", f"{twice}: give each its own")
    return items


def _parse(value: dict[str, Any], number: int) -> Item:
    if "conversations" in value and isinstance(value.get("image"), list):
        form, name = "interleavedbench", number - 1  # as public loaders name an item: its place
        question, *answers = [turn["value"] for turn in value["conversations"]]
        asked = list(_marked(question, iter(value["image"])))
        golden = list(_marked(answers[0], itertools.repeat("of the answer"))) if answers else []
    elif "conversations" in value:
        form, name = "opening", value["total_uid"]
        said, answer = value["conversations"][0]["input"], value["conversations"][1]["output"]
        asked, golden = list(_opening(said)), list(_opening(answer))
    elif "Query" in value:
        form, name = "isg", value["id"]
        asked, golden = list(_typed(value["Query"])), list(_typed(value.get("Golden") or []))
    else:
        form, name = "mmie", value["id"]
        asked, golden = list(_opening(value["question"])), list(_opening(value.get("gt_answer") or []))
    if not asked or max(len(asked), len(golden)) > MAX_PARTS:
        raise ValueError(f"{len(asked)} parts asked and {len(golden)} in the answer, at most {MAX_PARTS} are taken")
    return Item(id=str(name), form=form, asked=tuple(asked), golden=tuple(golden), raw=value)


def _marked(text: str, places: Iterator[Any]) -> Iterator[ItemPart]:
    """A text with the next picture wherever it says <image>."""
    for number, words in enumerate(text.replace("<BEGIN>", "").split("<image>")):
        if number:
            place = next(places, None)
            if not place:
                raise ValueError("more <image> than pictures")
            yield ItemPart(picture=f"{PICTURES}/{place}")
        if words.strip():
            yield ItemPart(text=words.strip())


def _opening(steps: list[dict[str, Any]]) -> Iterator[ItemPart]:
    """Texts, each with a picture after it or where it says <image>."""
    for step in steps:
        text, picture = str(step.get("text") or "").replace("<BEGIN>", ""), str(step.get("image") or "")
        before, _, after = text.partition("<image>")
        for words, place in ((before, picture), (after.replace("<image>", ""), "")):
            if words.strip():
                yield ItemPart(text=words.strip())
            if place:
                yield ItemPart(picture=place)


def _typed(parts: list[dict[str, Any]]) -> Iterator[ItemPart]:
    for part in parts:
        kind, content = part["type"], str(part["content"] or "")
        if kind not in ("text", "image"):
            raise ValueError(f"a part of type {kind!r}")
        if kind == "image" and not content:
            raise ValueError("a picture without a place")
        if content.strip():
            yield ItemPart(text=content) if kind == "text" else ItemPart(picture=content)


def to_row(item: Item, read: Callable[[str], bytes]) -> dict[str, Any]:
    """A row for protocols; `read` gives a picture by its place. Raises InvalidRequest where one is not there."""

    def load(place: str) -> bytes:
        try:
            return read(place)
        except (OSError, ValueError) as error:
            raise InvalidRequest(
                "picture", f"{place[:200]} cannot be read ({error}): put it beside the items"
            ) from error

    empty: dict[str, Any] = {"text": None, "speaker": None, "picture": None, "caption": None}

    def segment(part: ItemPart) -> dict[str, Any]:
        return {**empty, "picture": load(part.picture)} if part.picture else {**empty, "text": part.text}

    return {
        "id": item.id,
        "source": item.form,
        "kind": "question",
        "prompt": None,
        "segments": [segment(part) for part in item.asked],
        # Their pattern and texts are compared, not their pictures, which test sets may leave out.
        "golden": [{"text": None if part.picture else part.text} for part in item.golden],
        "item": json.dumps(item.raw),
    }


# Answers


def steps_in(answer: Sequence[AnswerPart]) -> list[tuple[str, Image.Image | None]]:
    """Parts -> steps of a text and the picture after it."""
    steps: list[tuple[str, Image.Image | None]] = []
    text = ""
    for part in answer:
        if isinstance(part, str):
            text = f"{text} {part}".strip()
        else:
            steps.append((text, part))
            text = ""
    return [*steps, (text, None)] if text else steps


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One item's answer in its benchmark's form."""

    entry: dict[str, Any]
    file: str
    """Of the entry alone; "": entries go into one file."""
    pictures: dict[str, bytes]


def submit(form: str, id: str, raw: dict[str, Any], answer: Sequence[AnswerPart], *, model: str) -> Submission:
    """An item's answer as the benchmark's own programs read it. Places of pictures are relative to the folder."""
    name, pictures = file_name(id), dict[str, bytes]()
    if form == "opening":
        steps: list[dict[str, str | None]] = []
        for number, (text, picture) in enumerate(steps_in(answer)):
            place = f"{name}-o-{number}.jpg"
            steps.append({"text": text, "image": place if picture else None})
            pictures |= {place: _encoded(picture, "JPEG")} if picture else {}
        entry = copy.deepcopy(raw)
        entry["conversations"][1]["output"] = steps
        return Submission(entry=entry, file=f"{name}.json", pictures=pictures)
    parts: list[dict[str, str]] = []
    for number, part in enumerate(answer):
        place = f"images/{name}-{number}.png"
        if isinstance(part, str):
            parts.append({"type": "text", "content": part})
        else:
            parts.append({"type": "image", "content": place})
            pictures[place] = _encoded(part, "PNG")
    if form == "isg":
        return Submission(entry={**raw, "output": parts}, file="", pictures=pictures)
    steps = [
        {
            "text": one["content"] if one["type"] == "text" else None,
            "image": one["content"] if one["type"] == "image" else None,
        }
        for one in parts
    ]
    return Submission(entry={**raw, "answer": steps, "model": model}, file="", pictures=pictures)


def file_name(name: str) -> str:
    """An id as part of a file's name: as it is where it is plain, else its hash."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name) else hashlib.sha256(name.encode()).hexdigest()[:32]


def _encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, quality=95)
    return file.getvalue()
