"""The engine that writes: replies, stop strings, and requests that share steps without changing each other."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import io
import math
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minigpt5.engine.generator import VokenGenerator
from minigpt5.engine.steps import CLOSE
from minigpt5.errors import EngineFull, InvalidRequest, SettingsError
from minigpt5.limits import BLOCK, default_limits
from minigpt5.model.language import LanguageModel
from minigpt5.model.prompt import encode, request_segments
from minigpt5.model.published_template import PUBLISHED
from minigpt5.model.vision import Vision
from minigpt5.types import GeneratorEvent, InputImage, Page, Picture, Sampling, StoryRequest, TextDelta, Usage, Vokens
from tests.helpers.streams import run_together
from tests.helpers.tiny import tiny_config, tiny_language, tiny_tokenizer, tiny_vision

SHARP = Sampling(temperature=0.1, max_page_tokens=10)
"""A random model has no favourites: at this temperature it has some."""


class Biased(LanguageModel):
    """The tiny model, inclined towards some tokens."""

    def __init__(self, language: LanguageModel) -> None:
        super().__init__(language.body, language.head, language.voken_embeddings)
        self.bias: dict[int, float] = {}
        self.shift = 0.0
        self.breaks_on_row: int | None = None
        """Row of the next step that has so many, whose logits are no numbers."""

    def logits(self, states_BSH: Tensor) -> Tensor:
        logits = super().logits(states_BSH) + self.shift
        if self.breaks_on_row is not None and len(logits) > self.breaks_on_row:
            logits[self.breaks_on_row] = torch.nan
            self.breaks_on_row = None
        for token, bias in self.bias.items():
            logits[..., token] += bias
        return logits


@functools.cache
def shared_parts() -> tuple[PreTrainedTokenizerBase, Vision]:
    """What no test changes."""
    return tiny_tokenizer(tiny_config()), tiny_vision(tiny_config())


def new_generator(*, max_jobs: int = 512, draws_on_device: bool | None = None, **limits: float) -> VokenGenerator:
    config = tiny_config()
    tokenizer, vision = shared_parts()
    return VokenGenerator(
        config,
        tokenizer,
        Biased(tiny_language(config)),
        vision,
        limits=default_limits("cpu", **limits),
        max_jobs=max_jobs,
        draws_on_device=draws_on_device,
    )


@pytest.fixture
def generator() -> VokenGenerator:
    return new_generator()


def bias(generator: VokenGenerator, *, first_voken: float = 0.0, end: float = 0.0, shift: float = 0.0) -> None:
    language = generator.language
    assert isinstance(language, Biased)
    language.bias = {language.voken_embeddings.first: first_voken, **dict.fromkeys(generator.end_ids, end)}
    language.shift = shift


def run(generator: VokenGenerator, *requests: StoryRequest) -> list[list[GeneratorEvent]]:
    return run_together(generator.generate, requests)


def reply(**changes: object) -> StoryRequest:
    values = {"prompt": ("What do foxes eat?",), "mode": "reply", "seed": 3, "pages": 3}
    return StoryRequest(**{**values, "sampling": Sampling(temperature=1, max_page_tokens=30), **changes})  # type: ignore[arg-type]


def story(**changes: object) -> StoryRequest:
    return StoryRequest(**{"prompt": ("A fox and a balloon",), "pages": 2, "sampling": SHARP, **changes})  # type: ignore[arg-type]


def text(events: Sequence[GeneratorEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def pages_with_pictures(events: Sequence[GeneratorEvent]) -> list[int]:
    return [event.page for event in events if isinstance(event, Vokens)]


def png(colour: str) -> InputImage:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return InputImage(data=file.getvalue())


# Pictures read back


def test_a_page_depends_on_the_pictures_before_it_where_they_are_read_back(generator: VokenGenerator) -> None:
    def ask(colour: str, **options: object) -> str:
        picture = Picture(page=1, png=png(colour).data, width=40, height=30, seed=1, denoise_steps=1)
        previous = (Page(index=1, text="one two", picture=picture),)
        request = StoryRequest(prompt=("a b c",), pages=1, previous=previous, sampling=SHARP, **options)  # type: ignore[arg-type]
        events = run(generator, request)[0]
        assert pages_with_pictures(events) == [2]
        return text(events)

    assert ask("red", feedback="pictures") == ask("red", feedback="pictures") != ask("blue", feedback="pictures")
    assert ask("red") == ask("blue")


def test_a_story_that_could_not_read_one_picture_is_refused_at_once(generator: VokenGenerator) -> None:
    request = StoryRequest(prompt=("a",), pages=40, sampling=Sampling(max_page_tokens=290))
    generator.validate_request(request)
    with pytest.raises(InvalidRequest, match="context window"):
        generator.validate_request(dataclasses.replace(request, feedback="pictures"))


# Long stories


def word_by_word() -> VokenGenerator:
    """It writes words that are one token each: what random tokens spell is tokenized otherwise when it is read."""
    generator = new_generator()
    assert isinstance(generator.language, Biased)
    words = [generator.tokenizer.encode(f" {word}")[-1] for word in ("fox", "tree", "moon", "river", "house", "wind")]
    generator.language.bias = {token: 40.0 for token in (*words, generator.language.voken_embeddings.first)}
    return generator


def test_a_long_story_reads_what_a_request_reads_that_begins_at_its_page() -> None:
    sampling = Sampling(temperature=1.0, max_page_tokens=20)
    request = StoryRequest(prompt=("A fox",), pages=40, seed=5, sampling=sampling)
    events = run(word_by_word(), request)[0]
    texts = {
        page: "".join(one.text for one in events if isinstance(one, TextDelta) and one.page == page).strip()
        for page in range(1, 41)
    }
    vokens = {one.page: one.hidden_VH for one in events if isinstance(one, Vokens)}
    assert sorted(vokens) == sorted(texts) and len(set(texts.values())) > 30
    previous = tuple(Page(index=page, text=text) for page, text in texts.items())
    again = [
        dataclasses.replace(request, previous=previous[: page - 1], pages=1, num_later=40 - page)
        for page in (1, 15, 16, 17, 29, 40)
    ]
    again.append(dataclasses.replace(request, given=tuple(texts.values())[:31]))
    for found in run(word_by_word(), *again):
        for one in found:
            if isinstance(one, Vokens):
                np.testing.assert_allclose(one.hidden_VH, vokens[one.page], atol=1e-4)
                assert (
                    "".join(
                        each.text for each in found if isinstance(each, TextDelta) and each.page == one.page
                    ).strip()
                    == texts[one.page]
                )


# Scenes


def test_a_scene_is_the_picture_of_a_given_text_or_a_page_of_its_own(generator: VokenGenerator) -> None:
    def ask(*prompt: str | InputImage, given: tuple[str, ...] = ()) -> Sequence[GeneratorEvent]:
        request = StoryRequest(prompt=prompt, pages=1, mode="scene", given=given, sampling=SHARP)
        return run(generator, request)[0]

    def vokens(*prompt: str | InputImage) -> np.ndarray:
        (first, usage) = ask(*prompt, given=("It ran.",))
        assert isinstance(first, Vokens) and isinstance(usage, Usage) and usage.completion_tokens == 8
        return first.hidden_VH

    assert not np.array_equal(vokens("It woke.", png("red")), vokens("It woke.", png("blue")))
    assert vokens().shape == (8, tiny_config().hidden)
    events = ask("It woke.", png("red"))
    assert text(events) and pages_with_pictures(events) == [1]


def test_a_scene_is_one_page_with_something_to_go_on(generator: VokenGenerator) -> None:
    for request, reason in (
        (StoryRequest(prompt=(), pages=1, mode="scene"), "prompt is empty"),
        (StoryRequest(prompt=("a",), pages=2, mode="scene"), "a scene is one page"),
        (StoryRequest(prompt=("a",), pages=1, mode="scene", given=("b", "c")), "2 texts"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            generator.validate_request(request)


# Replies


def test_a_reply_has_pictures_where_the_model_opens_them_and_may_end_with_text(generator: VokenGenerator) -> None:
    bias(generator, first_voken=8.5)
    kinds = set()
    for seed in range(12):
        events = run(generator, reply(seed=seed))[0]
        pictures = pages_with_pictures(events)
        assert pictures == list(range(1, len(pictures) + 1)) and len(pictures) <= 3
        order = [event.page for event in events if not isinstance(event, Usage)]
        assert order == sorted(order)
        last_text = max(event.page for event in events if isinstance(event, TextDelta))
        assert last_text <= len(pictures) + 1
        kinds.add((len(pictures), last_text > len(pictures)))
    assert len(kinds) > 2, kinds


def test_a_reply_without_pictures_has_none_however_much_the_model_wants_one(generator: VokenGenerator) -> None:
    bias(generator, first_voken=100)
    events = run(generator, reply(pictures="none"))[0]
    assert not pages_with_pictures(events)
    assert {event.page for event in events if isinstance(event, TextDelta)} == {1}


@pytest.mark.parametrize("shift", [0.0, -1000.0, 1000.0])
@pytest.mark.parametrize("end", [-100.0, 100.0])
def test_a_forced_picture_comes_after_the_text_for_any_logits(
    generator: VokenGenerator, shift: float, end: float
) -> None:
    bias(generator, first_voken=-100, end=end, shift=shift)
    events = run(generator, reply(pictures="forced"))[0]
    assert [type(event) for event in events[-2:]] == [Vokens, Usage]
    assert pages_with_pictures(events) == [1]
    assert text(events).strip()
    usage = events[-1]
    assert isinstance(usage, Usage) and usage.completion_tokens == (4 if end > 0 else 30) + 8


def test_the_published_way_to_force_a_picture_draws_before_any_text_or_not_at_all(generator: VokenGenerator) -> None:
    """Ten times the best logit: far above all others, or far below where that is negative."""
    generator.prompter.config = dataclasses.replace(generator.config, published_quirks=True)
    bias(generator, first_voken=-100, shift=1000)
    events = run(generator, reply(pictures="forced"))[0]
    assert isinstance(events[0], Vokens) and pages_with_pictures(events) == [1]
    bias(generator, shift=-1000)
    events = run(generator, reply(pictures="forced"))[0]
    assert not pages_with_pictures(events) and text(events).strip()


def test_the_published_reply_has_one_picture(generator: VokenGenerator) -> None:
    bias(generator, first_voken=100)
    assert len(pages_with_pictures(run(generator, reply())[0])) == 3
    generator.prompter.config = dataclasses.replace(generator.config, published_quirks=True)
    assert pages_with_pictures(run(generator, reply())[0]) == [1]


def test_a_picture_that_the_model_opened_itself_is_not_forced_again(generator: VokenGenerator) -> None:
    bias(generator, first_voken=100)
    events = run(generator, reply(pictures="forced", pages=1))[0]
    assert pages_with_pictures(events) == [1]
    kinds = [type(event) for event in events]
    assert TextDelta in kinds[: kinds.index(Vokens)]


def test_a_reply_ends_at_end_of_text_or_at_its_limit(generator: VokenGenerator) -> None:
    bias(generator, first_voken=-100, end=100)
    assert [type(event) for event in run(generator, reply())[0]] == [Usage]
    bias(generator, first_voken=8.5, end=-100)
    events = run(generator, reply(pages=2, sampling=Sampling(temperature=1, max_page_tokens=25)))[0]
    num_pictures = len(pages_with_pictures(events))
    usage = events[-1]
    assert isinstance(usage, Usage) and usage.completion_tokens - 8 * num_pictures == 25


@pytest.mark.parametrize("pages", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_reply_that_may_be_longer_than_the_window_ends_with_the_window(generator: VokenGenerator, pages: int) -> None:
    bias(generator, first_voken=-100, end=-100)
    request = reply(pages=pages, sampling=Sampling(max_page_tokens=100_000))
    usage = run(generator, request)[0][-1]
    assert isinstance(usage, Usage)
    window = generator.config.context_tokens
    assert usage.prompt_tokens + usage.completion_tokens == window - pages * generator.config.num_vokens
    with pytest.raises(InvalidRequest, match="context window"):
        generator.validate_request(dataclasses.replace(request, prompt=("word " * window,)))


def test_a_picture_and_the_trained_question_are_read_as_in_training(generator: VokenGenerator) -> None:
    def ids(segments: object) -> list[int]:
        rows = generator.language.voken_embeddings
        return encode(segments, generator.tokenizer, rows, picture_tokens=(-4,)).ids  # type: ignore[arg-type]

    request = reply(prompt=(png("red"), "Describe this image."))
    assert ids(request_segments(request, PUBLISHED)) == ids(PUBLISHED.describe("x")[:-1])


def test_a_reply_goes_on_after_what_was_said_before(generator: VokenGenerator) -> None:
    picture = Picture(page=1, png=b"", width=1, height=1, seed=1, denoise_steps=1)
    request = reply(previous=(Page(index=1, text="Mice.", picture=picture), Page(index=2, text="And eggs.")))
    kinds = [(segment.kind, segment.text) for segment in request_segments(request, PUBLISHED)]
    assert kinds[-3:] == [
        ("text", "###Human: What do foxes eat? ###Assistant: Mice."),
        ("draw", ""),
        ("text", " And eggs."),
    ]
    bias(generator, end=-100)
    assert {event.page for event in run(generator, request)[0] if isinstance(event, TextDelta)} == {3}


# Stop strings and penalties


@pytest.mark.parametrize("mode", ["story", "reply"])
def test_text_ends_before_a_stop_string_that_straddles_tokens(generator: VokenGenerator, mode: str) -> None:
    bias(generator, first_voken=-100, end=-100)
    values = {"mode": mode, "pages": 1, "sampling": Sampling(temperature=0, max_page_tokens=20)}
    whole = text(run(generator, story(**values))[0])
    stop = whole[len(whole) // 2 :][:25]
    events = run(generator, story(**values, stop=("never", stop)))[0]
    assert text(events) == whole[: whole.find(stop)]
    assert pages_with_pictures(events) == ([1] if mode == "story" else [])


def test_a_picture_after_a_stop_string_is_of_the_text_that_was_shown(generator: VokenGenerator) -> None:
    """Its vokens are those of a sequence that never held the tokens of the stop string."""
    bias(generator, first_voken=-100, end=-100)
    greedy = Sampling(temperature=0, max_page_tokens=20)
    tokenizer, language = generator.tokenizer, generator.language
    whole = text(run(generator, story(pages=1, sampling=greedy))[0])
    stop = whole[len(whole) // 2 :][:25]  # over several tokens
    events = run(generator, story(pages=1, sampling=greedy, stop=(stop,)))[0]
    hidden_VH = next(event.hidden_VH for event in events if isinstance(event, Vokens))
    usage = events[-1]
    assert isinstance(usage, Usage)

    prompt = encode(
        request_segments(story(pages=1), PUBLISHED), tokenizer, language.voken_embeddings, picture_tokens=(-4,)
    ).ids
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + usage.completion_tokens - 8:
            logits_T = language.logits(language.states(language.embed(torch.tensor([ids])))[0, -1])
            logits_T[language.voken_embeddings.first :] = -np.inf
            ids.append(int(logits_T.argmax()))
        states_SH = language.states(language.embed(torch.tensor([ids + language.voken_embeddings.ids])))[0]
    assert whole.startswith(tokenizer.decode(ids[len(prompt) :]).lstrip())
    np.testing.assert_allclose(hidden_VH, states_SH[len(ids) - 1 : len(ids) + 7].numpy(), atol=1e-5)


def test_pictures_are_exempt_from_repetition_penalties(generator: VokenGenerator) -> None:
    """However high the penalty, the second picture is as likely as the first."""
    bias(generator, first_voken=100)
    sampling = Sampling(temperature=0, repetition_penalty=50.0, max_page_tokens=12)
    assert pages_with_pictures(run(generator, reply(sampling=sampling))[0]) == [1, 2, 3]


# Batch invariance


def random_request(seed: int) -> StoryRequest:
    rng = random.Random(seed)
    sampling = Sampling(
        temperature=rng.choice([0, 0.05, 0.1]),
        top_p=rng.choice([0.8, 0.9, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        max_page_tokens=rng.randint(4, 12),
    )
    prompt = " ".join(rng.choice(["fox", "owl", "tent", "snow", "a", "finds"]) for _ in range(rng.randint(1, 60)))
    mode = rng.choice(["story", "story", "reply", "caption"])
    return StoryRequest(prompt=(prompt,), pages=1, seed=seed, sampling=sampling, mode=mode)  # type: ignore[arg-type]


@pytest.mark.parametrize("num", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_requests_in_random_batches_write_what_each_writes_alone(num: int) -> None:
    alone, beside = new_generator(), new_generator()
    requests = [random_request(seed) for seed in range(num)]
    num_close, expected = [], []
    for request in requests:
        before = alone.num_close_choices
        expected.append(run(alone, request)[0])
        num_close.append(alone.num_close_choices - before)

    async def all_in_batches() -> list[list[GeneratorEvent]]:
        rng = random.Random(1)

        async def one(request: StoryRequest) -> list[GeneratorEvent]:
            await asyncio.sleep(rng.random() * 2)
            return [event async for event in beside.generate(request)]

        return await asyncio.gather(*map(one, requests))

    num_compared = 0
    for mine, theirs, close in zip(asyncio.run(all_in_batches()), expected, num_close, strict=True):
        if close and text(mine) != text(theirs):
            continue
        num_compared += 1
        assert text(mine) == text(theirs)
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(a, Vokens) and isinstance(b, Vokens):
                np.testing.assert_allclose(a.hidden_VH, b.hidden_VH, atol=1e-4)
    print(f"{num_compared} of {num} compared; close choices {sum(num_close)}")
    assert num_compared >= 0.97 * num, f"{num_compared} of {num}, close choices {sum(num_close)}, margin {CLOSE}"
    assert beside.num_running == beside.num_waiting == beside.queued_cost == 0


def test_a_long_prompt_is_read_in_parts_while_others_write() -> None:
    generator = new_generator()
    long_prompt = "a fox and an owl " * 80

    async def write() -> tuple[int, int]:
        others = []
        during = 0
        stream = generator.generate(story(pages=4, sampling=Sampling(temperature=0.1, max_page_tokens=60)))
        await anext(stream)
        joining = asyncio.create_task(collect(generator.generate(story(prompt=(long_prompt,), pages=1))))
        async for event in stream:
            others.append(event)
            during += not joining.done()
        await joining
        return during, len(others)

    async def collect(stream: object) -> list[object]:
        return [event async for event in stream]  # type: ignore[attr-defined]

    during, num_events = asyncio.run(write())
    num_parts = generator.num_prompt_tokens // 16
    assert during > min(num_parts, num_events) / 2


# Prefixes


def test_a_prompt_that_was_read_before_is_not_read_again() -> None:
    generator, fresh = new_generator(), new_generator()
    first = story(prompt=("A fox, an owl and a bear go to the sea in a small red boat",))
    run(generator, first)
    assert generator.num_reused_tokens == 0
    again = run(generator, first)[0]
    assert generator.num_reused_tokens == generator.num_prompt_tokens / 2 - 1
    assert text(again) == text(run(fresh, first)[0])


def test_the_next_page_begins_with_the_pages_before_it() -> None:
    generator, fresh = new_generator(), new_generator()
    first = run(generator, story(pages=1, sampling=Sampling(temperature=0, max_page_tokens=10)))[0]
    longer = story(prompt=("A fox and a balloon",), pages=1, previous=(Page(index=1, text=text(first)),))
    before = generator.num_reused_tokens
    found = run(generator, longer)[0]
    assert generator.num_reused_tokens > before
    assert text(found) == text(run(fresh, longer)[0])


def test_pictures_are_known_by_their_content() -> None:
    generator, fresh = new_generator(), new_generator()

    def ask(colour: str) -> StoryRequest:
        return reply(prompt=(png(colour), "What is in this picture?"), pictures="forced", sampling=SHARP)

    red = run(generator, ask("red"))[0]
    num_read = generator.num_prompt_tokens
    blue = run(generator, ask("blue"))[0]
    num_shared = generator.num_reused_tokens
    assert num_shared < num_read / 2  # only what stands before the picture
    again = run(generator, ask("red"))[0]
    assert generator.num_reused_tokens - num_shared == num_read - 1
    for found, colour in ((red, "red"), (blue, "blue"), (again, "red")):
        expected = run(fresh, ask(colour))[0]
        assert text(found) == text(expected)
    states = [next(event.hidden_VH for event in events if isinstance(event, Vokens)) for events in (red, blue, again)]
    assert np.abs(states[0] - states[1]).max() > 1e-3
    np.testing.assert_allclose(states[0], states[2], atol=1e-5)


# Limits


@pytest.mark.parametrize("num", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_after_random_cancels_nothing_is_in_flight(num: int) -> None:
    generator = new_generator(num_slots=6, max_batch=4)

    async def cancel(seed: int) -> None:
        rng = random.Random(seed)
        await asyncio.sleep(rng.random())
        stream = generator.generate(story(pages=8, seed=seed, key=str(seed % 3)))
        left = rng.randint(0, 5)
        task = asyncio.ensure_future(anext(stream))
        await asyncio.wait([task], timeout=0.01 * rng.randint(0, 30))
        if task.done():
            async for _ in stream:
                left -= 1
                if left <= 0:
                    break
            await stream.aclose()  # type: ignore[attr-defined]
        else:
            task.cancel()

    async def run_all() -> None:
        await asyncio.gather(*(cancel(seed) for seed in range(num)))
        for _ in range(200):
            if not generator.num_running + generator.num_waiting:
                return
            await asyncio.sleep(0.05)

    asyncio.run(run_all())
    assert generator.num_running == generator.num_waiting == generator.queued_cost == 0
    assert len(generator._free_slots) == 6
    assert text(run(generator, story())[0]) == text(run(new_generator(), story())[0])


def test_more_requests_than_rows_wait_and_more_than_the_limit_are_refused() -> None:
    generator = new_generator(num_slots=2, max_jobs=5)
    assert len(run(generator, *[story(seed=seed) for seed in range(5)])) == 5
    with pytest.raises(EngineFull, match="at most 5"):
        run(generator, *[story(seed=seed) for seed in range(6)])


BLOCK_GIB = BLOCK * 2 * 2 * 2 * 12 * 4 / 2**30
"""Of the tiny model: keys and values, layers, key heads, their width, bytes."""


def test_tokens_that_are_drawn_on_the_device_are_those_that_the_cpu_draws() -> None:
    requests = [story(seed=seed, sampling=SAMPLINGS[seed % len(SAMPLINGS)]) for seed in range(12)]
    requests += [reply(seed=seed, pictures=mode) for seed, mode in enumerate(("auto", "none", "forced"))]
    expected = [text(events) for events in run(new_generator(), *requests)]
    generator = new_generator(draws_on_device=True, kv_cache_gib=80 * BLOCK_GIB)
    assert [text(events) for events in run(generator, *requests)] == expected
    assert generator.num_close_choices == 0


SAMPLINGS = [
    SHARP,
    Sampling(temperature=0, max_page_tokens=10),
    Sampling(temperature=0.1, repetition_penalty=1.2, max_page_tokens=12),
    Sampling(temperature=0.2, top_p=0.5, max_page_tokens=8),
]


def test_requests_that_share_blocks_wait_for_room_and_are_written_as_in_whole_slots() -> None:
    requests = [story(seed=seed, key=str(seed % 2), pages=2 + seed % 3) for seed in range(10)]
    expected = [text(events) for events in run(new_generator(), *requests)]
    generator = new_generator(kv_cache_gib=20 * BLOCK_GIB)
    blocks = generator._cache.blocks
    assert blocks and blocks.num_blocks == 20
    num_running = []
    forward = generator._cache.forward

    def note(body: torch.nn.Module, embeds_TH: Tensor, counts: Sequence[tuple[int, int]], **options: Any) -> Tensor:
        num_running.append(generator.num_running)
        return forward(body, embeds_TH, counts, **options)

    generator._cache.forward = note  # type: ignore[method-assign, assignment]
    assert [text(events) for events in run(generator, *requests)] == expected
    assert 1 < max(num_running) < len(requests)
    assert blocks.num_available(generator._free_slots) == 20
    generator._cache.forward = forward  # type: ignore[method-assign]
    before = generator.num_reused_tokens
    assert text(run(generator, requests[-1])[0]) == expected[-1]
    assert generator.num_reused_tokens > before


def test_a_request_whose_beginning_cannot_be_copied_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another goes on meanwhile, and the slot, which had read more, holds nothing that can be relied on."""
    generator = new_generator(num_slots=3, kv_cache_gib=60 * BLOCK_GIB)
    longest, short, long = story(prompt=("fox " * 500,), pages=1), story(seed=5, pages=1), story(seed=7, pages=8)
    expected = [text(run(generator, request)[0]) for request in (short, longest, long)]
    run(generator, short)
    cache, copy = generator._cache, generator._cache.copy
    found: list[tuple[int, int, int]] = []

    def fail_once(source: int, target: int, length: int) -> None:
        if found or generator.num_running < 2:
            return copy(source, target, length)
        before = cache.lengths[target]
        try:
            with monkeypatch.context() as patch:
                patch.setattr(cache, "stored_values", [OutOfMemory()])
                copy(source, target, length)
        finally:
            found.append((generator.num_running, before, cache.lengths[target]))

    async def together() -> list[str]:
        beside = generator.generate(long)
        events = [await anext(beside)]
        with pytest.raises(torch.OutOfMemoryError):
            await collect(generator.generate(short))
        events += await collect(beside)
        return [text(await collect(generator.generate(request))) for request in (short, longest)] + [text(events)]

    async def collect(events: AsyncIterator[GeneratorEvent]) -> list[GeneratorEvent]:
        return [event async for event in events]

    monkeypatch.setattr(cache, "copy", fail_once)
    assert asyncio.run(asyncio.wait_for(together(), 60)) == expected
    ((num_running, before, after),) = found
    assert num_running == 2 and before > 0 and after == 0
    assert cache.blocks and cache.blocks.num_available(generator._free_slots) == cache.blocks.num_blocks
    assert sorted(generator._free_slots) == [0, 1, 2]


