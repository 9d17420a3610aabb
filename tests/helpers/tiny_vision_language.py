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
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

HIDDEN = 32
SPREAD = 0.3
"""Of weights: with the usual 0.02 what is read would hardly decide what is written."""
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": SPREAD,
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


def make_qwen2_vl(folder: Path) -> None:
    """One embedding for 4 x 4 pixels."""
    sizes = {"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}
    config = Qwen2VLConfig(**_qwen(folder), vision_config={**sizes, "initializer_range": SPREAD})
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)


def make_qwen2_5_vl(folder: Path) -> None:
    """One embedding for 4 x 4 pixels; windows of 2 x 2 embeddings in one of the tower's two layers."""
    sizes = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 2}
    windows = {"window_size": 8, "fullatt_block_indexes": [1]}
    vision = {**sizes, **windows, "out_hidden_size": HIDDEN, "initializer_range": SPREAD}
    config = Qwen2_5_VLConfig(**_qwen(folder), vision_config=vision)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)


def _qwen(folder: Path) -> dict[str, Any]:
    """Write a Qwen-VL's tokenizer and image processor; the rest of its config."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    own = make_tokenizer(folder, [f"<|{name}|>" for name in names.values()])
    Qwen2VLImageProcessorPil(patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}).save_pretrained(folder)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {"vocab_size": len(own) + 5, "rope_parameters": rope, "eos_token_id": own.eos_token_id, "bos_token_id": None}
    ids = {f"{name}_token_id": own.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
    return {"text_config": {**TEXT, **text}, **ids}


IMAGE_PX = {"qwen2_vl": 16, "qwen2_5_vl": 24}
"""Side of the pictures that they read in tests."""
MAKERS: dict[str, Callable[[Path], None]] = {
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
}


def make_vision_language(kind: str, folder: Path) -> None:
    """Write a tiny random model of a type, with its tokenizer and image processor."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    MAKERS[kind](folder)
