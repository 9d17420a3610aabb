"""A tiny random IP-Adapter of a UNet, in the authors' format, with the real class of image encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE, WIDTH, PROJECTION, INNER = 32, 24, 20, 64
"""Pixels and widths of the image encoder; width of the layers of IP-Adapter Plus."""


def make_ip_adapter(folder: Path, unet: Any, *, is_plus: bool = False) -> Path:
    torch.manual_seed(4)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=8,
            projection_dim=PROJECTION,
        )
    )
    encoder.save_pretrained(folder / "image_encoder")
    width = unet.config.cross_attention_dim
    shapes = _plus(width) if is_plus else {"proj.weight": (4 * width, PROJECTION), "proj.bias": (4 * width,)}
    shapes |= {} if is_plus else {"norm.weight": (width,), "norm.bias": (width,)}
    tensors = {f"image_proj.{name}": _random(shape) for name, shape in shapes.items()}
    layers = [layer for name, layer in unet.named_modules() if name.endswith("attn2")]
    for number, layer in enumerate(_in_order(unet, layers)):
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{part}.weight"] = _random((layer.to_k.out_features, width))
    save_file(tensors, folder / "ip_adapter.safetensors")
    return folder


def _in_order(unet: Any, layers: list[Any]) -> list[Any]:
    """As diffusers numbers them."""
    by_processor = {id(layer.processor): layer for layer in layers}
    return [by_processor[id(one)] for one in unet.attn_processors.values() if id(one) in by_processor]


def _plus(width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, 3, INNER),
        "proj_in.weight": (INNER, WIDTH),
        "proj_in.bias": (INNER,),
        "proj_out.weight": (width, INNER),
        "proj_out.bias": (width,),
        "norm_out.weight": (width,),
        "norm_out.bias": (width,),
    }
    for number in range(4):
        layer = f"layers.{number}"
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"{layer}.{norm}.weight": (INNER,), f"{layer}.{norm}.bias": (INNER,)}
        shapes |= {f"{layer}.0.to_q.weight": (INNER, INNER), f"{layer}.0.to_kv.weight": (2 * INNER, INNER)}
        shapes |= {f"{layer}.0.to_out.weight": (INNER, INNER)}
        shapes |= {f"{layer}.1.1.weight": (4 * INNER, INNER), f"{layer}.1.3.weight": (INNER, 4 * INNER)}
    return shapes


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.3
