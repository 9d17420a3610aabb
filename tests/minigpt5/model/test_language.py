"""The language model: any causal base, and no row trained but the new ones."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from minigpt5.config import LoraConfig
from minigpt5.errors import ModelFolderError
from minigpt5.model.folder import save_language
from minigpt5.model.language import LanguageModel
from minigpt5.model.vokens import align
from tests.helpers.tiny import tiny_config

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BASES = {
    "llama, untied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "qwen2, tied": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
}
FAMILIES = {
    "phi: a bias on the head": (PhiForCausalLM, PhiConfig(**SIZES, partial_rotary_factor=0.5)),
    "phi3: queries, keys and values in one layer": (Phi3ForCausalLM, Phi3Config(**SIZES, pad_token_id=0)),
    "gemma2: scaled embeddings, capped logits": (
        Gemma2ForCausalLM,
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05),
    ),
    "cohere2: logits multiplied": (Cohere2ForCausalLM, Cohere2Config(**SIZES, logit_scale=0.25)),
    "granite: logits divided": (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=4.0)),
}
PADDED = 90
"""Tokens of a tokenizer that is smaller than the matrices."""


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_bases_own_library(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind, shape = FAMILIES[name]
    causal = kind(shape).eval()
    for parameter in causal.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))  # a fresh bias is zero
    causal.save_pretrained(tmp_path)
    config = dataclasses.replace(tiny_config(), vocabulary=PADDED, hidden=32)
    language = LanguageModel.from_base(tmp_path, config)
    language.initialise_vokens(seed=0)
    ids_1S = torch.tensor([[5, 17, 80, 3]])
    with torch.no_grad():
        logits_1ST = language.logits(language.states(language.embed(ids_1S)))
        torch.testing.assert_close(logits_1ST[..., :PADDED], causal(ids_1S, use_cache=False).logits[..., :PADDED])
        vokens_1SH = language.embed(torch.tensor([language.voken_embeddings.ids]))
        assert 0.5 < float(vokens_1SH.std() / language.embed(ids_1S).std()) < 2, "vokens are as large as words"
    assert logits_1ST.shape[-1] == PADDED + config.num_vokens + 1


@pytest.mark.parametrize("name", [*FAMILIES, *BASES, "qwen2, rows of its own"])
def test_trained_weights_are_read_as_they_were_saved(name: str, tmp_path: Path) -> None:
    """Whatever the family calls its parts, with a bias on the head, and where published rows part a tied head."""
    torch.manual_seed(0)
    kind, shape = (FAMILIES | BASES).get(name) or BASES["qwen2, tied"]
    kind(shape).save_pretrained(tmp_path / "base")
    config = dataclasses.replace(tiny_config(), vocabulary=PADDED, hidden=32)
    language = LanguageModel.from_base(tmp_path / "base", config)
    if name.endswith("rows of its own"):
        language.replace_vocabulary(torch.randn(PADDED, 32), torch.randn(PADDED, 32))
    for parameter in dict.fromkeys([*language.body.parameters(), *language.head.parameters()]):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    file = tmp_path / "base" / "config.json"  # of a base that transformers reads as plain weights
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    saved = save_language(tmp_path / "saved", config, language, tmp_path / "base")
    again = LanguageModel.from_base(tmp_path / "saved" / saved.language_model, config)
    ids_1S = torch.tensor([[5, 17, 80, 3]])
    with torch.no_grad():
        expected, found = (one.logits(one.states(one.embed(ids_1S)))[..., :PADDED] for one in (language, again))
    torch.testing.assert_close(found, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)


def test_a_base_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill them with random numbers, others at each start."""
    kind, shape = BASES["llama, untied"]
    kind(shape).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"], weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = dataclasses.replace(tiny_config(), vocabulary=99, hidden=32)
    with pytest.raises(ModelFolderError, match=r"lacks the weights lm_head.weight, model.layers.0.self_attn.k_proj"):
        LanguageModel.from_base(tmp_path, config)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ModelFolderError, match=f"the weights in {tmp_path} cannot be read"):
        LanguageModel.from_base(tmp_path, config)


