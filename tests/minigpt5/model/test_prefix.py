"""A prefix stands before every sequence as a past that was read: in training, in transformers' cache and in slots."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2Model,
    MistralConfig,
    MistralModel,
)

from minigpt5.engine.generator import VokenGenerator
from minigpt5.engine.kv_cache import SlotCache
from minigpt5.errors import ModelFolderError
from minigpt5.limits import default_limits
from minigpt5.model import folder as model_folder
from minigpt5.model.language import LanguageModel
from minigpt5.model.prefix import Prefix, ProjectedPrefix, check_positions, load_prefix, prefix_shape
from minigpt5.model.vokens import VokenEmbeddings
from minigpt5.model.weights import save_tensors
from minigpt5.types import GeneratorEvent, Sampling, StoryRequest, TextPrecision, Vokens
from tests.helpers.tiny import save_tiny, tiny_config, tiny_language, tiny_tokenizer, tiny_vision

BEFORE, AFTER = [5, 17, 3, 40, 8], [9, 2, 33, 12, 21, 7]


@torch.no_grad()
def language_after(ids: list[int]) -> LanguageModel:
    """A tiny language model whose prefix is what it keeps of some tokens."""
    language, cache = tiny_language(tiny_config()), DynamicCache()
    language.states(language.embed(torch.tensor([ids])), cache=cache)
    prefix = Prefix(prefix_shape(language.body, len(ids)))
    prefix.states.copy_(torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]))
    language.prefix = prefix
    return language


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """States of AFTER, read after BEFORE: (S, H)."""
    language = tiny_language(tiny_config())
    with torch.no_grad():
        return language.states(language.embed(torch.tensor([BEFORE + AFTER])))[0, len(BEFORE) :]


@torch.no_grad()
def test_a_prefix_of_what_was_read_is_as_reading_it(expected: Tensor) -> None:
    language = language_after(BEFORE)
    embeds_1SH = language.embed(torch.tensor([AFTER]))
    torch.testing.assert_close(language.states(embeds_1SH)[0], expected, atol=1e-5, rtol=0)
    ids_BS = torch.tensor([AFTER, [*AFTER[:3], 0, 0, 0]])
    mask_BS = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    both = language.states(language.embed(ids_BS), mask_BS=mask_BS)
    torch.testing.assert_close(both[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1, :3], expected[:3], atol=1e-5, rtol=0)
    cache = DynamicCache()
    parts = [language.states(part, cache=cache)[0] for part in embeds_1SH.split([4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=0)
    assert language.num_read(cache) == len(AFTER)


@torch.no_grad()
def test_vokens_are_read_after_the_prefix() -> None:
    language, plain = language_after(BEFORE), tiny_language(tiny_config())
    ids_BS, mask_BS = torch.tensor([AFTER, [*AFTER[:2], 0, 0, 0, 0]]), torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    found = language.voken_states(ids_BS, mask_BS)
    for states_VH, ids in zip(found, (AFTER, AFTER[:2]), strict=True):
        whole = torch.tensor([BEFORE + ids])
        torch.testing.assert_close(states_VH, plain.voken_states(whole, torch.ones_like(whole))[0], atol=1e-5, rtol=0)
    found = language.voken_states(ids_BS, mask_BS, next_ids=[3, 7])
    for states_AH, ids in zip(found, (AFTER, AFTER[:2]), strict=True):
        whole = torch.tensor([BEFORE + ids])
        expected = plain.voken_states(whole, torch.ones_like(whole), next_ids=[3, 7])[0]
        torch.testing.assert_close(states_AH, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_vokens_are_the_same_beside_a_longer_text_where_a_window_slides(kind: str) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "sliding_window": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    body = {
        "mistral": lambda: MistralModel(MistralConfig(**sizes, **heads)),
        "gemma2": lambda: Gemma2Model(Gemma2Config(**sizes, **heads)),
    }[kind]()
    language = LanguageModel(body.eval(), nn.Linear(32, 99), VokenEmbeddings(99, 2, 32))
    language.prefix = Prefix(prefix_shape(body, 4))
    language.prefix.states.normal_()
    short, long = torch.tensor([[5, 9, 2]]), torch.randint(0, 90, (1, 20))
    alone = language.voken_states(short, torch.ones_like(short))[0]
    ids_BS = torch.cat([F.pad(short, (0, 17)), long])
    mask_BS = torch.tensor([[1] * 3 + [0] * 17, [1] * 20])
    torch.testing.assert_close(language.voken_states(ids_BS, mask_BS)[0], alone, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_packed_language_model_reads_after_the_prefix(precision: TextPrecision, expected: Tensor) -> None:
    language = language_after(BEFORE)
    assert language.prefix
    language.pack(precision)
    embeds_1SH = language.embed(torch.tensor([AFTER]))
    bound = {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.05}[precision]
    assert (language.states(embeds_1SH)[0] - expected).abs().max() < bound * expected.abs().max()
    cache = SlotCache.for_model(language.body, num_slots=2, num_positions=64, prefix_L2GFD=language.prefix())
    cache.take(1, 64, idle=[])
    found = cache.forward(language.body, embeds_1SH[0], [(1, len(AFTER))])
    assert (found - expected).abs().max() < bound * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("num_shared_blocks", [None, 40])
def test_slots_begin_with_the_prefix(num_shared_blocks: int | None, expected: Tensor) -> None:
    language = language_after(BEFORE)
    assert language.prefix
    cache = SlotCache.for_model(
        language.body,
        num_slots=3,
        num_positions=200,
        num_shared_blocks=num_shared_blocks,
        prefix_L2GFD=language.prefix(),
    )
    embeds_SH = language.embed(torch.tensor([AFTER]))[0]
    cache.take(1, 200, idle=[])
    first = cache.forward(language.body, embeds_SH[:4], [(1, 4)])
    cache.take(0, 100, idle=[2])
    cache.copy(1, 0, 4)
    cache.take(2, 100, idle=[])
    rest = cache.forward(
        language.body, torch.cat([embeds_SH[4:], embeds_SH[4:], embeds_SH[:1]]), [(1, 2), (0, 2), (2, 1)]
    )
    torch.testing.assert_close(torch.cat([first, rest[:2]]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rest[2:4], expected[4:], atol=1e-5, rtol=0)
    torch.testing.assert_close(rest[4], expected[0], atol=1e-5, rtol=0)
    assert cache.lengths == [6, 6, 1]
    cache.lengths[1] = 0  # the slot is taken again: another text may have its blocks
    cache.trim(1)
    cache.take(1, 200, idle=[])
    again = cache.forward(language.body, embeds_SH, [(1, 6)])
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_it_is_pefts_prefix() -> None:
    """The states of PEFT's own prefix tuning with the same numbers."""
    language, ids_1S = tiny_language(tiny_config()), torch.tensor([AFTER])
    layers, _, num_heads, num_tokens, width = shape = prefix_shape(language.body, 4)
    prefix = Prefix(shape)
    prefix.states.normal_()
    language.prefix = prefix
    found = language.states(language.embed(ids_1S))
    theirs = PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=num_tokens,
        num_layers=layers,
        token_dim=num_heads * width,
        num_attention_heads=num_heads,
    )
    model = get_peft_model(language.body, theirs).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    weight.copy_(prefix.states.permute(3, 0, 1, 2, 4).reshape(num_tokens, -1))
    expected = model(ids_1S, attention_mask=torch.ones_like(ids_1S)).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_generator_writes_after_the_prefix_in_any_company() -> None:
    config, (tokenizer, vision) = tiny_config(), (tiny_tokenizer(tiny_config()), tiny_vision(tiny_config()))
    sampling = Sampling(temperature=0.0, max_page_tokens=8)
    requests = [
        StoryRequest(prompt=(f"A fox and {num} owls",), pages=2, seed=num, sampling=sampling) for num in range(4)
    ]

    def write(language: LanguageModel, *together: StoryRequest, **limits: float) -> list[list[GeneratorEvent]]:
        generator = VokenGenerator(config, tokenizer, language, vision, limits=default_limits("cpu", **limits))

        async def collect(request: StoryRequest) -> list[GeneratorEvent]:
            return [event async for event in generator.generate(request)]

        async def all_of_them() -> list[list[GeneratorEvent]]:
            return await asyncio.gather(*map(collect, together))

        return asyncio.run(all_of_them())

    def states(events: list[GeneratorEvent]) -> Tensor:
        return torch.cat([torch.from_numpy(event.hidden_VH) for event in events if isinstance(event, Vokens)])

    alone = [states(write(language_after(BEFORE), request)[0]) for request in requests]
    for limits in ({}, {"kv_cache_gib": 0.01}):
        together = write(language_after(BEFORE), *requests, **limits)
        torch.testing.assert_close([states(events) for events in together], alone, atol=1e-4, rtol=0)
    without = states(write(tiny_language(config), requests[0])[0])
    assert (without - alone[0]).abs().max() > 0.1


