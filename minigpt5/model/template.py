"""The template that a model folder names, for its tokenizer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from minigpt5.config import ModelConfig
from minigpt5.model.chat_template import read_chat_template
from minigpt5.model.prompt import READ, Template
from minigpt5.model.published_template import PublishedTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_template(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of training and serving alike. Raises ModelFolderError where the tokenizer's own does not serve."""
    if config.template == "published":
        return PublishedTemplate(caption_opens=config.caption_opens)
    template = dataclasses.replace(read_chat_template(tokenizer), caption_opens=config.caption_opens)
    return dataclasses.replace(template, picture=(READ,)) if config.vision.family == "own" else template