def test_activation_checkpointing_changes_no_voken_state(tmp_path: Path) -> None:
    """In training mode transformers drops the cache."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    language = LanguageModel.from_base(tmp_path, dataclasses.replace(tiny_config(), vocabulary=99, hidden=32))
    language.initialise_vokens(seed=0)
    ids_BS, mask_BS = torch.tensor([[5, 17, 9, 3], [5, 2, 9, 9]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected_BVH = language.voken_states(ids_BS, mask_BS)
    language.checkpoint_activations()
    assert language.body.training
    found_BVH = language.voken_states(ids_BS, mask_BS)
    torch.testing.assert_close(found_BVH, expected_BVH)
    found_BVH.square().mean().backward()
    assert language.voken_embeddings.embedding.grad is not None
    assert language.body.training, "it is put back"


@pytest.fixture(params=BASES)
def language(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    torch.manual_seed(0)
    kind, shape = BASES[request.param]
    assert isinstance(shape, PretrainedConfig)
    kind(shape).save_pretrained(tmp_path)
    language = LanguageModel.from_base(tmp_path, dataclasses.replace(tiny_config(), vocabulary=99, hidden=32))
    language.initialise_vokens(seed=0)
    return language


def test_a_tied_head_is_held_once(language: LanguageModel) -> None:
    is_tied = language.body.config.tie_word_embeddings
    assert (language.head.weight is language.embedding) == is_tied
    language.to(torch.bfloat16)
    assert (language.head.weight is language.embedding) == is_tied


def test_a_packed_head_is_held_once(language: LanguageModel) -> None:
    is_tied = language.body.config.tie_word_embeddings
    embeds_1SH = language.embed(torch.tensor([[5, 17, 98]]))
    expected = language.logits(language.states(embeds_1SH)).detach()  # a gradient's graph would hold the head
    head = weakref.ref(language.head.weight)
    language.pack("float32")
    packed = language.logits(language.states(embeds_1SH)).detach()
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-4)
    gc.collect()
    assert (head() is not None) == is_tied


def test_old_tokens_have_the_base_models_logits(language: LanguageModel) -> None:
    ids_1S = torch.tensor([[5, 17, 98]])
    states_1SH = language.states(language.embed(ids_1S))
    logits_1ST = language.logits(states_1SH)
    assert logits_1ST.shape == (1, 3, 99 + 9)
    torch.testing.assert_close(logits_1ST[..., :99], F.linear(states_1SH, language.head.weight))


def test_only_voken_embeddings_move_whatever_the_weight_decay(language: LanguageModel) -> None:
    """Published: the whole matrices decay, and 308 of 309 rows change in one step."""
    language.add_adapter(LoraConfig(rank=2, alpha=4, dropout=0.0, targets=("q_proj", "v_proj")))
    before = {name: value.clone() for name, value in language.named_parameters()}
    head_TH = language.head.weight.clone()
    trained = [parameter for parameter in language.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    ids_1S = torch.tensor([[5, 17, *language.voken_embeddings.ids, 3]])
    for _ in range(2):  # LoRA's first factor moves only once the second has
        states_1SH = language.states(language.embed(ids_1S))
        loss = (
            F.cross_entropy(language.logits(states_1SH)[0, :-1], ids_1S[0, 1:])
            + align(states_1SH, ids_1S, language.voken_embeddings)[0].square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, value in language.named_parameters() if not torch.equal(value, before[name])}
    assert {"voken_embeddings.embedding", "voken_embeddings.head"} <= moved
    assert all(name.startswith("voken_embeddings.") or "lora_" in name for name in moved)
    assert torch.equal(language.head.weight, head_TH)


def test_generated_one_by_one_or_all_at_once_states_agree(language: LanguageModel) -> None:
    ids_BS = torch.tensor([[5, 17, 9, 3]])
    mask_BS = torch.ones_like(ids_BS)
    at_once = language.voken_states(ids_BS, mask_BS)
    whole_1S = torch.cat([ids_BS, torch.tensor([language.voken_embeddings.ids])], dim=1)
    states_1SH = language.states(language.embed(whole_1S))
    torch.testing.assert_close(at_once, align(states_1SH, whole_1S, language.voken_embeddings)[0], atol=1e-5, rtol=1e-4)