def test_a_projected_prefix_settles_as_it_is_and_has_gradients() -> None:
    language = tiny_language(tiny_config())
    assert language.is_frozen
    language.add_prefix(5, context_tokens=600)
    assert isinstance(language.prefix, ProjectedPrefix) and not language.is_frozen
    embeds_1SH = language.embed(torch.tensor([AFTER]))
    states = language.states(embeds_1SH)
    states.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in language.prefix.parameters())
    language.prefix = language.prefix.settle()
    torch.testing.assert_close(language.states(embeds_1SH), states, atol=1e-6, rtol=0)


def test_a_folder_keeps_its_prefix(tmp_path: Path) -> None:
    config = save_tiny(tmp_path / "plain")
    language = language_after(BEFORE)
    parts = {
        "mapper": model_folder.load_mapper(tmp_path / "plain", config),
        "vision": model_folder.load_vision(tmp_path / "plain", config),
    }
    saved = model_folder.save(tmp_path / "prefixed", config, language=language, **parts, start=tmp_path / "plain")
    assert saved.fingerprint != config.fingerprint
    found = load_prefix(tmp_path / "prefixed" / "prefix.safetensors", language.body, context_tokens=600)
    assert language.prefix
    torch.testing.assert_close(found(), language.prefix(), atol=1e-2, rtol=1e-2)
    for damaged in (torch.zeros(2, 2, 3, 4, 5), torch.zeros(7)):
        save_tensors({"states": damaged}, tmp_path / "damaged.safetensors")
        with pytest.raises(ModelFolderError, match="does not fit"):
            load_prefix(tmp_path / "damaged.safetensors", language.body, context_tokens=600)


