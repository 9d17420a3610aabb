"""Families of causal language models: each is what transformers says it is, through every way in which we run it.

docs/own-models.md has FAMILIES and CHECKS as a table. The models are random and small, with windows that their texts
outgrow; classes, files and tokenizer are real.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from examples.own_model.tiny_bases import make_stable_diffusion, make_tokenizer
from minigpt5 import new
from minigpt5.config import ModelConfig
from minigpt5.engine.generator import VokenGenerator
from minigpt5.engine.kv_cache import SlotCache
from minigpt5.limits import ON_CPU, Limits
from minigpt5.model import folder as model_folder
from minigpt5.model.language import LanguageModel, pad
from minigpt5.model.prompt import encode, request_segments
from minigpt5.model.published_template import END
from minigpt5.model.published_template import PUBLISHED as TEMPLATE
from minigpt5.objective.example import Example
from minigpt5.parity.text import deviation, run, text_of
from minigpt5.pipeline import MiniGPT5
from minigpt5.types import DrawSettings, GeneratorEvent, Sampling, StoryRequest, Usage, Vokens
from training.data.batches import Batch, StageData
from training.presets import PUBLISHED, VokenPreset, override
from training.stages.voken import VokenStage
from training.strategy import new_strategy
from training.weight_sources import WeightSources

ROOT = Path(__file__).parents[3]
VOCABULARY = 259
WINDOW = 24
"""Tokens; a prompt here is several times as long."""
CLOSE = 1e-5
"""Largest deviation of states, as a share of the largest."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY + 5,  # rows that pad the matrices beyond the tokenizer
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}
MIXED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 4.0, 6.0, 8.0],
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of language model, and what sets it apart from a plain Llama."""

    ways: str
    config: Callable[..., PretrainedConfig]
    """A class of transformers' configs, or that with some arguments."""


FAMILIES = {
    "Llama 3": Family(ways="scaled RoPE", config=functools.partial(LlamaConfig, rope_parameters=LLAMA3)),
    "Qwen 2.5": Family(
        ways="biases of queries, keys and values; tied head",
        config=functools.partial(Qwen2Config, tie_word_embeddings=True),
    ),
    "Qwen 3": Family(ways="norms of queries and keys", config=functools.partial(Qwen3Config, head_dim=16)),
    "Qwen 3 MoE": Family(
        ways="experts", config=functools.partial(Qwen3MoeConfig, head_dim=8, num_experts=4, **EXPERTS)
    ),
    "Mistral": Family(ways="sliding window", config=functools.partial(MistralConfig, sliding_window=WINDOW)),
    "Mixtral": Family(
        ways="experts; sliding window",
        config=functools.partial(MixtralConfig, num_local_experts=4, sliding_window=WINDOW),
    ),
    "Gemma 2": Family(
        ways="local and global layers; soft caps of scores and logits; scaled embeddings",
        config=functools.partial(
            Gemma2Config, head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **MIXED
        ),
    ),
    "Gemma 3": Family(
        ways="local and global layers, each with its RoPE; scaled embeddings; own scale of queries",
        config=functools.partial(Gemma3TextConfig, head_dim=8, query_pre_attn_scalar=16, **MIXED),
    ),
    "Phi 2": Family(
        ways="partial RoPE; bias of the head; parallel blocks",
        config=functools.partial(PhiConfig, partial_rotary_factor=0.5),
    ),
    "Phi 3 and 4": Family(
        ways="fused queries, keys and values; LongRoPE to its original length",
        config=functools.partial(
            Phi3Config, rope_parameters=LONGROPE, original_max_position_embeddings=1024, sliding_window=None
        ),
    ),
    "SmolLM3": Family(
        ways="layers without positions; tied head",
        config=functools.partial(SmolLM3Config, no_rope_layers=[1, 0], tie_word_embeddings=True),
    ),
    "OLMo 2": Family(ways="norms after each part", config=Olmo2Config),
    "OLMo 3": Family(
        ways="norms after each part; local and global layers", config=functools.partial(Olmo3Config, **MIXED)
    ),
    "Granite": Family(
        ways="multipliers of embeddings, residuals, scores and logits",
        config=functools.partial(
            GraniteConfig,
            embedding_multiplier=6.0,
            residual_multiplier=0.3,
            attention_multiplier=0.2,
            logits_scaling=4.0,
        ),
    ),
    "Cohere 2": Family(
        ways="local layers, global ones without positions; parallel blocks; scaled logits",
        config=functools.partial(Cohere2Config, logit_scale=0.25, **MIXED),
    ),
    "StableLM": Family(
        ways="partial RoPE; layer norms",
        config=functools.partial(StableLmConfig, partial_rotary_factor=0.25, use_qkv_bias=True),
    ),
    "GLM 4": Family(
        ways="partial, interleaved RoPE; norms around each part", config=functools.partial(Glm4Config, head_dim=8)
    ),
    "Exaone 4": Family(
        ways="local layers, global ones without positions; norms after each part",
        config=functools.partial(Exaone4Config, sliding_window_pattern=2, **MIXED),
    ),
    "Starcoder 2": Family(
        ways="biases everywhere; sliding window", config=functools.partial(Starcoder2Config, sliding_window=WINDOW)
    ),
    "Apertus": Family(ways="xIELU", config=ApertusConfig),
    "gpt-oss": Family(
        ways="attention sinks; local and global layers; experts",
        config=functools.partial(GptOssConfig, head_dim=8, num_local_experts=4, num_experts_per_tok=2, **MIXED),
    ),
}


