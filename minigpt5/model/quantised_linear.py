"""Linear layers that multiply by quantised weights, for inference on a CPU.

A row's result has the same bits in any company: the 4-bit kernel adds a row's products in an order of its own, the
8-bit ones add integers, and bfloat16 ones are called with few rows, where the CPU has AMX.

Shape letters: B rows, O outputs, I inputs, K groups of 32 inputs, R ranks of an adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.model.packed_linear import PackedLinear, can_pack
from minigpt5.model.quantised import GROUP, Codes

MIDDLE = 8
"""The kernel's code that stands for its offset alone: a weight is (code - 8) * scale + offset."""
OUTPUT_MULTIPLE = 16
"""Outputs that the 4-bit kernel computes at once: it refuses a matrix with a part of them."""
RANK_MULTIPLE = 16
"""Ranks of an adapter that the 8-bit kernel takes at once."""
FBGEMM = "fbgemm"
PLANE = 128
"""Values of a plane of 7 bits."""
EVEN_ROWS = 32
"""Rows of a bfloat16 call with AMX: oneDNN adds in another order where it has more."""


class Int4Linear(nn.Module):
    """4-bit weights times bfloat16 activations, in bfloat16. Codes are a base model's own.

    The kernel wants scales and offsets in the activations' type: each is rounded to 8 bits of mantissa, which moves a
    weight by at most 1/256 of itself and of its group's offset. Sums are made in float32 and rounded to bfloat16.
    """

    def __init__(self, codes: Codes, bias_O: Tensor | None = None, adapter: LowRank | None = None) -> None:
        super().__init__()
        self.packed = torch._convert_weight_to_int4pack_for_cpu(codes.codes_OI.int(), 1)
        scales_OK = codes.scales_OK.float()
        offsets_OK = codes.minima_OK.float() + MIDDLE * scales_OK
        self.scales_KO2 = torch.stack([scales_OK.T, offsets_OK.T], dim=-1).bfloat16().contiguous()
        self.bias_O = None if bias_O is None else bias_O.bfloat16()
        self.adapter = adapter

    def forward(self, input: Tensor) -> Tensor:
        input_BI = input.to(torch.bfloat16).reshape(-1, input.shape[-1])
        out_BO = torch._weight_int4pack_mm_for_cpu(input_BI, self.packed, GROUP, self.scales_KO2)
        if self.bias_O is not None:
            out_BO += self.bias_O
        if self.adapter is not None:
            out_BO += self.adapter(input_BI)
        return out_BO.view(*input.shape[:-1], -1).to(input.dtype)

    __call__ = forward  # torch looks for hooks first, which takes as long as a small operation


class LowRank(nn.Module):
    """An adapter beside a matrix (LoRA, arXiv 2106.09685): its two matrices in 8 bits, with a scale for each row."""

    def __init__(self, down_RI: Tensor, up_OR: Tensor) -> None:
        super().__init__()
        missing = -len(down_RI) % RANK_MULTIPLE
        self.down_RI, self.down_scales_R = quantise_rows(F.pad(down_RI, (0, 0, 0, missing)))
        self.up_OR, self.up_scales_O = quantise_rows(F.pad(up_OR, (0, missing)))
        self.down_scales_R, self.up_scales_O = self.down_scales_R.bfloat16(), self.up_scales_O.bfloat16()

    def forward(self, input_BI: Tensor) -> Tensor:
        low_BR = torch._weight_int8pack_mm(input_BI, self.down_RI, self.down_scales_R)
        return torch._weight_int8pack_mm(low_BR, self.up_OR, self.up_scales_O)

    __call__ = forward


