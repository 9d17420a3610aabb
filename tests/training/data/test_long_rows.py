"""Stories that are longer than what is read at once, as training cuts them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_jobs.prepare import to_parquet
from minigpt5.engine.prompts import Prompter
from minigpt5.errors import TrainingError
from minigpt5.model.prompt import IGNORED, VokenIds, encode
from minigpt5.model.published_template import PUBLISHED
from minigpt5.model.story_windows import StoryWindows
from minigpt5.model.window import Window
from minigpt5.objective.example import Example
from minigpt5.objective.stored_example import ROW_SCHEMA
from minigpt5.types import Page, PromptPart, StoryRequest
from tests.helpers.tiny import tiny_config, tiny_tokenizer
from training.data.long_rows import cut_text, largest, pages_of_a_task, whole_or_part
from training.data.stored import StoredExamples, to_example

CONFIG, TOKENIZER = tiny_config(), tiny_tokenizer(tiny_config())
VOKENS = VokenIds(CONFIG.vocabulary, CONFIG.num_vokens)
PROMPT = "A fox and a moon"


def texts_of(num_pages: int) -> list[str]:
    return [f"The fox saw {page} moons and {'many ' * (page % 5)}stars." for page in range(1, num_pages + 1)]


def find_windows(prompt: Sequence[PromptPart], texts: Sequence[str]) -> list[Window]:
    story = StoryWindows(prompt, len(texts), config=CONFIG, template=PUBLISHED, tokenizer=TOKENIZER)
    return story.of([story.size(text) for text in texts])


def row_of(kind: str, texts: Sequence[str], *, prompt: str | None = None, number: int = 0) -> dict[str, Any]:
    """A stored row with a picture after each text; a dialogue's come after every second."""
    picture = np.zeros((3, 8, 8), np.float16)
    empty = dict.fromkeys(("text", "speaker", "picture", "caption", "moments", "features"))
    segments: list[dict[str, Any]] = []
    for at, text in enumerate(texts):
        segments.append(empty | {"text": text, "speaker": ("Human", "Assistant")[at % 2]})
        if kind != "dialogue" or at % 2:
            segments.append(empty | {"moments": _npy(picture), "features": _npy(picture[0])})
    return {"id": f"{kind} {number}", "source": "folder", "kind": kind, "prompt": prompt, "segments": segments}


def tokenise(example: Example) -> Example:
    tokens = encode(example.segments, TOKENIZER, VOKENS, picture_tokens=CONFIG.vision.picture_tokens)
    return dataclasses.replace(example, tokens=tokens)


def stored(folder: Path, rows: list[dict[str, Any]], *, stage: str = "learn", story_share: float = 0.0) -> Any:
    (folder / "rows").mkdir(parents=True)
    (folder / "rows" / "0.parquet").write_bytes(to_parquet(rows, ROW_SCHEMA))
    found = StoredExamples(
        str(folder),
        CONFIG,
        seed=1,
        stage=stage,
        story_share=story_share,
        tokenise=tokenise,
        find_windows=find_windows,
    )
    return found


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


def example_of(row: dict[str, Any], seed: int, share: float) -> Example:
    """One of a row's examples for "learn", by chance: whole stories at the share 1, tasks at 0."""
    rng = np.random.default_rng(seed)
    return to_example(row, rng, stage="learn", story_share=share, read_px=64, draw_px=8, find_windows=find_windows)


def test_a_stored_row_of_many_pages_gives_a_part_with_its_pictures() -> None:
    row = row_of("story", texts_of(40), prompt=PROMPT)
    for seed in range(8):
        for share in (0.0, 1.0):
            example = example_of(row, seed, share)
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


WORDS = "the fox went over the hill and saw a boat "


@pytest.mark.parametrize(
    ("kind", "stage", "story_share"),
    [("story", "learn", 1.0), ("story", "learn", 0.0), ("story", "align", 0.0), ("caption", "align", 0.0)]
    + [("caption", "learn", 0.0), ("dialogue", "learn", 0.0), ("dialogue", "align", 0.0), ("story", "vision", 0.0)],
)
def test_no_example_is_longer_than_the_model_reads(
    kind: str, stage: str, story_share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    num_texts = 1 if kind == "caption" else 6
    rows = [row_of(kind, [WORDS * 90] * num_texts, prompt="A fox", number=number) for number in range(3)]
    examples = stored(tmp_path, rows, stage=stage, story_share=story_share)
    for position in range(3):
        _, example = examples.example_at(position)
        assert CONFIG.context_tokens - 30 < len(example.tokens.ids) <= CONFIG.context_tokens
        assert len(example.drawn) == sum(one.kind == "draw" for one in example.segments)
        assert len(example.read) == sum(one.kind == "read" for one in example.segments)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"row {kind} " in said and "it is cut" in said


def test_a_task_that_is_too_long_loses_its_oldest_pages_and_no_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"Page {page}: {WORDS * 6}." for page in range(1, 13)]
    examples = stored(tmp_path, [row_of("story", texts, number=number) for number in range(3)])
    tasks = set()
    for position in range(16):
        _, example = examples.example_at(position)
        told = "".join(one.text for one in example.segments)
        assert len(example.tokens.ids) <= CONFIG.context_tokens
        pages = [page for page, text in enumerate(texts, start=1) if text.strip() in told]
        assert told.count("Page ") == len(pages), "none is cut"
        tasks.add(tuple(pages))
    assert len({pages[-1] for pages in tasks}) > 4 and (1, 2, 8, 9, 10, 11) in tasks
    assert not capsys.readouterr().out


def test_a_row_of_which_nothing_fits_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["a fox", "a fox", "an owl", "a fox"]
    examples = stored(tmp_path, [row_of("caption", [text], number=at) for at, text in enumerate(words)], stage="align")
    monkeypatch.setattr(examples, "_is_read_whole", lambda example: "owl" in example.captions[0])
    assert {examples.example_at(position)[0] for position in range(4)} == {"caption 2"}
    assert capsys.readouterr().out.count("it is left out") == 1
    monkeypatch.setattr(examples, "_is_read_whole", lambda example: False)
    with pytest.raises(TrainingError, match=r"no row of .* fits the \d+ tokens that the model reads"):
        examples.example_at(0)


def test_pages_after_the_last_picture_are_learnt_as_text() -> None:
    row = row_of("story", ["Page one.", "Page two."], prompt=PROMPT)
    row["segments"].pop()
    row["segments"] += row_of("story", ["Page three."])["segments"][:1]
    learnt: dict[float, set[str]] = {}
    for share in (0.0, 1.0):
        examples = [example_of(row, seed, share) for seed in range(40)]
        learnt[share] = {"".join(one.text or "<D>" for one in e.segments if one.is_target) for e in examples}
        assert all(len(e.drawn) == sum(one.kind == "draw" for one in e.segments) for e in examples)
    assert learnt[1.0] == {" Page one.<D> Page two. Page three. ###"}
    assert learnt[0.0] == {"<D> ###", "Page two. Page three. ###"}


def test_texts_are_cut_between_words() -> None:
    assert [cut_text("a fox saw", most) for most in (9, 8, 5, 4, 1)] == ["a fox saw", "a fox", "a fox", "a", "a"]
    assert cut_text("foxes", 3) == "fox"
    assert [largest(lambda value, most=most: value <= most, 1, 9) for most in (0, 1, 5, 20)] == [None, 1, 5, 9]


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values)
    return file.getvalue()