COVERED = {"Mixtral", "OLMo 3", "Exaone 4", "Starcoder 2", "Apertus"}
"""Families whose ways other families have too: slow tests."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A family's base model, and the model folder that `minigpt5.new` made of it."""

    base: Path
    folder: Path
    causal: Any
    """transformers' own model, read from the base."""
    config: ModelConfig
    tokenizer: Any
    language: LanguageModel
    """As it is served."""
    vision: Any

    def generator(self, *, num_slots: int = 8) -> VokenGenerator:
        return VokenGenerator(
            self.config, self.tokenizer, self.language, self.vision, limits=Limits(num_slots=num_slots)
        )


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion")
    make_stable_diffusion(folder)
    return folder


def parameters() -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in COVERED)) for name in FAMILIES]


@pytest.fixture(scope="module", params=parameters())
def made(request: pytest.FixtureRequest, diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    place = tmp_path_factory.mktemp("family")
    base, folder = place / "base", place / "model"
    make_base(base, FAMILIES[request.param])
    new.make_folder(folder, language=str(base), diffusion=str(diffusion), context_tokens=1024)
    causal = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    config, tokenizer, language, vision = model_folder.load_generator_model(folder)
    yield Made(
        base=base,
        folder=folder,
        causal=causal,
        config=config,
        tokenizer=tokenizer,
        language=language,
        vision=vision,
    )


@torch.no_grad()
def make_base(folder: Path, family: Family) -> None:
    """A random model, no parameter of which is zero or one."""
    tokenizer = make_tokenizer(folder)
    config = family.config(
        **{"tie_word_embeddings": False, **SIZES},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in causal.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    causal.save_pretrained(folder)


def some_ids(num_tokens: int, *, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, num_tokens), generator=torch.Generator().manual_seed(seed))


def ask(words: str, **fields: Any) -> StoryRequest:
    """A greedy request."""
    sampling = Sampling(temperature=0.0, max_page_tokens=fields.pop("max_page_tokens", 16))
    return StoryRequest(prompt=(words,), sampling=sampling, seed=1, **fields)


def check_equal(found: list[GeneratorEvent], expected: list[GeneratorEvent]) -> None:
    """The same text, and the same vokens but for rounding."""
    assert text_of(found) == text_of(expected)
    vokens = [[event.hidden_VH for event in events if isinstance(event, Vokens)] for events in (found, expected)]
    assert len(vokens[0]) == len(vokens[1]) > 0
    for one_VH, other_VH in zip(*vokens, strict=True):
        assert deviation(torch.from_numpy(one_VH), torch.from_numpy(other_VH)) < CLOSE


PROMPTS = [
    "A fox",
    "An owl that counts the stars, and loses its place when the moon comes up behind the mill",
    "Two bears in the rain who look for a boat",
    "A lighthouse keeper " * 8,
]
"""Of several lengths, the last of which is read in parts."""


@torch.no_grad()
def test_states_are_those_of_transformers(made: Made) -> None:
    ids_1S = some_ids(4 * WINDOW, seed=1)
    expected = made.causal(ids_1S, use_cache=False, output_hidden_states=True)
    embeds_1SH = made.language.embed(ids_1S)
    states_1SH = made.language.states(embeds_1SH)
    assert deviation(states_1SH, expected.hidden_states[-1]) < CLOSE
    tokens = slice(made.config.vocabulary)
    assert deviation(made.language.logits(states_1SH)[..., tokens], expected.logits[..., tokens]) < CLOSE
    cache = SlotCache.for_model(made.language.body, num_slots=2, num_positions=4 * WINDOW)
    parts = [
        cache.forward(made.language.body, part_TH, [(1, len(part_TH))])
        for part_TH in embeds_1SH[0].split([40, 1, 40, *[1] * 15])
    ]
    assert deviation(torch.cat(parts)[None], expected.hidden_states[-1]) < CLOSE


@torch.no_grad()
def test_greedy_text_is_that_of_generate(made: Made) -> None:
    """Tokens that pad the vocabulary, and the first voken, are not among ours."""
    generator = made.generator()
    lengths = []
    for words in PROMPTS[1], PROMPTS[3]:
        request = ask(words, mode="reply", pictures="none", max_page_tokens=32)
        events = run(generator, request)[0]
        read = encode(
            request_segments(request, made.generator().template),
            made.tokenizer,
            made.language.voken_embeddings,
            picture_tokens=(),
        )
        written = made.causal.generate(
            torch.tensor([read.ids]),
            attention_mask=torch.ones(1, len(read.ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=32,
            suppress_tokens=list(range(VOCABULARY, SIZES["vocab_size"])),
        )[0, len(read.ids) :]
        written = written[written != made.tokenizer.eos_token_id]
        text, stop, _ = made.tokenizer.decode(written).lstrip().partition(END.strip())
        assert text_of(events) == text
        usage = events[-1]
        assert isinstance(usage, Usage) and (stop or usage.completion_tokens == len(written))
        lengths.append(len(written))
    assert max(lengths) > 20


def test_requests_in_one_batch_write_what_each_writes_alone(made: Made) -> None:
    requests = [ask(words, pages=1) for words in PROMPTS]
    alone = [run(made.generator(), request)[0] for request in requests]
    for found, expected in zip(run(made.generator(), *requests), alone, strict=True):
        check_equal(found, expected)


def test_a_prompt_that_is_read_in_parts_is_read_as_a_whole(made: Made) -> None:
    """While another request writes, some tokens of a long prompt are read at a time."""
    long, short = ask(PROMPTS[3], pages=1), ask(PROMPTS[0], pages=2)
    generator = made.generator()
    sizes: list[list[tuple[int, int]]] = []
    forward = generator._cache.forward

    def note(body: nn.Module, embeds_TH: Tensor, counts: list[tuple[int, int]], **options: Any) -> Tensor:
        sizes.append(counts)
        return forward(body, embeds_TH, counts, **options)

    generator._cache.forward = note  # type: ignore[method-assign, assignment]
    whole = run(generator, long)[0]
    assert max(num for counts in sizes for _, num in counts) > ON_CPU.short_read_tokens
    sizes.clear()
    generator = made.generator()
    forward = generator._cache.forward
    generator._cache.forward = note  # type: ignore[method-assign, assignment]
    check_equal(run(generator, short, long)[1], whole)
    assert sum(1 < num < ON_CPU.short_read_tokens for counts in sizes if len(counts) > 1 for _, num in counts) > 5


def test_a_prompt_that_begins_as_another_is_read_from_there(made: Made) -> None:
    """The slot that it begins as is past the window, so keys that the window has left behind serve again."""
    generator = made.generator(num_slots=2)
    run(generator, ask(PROMPTS[3], pages=1))
    request = ask(PROMPTS[3][:130] + "meets a whale", pages=2)
    found = run(generator, request)[0]
    assert generator.num_reused_tokens > 4 * WINDOW
    check_equal(found, run(made.generator(), request)[0])


def stage(made: Made, name: str, start: Path, runs: Path) -> VokenStage:
    preset = override(PUBLISHED[name], ["bf16=false", "batch_size=2", "steps=2"])
    assert isinstance(preset, VokenPreset)
    return VokenStage(preset, WeightSources(runs=runs, start=start), StageData(training=Examples(), validation=None))


class Examples:
    """A caption and a story, by turns."""

    def example_at(self, position: int) -> tuple[int, Example]:
        picture = np.full((32, 32, 3), 40 * (position % 5), np.uint8)
        if position % 2:
            pages = ["It woke up early and went down to the water.", "It saw a boat."]
            return position, Example(
                segments=TEMPLATE.story(["A fox"], 2, pages), read=[], drawn=[picture] * 2, captions=pages
            )
        caption = "a fox beside a tent"
        return position, Example(
            segments=TEMPLATE.caption(caption), read=[], drawn=[picture], captions=[caption], is_caption=True
        )


def train(stage: VokenStage) -> set[str]:
    """Two optimizer steps, since LoRA's first factor moves once its second has. Returns which parameters moved."""
    parts = {"language": stage.language, "mapper": stage.mapper, "diffusion": stage.diffusion, "vision": stage.vision}
    named = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    strategy = new_strategy(stage.objective, stage.parameter_groups(), stage.preset.optimizer)
    stage.objective.train()
    for step in range(2):
        batch = Batch(examples=[Examples().example_at(place)[1] for place in (0, 1)], ids=[0, 1], step=step)
        strategy.backward(strategy.losses(batch, 1.0)["loss"])
        strategy.step(1.0)
    return {name for name, parameter in named.items() if not torch.equal(parameter, before[name])}


NEW_ROWS = {"language.voken_embeddings.embedding", "language.voken_embeddings.head"}


def test_align_moves_the_new_rows_and_the_mapper_alone(made: Made, tmp_path: Path) -> None:
    moved = train(stage(made, "align", made.folder, tmp_path))
    assert {name for name in moved if not name.startswith("mapper.")} == NEW_ROWS
    assert {name.split(".")[1] for name in moved if name.startswith("mapper.")} == {"fc", "queries", "transformer"}


@torch.no_grad()
def test_vokens_of_padded_captions_are_those_of_each_alone(made: Made) -> None:
    """What align learns from. A window counts the tokens of a text and no padding."""
    texts = [[int(token) for token in some_ids(length, seed=length)[0]] for length in (60, 7, 33)]
    together_BVH = made.language.voken_states(*pad(texts, 0))
    for text, found_VH in zip(texts, together_BVH, strict=True):
        ids_1S = torch.tensor([text + made.language.voken_embeddings.ids])
        states_SH = made.language.states(made.language.embed(ids_1S))[0]
        assert deviation(found_VH, states_SH[len(text) - 1 : -1]) < CLOSE


def test_learn_moves_the_adapter_too_and_its_folder_is_served(made: Made, tmp_path: Path) -> None:
    learn = stage(made, "learn", made.folder, tmp_path)
    moved = train(learn)
    is_adapter = {name: "lora_" in name for name in moved}
    of_adapter = {name for name, p in learn.language.named_parameters() if "lora_" in name}
    assert {name.removeprefix("language.") for name in moved if is_adapter[name]} == of_adapter
    assert {name for name in moved if not is_adapter[name] and not name.startswith("mapper.transformer.")} == NEW_ROWS
    learn.save(tmp_path / "model")
    trained = learn.language.eval()
    served = model_folder.load_language(tmp_path / "model", made.config)
    ids_1S = torch.cat([some_ids(2 * WINDOW, seed=2), torch.tensor([trained.voken_embeddings.ids])], dim=1)
    with torch.no_grad():
        states = [model.states(model.embed(ids_1S)) for model in (served, trained)]
    assert deviation(*states) < 1e-3, "what is stored has 16 bits"
    story = MiniGPT5.from_pretrained(tmp_path / "model").write("A fox", pages=2, seed=3, draw=DrawSettings(steps=1))
    assert [page.picture.width for page in story.pages if page.picture] == [32, 32]


CHECKS = {
    "states": test_states_are_those_of_transformers,
    "text": test_greedy_text_is_that_of_generate,
    "batch": test_requests_in_one_batch_write_what_each_writes_alone,
    "parts": test_a_prompt_that_is_read_in_parts_is_read_as_a_whole,
    "prefix": test_a_prompt_that_begins_as_another_is_read_from_there,
    "align": test_align_moves_the_new_rows_and_the_mapper_alone,
    "padding": test_vokens_of_padded_captions_are_those_of_each_alone,
    "learn, save, serve": test_learn_moves_the_adapter_too_and_its_folder_is_served,
}


def test_the_table_in_the_docs_is_this_one() -> None:
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in (ROOT / "docs" / "own-models.md").read_text().partition("| family |")[2].splitlines()
    ]
    table = rows[2 : 2 + len(FAMILIES)]
    assert rows[0] == ["own ways", *CHECKS]
    assert table == [[name, family.ways, *["yes"] * len(CHECKS)] for name, family in FAMILIES.items()]
    assert len(rows[2 + len(FAMILIES)]) == 1, "no further row"
    tests = {value for name, value in globals().items() if name.startswith("test_")}
    assert set(CHECKS.values()) == tests - {test_the_table_in_the_docs_is_this_one}
