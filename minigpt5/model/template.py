"""The template that a model folder names, for its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minigpt5.config import ModelConfig
from minigpt5.model.chat_template import read_chat_template
from minigpt5.model.prompt import Template
from minigpt5.model.published_template import PUBLISHED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_template(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of training and serving alike. Raises ModelFolderError where the tokenizer's own does not serve."""
    return read_chat_template(tokenizer) if config.template == "chat" else PUBLISHED
