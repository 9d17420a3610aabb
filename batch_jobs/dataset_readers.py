"""Readers of published data sets, and of a user's own -> items: what each row is, and where its pictures lie.

cc3m        a TSV of `caption<TAB>image_path`, paths relative to it
cc3m-tar    webdataset tar files: for each key a picture and a .txt or .json with its caption; a key is a member's
            name up to the first dot
vist        <split>_cleaned.json with <split>_image_mapping.json beside it: stories in sequence
mmdialog    JSON lines of conversations, pictures <media id>.jpg in the same folder
tuxpaint    a folder of stamps: <name>.png with <name>.txt, whose first line is the English caption; a <name>.svg
            needs its picture as <name>.png beside it
wesnoth     a folder of campaigns: [story] [part] blocks of .cfg files, with their paintings; a map is none
storybook   the picture world: `storybook:caption`, `storybook:story` or `storybook:dialogue`, as many as --limit says
folder      story.jsonl and pictures, a user's own: see docs/training.md

Tar, TSV and JSON lines files may be gzipped. A file that ends early gives the rows before its end, and a reject.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from pyarrow import fs

from batch_jobs.text_files import CUT, Line, check_utf8, open_text, parse_json, read_lines, unpack
from batch_jobs.webdataset import Part, only, read_parts
from batch_jobs.wml import Macro, macros_in, stories_in
from minigpt5.errors import InvalidRequest, StorageError
from minigpt5.objective.stored_example import SPEAKERS, Item, Kind, Segment, as_unicode
from minigpt5.published.data import MAX_TURN_TOKENS, clean_caption
from minigpt5.storage import open_place
from minigpt5.storybook.captions import Facts, canonical_caption, draw_facts, write_caption
from minigpt5.storybook.dialogues import dialogue_at
from minigpt5.storybook.scenes import Scene, draw_scene, scene_at
from minigpt5.storybook.stories import story_at

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PROBLEM = 500
"""Characters of the reason why an item cannot be a row."""
MAX_KEY_PARTS = 128
MAX_KEY_BYTES = 2**27
"""What is read of one key of a tar file: members, and bytes of its pictures and captions together."""
KEPT_PATHS = 2**19
"""A path of cc3m that comes again is known by at least so many different paths before it."""


class Source:
    """A folder or a file, wherever it is, and what lies beside it."""

    def __init__(self, uri: str) -> None:
        """Raises InvalidRequest where there is nothing."""
        self.uri = uri
        self._files, self._path = open_place(uri)
        kind = self._files.get_file_info(self._path).type
        if kind == fs.FileType.NotFound:
            raise InvalidRequest("source", f"source is {uri}, and there is nothing: name a file or a folder")
        self.is_file = kind == fs.FileType.File
        self._folder = self._path.rpartition("/")[0] if self.is_file else self._path

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    def names(self, *suffixes: str) -> list[str]:
        """Files below, relative to the folder, in order; of a single file its own name."""
        if self.is_file:
            return [self.name]
        found = self._files.get_file_info(fs.FileSelector(self._folder, recursive=True))
        names = [info.path[len(self._folder) :].lstrip("/") for info in found if info.is_file]
        return sorted(name for name in names if name.lower().endswith(suffixes))

    def infos(self, names: list[str]) -> list[fs.FileInfo]:
        """What the file system says of files, or of the folder itself by the name ""."""
        return self._files.get_file_info([f"{self._folder}/{name}".rstrip("/") for name in names])

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError; ValueError where the name leads out of the folder."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> Any:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name} leads out of {self._folder}")
        return self._files.open_input_file(f"{self._folder}/{name}")

    def lines(self, name: str) -> Iterator[Line]:
        """Raises StorageError where it is in UTF-16 or UTF-32, or ends early."""
        with self.open(name) as file:
            yield from read_lines(file, name=name)

    def parts(self, name: str) -> Iterator[Part]:
        """Of a tar file. Raises StorageError where it ends early or is damaged."""
        with self.open(name) as file:
            yield from read_parts(unpack(file), name=name, suffixes=(*PICTURE_SUFFIXES, ".txt", ".json"))

    def text(self, name: str) -> str:
        """Raises StorageError where it is no text in UTF-8."""
        try:
            with self.open(name) as file:
                return check_utf8(open_text(file, name=name).read())
        except (ValueError, *CUT) as error:
            raise StorageError(f"{name} cannot be read: {error}") from error

    def json(self, name: str) -> Any:
        """Raises StorageError where it is no JSON."""
        try:
            return parse_json(self.text(name))
        except ValueError as error:
            raise StorageError(f"{name} is not JSON: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`files` lists what is read by itself; `items` reads one of them, in order."""

    files: Callable[[Source], list[str]]
    items: Callable[[Source, str], Iterator[Item]]


