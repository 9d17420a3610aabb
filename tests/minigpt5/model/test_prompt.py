"""The published template: how the parts of a prompt and the pages of a story become text."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from minigpt5.model.prompt import (
    READ_AND_TELL,
    encode,
    given_ids,
    merge_text_parts,
    pictures_read,
    request_segments,
)
from minigpt5.model.published_template import PUBLISHED
from minigpt5.model.vokens import VokenEmbeddings
from minigpt5.published.data import vist_samples
from minigpt5.types import InputImage, Page, Picture, PromptPart, StoryRequest
from tests.helpers.tiny import tiny_config, tiny_tokenizer

PNG = InputImage(data=b"png")
PICTURE = Picture(page=1, png=b"drawn", width=1, height=1, seed=1, denoise_steps=1)
Mode = Literal["story", "caption", "reply"]


def read(request: StoryRequest) -> str:
    """What the generator reads, with a mark for each picture."""
    return "".join(segment.text or f"({segment.kind})" for segment in request_segments(request, PUBLISHED))


@pytest.mark.parametrize("mode", ["story", "caption", "reply"])
@pytest.mark.parametrize(
    "parts", [("A fox", "finds a balloon"), ("A fox ", " finds a balloon"), ("A fox", "", "finds a balloon", "")]
)
def test_neighbouring_texts_of_a_prompt_are_read_with_one_space_between(mode: Mode, parts: tuple[str, ...]) -> None:
    whole = StoryRequest(prompt=("A fox finds a balloon",), mode=mode)
    assert request_segments(dataclasses.replace(whole, prompt=parts), PUBLISHED) == request_segments(whole, PUBLISHED)


def test_neighbouring_texts_are_read_with_one_space_where_pages_are_read_back() -> None:
    request = StoryRequest(
        prompt=(PNG, "A fox", "finds a balloon"),
        previous=(Page(index=1, text="It flew.", picture=PICTURE),),
        feedback="pictures",
    )
    assert "###Human:<Img>(read)</Img> A fox finds a balloon It flew.<Img>(read)</Img>\n" in read(request)


def test_texts_with_a_picture_between_them_stay_apart() -> None:
    parts: list[PromptPart] = ["A fox", PNG, "finds", "a balloon"]
    assert merge_text_parts(parts) == ["A fox", PNG, "finds a balloon"]


@pytest.mark.parametrize("text", ["A fox sat. ", "\nA fox sat.\n", "A fox sat."])
def test_a_given_page_has_the_same_ids_when_it_is_resumed(text: str) -> None:
    config = tiny_config()
    tokenizer, rows = tiny_tokenizer(config), VokenEmbeddings(config.vocabulary, config.num_vokens, 1)

    def ids(request: StoryRequest) -> list[int]:
        return encode(request_segments(request, PUBLISHED), tokenizer, rows, picture_tokens=(-4,)).ids

    first = StoryRequest(prompt=("A fox",), pages=2, given=(text,))
    resumed = StoryRequest(prompt=("A fox",), pages=1, previous=(Page(index=1, text=text),))
    assert ids(resumed) == ids(first) + sum(given_ids(first, PUBLISHED, tokenizer), []) + rows.ids


@pytest.mark.parametrize("mode", ["story", "reply"])
@pytest.mark.parametrize("feedback", ["text", "pictures"])
def test_white_space_around_an_earlier_page_is_not_read(mode: Mode, feedback: Literal["text", "pictures"]) -> None:
    def request(text: str) -> StoryRequest:
        pages = (Page(index=1, text=text, picture=PICTURE),)
        return StoryRequest(prompt=("A fox",), previous=pages, mode=mode, feedback=feedback)

    assert request_segments(request("\n It flew. \n"), PUBLISHED) == request_segments(request("It flew."), PUBLISHED)


@pytest.mark.parametrize("mode", ["story", "caption", "reply"])
@pytest.mark.parametrize("feedback", ["text", "pictures"])
def test_each_picture_that_is_read_has_one_segment(mode: Mode, feedback: Literal["text", "pictures"]) -> None:
    pages = (Page(index=1, text="It flew.", picture=PICTURE), Page(index=2, text="It sank."))
    request = StoryRequest(prompt=(PNG, "A fox", PNG), previous=pages, mode=mode, feedback=feedback)
    segments = request_segments(request, PUBLISHED)
    assert len(pictures_read(request)) == sum(segment.kind == "read" for segment in segments)


@pytest.mark.parametrize(
    ("task", "variant", "asked"),
    [
        ("picture", 0, " Generate an image with the scene description: It ran. ###Assistant:(draw) ###"),
        ("picture", 3, " the scene description: It ran. ###Assistant:(draw) ###"),
        ("both", 5, " What should happen then? ###Assistant: It ran.(draw) ###"),
        ("text", 1, " What happen in the next scene image: <Img>(read)</Img> ###Assistant: It ran. ###"),
    ],
)
def test_published_tasks_are_worded_as_published(
    task: Literal["text", "picture", "both"], variant: int, asked: str
) -> None:
    segments = PUBLISHED.next_page(["It woke."], "It ran.", task, variant=variant)
    words = "".join(segment.text or f"({segment.kind})" for segment in segments)
    assert words.endswith(f"###Human:It woke.<Img>(read)</Img>\n{asked}")


def test_a_scene_is_asked_for_as_the_published_tasks_are() -> None:
    picture = InputImage(data=b"a")
    for text, task in (("It ran.", "picture"), ("", "both")):
        trained = PUBLISHED.next_page(["It woke."], "It ran.", task, variant=0)  # type: ignore[arg-type]
        asked = PUBLISHED.scene(("It woke.", picture), text)
        assert [(one.kind, one.text) for one in asked] == [(one.kind, one.text) for one in trained[: len(asked)]]
        assert trained[len(asked)].is_target
    first = next(vist_samples([("It woke.", "a")], is_training=False))
    assert "".join(one.text for one in PUBLISHED.scene((), "It woke.")) == first.source


def test_a_scene_takes_texts_alone_and_pictures_alone() -> None:
    def said(*context: str | InputImage) -> str:
        segments = PUBLISHED.scene(context, "It ran.")
        return "".join(one.text or f"({one.kind})" for one in segments).removeprefix(READ_AND_TELL)

    picture = InputImage(data=b"a")
    asked = " Generate an image with the scene description: It ran. ###Assistant:"
    assert said("It woke.", "It sat.") == f"###Human:It woke. It sat.\n{asked}"
    assert said(picture, picture) == f"###Human:<Img>(read)</Img><Img>(read)</Img>\n{asked}"
