"""What a request asks of an engine, whichever it is: said, taken and drawn in this order."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from minigpt5.engine.prompts import Prompter
from minigpt5.engine.script import Draw, Say, Take
from minigpt5.errors import InvalidRequest
from minigpt5.model.prompt import VokenIds, text_ids
from minigpt5.types import GeneratorEvent, Page, Picture, Sampling, StoryRequest, TextDelta, Usage, Vokens
from tests.helpers.tiny import tiny_config, tiny_tokenizer

CONFIG, TOKENIZER = tiny_config(), tiny_tokenizer(tiny_config())
STATES_VH = np.ones((CONFIG.num_vokens, CONFIG.hidden), np.float32)


def run(request: StoryRequest, *texts: str, opens_picture: bool = True) -> tuple[list[Any], list[GeneratorEvent]]:
    """What the script asks of a model that writes these texts, and the events."""
    prompter = Prompter(CONFIG, TOKENIZER, engine="none 1")
    events: list[GeneratorEvent] = []
    script = prompter.writer(prompter.encode(request), events.append).script()
    asked: list[Any] = []
    to_write = iter(texts)
    answer: Any = None
    try:
        while True:
            asked.append(script.send(answer))
            answer = None
            if isinstance(asked[-1], Take):
                tokens = text_ids(next(to_write), TOKENIZER)[: asked[-1].limit]
                answer = opens_picture and asked[-1].may_draw and not any(asked[-1].add(token) for token in tokens)
            elif isinstance(asked[-1], Draw):
                answer = STATES_VH
    except StopIteration:
        return asked, events


def kinds(asked: list[Any]) -> list[type]:
    return [type(one) for one in asked]


def pages(events: list[GeneratorEvent]) -> dict[int, str]:
    found: dict[int, str] = {}
    for event in events:
        if isinstance(event, TextDelta):
            found[event.page] = found.get(event.page, "") + event.text
    return found


def test_a_story_takes_a_text_and_draws_a_picture_for_each_page() -> None:
    asked, events = run(StoryRequest(prompt=("A fox",), pages=2), " One.", " Two.")
    assert kinds(asked) == [Say, Take, Draw, Take, Draw]
    assert pages(events) == {1: "One.", 2: "Two."}
    vokens = [event for event in events if isinstance(event, Vokens)]
    assert [(one.page, one.engine, one.fingerprint) for one in vokens] == [
        (page, "none 1", CONFIG.fingerprint) for page in (1, 2)
    ]
    assert isinstance(events[-1], Usage) and events[-1].completion_tokens == 2 * (2 + CONFIG.num_vokens)


def test_a_given_text_is_said_and_not_taken() -> None:
    asked, events = run(StoryRequest(prompt=("A fox",), pages=2, given=("A walk.",)), " Two.")
    assert kinds(asked) == [Say, Say, Draw, Take, Draw]
    assert pages(events) == {1: "A walk.", 2: "Two."}


def test_a_caption_is_said_and_drawn() -> None:
    asked, _ = run(StoryRequest(prompt=("a fox",), mode="caption", pages=1))
    assert kinds(asked) == [Say, Draw] and asked[0].ids[-2:] == text_ids("a fox", TOKENIZER)


def test_a_reply_that_owes_a_picture_may_not_end_before_its_first_tokens() -> None:
    request = StoryRequest(
        prompt=("a fox",), mode="reply", pages=1, pictures="forced", sampling=Sampling(min_page_tokens=3)
    )
    asked, _ = run(request, " One.", opens_picture=False)
    assert kinds(asked) == [Say, Take, Draw]
    assert asked[1].min_tokens == 3 and asked[1].may_draw


def test_a_reply_has_at_most_its_pictures_and_counts_all_its_tokens() -> None:
    request = StoryRequest(prompt=("a fox",), mode="reply", pages=1, sampling=Sampling(max_page_tokens=10))
    asked, _ = run(request, " One.", " Two.")
    takes = [one for one in asked if isinstance(one, Take)]
    assert [take.may_draw for take in takes] == [True, False]
    assert [take.limit for take in takes] == [10, 8] and len(takes[1].said) == 2


def test_a_stop_string_is_not_shown_and_its_tokens_are_taken_back() -> None:
    asked, events = run(StoryRequest(prompt=("a fox",), mode="reply", pages=1, stop=(" red",)), " A fox red tent")
    assert pages(events) == {1: "A fox"}
    assert asked[1].stream.tokens == text_ids(" A fox", TOKENIZER)


class Listener:
    """An engine that keeps the ids that it has before it, as both engines do, and writes random texts."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.ids: list[int] = []
        self.num_said = 0

    def answer(self, asked: Say | Take | Draw) -> Any:
        if isinstance(asked, Say):
            assert asked.start is None or asked.start < len(self.ids)
            self.ids[len(self.ids) if asked.start is None else asked.start :] = asked.ids
            self.num_said += len(asked.ids)
            return None
        assert len(self.ids) <= CONFIG.context_tokens - CONFIG.num_vokens
        if isinstance(asked, Draw):
            self.ids += VokenIds(CONFIG.vocabulary, CONFIG.num_vokens).ids
            return STATES_VH
        words = " ".join(self._chance.choices(["fox", "boat", "wind", "tree", "moon"], k=self._chance.randint(1, 9)))
        tokens = text_ids(f" {words}.", TOKENIZER)[: asked.limit]
        assert len(self.ids) + asked.limit <= CONFIG.context_tokens - CONFIG.num_vokens
        assert not any(asked.add(token) for token in tokens)
        self.ids += tokens
        return True