def read_items(layout: str, source: Source, name: str) -> Iterator[Item]:
    """The items of one file. A file that is cut, damaged or no UTF-8 ends with an item whose problem says so."""
    try:
        for item in DATASET_READERS[layout].items(source, name):
            yield replace(item, id=as_unicode(item.id), problem=_shortened(item.problem))
    except StorageError as problem:
        yield Item(id=name, kind="caption", segments=(), problem=_shortened(f"damaged file: {problem}"))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_PROBLEM else f"{text[: MAX_PROBLEM - 3]}..."


def picture(where: bytes | str, caption: str = "") -> Segment:
    return Segment(picture=where, caption=caption)


# CC3M


def _cc3m(source: Source, name: str) -> Iterator[Item]:
    known = _Paths()
    for line in source.lines(name):
        row = f"{name}:{line.number}"
        try:
            fields = line.text.split("\t")
            if line.number == 1 and fields == ["caption", "image_path"]:
                continue
            if len(fields) != 2:
                raise ValueError(f"{len(fields)} columns, not 2")
        except ValueError as problem:
            yield Item(id=row, kind="caption", segments=(), problem=str(problem))
            continue
        caption = clean_caption(fields[0])
        path = fields[1]
        row = f"{path}:{line.number}" if known.has(path) else path
        yield Item(id=row, kind="caption", segments=(Segment(text=caption), picture(path, caption)))


class _Paths:
    """Paths that came before: the last KEPT_PATHS of them, and up to twice as many, by their hashes."""

    def __init__(self) -> None:
        self._newer, self._older = set[int](), set[int]()

    def has(self, path: str) -> bool:
        """Whether a path came before. It is known from then on."""
        key = hash(path)
        if key in self._newer:
            return True
        is_known = key in self._older
        if len(self._newer) >= KEPT_PATHS:
            self._newer, self._older = set(), self._newer
        self._newer.add(key)
        return is_known


@dataclass(kw_only=True)
class _Sample:
    """The members of one key of a tar file; without them where they are too many or too large."""

    key: str
    parts: list[Part] = field(default_factory=list)
    num_parts: int = 0
    size_bytes: int = 0

    def add(self, part: Part) -> None:
        self.num_parts += 1
        self.size_bytes += len(part.data or b"")
        self.parts.append(part)
        if self.problem:
            self.parts.clear()

    @property
    def problem(self) -> str:
        if self.num_parts > MAX_KEY_PARTS:
            return (
                f"too many parts: {self.num_parts} have this key, at most {MAX_KEY_PARTS} are taken; a key ends at the "
                "first dot of a name, so rename files that have a dot before it, such as v1.0_1.jpg"
            )
        if self.size_bytes > MAX_KEY_BYTES:
            return f"too large: the parts of this key have {self.size_bytes} bytes, at most {MAX_KEY_BYTES} are taken"
        return ""

    def to_item(self, name: str) -> Item:
        if self.problem:
            return Item(id=f"{name}:{self.key}", kind="caption", segments=(), problem=self.problem)
        return _tar_item(f"{name}:{self.key}", self.parts)


def _cc3m_tar(source: Source, name: str) -> Iterator[Item]:
    sample = _Sample(key="")
    try:
        for part in source.parts(name):
            if part.key != sample.key:
                if sample.num_parts:
                    yield sample.to_item(name)
                sample = _Sample(key=part.key)
            sample.add(part)
    except StorageError:
        last = sample.to_item(name)
        if not last.problem:
            yield last
        raise
    if sample.num_parts:
        yield sample.to_item(name)


def _tar_item(name: str, parts: list[Part]) -> Item:
    try:
        words = only(parts, (".txt",)) or only(parts, (".json",))
        if words is None:
            raise ValueError("no caption in .txt or .json")
        shown = only(parts, PICTURE_SUFFIXES)
        if shown is None:
            raise ValueError("missing file: no picture with this key")
        too_large = next((part for part in (words, shown) if part.data is None), None)
        if too_large:
            raise ValueError(f"too large: {too_large.extension} has {too_large.size_bytes} bytes")
        assert words.data is not None
        text = open_text(io.BytesIO(words.data), name=words.extension).read()
        caption = check_utf8(text) if words.suffix == ".txt" else parse_json(text)["caption"]
        if not isinstance(caption, str):
            raise ValueError("no caption in .txt or .json")
    except (ValueError, StorageError) as problem:
        return Item(id=name, kind="caption", segments=(), problem=str(problem))
    except (KeyError, TypeError, *CUT):
        return Item(id=name, kind="caption", segments=(), problem="no caption in .txt or .json")
    caption = clean_caption(caption)
    return Item(id=name, kind="caption", segments=(Segment(text=caption), picture(shown.data or b"", caption)))


# Stories


def _vist_files(source: Source) -> list[str]:
    return [name for name in source.names("_cleaned.json") if name.endswith("_cleaned.json")]


