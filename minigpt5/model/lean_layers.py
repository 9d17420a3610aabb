"""Decoder layers in few operations, for inference on a CPU.

A step of a language model reads few tokens, and transformers' layers then spend more time between operations than in
them. A lean layer computes the same: matrices with the same input are one, the norm is one operation, and rotary
positions are prepared once for all layers. It serves models whose layers are those of Llama (arXiv 2302.13971), with or
without biases and norms of queries and keys; other layers stay transformers' own.

Shape letters: B sequences, S positions, H hidden width, A query heads, G key heads, N all heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

FAMILY = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
"""Layers that were compared with a lean layer, by tests with models of these classes."""

Fuse = Callable[[Sequence[nn.Module]], nn.Module]
"""Linear layers with the same input -> one with all their outputs."""


class LeanLayer(nn.Module):
    """One decoder layer. Its states are float32; what is multiplied has the type `operands`."""

    def __init__(self, layer: Any, fuse: Fuse, *, operands: torch.dtype, attended: torch.dtype) -> None:
        """`attended`: the type of queries, keys and values."""
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.operands, self.attended = operands, attended
        self.query_key_value = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = fuse([attention.o_proj])
        self.gate_up = fuse([mlp.gate_proj, mlp.up_proj])
        self.down = fuse([mlp.down_proj])
        self.input_norm, self.output_norm = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.query_norm = _Norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.key_norm = _Norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        num_heads, num_key_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
        self.parts = [num_heads, num_key_heads, num_key_heads]
        """Heads of queries, keys and values, as they lie beside each other."""
        self.attention = attention
        """What an attention function asks about its layer; its matrices are gone."""
        self.sliding_window = getattr(attention, "sliding_window", None)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            delattr(attention, name)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: Any = None,
        **options: Any,
    ) -> Tensor:
        mixed = self.query_key_value(self.input_norm(hidden_states).to(self.operands))
        mixed_BSND = mixed.view(*mixed.shape[:2], sum(self.parts), -1)
        turned_BNSD = self._turn(mixed_BSND.float(), position_embeddings).to(self.attended).transpose(1, 2)
        query, key, value = turned_BNSD.split_with_sizes(self.parts, dim=1)
        attention = self.attention
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        options |= {"scaling": attention.scaling, "sliding_window": self.sliding_window}
        seen, _ = attend(attention, query, key, value, attention_mask, **options)
        hidden_states = hidden_states + self.out(seen.reshape(*mixed.shape[:2], -1).to(self.operands))
        gate, up = self.gate_up(self.output_norm(hidden_states).to(self.operands)).chunk(2, dim=-1)
        return hidden_states + self.down(F.silu(gate).mul_(up))

    __call__ = forward  # torch looks for hooks first, which takes as long as a small operation

    def _turn(self, heads_BSND: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Normalise queries and keys where the model does, and rotate them by their positions."""
        if self.query_norm is not None and self.key_norm is not None:
            query, key, value = heads_BSND.split_with_sizes(self.parts, dim=2)
            heads_BSND = torch.cat([self.query_norm(query), self.key_norm(key), value], dim=2)
        cosine_BSND, sine_BSND = position_embeddings
        return torch.addcmul(heads_BSND * cosine_BSND, heads_BSND.roll(heads_BSND.shape[-1] // 2, dims=-1), sine_BSND)


class _Norm(nn.Module):
    """The root-mean-square norm (arXiv 1910.07467) of transformers' layer, in few operations. torch's own has more."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight.detach(), torch.tensor(norm.variance_epsilon)

    def forward(self, states: Tensor) -> Tensor:
        states = states.float()
        norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        scales = torch.addcmul(self.eps, norms, norms, value=1 / states.shape[-1]).rsqrt_()
        return (states * scales).mul_(self.weight)

    __call__ = forward


class _SignedRotary(nn.Module):
    """Rotary positions as lean layers take them: by head, the sine with the sign of the half that it turns. Values are
    turned by nothing."""

    def __init__(self, rotary: nn.Module, num_turned: int, num_values: int) -> None:
        """`num_turned`: heads of queries and keys; `num_values`: heads of values after them."""
        super().__init__()
        self.rotary, self.num_turned, self.num_values = rotary, num_turned, num_values

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cosine_BSD, sine_BSD = self.rotary(states, position_ids)
        half = sine_BSD.shape[-1] // 2
        sine_BSD = torch.cat([-sine_BSD[..., :half], sine_BSD[..., half:]], dim=-1)
        return self._by_head(cosine_BSD, 1.0), self._by_head(sine_BSD, 0.0)

    def _by_head(self, turns_BSD: Tensor, of_values: float) -> Tensor:
        """(B, S, N, D)."""
        turns_BS1D = turns_BSD[:, :, None]
        of_values_BS1D = torch.full_like(turns_BS1D, of_values)
        return torch.cat([turns_BS1D] * self.num_turned + [of_values_BS1D] * self.num_values, dim=2)


def can_be_lean(body: Any) -> bool:
    """Whether all layers of a transformer are of a known kind."""
    layers = getattr(body, "layers", None)
    if not layers or not hasattr(body, "rotary_emb"):
        return False
    return all(type(layer) in FAMILY and body.config.hidden_act == "silu" for layer in layers)


def make_lean(body: Any, fuse: Fuse, *, operands: torch.dtype, attended: torch.dtype) -> None:
    """Replace all layers of a transformer that `can_be_lean`; their weights can no longer be read or trained."""
    for place, layer in enumerate(body.layers):
        body.layers[place] = LeanLayer(layer, fuse, operands=operands, attended=attended)
    num_heads, num_key_heads, num_values = body.layers[0].parts
    body.rotary_emb = _SignedRotary(body.rotary_emb, num_heads + num_key_heads, num_values)
    body.norm = _Norm(body.norm)