def test_a_prefix_is_refused_where_pictures_see_all_of_themselves() -> None:
    language = tiny_language(tiny_config())
    language.sees_whole_pictures = True
    with pytest.raises(ModelFolderError, match="train an adapter"):
        language.add_prefix(5, context_tokens=600)


def test_learned_positions_must_reach_over_prefix_and_context() -> None:
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    language = LanguageModel(GPT2Model(config), nn.Linear(32, 50), VokenEmbeddings(50, 2, 32))
    with pytest.raises(ModelFolderError, match="the 64 places .*: set a smaller context_tokens"):
        language.add_prefix(5, context_tokens=60)
    language.add_prefix(4, context_tokens=60)
    check_positions(language.body, 4, context_tokens=60)
    assert language.prefix and language.prefix().shape == (2, 2, 4, 4, 8)


def test_layers_of_several_shapes_take_no_prefix() -> None:
    class Uneven(nn.Module):
        embedding = nn.Embedding(4, 8)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, inputs_embeds: Tensor, past_key_values: DynamicCache, use_cache: bool) -> None:
            for layer, width in enumerate((4, 8)):
                past_key_values.update(torch.zeros(1, 2, 1, width), torch.zeros(1, 2, 1, width), layer)

    with pytest.raises(ModelFolderError, match="takes no prefix: its layers keep keys and values of several shapes"):
        prefix_shape(Uneven(), 4)
