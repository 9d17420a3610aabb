"""The generator with a chat template, that of the installed SmolLM2: it reads and ends as training teaches."""

from __future__ import annotations

import asyncio
import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minigpt5.config import ModelConfig
from minigpt5.engine.generator import VokenGenerator
from minigpt5.model.language import LanguageModel
from minigpt5.model.prompt import IGNORED, Segment, encode
from minigpt5.model.vision import Vision
from minigpt5.model.vokens import align
from minigpt5.types import GeneratorEvent, Page, Picture, Sampling, StoryRequest, TextDelta, Vokens
from tests.helpers.tiny import tiny_config, tiny_language, tiny_tokenizer, tiny_vision

PAGES = ("It woke up.", "It saw a balloon, and ran.", "It <|im_end|> hid [IMG0].")


class Reciting(LanguageModel):
    """The tiny model, sure of the tokens of one sequence. It counts on from the ids that it last embedded."""

    def __init__(self, language: LanguageModel) -> None:
        super().__init__(language.body, language.head, language.voken_embeddings)
        self.sequence: list[int] = []
        self.num_read = 0

    def embed(self, ids_BS: Tensor, image_NQH: Tensor | None = None) -> Tensor:
        self.num_read += ids_BS.shape[1]
        return super().embed(ids_BS, image_NQH)

    def logits(self, states_BSH: Tensor) -> Tensor:
        logits = super().logits(states_BSH)
        if self.sequence:
            logits[..., self.sequence[self.num_read]] += 1000
        return logits


@functools.cache
def shared_parts() -> tuple[ModelConfig, PreTrainedTokenizerBase, Vision]:
    """What no test changes."""
    config = dataclasses.replace(tiny_config(), template="chat")
    return config, tiny_tokenizer(config), tiny_vision(config)


@pytest.fixture
def generator() -> VokenGenerator:
    config, tokenizer, vision = shared_parts()
    return VokenGenerator(config, tokenizer, Reciting(tiny_language(config)), vision)


def run(generator: VokenGenerator, request: StoryRequest) -> list[GeneratorEvent]:
    async def collect() -> list[GeneratorEvent]:
        return [event async for event in generator.generate(request)]

    return asyncio.run(collect())


def tokens(generator: VokenGenerator, segments: list[Segment]) -> tuple[list[int], list[int]]:
    picture_tokens = generator.config.vision.picture_tokens
    found = encode(segments, generator.tokenizer, generator.language.voken_embeddings, picture_tokens=picture_tokens)
    return found.ids, [label for label in found.labels if label != IGNORED]


def test_given_pages_have_the_vokens_of_training(generator: VokenGenerator) -> None:
    """State for state: the tokens of both ways are the same ones."""
    language = generator.language
    ids, _ = tokens(generator, generator.template.story(["A fox"], 3, PAGES))
    with torch.no_grad():
        expected_PVH, _ = align(
            language.states(language.embed(torch.tensor([ids]))), torch.tensor([ids]), language.voken_embeddings
        )
    whole = StoryRequest(prompt=("A fox",), pages=3, given=PAGES)
    picture = Picture(page=1, png=b"", width=1, height=1, seed=1, denoise_steps=1)
    previous = (Page(index=1, text=PAGES[0], picture=picture),)
    resumed = StoryRequest(prompt=("A fox",), pages=2, given=PAGES[1:], previous=previous)
    for request in (whole, resumed):
        found = [event.hidden_VH for event in run(generator, request) if isinstance(event, Vokens)]
        np.testing.assert_allclose(found, expected_PVH[-len(found) :].numpy(), atol=1e-5)


def test_a_model_that_recites_its_training_writes_the_same_tokens_and_stops(generator: VokenGenerator) -> None:
    language = generator.language
    assert isinstance(language, Reciting)
    words = "A fox in a tent. It sees a balloon"
    asked = "###Human: Describe <|im_end|> it."
    request = StoryRequest(prompt=(asked,), mode="reply", pages=1, sampling=Sampling(temperature=0, max_page_tokens=60))
    prompt, _ = tokens(generator, generator.template.reply(request.prompt, ()))
    answer, _ = tokens(generator, [*generator.template.reply(request.prompt, ()), *generator.template.answer(words)])
    language.sequence = answer
    events = run(generator, request)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == words
    assert answer[-1] in generator.end_ids and answer[: len(prompt)] == prompt
    assert language.num_read == len(answer) - 1, "it read all but the end of its turn, and nothing after it"


def test_the_published_end_is_plain_text_to_a_chat(generator: VokenGenerator) -> None:
    language = generator.language
    assert isinstance(language, Reciting)
    words = "One ### two"
    asked = StoryRequest(prompt=("Count.",), mode="reply", pages=1, sampling=Sampling(temperature=0))
    language.sequence, _ = tokens(
        generator, [*generator.template.reply(asked.prompt, ()), *generator.template.answer(words)]
    )
    assert "".join(event.text for event in run(generator, asked) if isinstance(event, TextDelta)) == words
    assert generator.template.stop == ()
