"""The first thing that a Q-Former learns: to write, for a picture, the words of what it shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minigpt5.model.language import LanguageModel
from minigpt5.model.vision import Vision
from minigpt5.objective.example import Example

WORD_SHARPNESS = 8.0
"""Distances are in units of a word's own size, so that an embedding at its word is e^8 times as near as at none."""


def word_losses(
    language: LanguageModel, vision: Vision, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> dict[str, Tensor]:
    """Teach each embedding of a read picture to be that of a word of what the picture shows, in order.

    A picture then reads like a text; the tokens of the batch are what each one is told apart from. Shape letters: N
    pictures, Q embeddings of each, W tokens, H hidden width.
    """
    image_NQH = vision([picture for example in examples for picture in example.read]).float()
    filler = tokenizer.encode(".", add_special_tokens=False)[:1] * image_NQH.shape[1]
    said = [tokenizer.encode(text, add_special_tokens=False) for example in examples for text in example.shown]
    ids_NQ = torch.tensor([(ids + filler)[: image_NQH.shape[1]] for ids in said], device=image_NQH.device)
    seen_W, target_NQ = ids_NQ.unique(return_inverse=True)
    words_WH = language.embed(seen_W[None])[0].detach().float()
    distance_NQW = (image_NQH[:, :, None] - words_WH).square().sum(-1) / words_WH.square().sum(-1).mean()
    chosen = F.cross_entropy(-WORD_SHARPNESS * distance_NQW.flatten(0, 1), target_NQ.flatten())
    near = distance_NQW.gather(2, target_NQ[..., None]).mean()
    return {"loss": chosen + near, "words": chosen, "distance": near}
