"""Stories that are longer than what is read at once, as training cuts them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from minigpt5.engine.prompts import Prompter
from minigpt5.model.prompt import IGNORED, VokenIds, encode
from minigpt5.model.published_template import PUBLISHED
from minigpt5.model.story_windows import StoryWindows
from minigpt5.model.window import Window
from minigpt5.types import Page, PromptPart, StoryRequest
from tests.helpers.tiny import tiny_config, tiny_tokenizer
from training.data.long_rows import pages_of_a_task, whole_or_part
from training.data.stored import to_example

CONFIG, TOKENIZER = tiny_config(), tiny_tokenizer(tiny_config())
VOKENS = VokenIds(CONFIG.vocabulary, CONFIG.num_vokens)
PROMPT = "A fox and a moon"


def texts_of(num_pages: int) -> list[str]:
    return [f"The fox saw {page} moons and {'many ' * (page % 5)}stars." for page in range(1, num_pages + 1)]


def find_windows(prompt: Sequence[PromptPart], texts: Sequence[str]) -> list[Window]:
    story = StoryWindows(prompt, len(texts), config=CONFIG, template=PUBLISHED, tokenizer=TOKENIZER)
    return story.of([story.size(text) for text in texts])


@pytest.mark.parametrize("num_pages", [5, 16, 40])
def test_each_page_is_learnt_once_after_what_serving_reads_before_it(num_pages: int) -> None:
    texts, prompter = texts_of(num_pages), Prompter(CONFIG, TOKENIZER, engine="none 1")
    parts = {}
    for seed in range(60):
        part = whole_or_part(
            [PROMPT], texts, np.random.default_rng(seed), template=PUBLISHED, find_windows=find_windows
        )
        parts[part.pages] = part
    assert (len(parts) > 1) == (num_pages > 16)
    learnt: list[int] = []
    for part in parts.values():
        tokens = encode(part.segments, TOKENIZER, VOKENS, picture_tokens=(-4,))
        draws = [at for at, token in enumerate(tokens.ids) if token == VOKENS.first]
        assert len(draws) == len(part.pages) and len(tokens.ids) <= CONFIG.context_tokens
        for page, at in zip(part.pages, draws, strict=True):
            if tokens.labels[at] == IGNORED:
                continue
            learnt.append(page)
            previous = tuple(Page(index=one, text=texts[one - 1]) for one in range(1, page))
            request = StoryRequest(
                prompt=(PROMPT,), previous=previous, num_later=num_pages - page, pages=1, sampling=CONFIG.sampling
            )
            served = prompter.encode(request).ids
            assert tokens.ids[: len(served)] == served
            assert all(label != IGNORED for label in tokens.labels[len(served) : at])
    assert sorted(learnt) == list(range(1, num_pages + 1))


def test_a_stored_row_of_many_pages_gives_a_part_with_its_pictures() -> None:
    picture = np.zeros((3, 8, 8), np.float16)
    segments: list[dict[str, Any]] = []
    for text in texts_of(40):
        empty = dict.fromkeys(("text", "speaker", "picture", "caption", "moments", "features"))
        segments += [empty | {"text": text}, empty | {"moments": _npy(picture), "features": _npy(picture[0])}]
    row = {"id": "long", "source": "own", "kind": "story", "prompt": PROMPT, "segments": segments}
    for seed in range(8):
        for share in (0.0, 1.0):
            example = to_example(
                row,
                np.random.default_rng(seed),
                stage="learn",
                story_share=share,
                read_px=64,
                draw_px=8,
                find_windows=find_windows,
            )
            assert len(example.drawn) == sum(one.kind == "draw" for one in example.segments) <= 8
            assert len(example.read) == sum(one.kind == "read" for one in example.segments) <= 8


def test_a_task_of_a_long_story_has_the_pages_of_a_window_before_it() -> None:
    def task(num_pages: int, seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return pages_of_a_task([PROMPT], texts_of(num_pages), rng, find_windows=find_windows)

    assert task(16, 0) == list(range(1, 17))
    found = {tuple(task(40, seed)) for seed in range(80)}
    assert (1, 2, 8, 9, 10) in found
    assert max(map(len, found)) <= CONFIG.window_pages and max(pages[-1] for pages in found) > 30


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values)
    return file.getvalue()
