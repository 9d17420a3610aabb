"""Slots of any lengths in one pass give what each gives by itself."""

from __future__ import annotations

import mmap
import random

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomModel,
    DeepseekV3Config,
    DeepseekV3Model,
    DynamicCache,
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    GptOssConfig,
    GptOssModel,
    Llama4TextConfig,
    Llama4TextModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen2MoeConfig,
    Qwen2MoeModel,
    Qwen3NextConfig,
    Qwen3NextModel,
    StableLmConfig,
    StableLmModel,
)

from minigpt5.engine.kv_cache import SlotCache, bytes_per_token
from minigpt5.limits import BLOCK

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


ADAPTER = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])


MIXED = ["sliding_attention", "full_attention"]
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "shared_expert_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}


def body_of(kind: str) -> torch.nn.Module:
    """A random transformer whose attention is the eager one: the reference of all ways to attend."""
    torch.manual_seed(0)
    models = {
        "llama": lambda: LlamaModel(LlamaConfig(**SHAPE)),
        "llama without shared heads": lambda: LlamaModel(LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})),
        "llama with an adapter": lambda: get_peft_model(LlamaModel(LlamaConfig(**SHAPE)), ADAPTER),
        "qwen2": lambda: Qwen2Model(Qwen2Config(**SHAPE)),
        "mistral": lambda: MistralModel(MistralConfig(**SHAPE, sliding_window=None)),
        "a window": lambda: MistralModel(MistralConfig(**SHAPE, sliding_window=13)),
        "a window that the attention is not told": lambda: Qwen2MoeModel(
            Qwen2MoeConfig(**SHAPE, **EXPERTS, use_sliding_window=True, sliding_window=13, layer_types=MIXED)
        ),
        "local and global layers": lambda: Gemma3TextModel(
            Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=13, layer_types=MIXED)
        ),
        "capped scores": lambda: Gemma2Model(
            Gemma2Config(**SHAPE, head_dim=8, sliding_window=13, layer_types=MIXED, attn_logit_softcapping=0.5)
        ),
        "sinks": lambda: GptOssModel(
            GptOssConfig(**SHAPE, head_dim=8, sliding_window=13, layer_types=MIXED, num_local_experts=4)
        ),
        "arguments that do not reach the attention": lambda: StableLmModel(StableLmConfig(**SHAPE)),
        "chunks": lambda: Llama4TextModel(
            Llama4TextConfig(
                **SHAPE,
                head_dim=8,
                attention_chunk_size=13,
                num_local_experts=2,
                intermediate_size_mlp=48,
                pad_token_id=0,
            )
        ),
        "keys kept as latents": lambda: DeepseekV3Model(DeepseekV3Config(**{**SHAPE, **LATENT})),
        "linear attention": lambda: Qwen3NextModel(Qwen3NextConfig(**SHAPE, num_experts=4, moe_intermediate_size=16)),
        "bloom": lambda: BloomModel(BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4)),
    }
    body = models[kind]().eval().requires_grad_(False)
    for parameter in body.parameters():  # fresh biases and sinks are zero
        parameter.add_(0.05 * torch.randn_like(parameter))
    body.set_attn_implementation("eager")
    return body


WAYS = pytest.mark.parametrize("num_shared_blocks", [None, 40], ids=["whole slots", "blocks"])


def embeds(num_tokens: int, seed: int) -> Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "llama without shared heads",
        "llama with an adapter",
        "qwen2",
        "mistral",
        "a window",
        "a window that the attention is not told",
        "local and global layers",
        "capped scores",
        "sinks",
        "arguments that do not reach the attention",
        "chunks",
        "keys kept as latents",
    ],
)
@WAYS
def test_rows_that_come_and_go_in_any_company_have_their_own_states(kind: str, num_shared_blocks: int | None) -> None:
    body = body_of(kind)
    sequences = [embeds(length, seed) for seed, length in enumerate((20, 35, 7, 150, 60, 1))]
    expected = [body(inputs_embeds=sequence[None]).last_hidden_state[0] for sequence in sequences]
    cache = SlotCache.for_model(body, num_slots=8, num_positions=160, num_shared_blocks=num_shared_blocks)
    slots, done, found = [5, 0, 3, 7, 1, 2], [0] * 6, [[] for _ in sequences]
    for slot, sequence in zip(slots, sequences, strict=True):
        cache.take(slot, len(sequence), idle=[])
    rng = random.Random(0)
    while any(num < len(sequence) for num, sequence in zip(done, sequences, strict=True)):
        here = [i for i, sequence in enumerate(sequences) if done[i] < len(sequence) and rng.random() < 0.7]
        if not here:
            continue
        nums = [min(rng.choice([1, 1, 1, 8, 5, 40]), len(sequences[i]) - done[i]) for i in here]
        tokens = torch.cat([sequences[i][done[i] : done[i] + num] for i, num in zip(here, nums, strict=True)])
        states = cache.forward(body, tokens, [(slots[i], num) for i, num in zip(here, nums, strict=True)])
        for i, piece in zip(here, states.split(nums), strict=True):
            found[i].append(piece)
            done[i] += len(piece)
    for pieces, states in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(pieces), states, atol=1e-5, rtol=1e-4)


