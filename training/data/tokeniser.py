"""Tokenises examples where they are made: in data workers, beside training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from minigpt5.config import ModelConfig
from minigpt5.model.folder_config import load_config
from minigpt5.model.language import load_tokenizer
from minigpt5.model.locate import find_part, locate
from minigpt5.model.prompt import encode
from minigpt5.model.story_windows import StoryWindows
from minigpt5.model.template import make_template
from minigpt5.model.vokens import VokenEmbeddings
from minigpt5.model.window import Window
from minigpt5.objective.example import Example
from minigpt5.types import PromptPart
from training.data.written import write_out
from training.presets import DrawsBy


@dataclass(frozen=True)
class Tokeniser:
    """Fills `tokens` of examples for a model folder. Every process reads the tokenizer for itself, once."""

    start: str
    """The folder's path, URI or hub id."""
    draws_by: DrawsBy = "vokens"
    """See `write_out`, which comes first."""

    def __call__(self, example: Example) -> Example:
        config, tokenizer, voken_embeddings = _load(self.start)
        example = write_out(example, self.draws_by, reads_pictures=config.vision.family != "none")
        tokens = encode(
            example.segments,
            tokenizer,
            voken_embeddings,
            picture_tokens=config.vision.picture_tokens,
            published_quirks=config.published_quirks,
        )
        return dataclasses.replace(example, tokens=tokens)

    def windows(self, prompt: Sequence[PromptPart], texts: Sequence[str]) -> list[Window]:
        """What is read before each page of a story, as serving reads it at the model's own settings."""
        config, tokenizer, _ = _load(self.start)
        template = make_template(config, tokenizer)
        story = StoryWindows(prompt, len(texts), config=config, template=template, tokenizer=tokenizer)
        return story.of([story.size(text) for text in texts])


@lru_cache(maxsize=1)
def _load(start: str) -> tuple[ModelConfig, PreTrainedTokenizerBase, VokenEmbeddings]:
    """The vokens have ids here, and no weights."""
    folder = locate(start)
    config = load_config(folder)
    tokenizer = load_tokenizer(find_part(folder, config, config.language_model), config)
    return config, tokenizer, VokenEmbeddings(config.vocabulary, config.num_vokens, 0)
