"""A story's row as one example, or where it is longer than what is read at once, a part of it.

The parts end where serving's windows move (minigpt5/model/window.py): every page is learnt after the tokens that
serving has before it, and in one part alone. The pages that a part begins with are read and not learnt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minigpt5.model.prompt import Segment, Template
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
) -> Part:
    """One of a story's parts, by chance; a story that is read whole has one. Without `find_windows` it is whole."""
    if find_windows is None:
        return Part(segments=template.story(prompt, len(texts), texts), pages=tuple(range(1, len(texts) + 1)))
    found = find_windows(prompt, texts)
    begins = [found[0]] + [one for before, one in itertools.pairwise(found) if not one.goes_on_from(before)]
    chosen = int(rng.integers(len(begins))) if len(begins) > 1 else 0
    first = begins[chosen]
    end = begins[chosen + 1].page if chosen + 1 < len(begins) else len(texts) + 1
    pages = (*first.pages, *range(first.page, end))
    segments = template.story(prompt, first.num_pages, [texts[page - 1] for page in pages])
    return Part(segments=_only_read(segments, len(first.pages)), pages=pages)


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
