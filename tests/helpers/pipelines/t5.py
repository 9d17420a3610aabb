"""A tiny T5 text encoder and its tokenizer."""

from __future__ import annotations

from transformers import T5Config, T5EncoderModel, T5Tokenizer

PIECES = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *"abcdefghijklmnopqrstuvwxyz"]


def make_t5_tokenizer() -> T5Tokenizer:
    """Letters, and unknown for all else."""
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in PIECES], extra_ids=0)


def make_t5_text(*, hidden: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(PIECES),
        d_model=hidden,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()
