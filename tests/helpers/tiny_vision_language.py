"""Tiny random vision-language models of the real classes, with their own image processors, as folders on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

HIDDEN = 32
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def make_tokenizer(folder: Path, markers: list[str], *, bos: str | None = None) -> PreTrainedTokenizerFast:
    """Write a byte-level tokenizer with a model's markers as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=markers,
    )
    own.save_pretrained(folder)
    return own


def make_qwen2_5_vl(folder: Path) -> None:
    """One embedding for 4 x 4 pixels; windows of 2 x 2 embeddings in all layers of the tower but one."""
    own = make_tokenizer(folder, ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(own) + 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "eos_token_id": own.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 2,
            "window_size": 8,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [1],
        },
        **{f"{name}_token_id": own.convert_tokens_to_ids(f"<|{token}|>") for name, token in QWEN_MARKERS.items()},
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}).save_pretrained(folder)


QWEN_MARKERS = {
    "image": "image_pad",
    "video": "video_pad",
    "vision_start": "vision_start",
    "vision_end": "vision_end",
}
MAKERS: dict[str, Callable[[Path], None]] = {
    "qwen2_5_vl": make_qwen2_5_vl,
}


def make_vision_language(kind: str, folder: Path) -> None:
    """Write a tiny random model of a type, with its tokenizer and image processor."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    MAKERS[kind](folder)
