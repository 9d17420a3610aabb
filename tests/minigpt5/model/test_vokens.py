"""Training and serving must read a picture's vokens from the same states."""

from __future__ import annotations

import asyncio
import io

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt5.engine.generator import VokenGenerator
from minigpt5.engine.sampling import mask
from minigpt5.errors import InvalidRequest
from minigpt5.model.language import pad
from minigpt5.model.prompt import encode, request_segments
from minigpt5.model.published_template import PUBLISHED
from minigpt5.model.vokens import align
from minigpt5.types import InputImage, Page, Sampling, StoryRequest, TextDelta, Usage, Vokens
from tests.helpers.tiny import tiny_config, tiny_language, tiny_tokenizer, tiny_vision


@pytest.fixture(scope="module")
def generator() -> VokenGenerator:
    config = tiny_config()
    return VokenGenerator(config, tiny_tokenizer(config), tiny_language(config), tiny_vision(config))


def run(generator: VokenGenerator, request: StoryRequest) -> list[object]:
    async def collect() -> list[object]:
        return [event async for event in generator.generate(request)]

    return asyncio.run(collect())


def request(**changes: object) -> StoryRequest:
    values = {"prompt": ("A fox and a balloon",), "pages": 3, "seed": 5, "sampling": Sampling(max_page_tokens=12)}
    return StoryRequest(**(values | changes))  # type: ignore[arg-type]


def plain_picture(colour: str) -> InputImage:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return InputImage(data=file.getvalue())


def test_generated_and_teacher_forced_states_are_the_same(generator: VokenGenerator) -> None:
    events = run(generator, request(sampling=Sampling(temperature=0, max_page_tokens=12)))
    language, tokenizer = generator.language, generator.tokenizer
    generated = [event.hidden_VH for event in events if isinstance(event, Vokens)]

    ids = encode(request_segments(request(), PUBLISHED), tokenizer, language.voken_embeddings, picture_tokens=(-4,)).ids
    with torch.no_grad():  # rebuild the sequence greedily, without a cache
        for _ in generated:
            for written in range(12):
                state_H = language.states(language.embed(torch.tensor([ids])))[0, -1]
                closed = (
                    [language.voken_embeddings.first, *generator.end_ids]
                    if written < Sampling().min_page_tokens
                    else []
                )
                logits_T = language.logits(state_H).numpy()
                token = int(mask(logits_T, closed, first_voken=language.voken_embeddings.first).argmax())
                if token == language.voken_embeddings.first or token in generator.end_ids:
                    break
                ids.append(token)
            ids += language.voken_embeddings.ids
        ids_1S = torch.tensor([ids])
        forced_PVH, _ = align(language.states(language.embed(ids_1S)), ids_1S, language.voken_embeddings)
    np.testing.assert_allclose(np.stack(generated), forced_PVH.numpy(), atol=1e-5)


def test_captions_with_a_cached_text_give_the_states_of_the_whole_sequence(generator: VokenGenerator) -> None:
    language = generator.language
    texts, end = [[1, 40, 41, 42], [1, 50], [1, 60, 61]], [70, 71]
    ids_BS, mask_BS = pad(texts, 2)
    whole_BS, whole_mask_BS = pad([text + language.voken_embeddings.ids + end for text in texts], 2)
    with torch.no_grad():
        whole_BSH = language.states(language.embed(whole_BS), mask_BS=whole_mask_BS)
        expected_PVH, where_P2 = align(whole_BSH, whole_BS, language.voken_embeddings)
        torch.testing.assert_close(language.voken_states(ids_BS, mask_BS), expected_PVH, atol=1e-5, rtol=1e-4)
        with_end_BAH = language.voken_states(ids_BS, mask_BS, next_ids=end)
    for text, whole_SH, states_AH in zip(texts, whole_BSH, with_end_BAH, strict=True):
        expected_AH = whole_SH[len(text) - 1 :][: language.voken_embeddings.num_vokens + len(end)]
        torch.testing.assert_close(states_AH, expected_AH, atol=1e-5, rtol=1e-4)
    assert where_P2.tolist() == [[0, 3], [1, 1], [2, 2]]


