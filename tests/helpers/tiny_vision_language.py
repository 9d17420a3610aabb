"""Tiny random vision-language models of the real classes, with their own image processors, as folders on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

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

QWEN_CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of Qwen2.5-VL-Instruct, without videos. A content is a text, or parts."""
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": SPREAD,
}


def make_tokenizer(
    folder: Path, markers: list[str], *, bos: str | None = None, chat: str | None = None, **named: str
) -> PreTrainedTokenizerFast:
    """Write a byte-level tokenizer with a model's markers as special tokens, or with those that have a name."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named or markers,
    )
    own.chat_template = chat
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


def make_qwen3_vl(folder: Path) -> None:
    """One embedding for 4 x 4 pixels; the first two layers of three take features of the tower's."""
    base = _qwen(folder)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {"num_hidden_layers": 3, "head_dim": 8, "rope_parameters": rope}
    sizes = {"depth": 3, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 2}
    stack = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    vision = {**sizes, **stack, "out_hidden_size": HIDDEN, "initializer_range": SPREAD}
    config = Qwen3VLConfig(**{**base, "text_config": {**base["text_config"], **text}}, vision_config=vision)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)


def _qwen(folder: Path) -> dict[str, Any]:
    """Write a Qwen-VL's tokenizer and image processor; the rest of its config."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    markers = [f"<|{name}|>" for name in ("im_start", *names.values())]
    own = make_tokenizer(folder, markers, chat=QWEN_CHAT)
    Qwen2VLImageProcessorPil(patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}).save_pretrained(folder)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {"vocab_size": len(own) + 5, "rope_parameters": rope, "eos_token_id": own.eos_token_id, "bos_token_id": None}
    ids = {f"{name}_token_id": own.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
    return {"text_config": {**TEXT, **text}, **ids}


def make_idefics3(folder: Path) -> None:
    """Tiles of 8 x 8 pixels and 4 embeddings."""
    config = Idefics3Config(**_idefics3(folder))
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    Idefics3ImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 8}).save_pretrained(folder)


def make_smolvlm(folder: Path) -> None:
    """Tiles of 8 x 8 pixels and 4 embeddings."""
    config = SmolVLMConfig(**_idefics3(folder))
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    SmolVLMImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 8}).save_pretrained(folder)


def _idefics3(folder: Path) -> dict[str, Any]:
    """Write an Idefics3's tokenizer; its config."""
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    markers = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *tiles]
    own = make_tokenizer(folder, markers, bos="<|im_start|>", chat=DEFAULT_CHAT_TEMPLATE)
    text = {"model_type": "llama", "vocab_size": len(own), "eos_token_id": own.eos_token_id}
    text |= {"bos_token_id": own.bos_token_id, "pad_token_id": own.pad_token_id}
    return {
        "text_config": {**TEXT, **text},
        "vision_config": {**TOWER, "image_size": 8, "patch_size": 2},
        "scale_factor": 2,
        "image_token_id": own.convert_tokens_to_ids("<image>"),
        "pad_token_id": own.pad_token_id,
    }


def make_llava_onevision(folder: Path) -> None:
    """Tiles of 12 x 12 pixels and 9 embeddings."""
    own = make_tokenizer(folder, ["<image>", "<video>"])
    text = {"model_type": "qwen2", "vocab_size": len(own), "eos_token_id": own.eos_token_id, "bos_token_id": None}
    pinpoints = [[12, 12], [12, 24], [24, 12], [24, 24]]
    config = LlavaOnevisionConfig(
        text_config={**TEXT, **text},
        vision_config={
            **TOWER,
            "model_type": "siglip_vision_model",
            "image_size": 12,
            "patch_size": 4,
            "vision_use_head": False,
        },
        image_token_index=own.convert_tokens_to_ids("<image>"),
        video_token_index=own.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(size={"height": 12, "width": 12}, image_grid_pinpoints=pinpoints).save_pretrained(
        folder
    )


def make_gemma3(folder: Path) -> None:
    """Pictures of 16 x 16 pixels and 16 embeddings, in layers that see 10 tokens back and layers that see all."""
    names = {"boi": "<start_of_image>", "image": "<image_soft_token>", "eoi": "<end_of_image>"}
    own = make_tokenizer(folder, [], bos="<bos>", **{f"{name}_token": token for name, token in names.items()})
    text = {"vocab_size": len(own) + 3, "head_dim": 8, "sliding_window": 10, "eos_token_id": own.eos_token_id}
    text |= {"bos_token_id": own.bos_token_id, "pad_token_id": own.pad_token_id}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3Config(
        text_config={**TEXT, **text, "num_hidden_layers": 3, "layer_types": kinds},
        vision_config={**TOWER, "image_size": 16, "patch_size": 2, "vision_use_head": False},
        mm_tokens_per_image=16,
        **{f"{name}_token_index": own.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    model = Gemma3ForConditionalGeneration(config)
    model.get_input_embeddings().weight.data *= 0.1  # it is the head too, and would say each token again
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=SPREAD)  # it is made of zeros
    model.save_pretrained(folder)
    Gemma3ImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


IMAGE_PX = {
    "gemma3": 16,
    "qwen2_vl": 16,
    "qwen2_5_vl": 24,
    "qwen3_vl": 20,
    "idefics3": 8,
    "smolvlm": 16,
    "llava_onevision": 12,
}
"""Side of the pictures that they read in tests."""
MAKERS: dict[str, Callable[[Path], None]] = {
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "idefics3": make_idefics3,
    "smolvlm": make_smolvlm,
    "llava_onevision": make_llava_onevision,
    "gemma3": make_gemma3,
}


def make_vision_language(kind: str, folder: Path) -> None:
    """Write a tiny random model of a type, with its tokenizer and image processor."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    MAKERS[kind](folder)
