"""Our language model as a folder of transformers, for vLLM: `python -m benchmarks.peers.export MODEL FOLDER`.

The adapter is merged and the voken rows stand after the base's own, so that it is the model that our engine runs. The
weights are bfloat16, in which vLLM computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minigpt5.config import ModelConfig
from minigpt5.model.folder import load_language
from minigpt5.model.folder_config import load_config
from minigpt5.model.language import LanguageModel, load_base, load_tokenizer
from minigpt5.model.locate import find_part


@torch.no_grad()
def export(model: Path, folder: Path) -> None:
    """Write `folder`: weights, config and tokenizer."""
    config = load_config(model)
    base = find_part(model, config, config.language_model)
    causal = load_base(base)
    language = load_language(model, config, base=causal)
    embedding_TH, head_TH = widened(language, config)
    causal.set_input_embeddings(nn.Embedding.from_pretrained(embedding_TH))
    head = nn.Linear(config.hidden, len(head_TH), bias=False)
    head.weight = nn.Parameter(head_TH)
    causal.set_output_embeddings(head)
    causal.config.vocab_size, causal.config.tie_word_embeddings = len(head_TH), False
    causal.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(base, config).save_pretrained(folder)


def widened(language: LanguageModel, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Embedding and head with the rows of the vokens and the placeholder: (T, H) each."""
    rows, vocabulary = language.voken_embeddings, config.vocabulary
    return (
        torch.cat([language.embedding[:vocabulary], rows.embedding]),
        torch.cat([language.head.weight[:vocabulary], rows.head]),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.export", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    export(options.model, options.folder)


if __name__ == "__main__":
    main()
