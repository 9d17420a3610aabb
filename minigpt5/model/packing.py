"""A language model laid out for inference on a CPU, in one of the precisions that engines compute in.

Layers of a known kind become lean layers, with an adapter beside 4-bit weights and merged into all others; of other
layers, each matrix is replaced by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from minigpt5.model.lean_layers import Fuse, can_be_lean, make_lean
from minigpt5.model.packed_linear import can_pack
from minigpt5.model.quantised import Codes
from minigpt5.model.quantised_linear import (
    OUTPUT_MULTIPLE,
    Bfloat16Linear,
    Int4Linear,
    LowRank,
    can_multiply_int8,
    make_float32,
    make_int8,
    stack_adapters,
)
from minigpt5.types import TextPrecision

CodesByLayer = Mapping[nn.Module, Codes]
"""A base model's own codes, by the layer that they belong to."""


def match_codes(causal: nn.Module, codes: Mapping[str, Codes]) -> CodesByLayer:
    """The codes of each linear layer of transformers' own model. Raises ValueError where their shapes differ."""
    matched: dict[nn.Module, Codes] = {}
    for name, module in causal.named_modules():
        matrix = codes.get(f"{name}.weight")
        if matrix is None or not isinstance(module, nn.Linear):
            continue
        if matrix.codes_OI.shape != module.weight.shape:
            raise ValueError(
                f"{name} is {tuple(module.weight.shape)} but has codes of {tuple(matrix.codes_OI.shape)}: convert the "
                "base model again"
            )
        matched[module] = matrix
    return matched


def pack_body(body: Any, precision: TextPrecision, codes: CodesByLayer) -> Any:
    """Replace a transformer's layers, and return it without PEFT's wrapper. Its weights can no longer be trained."""
    if isinstance(body, PeftModel):
        if precision == "int4" and _is_beside(body):
            body = body.get_base_model()
        else:
            body, codes = body.merge_and_unload(), {}  # codes do not stand for merged weights
    fuse = _fuse(precision, codes)
    if can_be_lean(body):
        make_lean(
            body,
            fuse,
            operands=torch.bfloat16 if precision in ("bfloat16", "int4") else torch.float32,
            attended=torch.float32 if precision == "float32" else torch.bfloat16,
        )
    else:
        _replace_linears(body, fuse)
    return body.requires_grad_(False)


def pack_head(weight_TH: Tensor, bias_T: Tensor | None, precision: TextPrecision) -> nn.Module:
    """The base model's output layer for some of its rows: with quantised layers, in 8 bits where the CPU can."""
    if precision in ("int8", "int4") and can_multiply_int8():
        return make_int8(weight_TH, bias_T)
    return Bfloat16Linear(weight_TH, bias_T) if precision == "bfloat16" else make_float32(weight_TH, bias_T)


def _replace_linears(module: nn.Module, fuse: Fuse) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, LoraLinear) or (type(child) is nn.Linear and can_pack(child.weight)):
            setattr(module, name, fuse([child]))
        else:
            _replace_linears(child, fuse)


def _is_beside(body: PeftModel) -> bool:
    """Whether an adapter consists of low-rank matrices beside others, and replaces none."""
    configs = body.peft_config.values()
    return all(config.peft_type == PeftType.LORA and not config.modules_to_save for config in configs)


def _fuse(precision: TextPrecision, codes: CodesByLayer) -> Fuse:
    def fuse(layers: Sequence[Any]) -> nn.Module:
        bases = [layer.base_layer if isinstance(layer, LoraLinear) else layer for layer in layers]
        is_coded = precision == "int4" and all(base in codes for base in bases)
        if is_coded and _has_whole_blocks(bases) and all(_is_plain(layer) for layer in layers):
            return Int4Linear(_join_codes([codes[base] for base in bases]), _join_biases(bases), _join_adapters(layers))
        layers = [_merge(layer) for layer in layers]
        weight_OI = torch.cat([layer.weight.detach() for layer in layers])
        make = {"int8": make_int8, "bfloat16": Bfloat16Linear}.get(precision, make_float32)
        return make(weight_OI, _join_biases(layers))

    return fuse


def _has_whole_blocks(layers: Sequence[Any]) -> bool:
    """Whether the 4-bit kernel takes the outputs of layers with the same input, joined."""
    return sum(layer.out_features for layer in layers) % OUTPUT_MULTIPLE == 0


def _is_plain(layer: Any) -> bool:
    """Whether a layer has no adapter, or one of two matrices and a scaling alone: LoRA, and not its variants."""
    if not isinstance(layer, LoraLinear):
        return True
    name, *others = layer.active_adapters
    return not (others or layer.merged or name in layer.lora_variant or layer.lora_bias.get(name, True))


def _merge(layer: Any) -> Any:
    if not isinstance(layer, LoraLinear):
        return layer
    layer.merge()
    return layer.base_layer


def _join_codes(matrices: Sequence[Codes]) -> Codes:
    return Codes(
        codes_OI=torch.cat([matrix.codes_OI for matrix in matrices]),
        scales_OK=torch.cat([matrix.scales_OK for matrix in matrices]),
        minima_OK=torch.cat([matrix.minima_OK for matrix in matrices]),
    )


def _join_biases(layers: Sequence[Any]) -> Tensor | None:
    """Biases of layers one after another; zeros for those that have none."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    )


def _join_adapters(layers: Sequence[Any]) -> LowRank | None:
    """The adapters of plain layers with the same input, as one."""
    if not any(isinstance(layer, LoraLinear) for layer in layers):
        return None
    pairs = [
        (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        if isinstance(layer, LoraLinear) and (name := layer.active_adapters[0])
        else None
        for layer in layers
    ]
    return LowRank(*stack_adapters(pairs, [layer.out_features for layer in layers]))