def tell(request: StoryRequest, *, seed: int = 0) -> tuple[dict[int, list[int]], dict[int, str], Listener]:
    """What the model had before it at the beginning of each page, the pages, and the engine."""
    prompter, engine = Prompter(CONFIG, TOKENIZER, engine="none 1"), Listener(seed)
    events: list[GeneratorEvent] = []
    script = prompter.writer(prompter.encode(request), events.append).script()
    before: dict[int, list[int]] = {}
    answer = None
    try:
        while True:
            asked = script.send(answer)
            if isinstance(asked, Take):
                before[asked.page] = list(engine.ids)
            answer = engine.answer(asked)
    except StopIteration:
        return before, pages(events), engine


@pytest.mark.parametrize("limit", [8, 40, 90])
def test_a_page_of_a_long_story_is_read_after_the_same_tokens_by_every_request_that_begins_there(limit: int) -> None:
    request = StoryRequest(prompt=("A fox",), pages=40, sampling=Sampling(max_page_tokens=limit))
    before, told, _ = tell(request)
    texts = [told[page] for page in sorted(told)]
    assert list(before) == list(range(1, 41))
    prompter = Prompter(CONFIG, TOKENIZER, engine="none 1")
    for page in range(1, 41):
        done = page - 1
        previous = tuple(Page(index=at, text=text) for at, text in enumerate(texts[:done], start=1))
        follows = dataclasses.replace(request, previous=previous, pages=40 - done)
        assert prompter.encode(follows).ids == before[page]
        one = dataclasses.replace(request, previous=previous, pages=1, num_later=40 - page)
        assert prompter.encode(one).ids == before[page]
    for done in (3, 17, 39):
        resumed, again, _ = tell(dataclasses.replace(request, given=tuple(texts[:done])), seed=1)
        assert again[done] == texts[done - 1]
        assert resumed[done + 1] == before[done + 1]


def test_a_story_that_fits_says_its_prompt_and_nothing_again() -> None:
    for num_pages in (2, 16):
        request = StoryRequest(prompt=("A fox",), pages=num_pages, sampling=Sampling(max_page_tokens=8))
        _, _, engine = tell(request)
        prompter = Prompter(CONFIG, TOKENIZER, engine="none 1")
        assert engine.num_said == len(prompter.encode(request).ids)


