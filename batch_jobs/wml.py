"""Campaign files of Battle for Wesnoth -> the pages of their stories, in order. dataset_readers.py finds the files.

WML is `[tag]`s that hold `key=value` lines, after a preprocessor: `#define NAME PARAMETERS ... #enddef` makes a macro,
`{NAME ARGUMENTS}` is what it stands for. Most campaigns keep their paintings, and some whole pages, in macros.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Macro:
    parameters: tuple[str, ...]
    body: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """A [part] of a story.

    Example: Page(text="The ships sailed.", paintings=("story/ships.jpg",))
    """

    text: str
    paintings: tuple[str, ...]
    """What is drawn over one another, places below an images/ folder: a full page before what stands on it."""


@dataclass(kw_only=True)
class _Tag:
    name: str
    values: dict[str, str] = field(default_factory=dict)
    tags: list[_Tag] = field(default_factory=list)


CAPTION = Macro(parameters=("SPEAKER",), body='{SPEAKER} + ": "')
"""The game's own shows who speaks as a heading, which would run into the words."""

_DEFINE = re.compile(r"^[ \t]*#define[ \t]+(\S+)([^\n]*)\n(.*?)#enddef", re.S | re.M)
_STRING = r'"(?:[^"]|"")*"'
_COMMENT = re.compile(rf"({_STRING})|#[^\n]*")
_CONDITION = re.compile(r"^[ \t]*#if(n?)(?:def|have|ver)\b[^\n]*\n((?:(?!^[ \t]*#if).)*?)^[ \t]*#endif", re.S | re.M)
_ELSE = re.compile(r"^[ \t]*#else\b[^\n]*", re.M)
_CALL_ENDS = re.compile(rf"{_STRING}|[{{}}]")
_WORD_PIECE = re.compile(rf"{_STRING}|\s+|[(){{}}]|[^\s\"(){{}}]+")
_STORY = re.compile(r"\[story\](.*?)\[/story\]", re.S)
_TOKEN = re.compile(
    rf"\[(?P<end>/?)\+?(?P<tag>\w+)\]|(?:^|(?<=\]))[ \t]*(?P<key>\w[\w,]*)[ \t]*="
    rf"|_?[ \t]*(?P<string>{_STRING})|(?P<bare>[^\s\"\[\]+]+)",
    re.M,
)
_MARKUP = re.compile(r"<[^>]+>")
# Maps, icons and effects lie elsewhere; a painting may stand inside a function, as in blank.png~BLIT(story/a.jpg,0,0).
_PAINTING = re.compile(r"(?:[\w.-]+/)*(?:story|portraits)/[\w./' -]+?\.(?:png|jpe?g|webp)", re.I)
_BACKDROP = "black-background"


def macros_in(text: str) -> dict[str, Macro]:
    """The macros that a file defines, by name."""
    found = {}
    for name, parameters, body in _DEFINE.findall(text):
        words = parameters.partition("#")[0].split()
        found[name] = Macro(parameters=tuple(words), body=_without_comments(body))
    return found


def stories_in(text: str, macros: Mapping[str, Macro]) -> Iterator[list[Page]]:
    """The pages of each [story] of a file. A macro that is not known stands for nothing."""
    known = {**macros, "CAPTION": CAPTION}
    for block in _STORY.findall(text):
        yield [_page(part) for part in _parts(_parse(_expand(_without_comments(block), known)))]


def _without_comments(text: str) -> str:
    """Also without what only other settings (difficulties, many players) show."""
    while (shorter := _CONDITION.sub(_of_condition, text)) != text:
        text = shorter
    return _COMMENT.sub(lambda match: match.group(1) or "", text)


def _of_condition(match: re.Match[str]) -> str:
    where, otherwise = [*_ELSE.split(match.group(2), maxsplit=1), ""][:2]
    return where if match.group(1) else otherwise


def _expand(text: str, macros: Mapping[str, Macro]) -> str:
    out, at = [], 0
    while (start := text.find("{", at)) >= 0 and (end := _end_of_call(text, start)) > 0:
        out.append(text[at:start])
        at = end
        name, *arguments = _words(text[start + 1 : end - 1]) or [""]
        if macro := macros.get(name):
            given = [Macro(parameters=(), body=_expand(argument, macros)) for argument in arguments]
            inside = {key: known for key, known in macros.items() if key != name}  # else one in itself has no end
            out.append(_expand(macro.body, inside | dict(zip(macro.parameters, given, strict=False))))
    return "".join([*out, text[at:]])


def _words(call: str) -> list[str]:
    """A call's name and arguments: what is in quotes, in braces or in (parentheses, which are taken off) is one."""
    words, word, num_open = [], "", 0
    for piece in [*_WORD_PIECE.findall(call), " "]:
        if piece.isspace() and not num_open:
            words += [word[1:-1] if word.startswith("(") else word] if word else []
            word = ""
        else:
            num_open += {"(": 1, "{": 1, ")": -1, "}": -1}.get(piece, 0)
            word += piece
    return words


def _end_of_call(text: str, start: int) -> int:
    """Behind the } that belongs to the { at `start`; 0 where there is none."""
    open_calls = 0
    for match in _CALL_ENDS.finditer(text, start):
        open_calls += {"{": 1, "}": -1}.get(match.group(), 0)
        if not open_calls:
            return match.end()
    return 0


def _parse(text: str) -> _Tag:
    root = _Tag(name="story")
    path, key = [root], ""
    strings: list[str] = []
    bare: list[str] = []

    def end_value() -> None:
        if key:
            path[-1].values[key] = "".join(strings) or " ".join(bare)
        strings.clear()
        bare.clear()

    for token in _TOKEN.finditer(text):
        if token["string"] is not None:
            strings.append(token["string"][1:-1].replace('""', '"'))
        elif token["bare"] is not None:
            bare.append(token["bare"])
        else:
            end_value()
            key = token["key"] or ""
            if token["tag"] and not token["end"]:
                path[-1].tags.append(_Tag(name=token["tag"]))
                path.append(path[-1].tags[-1])
            elif token["end"] and len(path) > 1:
                path.pop()
    end_value()
    return root


def _parts(tag: _Tag) -> Iterator[_Tag]:
    """In order. What a condition of the game decides is told as if it were so."""
    for below in tag.tags:
        if below.name == "part":
            yield below
        elif below.name != "else":
            yield from _parts(below)


def _page(part: _Tag) -> Page:
    drawn = [part.values.get("background", "")]
    drawn += [tag.values.get("image", "") for tag in reversed(part.tags) if tag.name == "background_layer"]
    drawn += [tag.values.get("file", "") for tag in reversed(part.tags) if tag.name == "image"]
    choices = [tag for tag in part.tags if tag.name == "if"]
    said = [part.values, *(tag.values for choice in choices for tag in choice.tags if tag.name == "then")]
    words = next((values["story"] for values in said if "story" in values), "")
    paintings = [name for value in drawn for name in _PAINTING.findall(value) if _BACKDROP not in name]
    return Page(text=" ".join(_MARKUP.sub("", words).split()), paintings=tuple(paintings))
