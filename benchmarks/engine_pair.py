"""Both engines of a model folder, and how the bench loads them: the one place where precision and backend are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.load import Load
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.engine.threads import share, single_thread
from minigpt5.model.folder import load_decoder_model, load_generator_model
from minigpt5.model.prompt import encode as encode_prompt
from minigpt5.model.prompt import request_segments
from minigpt5.types import StoryRequest


class Engines:
    """Both engines, and their parts for the ways without an engine."""

    def __init__(self, generator: VokenGenerator, decoder: DiffusionDecoder) -> None:
        self.generator, self.decoder, self.config = generator, decoder, generator.config
        self._num_asked = 0

    def new_stories(self, num: int, load: Load, *, pictures: str) -> list[StoryRequest]:
        first, self._num_asked = self._num_asked, self._num_asked + num
        return [load.story(index, self.config, pictures=pictures) for index in range(first, first + num)]

    def new_texts(self, num: int, load: Load) -> list[StoryRequest]:
        """Requests for one page of greedy text each."""
        first, self._num_asked = self._num_asked, self._num_asked + num
        return [load.text(index, self.config) for index in range(first, first + num)]

    def prompt_ids(self, request: StoryRequest) -> list[int]:
        return encode_prompt(
            request_segments(request, self.generator.template),
            self.generator.tokenizer,
            self.generator.language.voken_embeddings,
            picture_tokens=self.config.vision.picture_tokens,
        ).ids


def load_engines(
    model: Path,
    *,
    num_cores: int,
    is_reference: bool = False,
    writes_alone: bool = False,
    context_tokens: int | None = None,
) -> Engines:
    """Both engines with their share of the cores. `is_reference`: float32 and torch's own kernels instead of what is
    fastest on this machine. `writes_alone`: the generator has all cores."""
    generator_threads, decoder_threads = share(num_cores)
    if writes_alone:
        generator_threads = num_cores
    precision, backend = ("float32", "eager") if is_reference else (None, "auto")
    with single_thread():
        config, *parts = load_generator_model(model, precision=precision)
        drawing = load_decoder_model(model, backend=backend, num_threads=decoder_threads)
        config = dataclasses.replace(config, context_tokens=context_tokens or config.context_tokens)
        generator = VokenGenerator(config, *parts, num_threads=generator_threads)
    return Engines(generator, DiffusionDecoder(*drawing, num_threads=decoder_threads))
