"""A row as one example, or where it is longer than what is read at once, a part of it.

The parts end where serving's windows move (minigpt5/model/window.py): every page is learnt after the tokens that
serving has before it, and in one part alone. The pages that a part begins with are read and not learnt.

A published task is read without its oldest pages where it would be too long. Last, texts are cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minigpt5.model.prompt import Segment, Template, text_segment
from minigpt5.model.window import Window
from minigpt5.types import WHOLE_PAGES, PromptPart

FindWindows = Callable[[Sequence[PromptPart], Sequence[str]], list[Window]]
"""The windows of all pages of a story, from its prompt and texts."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What of a story is one example."""

    segments: list[Segment]
    pages: tuple[int, ...]
    """Pages whose texts and pictures it has, from 1."""


def whole_or_part(
    prompt: Sequence[PromptPart],
    texts: Sequence[str],
    rng: np.random.Generator,
    *,
    template: Template,
    find_windows: FindWindows | None,
    ending: str = "",
) -> Part:
    """One of a story's parts, by chance; a story that is read whole has one. Without `find_windows` it is whole.
    `ending`: a text after the last picture, which counts as the last page's where windows move."""
    if find_windows is None:
        segments = template.story(prompt, len(texts), texts)
        return Part(segments=_end(segments, ending, template), pages=tuple(range(1, len(texts) + 1)))
    found = find_windows(prompt, [*texts[:-1], f"{texts[-1]} {ending}".strip()])
    begins = [found[0]] + [one for before, one in itertools.pairwise(found) if not one.goes_on_from(before)]
    chosen = int(rng.integers(len(begins))) if len(begins) > 1 else 0
    first = begins[chosen]
    end = begins[chosen + 1].page if chosen + 1 < len(begins) else len(texts) + 1
    pages = (*first.pages, *range(first.page, end))
    segments = template.story(prompt, first.num_pages, [texts[page - 1] for page in pages])
    if end > len(texts):
        segments = _end(segments, ending, template)
    return Part(segments=_only_read(segments, len(first.pages)), pages=pages)


def _end(segments: list[Segment], ending: str, template: Template) -> list[Segment]:
    """The segments of a story's last part, and its ending before what ends an answer."""
    if not ending:
        return segments
    told = text_segment(template.page(ending, begins_answer=False), is_target=True)
    return [*segments[:-1], told, segments[-1]]


def _only_read(segments: Sequence[Segment], num_pages: int) -> list[Segment]:
    """The segments, of which the first pages are not learnt."""
    read = []
    for segment in segments:
        if num_pages and segment.is_target:
            num_pages -= segment.kind == "draw"
            segment = replace(segment, is_target=False)
        read.append(segment)
    return read


def pages_of_a_task(
    prompt: Sequence[PromptPart], texts: Sequence[str], rng: np.random.Generator, *, find_windows: FindWindows | None
) -> list[int]:
    """Pages, from 1, of a story whose published tasks are learnt. Of a long one a page by chance, as the last one, and
    before it those that stand in its window."""
    if find_windows is None or len(texts) <= WHOLE_PAGES:
        return list(range(1, len(texts) + 1))
    found = find_windows(prompt, texts)
    chosen = found[int(rng.integers(len(found)))]
    return [*chosen.pages, chosen.page]


def pages_before(
    number: int,
    pages: Sequence[int],
    prompt: Sequence[PromptPart],
    texts: Sequence[str],
    *,
    find_windows: FindWindows | None,
    most: int,
) -> list[int]:
    """Pages, from 1, before that of a task that is too long with all of them: the last `most` of its window's.

    `pages`: those of the task's story, as `pages_of_a_task` has them; `number` of them come before the task's own."""
    before = list(pages[:number])
    if find_windows is not None and before and len(texts) <= WHOLE_PAGES:
        found = find_windows(prompt, texts)
        last = found[min(number, len(found) - 1)]
        before = [*last.pages, *range(last.page, number + 1)]
    return before[max(0, len(before) - most) :]


def cut_texts(stored: dict[str, Any], most: int) -> dict[str, Any]:
    """A stored row whose texts have at most so many characters each."""
    segments = [
        {**one, **{name: cut_text(one[name], most) for name in ("text", "caption") if one[name]}}
        for one in stored["segments"]
    ]
    return {**stored, "prompt": stored["prompt"] and cut_text(stored["prompt"], most), "segments": segments}


def cut_text(text: str, most: int) -> str:
    """The beginning of a text, up to the end of a word where there are several."""
    if len(text) <= most:
        return text
    kept = text[: most + 1]
    return kept.rpartition(" ")[0].rstrip() or kept[:most]


def largest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest of `low` to `high` that fits, where every smaller one fits too; None where `low` does not."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
