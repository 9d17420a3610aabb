"""The language model: any causal base, and no row trained but the new ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, Qwen2Config, Qwen2ForCausalLM

from minigpt5.config import LoraConfig
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


@pytest.fixture(params=BASES)
def language(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    torch.manual_seed(0)
    kind, shape = BASES[request.param]
    assert isinstance(shape, PretrainedConfig)
    kind(shape).save_pretrained(tmp_path)
    return LanguageModel.from_base(tmp_path, dataclasses.replace(tiny_config(), vocabulary=99, hidden=32))


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
