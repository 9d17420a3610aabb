"""A language model as our engine runs it, against transformers' own, and the vokens that a model folder generates,
against those of one pass.

Shape letters: S positions, H hidden width, T vocabulary, V vokens.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt5.config import NO_VISION, storybook
from minigpt5.engine.generator import VokenGenerator
from minigpt5.engine.kv_cache import SlotCache
from minigpt5.errors import ModelFolderError
from minigpt5.limits import Limits
from minigpt5.model.language import LanguageModel, load_base, load_tokenizer
from minigpt5.model.prompt import encode, request_segments
from minigpt5.model.template import make_template
from minigpt5.model.vision import Vision
from minigpt5.model.vokens import align
from minigpt5.story.stream import describe
from minigpt5.types import GeneratorEvent, Sampling, StoryRequest, TextDelta, Vokens

TOLERANCE = 1e-4
"""Largest deviation, as a share of the largest value."""
PROMPTS = (
    "A fox finds a red balloon.",
    "Two bears cross the sea in a boat that is too small for them, and the weather is bad from the first day on.",
)
NUM_NEW = 32
"""Greedy tokens."""
CONTEXT = 1024
PARTS = (7, 1, 1)
"""How many tokens are read at first and then, before the rest is read."""


def compare_base(folder: Path) -> bool:
    """Print how far a language model's states and logits deviate from transformers', and whether greedy text is equal.
    Raises ModelFolderError where it cannot be read or run."""
    from transformers.utils import logging

    from minigpt5.model.libraries import load_base_tokenizer

    logging.disable_progress_bar()
    try:
        causal = load_base(folder)
        vocabulary = len(load_base_tokenizer(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ModelFolderError(f"{folder} is no causal language model of transformers ({describe(error)})") from error
    config = dataclasses.replace(
        storybook(),
        language_model=str(folder),
        vision=NO_VISION,
        hidden=causal.config.get_text_config().hidden_size,
        vocabulary=vocabulary,
        context_tokens=CONTEXT,
    )
    tokenizer = load_tokenizer(folder, config)
    language = LanguageModel.from_causal(causal, config, folder)
    language.initialise_vokens(seed=0)
    print(f"language model {folder} ({causal.config.model_type})")
    # transformers comes first: our engine sets the attention of the same model.
    template = make_template(config, tokenizer)
    prompts = [
        encode(request_segments(_reply(prompt), template), tokenizer, language.voken_embeddings, picture_tokens=()).ids
        for prompt in PROMPTS
    ]
    expected = [_Expected.of(causal, ids, vocabulary) for ids in prompts]
    deviations = [_deviations(language, one) for one in expected]
    is_close = [report(name, *(one[name] for one in deviations)) for name in deviations[0]]
    generator = VokenGenerator(config, tokenizer, language, Vision(config), limits=Limits(num_slots=len(PROMPTS)))
    texts = [text_of(events) for events in run(generator, *map(_reply, PROMPTS))]
    is_equal = [_report_text(text, one, generator) for text, one in zip(texts, expected, strict=True)]
    return all([*is_close, *is_equal])


def compare_vokens(folder: Path) -> bool:
    """Print how far the vokens that a model folder generates, a page after another, deviate from those of one pass over
    the whole story, as training reads it."""
    from minigpt5.model.folder import load_generator_model

    config, tokenizer, language, vision = load_generator_model(folder, precision="float32")
    generator = VokenGenerator(config, tokenizer, language, vision, limits=Limits(num_slots=len(PROMPTS)))
    print(f"vokens of {folder}")
    greedy = Sampling(temperature=0.0, max_page_tokens=NUM_NEW, min_page_tokens=1)
    stories = [StoryRequest(prompt=(prompt,), pages=2, sampling=greedy) for prompt in PROMPTS]
    deviations = []
    for story, events in zip(stories, run(generator, *stories), strict=True):
        pages = [[e for e in events if isinstance(e, TextDelta) and e.page == page] for page in (1, 2)]
        texts = [text_of(page).strip() or PROMPTS[0] for page in pages]
        # The text is given, since a text that was written may have other tokens than the same text when it is read.
        given = run(generator, dataclasses.replace(story, given=tuple(texts)))[0]
        vokens_PVH = torch.stack([torch.from_numpy(e.hidden_VH) for e in given if isinstance(e, Vokens)])
        deviations.append(deviation(vokens_PVH, _forced(story, texts, generator)))
    return report("teacher-forced", *deviations)


@torch.no_grad()
def _forced(story: StoryRequest, texts: list[str], generator: VokenGenerator) -> Tensor:
    """The states of a story's vokens from one pass over all of it: (P, V, H)."""
    segments = generator.template.story(story.prompt, story.pages, texts)
    language, picture_tokens = generator.language, generator.config.vision.picture_tokens
    read = encode(segments, generator.tokenizer, language.voken_embeddings, picture_tokens=picture_tokens)
    ids_1S = torch.tensor([read.ids])
    return align(language.states(language.embed(ids_1S)), ids_1S, language.voken_embeddings)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Expected:
    """What transformers' own model gives for a prompt."""

    ids_1S: Tensor
    states_SH: Tensor
    logits_ST: Tensor
    written: list[int]
    """Greedy tokens."""

    @classmethod
    @torch.no_grad()
    def of(cls, causal: Any, ids: list[int], vocabulary: int) -> _Expected:
        ids_1S = torch.tensor([ids])
        given = causal(ids_1S, use_cache=False, output_hidden_states=True)
        outside = list(range(vocabulary, given.logits.shape[-1]))
        written_1S = causal.generate(
            ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            do_sample=False,
            max_new_tokens=NUM_NEW,
            suppress_tokens=outside or None,
        )
        return cls(
            ids_1S=ids_1S,
            states_SH=given.hidden_states[-1][0],
            logits_ST=given.logits[0, :, :vocabulary],
            written=written_1S[0, len(ids) :].tolist(),
        )


