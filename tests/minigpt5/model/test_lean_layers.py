"""Lean layers give what transformers' own layers give, alone and with a cache, in the families that they serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from minigpt5.engine.kv_cache import SlotCache
from minigpt5.model.lean_layers import LeanLayer, can_be_lean
from minigpt5.model.packed_linear import PackedLinear
from minigpt5.model.packing import pack_body
from minigpt5.model.quantised import Codes
from minigpt5.model.quantised_linear import Float32Linear, Int4Linear
from minigpt5.types import TextPrecision

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
BODIES: dict[str, Any] = {
    "llama": lambda: LlamaModel(LlamaConfig(**SHAPE)),
    "llama with biases": lambda: LlamaModel(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralModel(MistralConfig(**SHAPE, sliding_window=7)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**SHAPE, head_dim=24)),
}


def new_body(family: str) -> Any:
    torch.manual_seed(0)
    body = BODIES[family]().eval()
    for parameter in body.parameters():  # norms and biases begin as ones and zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    return body.requires_grad_(False)


@pytest.mark.parametrize("family", BODIES)
def test_lean_layers_give_what_transformers_gives(family: str) -> None:
    plain, lean = new_body(family), pack_body(new_body(family), "float32", {})
    assert all(type(layer) is LeanLayer for layer in lean.layers)
    embeds_BSH = torch.randn(2, 12, 64)
    caches = DynamicCache(config=plain.config), DynamicCache(config=plain.config)
    for part in (embeds_BSH[:, :9], embeds_BSH[:, 9:10], embeds_BSH[:, 10:]):
        expected, found = (
            body(inputs_embeds=part, past_key_values=cache, use_cache=True).last_hidden_state
            for body, cache in zip((plain, lean), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_is_merged_into_lean_layers() -> None:
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    plain = get_peft_model(new_body("llama"), lora)
    embeds_BSH = torch.randn(1, 5, 64)
    expected = plain(inputs_embeds=embeds_BSH).last_hidden_state
    found = pack_body(plain, "float32", {})(inputs_embeds=embeds_BSH).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_other_layers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    body = Gemma2Model(Gemma2Config(**SHAPE, head_dim=16)).eval().requires_grad_(False)
    assert not can_be_lean(body)
    embeds_BSH = torch.randn(1, 5, 64)
    expected = body(inputs_embeds=embeds_BSH).last_hidden_state
    found = pack_body(body, "float32", {})(inputs_embeds=embeds_BSH).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def quantise(body: Any) -> dict[Any, Codes]:
    """Codes for all matrices of a body, which then has the weights that they stand for."""
    codes = {}
    for module in body.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        groups = module.weight.data.unflatten(1, (-1, 32))
        minima = groups.amin(dim=-1).half()
        scales = ((groups.amax(dim=-1) - minima.float()) / 15).half()
        levels = ((groups - minima.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 15)
        codes[module] = Codes(codes_OI=levels.flatten(1).to(torch.uint8), scales_OK=scales, minima_OK=minima)
        module.weight.data = codes[module].dequantise()
    return codes


@pytest.mark.parametrize("has_adapter", [False, True])
def test_4bit_layers_are_near_the_float32_ones(has_adapter: bool) -> None:
    body = new_body("llama")
    codes = quantise(body)
    if has_adapter:
        body = get_peft_model(body, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"]))
    embeds_BSH = torch.randn(1, 6, 64)
    expected = body(inputs_embeds=embeds_BSH).last_hidden_state
    found = pack_body(body, "int4", codes)(inputs_embeds=embeds_BSH).last_hidden_state
    assert (found - expected).norm() < 0.02 * expected.norm()


def _two_adapters(body: Any) -> Any:
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"])
    body = get_peft_model(body, lora)
    body.add_adapter("second", lora)
    body.base_model.set_adapter(["default", "second"])
    return body


def test_widths_that_the_4bit_kernel_refuses_stay_float32() -> None:
    body = torch.nn.Sequential(torch.nn.Linear(64, 72), torch.nn.Linear(64, 80)).requires_grad_(False)
    codes = quantise(body)
    inputs = torch.randn(3, 64)
    expected = [layer(inputs) for layer in body]
    packed = pack_body(body, "int4", codes)
    assert [type(layer) for layer in packed] == [PackedLinear, Int4Linear]
    for layer, outputs in zip(packed, expected, strict=True):
        assert (layer(inputs) - outputs).norm() < 0.02 * outputs.norm()


ADAPTERS: dict[str, Any] = {
    "dora": lambda body: get_peft_model(
        body, LoraConfig(r=4, init_lora_weights=False, use_dora=True, target_modules=["q_proj", "up_proj"])
    ),
    "bias": lambda body: get_peft_model(
        body, LoraConfig(r=4, init_lora_weights=False, lora_bias=True, target_modules=["q_proj", "up_proj"])
    ),
    "two": _two_adapters,
    "a whole matrix": lambda body: get_peft_model(
        body, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["up_proj"])
    ),
    "no lora": lambda body: get_peft_model(
        body,
        IA3Config(init_ia3_weights=False, target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_is_no_plain_lora_is_merged_where_others_are_4bit(kind: str) -> None:
    body = new_body("llama with biases")
    codes = quantise(body)
    body = ADAPTERS[kind](body).eval()
    for name, parameter in body.named_parameters():
        if "lora" in name or "ia3" in name or "modules_to_save" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    embeds_BSH = torch.randn(1, 6, 64)
    expected = body(inputs_embeds=embeds_BSH).last_hidden_state
    packed = pack_body(body, "int4", codes)
    found = packed(inputs_embeds=embeds_BSH).last_hidden_state
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert isinstance(packed.layers[0].query_key_value, PackedLinear)


@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_a_machine_without_onednn_computes_too(precision: TextPrecision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    body = new_body("llama")
    codes = quantise(body)
    del codes[body.layers[0].mlp.down_proj]
    embeds_BSH = torch.randn(1, 6, 64)
    expected = body(inputs_embeds=embeds_BSH).last_hidden_state
    packed = pack_body(body, precision, codes)
    found = packed(inputs_embeds=embeds_BSH).last_hidden_state
    assert type(packed.layers[0].down) is Float32Linear
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_states_have_the_same_bits_in_any_company(precision: TextPrecision) -> None:
    body = new_body("llama")
    body = pack_body(body, precision, quantise(body))
    cache = SlotCache.for_model(body, num_slots=6, num_positions=300)
    prompts = [torch.randn(length, 64) for length in (5, 70, 130, 20)]

    def read(slot: int, states_TH: torch.Tensor) -> torch.Tensor:
        return cache.forward(body, states_TH, [(slot, len(states_TH))])

    alone = [torch.cat([read(slot, prompt[:-3]), *(read(slot, one[None]) for one in prompt[-3:])])
             for slot, prompt in enumerate(prompts)]  # fmt: skip
    cache.lengths = [0] * 6
    slots, found = [4, 0, 5, 2], [[] for _ in prompts]  # type: ignore[var-annotated]
    done = [0] * 4
    for size in (2, 3, 40, 62, 1, 9, 1, 1, 7, 1, 1, 40):
        parts = [prompt[start : start + size] for prompt, start in zip(prompts, done, strict=True)]
        chosen = [number for number, part in enumerate(parts) if len(part)]
        counts = [(slots[number], len(parts[number])) for number in chosen]
        states = cache.forward(body, torch.cat([parts[number] for number in chosen]), counts)
        for number, part in zip(chosen, states.split([num for _, num in counts]), strict=True):
            found[number].append(part)
            done[number] += len(part)
    for one, parts in zip(alone, found, strict=True):
        assert torch.equal(torch.cat(parts), one[: sum(map(len, parts))])