def _vist(source: Source, name: str) -> Iterator[Item]:
    mapping = name.replace("_cleaned.json", "_image_mapping.json")
    stories = source.json(name)
    try:
        paths = source.json(mapping)
    except FileNotFoundError:
        raise StorageError(f"{name} has no {mapping} beside it") from None
    if not isinstance(stories, dict) or not isinstance(paths, dict):
        raise StorageError(f"{name} and {mapping} must each hold a JSON object")
    for story_id, steps in stories.items():
        segments: list[Segment] = []
        problem = ""
        try:
            for step in sorted(steps, key=lambda step: int(step["sequence_index"])):
                where = str(paths.get(str(step["image_id"])) or "")
                problem = problem or ("" if where else f"missing file: image {step['image_id']} is not in the mapping")
                segments += [Segment(text=str(step["caption"])), picture(where)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"not a story: {type(error).__name__}: {error}"
        yield Item(id=str(story_id), kind="story", segments=tuple(segments), problem=problem)


def _wesnoth(source: Source, name: str) -> Iterator[Item]:
    text = source.text(name)
    if "[story]" not in text:
        return
    macros = {**_macros_of(source.uri, _campaign_of(source, name)), **macros_in(text)}
    for number, pages in enumerate(stories_in(text, macros)):
        segments: list[Segment] = []
        problem = ""
        for page in pages:
            if not page.text:
                continue
            segments.append(Segment(text=page.text))
            if page.paintings:
                where = next(filter(None, (_find_painting(source, name, one) for one in page.paintings)), "")
                missing = f"missing file: {page.paintings[0]} is in no images/; the game's own are in data/core"
                problem = problem or ("" if where else missing)
                segments.append(picture(where))
        if segments:
            yield Item(id=f"{name}#{number}", kind="story", segments=tuple(segments), problem=problem)


def _campaign_of(source: Source, name: str) -> str:
    """The nearest folder above that has a _main.cfg, else the file's own."""
    folders = [str(folder) for folder in PurePosixPath(name).parents]
    found = (folder for folder in folders if str(PurePosixPath(folder) / "_main.cfg") in _names_of(source.uri))
    return next(found, folders[0])


@lru_cache(maxsize=32)
def _macros_of(uri: str, folder: str) -> dict[str, Macro]:
    source = Source(uri)
    macros: dict[str, Macro] = {}
    for name in sorted(_names_of(uri)):
        if name.lower().endswith(".cfg") and PurePosixPath(name).is_relative_to(folder):
            macros.update(macros_in(source.text(name)))
    return macros


def _find_painting(source: Source, name: str, painting: str) -> str | None:
    """A campaign's paintings lie in its own images/, or in those that all share."""
    parts = PurePosixPath(name).parts
    roots = ["/".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]
    for root in roots:
        for folder in ("images", "data/core/images"):
            where = "/".join(piece for piece in (root, folder, painting) if piece)
            if where in _names_of(source.uri):
                return where
    return None


@lru_cache(maxsize=1)
def _names_of(uri: str) -> frozenset[str]:
    return frozenset(Source(uri).names(".cfg", *PICTURE_SUFFIXES))


# Dialogues


def _mmdialog(source: Source, name: str) -> Iterator[Item]:
    folder = name.rpartition("/")[0]
    for line in source.lines(name):
        if not line.raw.strip():
            continue
        try:
            values = parse_json(line.text)
            turns = values["conversation"]
            given = values["conversation_id"]
            name_of_item = f"{name}:{line.number}" if given is None else str(given)
            segments: list[Segment] = []
            for index, turn in enumerate(turns):
                elements = turn["turn"]
                words = " ".join(str(one["__TEXT__"]) for one in elements if "__TEXT__" in one).strip()
                media = [str(one["__MEDIA__"]) for one in elements if "__MEDIA__" in one]
                # As published, a conversation is cut at its first turn that cannot be learnt.
                if not words or words.endswith(".jpg") or len(words.split()) > MAX_TURN_TOKENS:
                    break
                segments.append(Segment(text=words, speaker=SPEAKERS[index % 2]))
                segments += (
                    [picture("/".join(piece for piece in (folder, f"{media[0]}.jpg") if piece))] if media else []
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"not a conversation: {type(error).__name__}: {error}"
            yield Item(id=f"{name}:{line.number}", kind="dialogue", segments=(), problem=problem)
            continue
        yield Item(id=name_of_item, kind="dialogue", segments=tuple(segments))


# Captions of stamps


def _tuxpaint_files(source: Source) -> list[str]:
    """All stamps together: most of their folders hold a handful."""
    return [""] if source.names(".png", ".svg") else []


def _tuxpaint(source: Source, _all: str) -> Iterator[Item]:
    names = source.names(".png", ".svg", ".txt")
    known = set(names)
    for name in names:
        stem, _, suffix = name.rpartition(".")
        words = f"{stem}.txt"
        if suffix.lower() == "txt" or re.search(r"_(mirror|flip|mirror_flip)$", stem):
            continue
        if suffix.lower() == "svg":
            if f"{stem}.png" not in known:
                problem = f"a drawing (SVG) is not read: put a {stem}.png beside it (rsvg-convert, cairosvg)"
                yield Item(id=name, kind="caption", segments=(), problem=problem)
        elif words not in known:
            yield Item(id=name, kind="caption", segments=(), problem=f"missing file: {words}")
        else:
            caption, problem = "", ""
            try:
                caption = next((line.text.strip() for line in source.lines(words)), "")
            except (ValueError, StorageError) as error:
                problem = f"damaged file: {words}: {error}"
            segments = (Segment(text=caption), picture(name, caption))
            yield Item(id=name, kind="caption", segments=segments, problem=problem)


# A user's own


def _folder(source: Source, name: str) -> Iterator[Item]:
    folder = name.rpartition("/")[0]

    def place(value: object) -> str:
        return "/".join(piece for piece in (folder, str(value)) if piece)

    for line in source.lines(name):
        if not line.raw.strip():
            continue
        row = f"{name}:{line.number}"
        try:
            values = parse_json(line.text)
            if (given := values.get("id")) is not None:
                row = str(given)
            yield _own_row(row, values, place)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            words = f"missing {error}" if isinstance(error, KeyError) else str(error)
            yield Item(id=row, kind="story", segments=(), problem=f"not a row: {words}")


def _own_row(row: str, values: dict[str, Any], place: Callable[[object], str]) -> Item:
    known = {"pages", "turns", "caption", "picture", "id", "prompt"}
    if unknown := set(values) - known:
        raise ValueError(f"{min(unknown)} is not a field: pages, turns, or caption and picture are")
    kind: Kind
    if "pages" in values:
        kind, parts = "story", [(str(page["text"]), "", page) for page in values["pages"]]
    elif "turns" in values:
        kind = "dialogue"
        parts = [(str(turn["text"]), str(turn["speaker"]), turn) for turn in values["turns"]]
    else:
        kind, parts = "caption", [(str(values["caption"]), "", values)]
    segments: list[Segment] = []
    for words, speaker, part in parts:
        segments.append(Segment(text=words, speaker=speaker))
        if part.get("picture"):
            segments.append(picture(place(part["picture"]), str(part.get("caption", ""))))
    return Item(id=row, kind=kind, segments=tuple(segments), prompt=str(values.get("prompt", "")))


# The picture world


def storybook_item(kind: str, index: int, seed: int) -> Item:
    """Row number `index` of the picture world."""
    rng = np.random.default_rng([seed, index])
    name = f"{kind}-{seed}-{index}"
    if kind == "caption":
        scene = scene_at(index, seed=seed)
        facts = draw_facts(scene, rng)
        segments: list[Segment] = [Segment(text=write_caption(facts, rng)), _scene(scene, facts)]
        return Item(id=name, kind="caption", segments=tuple(segments))
    segments = []
    if kind == "story":
        story = story_at(index, seed=seed)
        for page in story.pages:
            segments += [Segment(text=page.text), _scene(page.scene, page.facts)]
        return Item(id=name, kind="story", segments=tuple(segments), prompt=story.prompt)
    for number, turn in enumerate(dialogue_at(index, seed=seed)):
        segments.append(Segment(text=turn.text, speaker=SPEAKERS[number % 2]))
        if turn.scene and turn.facts:
            segments.append(_scene(turn.scene, turn.facts))
    return Item(id=name, kind="dialogue", segments=tuple(segments))


def _scene(scene: Scene, facts: Facts) -> Segment:
    file = io.BytesIO()
    Image.fromarray(draw_scene(scene)).save(file, "PNG")
    return picture(file.getvalue(), canonical_caption(facts))


DATASET_READERS = {
    "cc3m": Layout(files=lambda source: source.names(".tsv", ".tsv.gz"), items=_cc3m),
    "cc3m-tar": Layout(files=lambda source: source.names(".tar", ".tar.gz", ".tgz"), items=_cc3m_tar),
    "vist": Layout(files=_vist_files, items=_vist),
    "mmdialog": Layout(files=lambda source: source.names(".jsonl", ".jsonl.gz", ".txt"), items=_mmdialog),
    "tuxpaint": Layout(files=_tuxpaint_files, items=_tuxpaint),
    "wesnoth": Layout(files=lambda source: source.names(".cfg"), items=_wesnoth),
    "folder": Layout(files=lambda source: source.names("story.jsonl", "story.jsonl.gz"), items=_folder),
}
STORYBOOK = ("caption", "story", "dialogue")