@torch.no_grad()
def _deviations(language: LanguageModel, expected: _Expected) -> dict[str, float]:
    """Of one pass, and of states from the second slot of a KV store that reads a prompt in parts."""
    embeds_1SH = language.embed(expected.ids_1S)
    states_SH = language.states(embeds_1SH)[0]
    logits_ST = language.logits(states_SH)[:, : language.voken_embeddings.first]
    cache = SlotCache.for_model(language.body, num_slots=2, num_positions=embeds_1SH.shape[1])
    sizes = [*PARTS, embeds_1SH.shape[1] - sum(PARTS)]
    parts = [cache.forward(language.body, part_TH, [(1, len(part_TH))]) for part_TH in embeds_1SH[0].split(sizes)]
    return {
        "states": deviation(states_SH, expected.states_SH),
        "logits": deviation(logits_ST, expected.logits_ST),
        "states in parts": deviation(torch.cat(parts), expected.states_SH),
    }


def _reply(prompt: str) -> StoryRequest:
    sampling = Sampling(temperature=0.0, max_page_tokens=NUM_NEW)
    return StoryRequest(prompt=(prompt,), mode="reply", pictures="none", sampling=sampling)


def _report_text(text: str, expected: _Expected, generator: VokenGenerator) -> bool:
    """Say whether our text is transformers'. Ours ends before the tokens and the strings that end a text."""
    ends = [place for place, token in enumerate(expected.written) if token in generator.end_ids]
    tokens = expected.written[: min(ends, default=NUM_NEW)]
    own = str(generator.tokenizer.decode(tokens)).lstrip()
    for stop in generator.template.stop:
        own = own.partition(stop)[0]
    is_equal = text == own
    print(f"  {'greedy text':18}{'equal' if is_equal else f'{text!r} is not {own!r}'} ({len(tokens)} tokens)")
    return is_equal


def report(name: str, *shares: float) -> bool:
    """Print the largest, which is NaN where one of them is, and return whether it is small enough."""
    share = float(np.max(shares))
    is_close = share <= TOLERANCE
    print(f"  {name:18}deviate by {share:.1e} of the largest{'' if is_close else f', more than {TOLERANCE:.0e}'}")
    return is_close


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def text_of(events: Sequence[GeneratorEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def run(generator: VokenGenerator, *requests: StoryRequest) -> list[list[GeneratorEvent]]:
    """All requests at once, each with its events."""

    async def collect(request: StoryRequest) -> list[GeneratorEvent]:
        return [event async for event in generator.generate(request)]

    async def together() -> list[list[GeneratorEvent]]:
        return await asyncio.gather(*map(collect, requests))

    return asyncio.run(together())
