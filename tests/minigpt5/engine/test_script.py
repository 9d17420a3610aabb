"""What a request asks of an engine, whichever it is: said, taken and drawn in this order."""

from __future__ import annotations

from typing import Any

import numpy as np

from minigpt5.engine.prompts import Prompter
from minigpt5.engine.script import Draw, Say, Take
from minigpt5.model.prompt import text_ids
from minigpt5.types import GeneratorEvent, Sampling, StoryRequest, TextDelta, Usage, Vokens
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
