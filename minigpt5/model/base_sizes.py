"""What the config files of base models decide of a new model's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minigpt5.config import LoraConfig, VisionConfig
from minigpt5.errors import ModelFolderError

DEFAULT_CONTEXT = 2048
"""Tokens. More costs memory in every slot of the KV store, whether it is used or not."""
LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.05
QFORMER_WIDTH, QFORMER_LAYERS, HEAD_WIDTH = 768, 6, 64
"""Widest Q-Former of a new folder, its layers, and the width of an attention head of new parts."""


def language_sizes(folder: Path, context_tokens: int | None) -> dict[str, Any]:
    """The fields of ModelConfig that a language model decides. Raises ModelFolderError where its kind does not fit.

    `vocabulary` is that of its matrices; its tokenizer may have fewer tokens.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    if config.is_encoder_decoder:
        raise ModelFolderError(f"{folder} is an encoder-decoder ({config.model_type}): name a causal language model")
    longest = longest_context(config)
    if context_tokens and context_tokens > longest:
        raise ModelFolderError(f"context is {context_tokens} but {folder} sees {longest} tokens: name at most that")
    return {
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context_tokens": context_tokens or min(DEFAULT_CONTEXT, longest),
        "lora": LoraConfig(rank=LORA_RANK, alpha=LORA_ALPHA, dropout=LORA_DROPOUT, targets=find_lora_targets(folder)),
    }


def longest_context(config: Any) -> int:
    """Tokens that a language model reads with one set of positions.

    Past its original length, "longrope" turns every position by other angles. Keys that are in the KV store by then
    would have the wrong ones, and so would shorter stories of the same step.
    """
    longest: int = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_kind = [one for one in rope.values() if isinstance(one, dict)]
    originals = [
        one["original_max_position_embeddings"] for one in by_layer_kind or [rope] if one.get("rope_type") == "longrope"
    ]
    return min(longest, *originals) if originals else longest


def find_lora_targets(folder: Path) -> tuple[str, ...]:
    """The attention's query and value layers, as published, or the layer that holds both, as in Phi-3."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        body = AutoModel.from_config(config := AutoConfig.from_pretrained(folder))
    body = body.get_decoder() if hasattr(config, "vision_config") else body
    linears = {name.rpartition(".")[2] for name, module in body.named_modules() if isinstance(module, nn.Linear)}
    fused = sorted(name for name in linears if "qkv" in name.lower() or name in ("query_key_value", "c_attn"))
    if {"q_proj", "v_proj"} <= linears:
        return ("q_proj", "v_proj")
    if not fused:
        raise ModelFolderError(
            f"{folder} has no attention layers that LoRA knows: it has {', '.join(sorted(linears)) or 'no linear ones'}"
        )
    return tuple(fused)


def diffusion_sizes(folder: Path) -> dict[str, Any]:
    """The fields of ModelConfig that a diffusion model decides. Raises ModelFolderError where its kind does not fit."""
    configs = {}
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        if not path.is_file():
            raise ModelFolderError(f"{folder} has no {part}/: name a Stable Diffusion 1.x or 2.x in diffusers' layout")
        configs[part] = json.loads(path.read_text())
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    width, channels = unet.get("cross_attention_dim"), unet.get("in_channels", 4)
    if unet.get("addition_embed_type") or not isinstance(width, int) or channels != vae.get("latent_channels", 4):
        kind = unet.get("addition_embed_type") or f"{channels} input channels and condition width {width}"
        raise ModelFolderError(f"{folder} is no Stable Diffusion 1.x or 2.x (its UNet has {kind}): name one of these")
    if text["hidden_size"] != width:
        raise ModelFolderError(
            f"the text encoder of {folder} has width {text['hidden_size']} but its UNet reads {width}"
        )
    return {
        "condition_length": text.get("max_position_embeddings", 77),
        "condition_width": width,
        "mapper_heads": max(1, width // max(HEAD_WIDTH, width // 8)),
        "image_px": unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1),
    }


def tower_config(tower: Any, base_id: str) -> VisionConfig:
    """Sizes of a tower, from one look at a black picture, and of the Q-Former that reads it."""
    import torch

    prepared_1CYX = tower.prepare(torch.zeros(1, 3, 64, 64))
    features_1FE = tower(prepared_1CYX.to(tower.network.device))
    hidden = min(QFORMER_WIDTH, features_1FE.shape[2])
    heads = max(1, hidden // HEAD_WIDTH)
    return VisionConfig(
        family="tower",
        encoder=base_id,
        image_px=prepared_1CYX.shape[-1],
        encoder_width=features_1FE.shape[2],
        num_features=features_1FE.shape[1],
        hidden=hidden - hidden % heads,
        num_layers=QFORMER_LAYERS,
        num_heads=heads,
    )