class VnniInt8Linear(nn.Module):
    """8-bit weights with a scale for each row, times activations of 16 bits with a scale for each row of theirs.

    Activations are two planes of 8 bits, so that oneDNN multiplies integers alone. A weight moves by at most 1/254 of
    its row's largest, and an activation by 1/65024 of its row's. For CPUs with AVX-512 VNNI: others lose sums of
    two such products.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        codes_OI, self.scales_O = quantise_rows(weight_OI.detach())
        self.packed = torch.ops.onednn.qlinear_prepack(codes_OI, None)
        self.zeros_O = torch.zeros(len(codes_OI), dtype=torch.int64)
        self.bias_O = bias_O

    def forward(self, input: Tensor) -> Tensor:
        input_BI = input.float().reshape(-1, input.shape[-1])
        num = len(input_BI)
        steps_B1 = input_BI.abs().amax(dim=1, keepdim=True).clamp_min_(1e-30).mul_(1 / 32512)
        # 128 in each byte stands for zero, and the conversion rounds down.
        codes_BI = (input_BI / steps_B1).add_(128 * 257 + 0.5).to(torch.int32)
        low_high_4BI = codes_BI.view(torch.uint8).view(*codes_BI.shape, 4).permute(2, 0, 1)
        planes = low_high_4BI[:2].reshape(2 * num, -1)
        out = torch.ops.onednn.qlinear_pointwise(
            planes, 1.0, 128, self.packed, self.scales_O, self.zeros_O, None, 1.0, 0, torch.float32, "none", [], ""
        )
        out_BO = torch.add(out[:num], out[num:], alpha=256).mul_(steps_B1)
        if self.bias_O is not None:
            out_BO += self.bias_O
        return out_BO.view(*input.shape[:-1], -1).to(input.dtype)


class Avx2Int8Linear(nn.Module):
    """As `VnniInt8Linear`, with planes of 7 bits: FBGEMM adds two products in 16 bits, which these do not fill.

    An activation moves by at most 1/16128 of its row's largest.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        codes_OI, scales_O = quantise_rows(weight_OI.detach())
        self.packed = _pack_for_fbgemm(codes_OI, scales_O / PLANE)
        self.bias_O = bias_O

    def forward(self, input: Tensor) -> Tensor:
        input_BI = input.float().reshape(-1, input.shape[-1])
        num = len(input_BI)
        norms_B1 = torch.linalg.vector_norm(input_BI, torch.inf, dim=1, keepdim=True)
        steps_B1 = norms_B1.mul_(1 / (PLANE // 2 - 1)).add_(1e-30)
        scaled_BI = input_BI / steps_B1
        high_BI = scaled_BI.round()
        planes = torch.cat([high_BI, scaled_BI.sub_(high_BI).mul_(PLANE)])
        out = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(planes, 1.0, PLANE // 2, self.packed)
        out_BO = torch.add(out[num:], out[:num], alpha=PLANE).mul_(steps_B1)
        if self.bias_O is not None:
            out_BO += self.bias_O
        return out_BO.view(*input.shape[:-1], -1).to(input.dtype)


class Bfloat16Linear(nn.Module):
    """bfloat16 weights and activations; sums are made in float32 and rounded to bfloat16.

    With AMX, weights are laid out for it, and a call takes at most EVEN_ROWS rows: so many have the same bits in any
    company. On other CPUs, a row's last bits depend on its company.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        weight_OI = weight_OI.detach().bfloat16()
        self.is_packed = has_amx()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, EVEN_ROWS) if self.is_packed else weight_OI
        self.bias_O = None if bias_O is None else bias_O.bfloat16()

    def forward(self, input: Tensor) -> Tensor:
        input_BI = input.to(torch.bfloat16).reshape(-1, input.shape[-1])
        if not self.is_packed:
            out_BO = F.linear(input_BI, self.weight, self.bias_O)
        elif len(input_BI) <= EVEN_ROWS:
            out_BO = self._multiply(input_BI)
        else:
            out_BO = torch.cat([self._multiply(rows_BI) for rows_BI in input_BI.split(EVEN_ROWS)])
        return out_BO.view(*input.shape[:-1], -1).to(input.dtype)

    __call__ = forward  # torch looks for hooks first, which takes as long as a small operation

    def _multiply(self, rows_BI: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows_BI, self.weight, self.bias_O, "none", [], "")


class Float32Linear(nn.Module):
    """float32 weights as torch keeps them, for machines where oneDNN lays none out."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.weight_OI, self.bias_O = weight_OI.detach(), bias_O

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight_OI, self.bias_O).to(input.dtype)


def make_float32(weight_OI: Tensor, bias_O: Tensor | None = None) -> nn.Module:
    """The quickest float32 layer of this machine: packed, where oneDNN can."""
    return PackedLinear(weight_OI, bias_O) if can_pack(weight_OI) else Float32Linear(weight_OI, bias_O)


def quantise_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes from -127 to 127 and a scale for each row: (O, I) and (O,)."""
    scales_O = weight_OI.abs().amax(dim=1).clamp_min(1e-30).float() / 127
    return (weight_OI / scales_O[:, None]).round().to(torch.int8), scales_O


def stack_adapters(matrices: Sequence[tuple[Tensor, Tensor, float] | None], num_outputs: Sequence[int]) -> LowRankPair:
    """LoRA matrices (R, I), (O, R) and scaling of layers with the same input -> one pair for all their outputs.

    Layers without an adapter are None. The first matrices lie one below another; the second, scaled, on a diagonal of
    blocks.
    """
    downs = [pair[0].float() for pair in matrices if pair]
    ups = [
        pair[1].float() * pair[2] if pair else torch.zeros(outputs, 0)
        for pair, outputs in zip(matrices, num_outputs, strict=True)
    ]
    return torch.cat(downs), torch.block_diag(*ups)


LowRankPair = tuple[Tensor, Tensor]
"""(R, I) and (O, R)."""


def can_multiply_int8() -> bool:
    """Whether this CPU multiplies 8-bit integers by one of the kernels here."""
    return _has_vnni() or FBGEMM in torch.backends.quantized.supported_engines


def has_amx() -> bool:
    """Whether this CPU has matrix units (AMX), and torch has oneDNN."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


def make_int8(weight_OI: Tensor, bias_O: Tensor | None = None) -> nn.Module:
    """The 8-bit layer of a machine that `can_multiply_int8`."""
    return VnniInt8Linear(weight_OI, bias_O) if _has_vnni() else Avx2Int8Linear(weight_OI, bias_O)


def _pack_for_fbgemm(codes_OI: Tensor, scales_O: Tensor) -> Any:
    """torch has no other way to FBGEMM than its quantised tensors, which it deprecates: once they are gone, this CPU is
    one without 8-bit integers."""
    zeros_O = torch.zeros(len(codes_OI), dtype=torch.int64)
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, FBGEMM
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*quantized tensor creation functions.*deprecated")
            quantised = torch._make_per_channel_quantized_tensor(codes_OI, scales_O.double(), zeros_O, 0)
        return torch.ops.quantized.linear_prepack(quantised, None)
    finally:
        torch.backends.quantized.engine = before


def _has_vnni() -> bool:
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