class OutOfMemory:
    """A store of a GPU without memory."""

    def __getitem__(self, where: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_request_as_long_as_the_context_takes_the_whole_store_and_its_own_beginning() -> None:
    generator = new_generator(kv_cache_gib=19 * BLOCK_GIB)
    longest = [story(seed=seed, prompt=("fox " * 545,), pages=1) for seed in (1, 2)]
    prompt = generator.prompter.encode(longest[0])
    assert len(prompt.ids) + prompt.num_new > 18 * BLOCK
    expected = [text(events) for events in run(new_generator(), *longest)]
    assert [text(events) for events in run(generator, *longest)] == expected
    assert generator.num_reused_tokens == len(prompt.ids) - 1


def test_a_store_without_room_for_the_context_is_refused() -> None:
    with pytest.raises(SettingsError, match="one request of 600 tokens takes .* set kv_cache_gib"):
        new_generator(kv_cache_gib=18.9 * BLOCK_GIB)


def test_a_client_with_many_stories_leaves_room_for_another() -> None:
    generator = new_generator(num_slots=4, max_batch=4)
    ends: list[str] = []

    async def one(key: str, pages: int) -> None:
        async for _ in generator.generate(story(key=key, pages=pages)):
            pass
        ends.append(key)

    async def together() -> None:
        many = [asyncio.create_task(one("many", 6)) for _ in range(10)]
        await asyncio.sleep(0.05)
        await one("few", 1)
        await asyncio.gather(*many)

    asyncio.run(together())
    assert ends.index("few") <= 1


def test_a_clients_long_prompts_do_not_hold_up_anothers_short_one() -> None:
    generator = new_generator(num_slots=8, max_batch=8)
    order: list[str] = []

    async def first_text(key: str, prompt: str) -> None:
        stream = generator.generate(story(key=key, prompt=(prompt,), pages=1))
        async for event in stream:
            if isinstance(event, TextDelta):
                order.append(key)
                break
        await stream.aclose()  # type: ignore[attr-defined]

    async def write() -> None:
        async for _ in generator.generate(story(key="writes", pages=8, sampling=Sampling(max_page_tokens=40))):
            pass

    async def together() -> None:
        writing = asyncio.create_task(write())
        await asyncio.sleep(0.05)
        many = [asyncio.create_task(first_text("long", f"{i} " + f"{i} foxes and an owl " * 60)) for i in range(5)]
        await asyncio.sleep(0.05)
        await first_text("short", "go to the sea in a small red boat, find a tent on the beach and sleep well")
        await asyncio.gather(*many)
        writing.cancel()

    asyncio.run(together())
    assert order[0] == "short", order


@pytest.mark.parametrize("draws_on_device", [False, True])
def test_a_token_that_cannot_be_drawn_ends_its_own_request_only(draws_on_device: bool) -> None:
    generator = new_generator(draws_on_device=draws_on_device)
    language = generator.language
    assert isinstance(language, Biased)
    language.breaks_on_row = 1

    async def together() -> list[object]:
        async def collect(request: StoryRequest) -> str:
            return text([event async for event in generator.generate(request)])

        requests = [story(seed=seed, key=str(seed)) for seed in range(3)]
        return await asyncio.gather(*map(collect, requests), return_exceptions=True)

    ends = asyncio.run(together())
    [bad] = [end for end in ends if isinstance(end, Exception)]
    assert isinstance(bad, FloatingPointError) and "logits are not finite" in str(bad)
    expected = [text(events) for events in run(new_generator(), *[story(seed=seed) for seed in range(3)])]
    assert sum(end == one for end, one in zip(ends, expected, strict=True)) == 2
    assert generator.num_running == 0
    assert text(run(generator, story())[0]) == expected[0]


@pytest.mark.parametrize("draws_on_device", [False, True])
def test_a_request_by_which_no_token_can_be_drawn_is_refused_beside_others(draws_on_device: bool) -> None:
    generator = new_generator(draws_on_device=draws_on_device)
    broken = [
        story(sampling=dataclasses.replace(SHARP, top_p="much")),  # type: ignore[arg-type]
        story(sampling=dataclasses.replace(SHARP, repetition_penalty=1e-310)),
        story(seed=-1),
    ]

    async def together() -> list[object]:
        async def collect(request: StoryRequest) -> str:
            return text([event async for event in generator.generate(request)])

        return await asyncio.gather(*map(collect, [story(), *broken]), return_exceptions=True)

    good, *bad = asyncio.run(together())
    assert [one.field for one in bad if isinstance(one, InvalidRequest)] == ["top_p", "repetition_penalty", "seed"]
    assert good == text(run(new_generator(), story())[0])


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (story(pictures="none"), "pictures"),
        (story(stop=("###", "")), "stop"),
        (reply(prompt=("a " * 600,)), "prompt"),
        (story(seed=-1), "seed"),
        (story(seed=0.5), "seed"),
        (story(sampling=Sampling(temperature=-0.1)), "temperature"),
        (story(sampling=Sampling(temperature=math.inf)), "temperature"),
        (story(sampling=Sampling(top_p=math.nan)), "top_p"),
        (story(sampling=Sampling(top_p=1.1)), "top_p"),
        (reply(sampling=Sampling(repetition_penalty=0.0)), "repetition_penalty"),
        (reply(sampling=Sampling(repetition_penalty=1e-310)), "repetition_penalty"),
        (reply(sampling=Sampling(repetition_penalty=1e30)), "repetition_penalty"),
    ],
)
def test_what_cannot_take_effect_is_refused(generator: VokenGenerator, request_: StoryRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generator.validate_request(request_)
    assert caught.value.field == field


# Given texts


def test_a_given_text_is_read_as_a_written_page_is_and_the_story_goes_on_after_it(generator: VokenGenerator) -> None:
    first, second = "A fox found a balloon " * 20, "He went home."  # the first is longer than one reading
    given, after_first, after_both = run(
        generator,
        story(given=(first, second), pages=3),
        story(previous=(Page(index=1, text=first.strip()),), given=(second,)),
        story(previous=(Page(index=1, text=first.strip()), Page(index=2, text=second)), pages=1),
    )
    shown = {page: "".join(e.text for e in given if isinstance(e, TextDelta) and e.page == page) for page in (1, 2, 3)}
    assert (shown[1], shown[2]) == (first, second)
    assert shown[3] == text(after_both)
    vokens = {event.page: event.hidden_VH for event in given if isinstance(event, Vokens)}
    for events in (after_first, after_both):
        for event in events:
            if isinstance(event, Vokens):
                np.testing.assert_allclose(event.hidden_VH, vokens[event.page], atol=1e-5)
    assert pages_with_pictures(given) == [1, 2, 3]
    usage = {
        name: next(e for e in events if isinstance(e, Usage)) for name, events in (("3", given), ("1", after_both))
    }
    assert usage["3"].completion_tokens == usage["1"].completion_tokens + 2 * generator.config.num_vokens


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"given": ("a", "b", "c")}, "given has 3 texts but pages is 2"),
        ({"given": ("a", " ")}, "given text 2 is empty"),
        ({"given": ("a", "half \ud83e")}, "given 'half .* half of a surrogate pair"),
        ({"given": ("a",), "mode": "reply"}, "a reply has no pages"),
        ({"given": ("a fox " * 400,)}, "context window"),
    ],
)
def test_given_texts_that_cannot_be_used_are_refused(
    generator: VokenGenerator, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        generator.validate_request(story(**changes))