def test_a_window_that_moves_costs_about_as_much_as_the_story_itself() -> None:
    request = StoryRequest(prompt=("A fox",), pages=64, sampling=Sampling(max_page_tokens=8))
    prompter = Prompter(CONFIG, TOKENIZER, engine="none 1")
    prompt = prompter.encode(request)
    _, told, engine = tell(request)
    sizes = [len(text_ids(f" {text}", TOKENIZER)) + CONFIG.num_vokens for text in told.values()]
    assert sum(sizes) / 3 < engine.num_said - len(prompt.ids) < sum(sizes)
    assert len(prompt.ids) + prompt.num_new > engine.num_said + sum(sizes)
    assert prompt.num_positions == CONFIG.context_tokens


def test_a_page_that_does_not_fit_by_itself_is_refused() -> None:
    prompter = Prompter(CONFIG, TOKENIZER, engine="none 1")
    limit = CONFIG.context_tokens
    with pytest.raises(InvalidRequest, match="a page up to .* shorten the prompt or ask for shorter pages"):
        prompter.encode(StoryRequest(prompt=("A fox",), pages=1, sampling=Sampling(max_page_tokens=limit)))
    with pytest.raises(InvalidRequest, match="the story would have 65 pages but may have 64"):
        prompter.encode(StoryRequest(prompt=("A fox",), pages=60, num_later=5))


def test_a_reply_has_no_more_pictures_than_before() -> None:
    prompter = Prompter(CONFIG, TOKENIZER, engine="none 1")
    with pytest.raises(InvalidRequest, match="pages is 17 but must be from 1 to 16"):
        prompter.encode(StoryRequest(prompt=("A fox",), mode="reply", pages=17))


@pytest.mark.parametrize("limit", [4, 64])
def test_a_turn_that_reads_a_page_back_fits_the_window_or_is_refused(limit: int) -> None:
    """The templates of its turns take more tokens than a story's prompt."""
    config = dataclasses.replace(CONFIG, context_tokens=600, template="published")
    prompter = Prompter(config, TOKENIZER, engine="none 1")
    picture = Picture(page=1, png=b"a picture", width=8, height=8, seed=0, denoise_steps=1)
    ends = []
    for num_words in range(300, 600, 4):
        request = StoryRequest(
            prompt=("fox " * num_words,), previous=(Page(index=1, text="A fox.", picture=picture),), pages=1,
            feedback="pictures", sampling=Sampling(max_page_tokens=limit, min_page_tokens=1),
        )  # fmt: skip
        try:
            num = len(prompter.encode(request).ids) + limit + config.num_vokens
        except InvalidRequest:
            ends.append("refused")
        else:
            ends.append("fits")
            assert num <= config.context_tokens
    assert set(ends) == {"fits", "refused"} and ends == sorted(ends)


def test_pictures_that_are_read_back_are_those_of_a_window() -> None:
    prompter = Prompter(CONFIG, TOKENIZER, engine="none 1")
    png = b"a picture"
    picture = Picture(page=1, png=png, width=8, height=8, seed=0, denoise_steps=1)
    for done in (1, 5, 14, 15, 40, 63):
        previous = tuple(Page(index=at, text=f"Page {at}.", picture=picture) for at in range(1, done + 1))
        request = StoryRequest(
            prompt=("A fox",), previous=previous, pages=1, num_later=63 - done, feedback="pictures",
            sampling=Sampling(max_page_tokens=8),
        )  # fmt: skip
        prompt = prompter.encode(request)
        assert 1 <= len(prompt.pictures) <= min(done, CONFIG.window_pages - 1)
        assert prompt.num_positions <= CONFIG.context_tokens
        placeholder = VokenIds(CONFIG.vocabulary, CONFIG.num_vokens).placeholder
        assert prompt.ids.count(placeholder) == len(prompt.pictures) * CONFIG.vision.num_queries
        given = dataclasses.replace(request, given=("It was the end.",))
        assert prompter.encode(given).ids == prompt.ids, "a page is read alike when it is there already"