@WAYS
def test_a_row_alone_gives_bit_for_bit_what_transformers_own_cache_gives(num_shared_blocks: int | None) -> None:
    body = body_of("llama")
    theirs = DynamicCache()
    ours = SlotCache.for_model(body, num_slots=2, num_positions=64, num_shared_blocks=num_shared_blocks)
    ours.take(1, 64, idle=[])
    for seed, num_tokens in enumerate((20, 1, 1, 8, 1)):
        tokens = embeds(num_tokens, seed)
        expected = body(inputs_embeds=tokens[None], past_key_values=theirs, use_cache=True).last_hidden_state[0]
        assert torch.equal(ours.forward(body, tokens, [(1, num_tokens)]), expected)


@WAYS
def test_a_row_that_begins_as_another_goes_on_as_if_it_had_read_it_all(num_shared_blocks: int | None) -> None:
    body = body_of("llama")
    cache = SlotCache.for_model(body, num_slots=3, num_positions=64, num_shared_blocks=num_shared_blocks)
    shared, own = embeds(50, 1), embeds(9, 2)
    for slot in (0, 2):
        cache.take(slot, 64, idle=[])
    cache.forward(body, shared, [(0, 50)])
    cache.copy(0, 2, 42)
    found = cache.forward(body, own, [(2, 9)])
    expected = body(inputs_embeds=torch.cat([shared[:42], own])[None]).last_hidden_state[0, 42:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert cache.lengths == [50, 0, 51]


@WAYS
def test_a_row_that_is_cut_forgets_what_came_after(num_shared_blocks: int | None) -> None:
    body = body_of("llama")
    cache = SlotCache.for_model(body, num_slots=1, num_positions=64, num_shared_blocks=num_shared_blocks)
    cache.take(0, 64, idle=[])
    first, second = embeds(10, 1), embeds(5, 2)
    cache.forward(body, first, [(0, 10)])
    cache.lengths[0] = 4
    found = cache.forward(body, second, [(0, 5)])
    expected = body(inputs_embeds=torch.cat([first[:4], second])[None]).last_hidden_state[0, 4:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_slots_share_blocks_and_an_idle_one_forgets_where_its_blocks_are_needed() -> None:
    body = body_of("llama")
    cache = SlotCache.for_model(body, num_slots=3, num_positions=8 * BLOCK, num_shared_blocks=8)
    assert cache.stored_keys[0].shape == (1, 2, (8 + 1) * BLOCK, 8)
    cache.take(0, 5 * BLOCK, idle=[])
    assert cache.has_room(3 * BLOCK, idle=[]) and not cache.has_room(3 * BLOCK + 1, idle=[])
    assert not cache.has_room(3 * BLOCK, idle=[], share=0.75)
    cache.forward(body, embeds(BLOCK + 1, 0), [(0, BLOCK + 1)])
    cache.trim(0)
    assert cache.has_room(6 * BLOCK, idle=[])
    cache.take(1, 6 * BLOCK, idle=[0, 2])
    assert cache.lengths[0] == BLOCK + 1
    assert not cache.has_room(1, idle=[]) and cache.has_room(2 * BLOCK, idle=[0, 2])
    cache.take(2, BLOCK, idle=[0])
    assert cache.lengths == [0, 0, 0] and cache.has_room(BLOCK, idle=[])


@pytest.mark.skipif(not hasattr(mmap, "MADV_NOHUGEPAGE"), reason="only Linux says how much memory is really taken")
def test_a_slot_whose_values_are_not_finite_leaves_the_others_as_they_are() -> None:
    body = body_of("llama")
    found = []
    for factor in (1.0, torch.nan):
        cache = SlotCache.for_model(body, num_slots=4, num_positions=4 * BLOCK, num_shared_blocks=9)
        lengths = {1: 70, 2: 5, 3: 100, 0: 20}  # the last has the first block
        for slot, length in lengths.items():
            cache.take(slot, length + 1, idle=[])
        for slot, length in lengths.items():
            cache.forward(body, embeds(length, slot) * (factor if slot == 0 else 1), [(slot, length)])
        found.append(cache.forward(body, embeds(3, 9), [(1, 1), (2, 1), (3, 1)]))
    assert torch.equal(*found) and found[0].isfinite().all()


def test_in_bfloat16_on_a_cpu_blocks_give_the_bits_that_whole_slots_give() -> None:
    """Those do not depend on the company."""
    body = body_of("llama").to(torch.bfloat16)
    for name, parameter in body.named_parameters():
        if "self_attn" in name:  # else rounding hides what attention adds
            parameter.mul_(8)
    whole = SlotCache.for_model(body, num_slots=6, num_positions=600)
    shared = SlotCache.for_model(body, num_slots=6, num_positions=600, num_shared_blocks=90)
    passes = [[(0, 470)], [(4, 231), (1, 1), (2, 500)], [(0, 1), (1, 1), (2, 1), (4, 1)], [(5, 3), (2, 98), (4, 1)]]
    passes += [[(2, 1), (0, 1)], [(1, 1)]]
    for slot in range(6):
        shared.take(slot, {1: 5, 2: 600}.get(slot, 500), idle=[])
    for seed, counts in enumerate(passes):
        tokens = embeds(sum(num for _, num in counts), seed).to(torch.bfloat16)
        expected, found = (cache.forward(body, tokens, counts) for cache in (whole, shared))
        assert expected.dtype == torch.bfloat16 and torch.equal(expected, found), counts


def test_rows_take_memory_only_as_they_are_filled() -> None:
    body = body_of("llama")
    cache = SlotCache.for_model(body, num_slots=64, num_positions=32768)
    reserved = sum(stored.nbytes for stored in (*cache.stored_keys, *cache.stored_values))
    before = psutil.Process().memory_info().rss
    for slot in range(64):
        cache.forward(body, embeds(100, slot), [(slot, 100)])
    taken = psutil.Process().memory_info().rss - before
    assert reserved > 500 * 2**20 and taken < reserved / 10


def test_padded_batches_are_read_as_before() -> None:
    """The attention is one for both ways: training and captions with a mask use the same model."""
    body = body_of("llama")
    body.set_attn_implementation("sdpa")
    tokens = torch.randn(2, 9, 32)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    expected = body(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
    SlotCache.for_model(body, num_slots=1, num_positions=8)
    found = body(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["capped scores", "sinks"])
def test_padded_batches_are_read_by_the_attention_that_slots_have(kind: str) -> None:
    body = body_of(kind)
    tokens = torch.randn(2, 40, 32)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 25:] = 0
    expected = body(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
    alone = body(inputs_embeds=tokens[:1]).last_hidden_state
    SlotCache.for_model(body, num_slots=1, num_positions=8)
    found = body(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(body(inputs_embeds=tokens[:1]).last_hidden_state, alone, atol=1e-5, rtol=1e-4)


def test_memory_of_a_token_is_counted_in_every_layer() -> None:
    assert bytes_per_token(body_of("llama")) == bytes_per_token(body_of("llama"), 4)
    assert bytes_per_token(body_of("llama"), 4) == 2 * 2 * 2 * 8 * 4
    assert bytes_per_token(body_of("local and global layers"), 2) == 2 * 2 * 2 * 8 * 2
    assert bytes_per_token(body_of("keys kept as latents"), 2) == 2 * (8 + 8) * 2


def test_what_the_attention_does_not_do_is_refused_by_its_name() -> None:
    body = body_of("llama")
    SlotCache.for_model(body, num_slots=1, num_positions=8)
    with pytest.raises(ValueError, match="its attention needs block_indices, position_bias"):
        body(inputs_embeds=embeds(3, 0)[None], position_bias=torch.zeros(1), block_indices=torch.zeros(1))


def test_layers_that_keep_another_state_than_keys_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="neither keys nor values"):
        SlotCache.for_model(body_of("linear attention"), num_slots=1, num_positions=8)


def test_a_model_that_does_not_attend_through_transformers_interface_is_refused() -> None:
    with pytest.raises(ValueError, match="bloom does not attend through"):
        SlotCache.for_model(body_of("bloom"), num_slots=1, num_positions=8)
