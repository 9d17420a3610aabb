"""What the config files of base models decide of a new model's config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minigpt5.config import LoraConfig, VisionConfig
from minigpt5.errors import ModelFolderError

DEFAULT_CONTEXT = 2048
"""Tokens. More costs memory in every slot of the KV store, whether it is used or not."""
MIN_CONTEXT = 64
"""Tokens: less holds no page with its picture."""
DEQUANTISED = ("fp8", "mxfp4")
"""Kinds of quantised weights that transformers reads as plain ones."""
LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.05
QFORMER_WIDTH, QFORMER_LAYERS, HEAD_WIDTH = 768, 6, 64
"""Widest Q-Former of a new folder, its layers, and the width of an attention head of new parts."""
MAPPER_WIDTH = 1024
"""Widest transformer of a new mapper, as for Stable Diffusion 2.1. A last linear layer writes wider conditions."""
MAX_SIZE_RATIO = 2
"""Largest picture of a new folder, in pixels of the size that its diffusion model was trained to draw."""


def language_sizes(folder: Path, context_tokens: int | None) -> dict[str, Any]:
    """The fields of ModelConfig that a language model decides. Raises ModelFolderError where its kind does not fit.

    `vocabulary` is that of its matrices; its tokenizer may have fewer tokens.
    """
    from minigpt5.model.libraries import load_base_config

    whole = load_base_config(folder)
    config = whole.get_text_config()
    if config.is_encoder_decoder:
        raise ModelFolderError(f"{folder} is an encoder-decoder ({config.model_type}): name a causal language model")
    quantised = getattr(whole, "quantization_config", None) or {}
    if quantised and (method := quantised.get("quant_method")) not in DEQUANTISED:
        raise ModelFolderError(f"the weights of {folder} are quantised ({method}): name the model that is not")
    longest = longest_context(config)
    context = min(DEFAULT_CONTEXT, longest) if context_tokens is None else context_tokens
    if not min(MIN_CONTEXT, longest) <= context <= longest:
        raise ModelFolderError(
            f"context is {context} but {folder} takes {min(MIN_CONTEXT, longest)} to {longest} tokens"
        )
    return {
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context_tokens": context,
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
    """The attention's query and value layers, as published, or the layer that holds both, as in Phi-3. Of latent
    attention (arXiv 2405.04434) the layers that widen the latents to queries, and to keys and values."""
    import torch
    from torch import nn
    from transformers import AutoModel

    from minigpt5.model.libraries import load_base_config

    with torch.device("meta"):
        body = AutoModel.from_config(config := load_base_config(folder))
    body = body.get_decoder() if hasattr(config, "vision_config") else body
    linears = {name.rpartition(".")[2] for name, module in body.named_modules() if isinstance(module, nn.Linear)}
    fused = sorted(name for name in linears if "qkv" in name.lower() or name in ("query_key_value", "c_attn"))
    if {"q_proj", "v_proj"} <= linears:
        return ("q_proj", "v_proj")
    if "kv_b_proj" in linears:
        return ("q_b_proj" if "q_b_proj" in linears else "q_proj", "kv_b_proj")
    if not fused:
        raise ModelFolderError(
            f"{folder} has no attention layers that LoRA knows: it has {', '.join(sorted(linears)) or 'no linear ones'}"
        )
    return tuple(fused)


def diffusion_sizes(folder: Path, condition_length: int | None = None) -> dict[str, Any]:
    """The fields of ModelConfig that a diffusion model decides. `condition_length`: by default the pipeline's. Raises
    ModelFolderError where no family fits, or where the pipeline has fewer positions."""
    from minigpt5.model.decoders.load import find_family

    sizes = find_family(folder).read_sizes(folder)
    length = sizes.condition_length if condition_length is None else condition_length
    if not 1 <= length <= sizes.condition_length:
        raise ModelFolderError(
            f"a condition of {length} positions was named, but {folder} reads 1 to {sizes.condition_length}"
        )
    width = min(sizes.condition_width, MAPPER_WIDTH)
    return {
        "condition_length": length,
        "condition_width": sizes.condition_width,
        "condition_pooled": sizes.condition_pooled,
        "mapper_width": width if width < sizes.condition_width else 0,
        "mapper_heads": count_heads(width),
        "image_px": sizes.image_px,
        "max_pixels": MAX_SIZE_RATIO * sizes.image_px**2,
        "draw": sizes.draw,
    }


def count_heads(width: int) -> int:
    """Attention heads of a mapper: as many as divide its width, up to 8 of at least HEAD_WIDTH."""
    most = max(1, width // max(HEAD_WIDTH, width // 8))
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)


def tower_config(tower: Any, base_id: str) -> VisionConfig:
    """Sizes of a tower, from one look at a black picture, and of the Q-Former that reads it."""
    import torch

    prepared_1CYX = tower.prepare(torch.zeros(1, 3, 64, 64))
    features_1FE = tower(prepared_1CYX.to(next(tower.parameters()).device))
    hidden = min(QFORMER_WIDTH, features_1FE.shape[2])
    heads = max(1, hidden // HEAD_WIDTH)
    return VisionConfig(
        family=tower.FAMILY,
        encoder=base_id,
        image_px=prepared_1CYX.shape[-1],
        encoder_width=features_1FE.shape[2],
        num_features=features_1FE.shape[1],
        hidden=hidden - hidden % heads,
        num_layers=QFORMER_LAYERS,
        num_heads=heads,
    )
