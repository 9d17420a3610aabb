"""Our engine against transformers' own continuous batching: `python -m benchmarks.continuous_batching`.

Eight requests at once write greedily on the shipped model's base, SmolLM2-135M, in float32, in turns:

  ours                  VokenGenerator as it is served: a KV cache of slots, linear layers packed for the CPU
  ours, not packed      the same with transformers' linear layers
  transformers          ContinuousBatchingManager with its paged cache
  transformers, packed  the same with our linear layers

Prompts differ from round to round, so that nothing is reused. The figure is tokens written a second, of all requests.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from benchmarks.quality import machine
from minigpt5.config import NO_VISION, ModelConfig, storybook
from minigpt5.engine.generator import VokenGenerator
from minigpt5.model.base_models import resolve
from minigpt5.model.language import LanguageModel, load_tokenizer
from minigpt5.model.packed_linear import pack_linears
from minigpt5.model.prompt import encode, request_segments
from minigpt5.model.vision import Vision
from minigpt5.types import Sampling, StoryRequest, TextDelta

NUM_REQUESTS = 8
NUM_TOKENS = 64
NUM_BLOCKS = 64
"""Of 256 tokens each; left to itself, transformers takes nine tenths of the free memory."""
SUBJECTS = ("a fox", "an owl", "two bears", "a ship", "the sea", "an old mill", "a red tent", "the moon")

Way = Callable[[list[StoryRequest]], list[str]]
"""Requests -> their texts."""


def requests(round_number: int) -> list[StoryRequest]:
    """Requests whose prompts differ from their first words on."""
    sampling = Sampling(temperature=0.0, max_page_tokens=NUM_TOKENS)
    return [
        StoryRequest(
            prompt=(f"{round_number}{place} lines about {subject}",), mode="reply", pictures="none", sampling=sampling
        )
        for place, subject in enumerate(SUBJECTS[:NUM_REQUESTS])
    ]


class Ours:
    """VokenGenerator, whose texts have a fixed number of tokens, unless they have a stop string of the template."""

    def __init__(
        self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, causal: Any, *, is_packed: bool
    ) -> None:
        language = LanguageModel.from_causal(causal, config, config.language_model)
        language.initialise_vokens(seed=0)
        if is_packed:
            language.pack()
        self.generator = VokenGenerator(config, tokenizer, language, Vision(config))
        self.generator.end_ids = frozenset()

    def __call__(self, asked: list[StoryRequest]) -> list[str]:
        return asyncio.run(self._write(asked))

    async def _write(self, asked: list[StoryRequest]) -> list[str]:
        return list(await asyncio.gather(*map(self._write_one, asked)))

    async def _write_one(self, request: StoryRequest) -> str:
        events = [event async for event in self.generator.generate(request)]
        return "".join(event.text for event in events if isinstance(event, TextDelta))


class Theirs:
    """transformers' manager, started once."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        causal: Any,
        read: Callable[[StoryRequest], list[int]],
        *,
        is_packed: bool,
    ) -> None:
        self.tokenizer, self.read = tokenizer, read
        generation = GenerationConfig(
            do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=-1, pad_token_id=tokenizer.eos_token_id
        )
        if is_packed:
            pack_linears(causal)
        self.manager = causal.init_continuous_batching(
            generation_config=generation, continuous_batching_config=ContinuousBatchingConfig(num_blocks=NUM_BLOCKS)
        )
        self.manager.start()

    def __call__(self, asked: list[StoryRequest]) -> list[str]:
        names = self.manager.add_requests([self.read(request) for request in asked], max_new_tokens=NUM_TOKENS)
        written: dict[str, list[int]] = {}
        while len(written) < len(names):
            if result := self.manager.get_result(timeout=60):
                if result.is_finished():
                    written[result.request_id] = result.generated_tokens
            elif not self.manager.is_running():
                raise SystemExit("transformers' manager has stopped")
        assert all(len(tokens) == NUM_TOKENS for tokens in written.values())
        return [str(self.tokenizer.decode(written[name])).lstrip() for name in names]

    def stop(self) -> None:
        self.manager.stop(block=True, timeout=10)


def measure(num_rounds: int) -> dict[str, Any]:
    """Seconds and tokens a second of each way, in turns after a first round that does not count."""
    base = storybook().language_model
    folder = resolve(base)
    config = dataclasses.replace(storybook(), vision=NO_VISION)
    tokenizer = load_tokenizer(folder, config)
    causal: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    ours = {
        name: Ours(config, tokenizer, copy.deepcopy(causal), is_packed=is_packed)
        for name, is_packed in (("ours", True), ("ours, not packed", False))
    }
    generator = ours["ours"].generator
    template, voken_embeddings = generator.template, generator.language.voken_embeddings

    def read(request: StoryRequest) -> list[int]:
        return encode(request_segments(request, template), tokenizer, voken_embeddings, picture_tokens=()).ids

    theirs = {
        name: Theirs(tokenizer, copy.deepcopy(causal), read, is_packed=is_packed)
        for name, is_packed in (("transformers", False), ("transformers, packed", True))
    }
    ways: dict[str, Way] = {**ours, **theirs}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    num_equal = number = 0
    try:
        _one_round(ways, number)
        while len(seconds["ours"]) < num_rounds:
            number += 1
            found, texts = _one_round(ways, number)
            if any(stop in text for text in texts["transformers"] for stop in template.stop):
                continue  # our engine ends a text there, and has fewer tokens to write
            num_equal += sum(len(set(alike)) == 1 for alike in zip(*texts.values(), strict=True))
            for name in ways:
                seconds[name].append(found[name])
            print("   ".join(f"{name} {found[name]:.2f} s" for name in ways), flush=True)
    finally:
        for one in theirs.values():
            one.stop()
    num_tokens = NUM_REQUESTS * NUM_TOKENS
    return {
        "base": base,
        "requests": NUM_REQUESTS,
        "tokens_of_each": NUM_TOKENS,
        "same_text_in_all_ways": num_equal,
        "texts": num_rounds * NUM_REQUESTS,
        "ways": {
            name: {
                "seconds": [round(one, 3) for one in found],
                "tokens_per_s": round(num_tokens / statistics.median(found), 1),
            }
            for name, found in seconds.items()
        },
    }


def _one_round(ways: dict[str, Way], number: int) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Seconds and texts of each way, one after the other."""
    seconds, texts = {}, {}
    for name, way in ways.items():
        began = time.perf_counter()
        texts[name] = way(requests(number))
        seconds[name] = time.perf_counter() - began
    return seconds, texts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.continuous_batching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results" / "continuous_batching.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    figures = measure(options.rounds)
    ways = {name: way["tokens_per_s"] for name, way in figures["ways"].items()}
    for name, rate in ways.items():
        print(f"{name:22}{rate:8.1f} tokens/s")
    given = sys.argv[1:] if arguments is None else arguments
    report = {
        "ratios": {
            "as served": round(ways["ours"] / ways["transformers"], 2),
            "same linear layers": round(ways["ours"] / ways["transformers, packed"], 2),
        },
        "figures": figures,
        "machine": machine(),
        "command": " ".join(["python -m benchmarks.continuous_batching", *given]),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
