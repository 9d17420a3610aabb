"""Tiny CLIP text encoders and their tokenizer."""

from __future__ import annotations

from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def make_clip_tokenizer() -> CLIPTokenizer:
    """Bytes, without merges."""
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(TOKENS)}, merges=[], model_max_length=77, pad_token="!"
    )


def make_clip_text(*, hidden: int = 32, projection: int = 0) -> CLIPTextModel | CLIPTextModelWithProjection:
    """`projection`: the width of the pooled vector, of a model that has one."""
    config = CLIPTextConfig(
        vocab_size=len(TOKENS),
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=projection or hidden,
        bos_token_id=len(TOKENS) - 2,
        eos_token_id=len(TOKENS) - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