def test_gradients_reach_the_rows_and_nothing_else(generator: VokenGenerator) -> None:
    language = generator.language
    ids_BS, mask_BS = pad([[1, 40, 41]], 2)
    language.voken_states(ids_BS, mask_BS).sum().backward()
    assert language.voken_embeddings.embedding.grad is not None
    assert language.voken_embeddings.embedding.grad[:7].abs().sum() > 0
    assert all(parameter.grad is None for parameter in language.body.parameters())
    language.zero_grad()


def test_the_asked_pages_are_written_each_with_its_vokens(generator: VokenGenerator) -> None:
    events = run(generator, request())
    assert [event.page for event in events if isinstance(event, Vokens)] == [1, 2, 3]
    assert {event.page for event in events if isinstance(event, TextDelta)} == {1, 2, 3}
    assert isinstance(events[-1], Usage)
    assert all(event.hidden_VH.shape == (8, 48) for event in events if isinstance(event, Vokens))
    pages = [event.page for event in events if not isinstance(event, Usage)]
    assert pages == sorted(pages)


def test_a_seed_fixes_the_story_whoever_runs_beside_it(generator: VokenGenerator) -> None:
    async def together() -> list[list[object]]:
        async def collect(seed: int) -> list[object]:
            return [event async for event in generator.generate(request(seed=seed))]

        return await asyncio.gather(*(collect(seed) for seed in (5, 6, 7)))

    def text(events: list[object]) -> str:
        return "".join(event.text for event in events if isinstance(event, TextDelta))

    alone = text(run(generator, request(seed=5)))
    beside = asyncio.run(together())
    assert text(beside[0]) == alone
    assert text(beside[1]) != alone


def test_caption_mode_writes_nothing_and_gives_one_picture(generator: VokenGenerator) -> None:
    events = run(generator, request(mode="caption", pages=1))
    assert [type(event) for event in events] == [Vokens, Usage]


def test_a_story_goes_on_after_its_previous_pages(generator: VokenGenerator) -> None:
    events = run(generator, request(previous=(Page(index=1, text="A fox sat."),), pages=2))
    assert [event.page for event in events if isinstance(event, Vokens)] == [2, 3]


def test_an_input_picture_changes_what_is_written(generator: VokenGenerator) -> None:
    texts = []
    for colour in ("red", "blue"):
        events = run(generator, request(prompt=(plain_picture(colour), "What is this?"), pages=1))
        texts.append(next(event.hidden_VH for event in events if isinstance(event, Vokens)))
    assert not np.allclose(texts[0], texts[1])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": ("  ",)}, "prompt"),
        ({"pages": 0}, "pages"),
        ({"pages": 65}, "pages"),
        ({"prompt": ("a " * 600,)}, "prompt"),
    ],
)
def test_bad_requests_name_their_field(generator: VokenGenerator, changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generator.validate_request(request(**changes))
    assert caught.value.field == field


def test_only_the_first_voken_of_a_picture_is_learnt(generator: VokenGenerator) -> None:
    rows = generator.language.voken_embeddings
    tokens = encode(PUBLISHED.story(["A fox"], 1, ["One."]), generator.tokenizer, rows, picture_tokens=(-4,))
    learnt = [label for label in tokens.labels if label >= rows.first]
    assert learnt == [rows.first]
    assert [token for token in tokens.ids if token >= rows.first] == rows.ids


def test_words_that_spell_vokens_and_slots_are_words(generator: VokenGenerator) -> None:
    rows = generator.language.voken_embeddings
    tokens = encode(PUBLISHED.story(["[IMG0] <ImageHere>"], 1, []), generator.tokenizer, rows, picture_tokens=(-4,))
    assert max(tokens.ids) < rows.first
    events = run(generator, request(prompt=(plain_picture("red"), "<ImageHere> [IMG0]"), pages=1))
    assert isinstance(events[-1], Usage)
