"""The ways that are compared, each a program that measures in turns: `python -m benchmarks.ways WAY`.

  published  a loop as published, and diffusers' pipeline
  limit      lockstep, and the machine's own peak
  text       the generator alone, with all threads
  pictures   the decoder alone
  eager      the decoder alone, with torch's own kernels
  ours       both engines, with their shares of the threads
  long       both engines, with a long context

Each has a process of its own: threads that another one has used would slow it down (`minigpt5/engine/threads.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import long_prompt
from benchmarks.alone import Pictures, Text
from benchmarks.engine_pair import Engines, load_engines
from benchmarks.load import LOADS, Load
from benchmarks.lockstep import Lockstep
from benchmarks.machine_peak import measure_peak
from benchmarks.ours import Ours
from benchmarks.published import PublishedWay
from benchmarks.turns import Measurements, answer_questions
from minigpt5.config import default_model_folder


def published(engines: Engines, load: Load) -> Measurements:
    way = PublishedWay(engines, load)
    return {"story": way.story, "pictures": way.pictures}


def limit(engines: Engines, load: Load) -> Measurements:
    way = Lockstep(engines, load)
    return {"text": way.text, "pictures": way.pictures, "peak": measure_peak}


def pictures(engines: Engines, load: Load) -> Measurements:
    way = Pictures(engines.decoder, load)
    return {"pictures": way.pictures, "unet": way.unet, "unet_flops": way.unet_flops}


def text(engines: Engines, load: Load) -> Measurements:
    way = Text(engines.generator, load)
    return {
        "text": way.text,
        "weight_bytes": way.weight_bytes,
        "prompts": lambda num: [engines.prompt_ids(story) for story in engines.new_texts(num, load)],
    }


def ours(engines: Engines, load: Load) -> Measurements:
    way = Ours(engines, load)
    return {"stories": way.stories, "bound": way.bound, "counters": way.counters}


def long(engines: Engines, load: Load) -> Measurements:
    return {"gaps": lambda: asyncio.run(long_prompt.measure_token_gaps(engines, load))}


WAYS: dict[str, Callable[[Engines, Load], Measurements]] = {
    "published": published,
    "limit": limit,
    "text": text,
    "pictures": pictures,
    "eager": pictures,
    "ours": ours,
    "long": long,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ways", description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--load", choices=LOADS, default="full")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.cores)

    def load() -> Measurements:
        engines = load_engines(
            options.model,
            num_cores=options.cores,
            is_reference=options.way in ("published", "eager"),
            writes_alone=options.way == "text",
            context_tokens=long_prompt.CONTEXT_TOKENS if options.way == "long" else None,
        )
        return WAYS[options.way](engines, LOADS[options.load])

    answer_questions(load)


if __name__ == "__main__":
    main()
