"""Batch invariance: `python -m benchmarks.company [--num 200]`, both engines of a model folder.

text       requests written alone, and again while others join and leave at random: the same tokens?
pictures   drawn alone, and again in random batches of other settings: how far apart are the pictures?
cancels    requests cancelled at random moments: how soon they are gone, and whether anything stays behind
fairness   one client's page, alone and beside sixteen stories of another client, over HTTP
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import io
import json
import random
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.http_load import REFUSES_NOTHING, measure_fairness, running_server
from benchmarks.load import WHAT, WHO, Load
from benchmarks.quality import machine
from minigpt5.config import default_model_folder
from minigpt5.engine.decoder import DiffusionDecoder, Drawn
from minigpt5.engine.denoising import Denoising
from minigpt5.engine.generator import VokenGenerator
from minigpt5.model.folder import load_decoder_model
from minigpt5.story.stream import stream_story
from minigpt5.types import DrawRequest, DrawSettings, Picture, Precision, StoryRequest, TextDelta, Vokens

AT_ONCE = 24
NUM_DRAWN_BY_BOTH = 3
PATIENCE_S = 30.0
"""How long what is cancelled may take to be gone."""


def some_stories(num: int, generator: VokenGenerator, rng: random.Random) -> list[StoryRequest]:
    """Requests of different prompts, lengths, temperatures and seeds; every third is greedy."""
    stories = []
    for index in range(num):
        sampling = dataclasses.replace(
            generator.config.sampling,
            max_page_tokens=rng.randint(8, 32),
            temperature=rng.choice([0.0, 0.7, 1.0]),
        )
        prompt = f"A {rng.choice(WHO)} who finds a {rng.choice(WHAT)}"
        stories.append(StoryRequest(prompt=(prompt,), pages=rng.randint(1, 2), seed=index, sampling=sampling))
    return stories


async def write(generator: VokenGenerator, request: StoryRequest) -> tuple[str, list[np.ndarray]]:
    """A request's text, and its vokens' states."""
    text, states = "", []
    async for event in generator.generate(request):
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, Vokens):
            text += "\n"
            states.append(event.hidden_VH)
    return text, states


async def join_at_random(works: Sequence[Any], rng: random.Random, *, pause_s: float) -> list[Any]:
    """Run coroutines, at most AT_ONCE together, each begun a random moment after the one before."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(work: Any) -> Any:
        async with places:
            return await work

    tasks = []
    for work in works:
        tasks.append(asyncio.create_task(one(work)))
        await asyncio.sleep(rng.random() * pause_s)
    return await asyncio.gather(*tasks)


async def compare_texts(generator: VokenGenerator, num: int, rng: random.Random) -> dict[str, object]:
    stories = some_stories(num, generator, rng)
    first_close = generator.num_close_choices
    alone = [await write(generator, story) for story in stories]
    num_close = generator.num_close_choices - first_close
    together = await join_at_random([write(generator, story) for story in stories], rng, pause_s=0.1)
    pairs = list(zip(alone, together, strict=True))
    same = [(one, other) for one, other in pairs if one[0] == other[0]]
    apart = [float(np.abs(a - b).max()) for one, other in same for a, b in zip(one[1], other[1], strict=True)]
    return {
        "requests": num,
        "same_text": len(same),
        "close_choices": num_close,
        "largest_voken_difference": max(apart, default=0.0),
    }


class Recording(DiffusionDecoder):
    """Keeps the latents of what it draws, by seed."""

    latents: dict[int, Tensor]

    def _finish(self, requests: Sequence[DrawRequest], pictures: Sequence[Denoising]) -> list[Drawn]:
        self.latents = getattr(self, "latents", {})
        for request, picture in zip(requests, pictures, strict=True):
            self.latents[request.seed] = picture.latents_1CYX
        return super()._finish(requests, pictures)


async def draw(decoder: DiffusionDecoder, request: DrawRequest) -> np.ndarray:
    async for event in decoder.decode(request):
        if isinstance(event, Picture):
            return np.asarray(Image.open(io.BytesIO(event.png)), dtype=np.int16)
    raise AssertionError("the decoder ended without a picture")


async def compare_pictures(
    decoder: Recording, again: Recording, vokens: Sequence[Vokens], num: int, rng: random.Random
) -> dict[str, object]:
    """`again` is a decoder of the same weights that has drawn nothing yet, so that no cache answers."""
    requests = [
        DrawRequest(
            vokens=rng.choice(vokens),
            seed=index,
            settings=DrawSettings(
                steps=rng.randint(2, 8),
                guidance_scale=rng.choice([1.0, 3.0, 5.0]),
                scheduler=rng.choice(["ddim", "pndm", "dpm-solver++", "sde-dpm-solver++"]),
            ),
        )
        for index in range(num)
    ]
    alone = [await draw(decoder, request) for request in requests]
    together = await join_at_random([draw(again, request) for request in requests], rng, pause_s=0.05)
    levels = [int(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True)]
    apart = [float((decoder.latents[seed] - again.latents[seed]).abs().max()) for seed in range(num)]
    return {
        "pictures": num,
        "bit_equal_latents": apart.count(0.0),
        "bit_equal": levels.count(0),
        "largest_latent_difference": max(apart),
        "largest_difference_levels": max(levels),
    }


async def cancel_at_random(
    generator: VokenGenerator, decoder: DiffusionDecoder, vokens: Vokens, num: int, rng: random.Random
) -> dict[str, object]:
    """Stories that are left at random moments: in the text, or while pictures are drawn."""

    async def leave(request: StoryRequest) -> None:
        async def read() -> None:
            async for _ in stream_story(request, generator.generate, decoder.decode):
                pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(rng.random() * 2)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    await join_at_random([leave(story) for story in some_stories(num, generator, rng)], rng, pause_s=0.1)
    began = time.perf_counter()
    while engines_are_busy(generator, decoder) and time.perf_counter() - began < PATIENCE_S:
        await asyncio.sleep(0.005)
    return {
        "cancelled": num,
        "seconds_until_nothing_is_in_flight": time.perf_counter() - began,
        "in_flight_after": generator.num_running + generator.num_waiting + decoder.num_running + decoder.num_waiting,
        "queued_cost_after": generator.queued_cost + decoder.queued_cost,
        "leaving_over_a_step": await measure_cancel(generator, decoder, vokens),
    }


def engines_are_busy(*engines: VokenGenerator | DiffusionDecoder) -> bool:
    return any(engine.num_running + engine.num_waiting for engine in engines)


async def measure_cancel(generator: VokenGenerator, decoder: DiffusionDecoder, vokens: Vokens) -> dict[str, object]:
    """How long a lone request is still inside after it is cancelled, over the time of one of its steps."""

    def write(seed: int) -> AsyncGenerator[object, None]:
        return generator.generate(StoryRequest(prompt=("A fox",), pages=4, seed=seed))  # type: ignore[return-value]

    def draw(seed: int) -> AsyncGenerator[object, None]:
        return decoder.decode(DrawRequest(vokens=vokens, seed=10_000 + seed))  # type: ignore[return-value]

    figures = {}
    for name, start, engine in (("generator", write, generator), ("decoder", draw, decoder)):
        ratios = []
        for seed in range(10):
            times: list[float] = []
            events = start(seed)
            async for _ in events:
                times.append(time.perf_counter())
                if len(times) == 8:
                    break
            began = time.perf_counter()
            await events.aclose()
            while engines_are_busy(engine):
                await asyncio.sleep(0.0005)
            ratios.append((time.perf_counter() - began) / float(np.median(np.diff(times))))
        figures[name] = {"median": float(np.median(ratios)), "most": max(ratios)}
    return figures


async def measure(folder: Path, num: int, precision: Precision) -> tuple[dict[str, float], dict[str, Any]]:
    rng = random.Random(5)
    generator = VokenGenerator.from_pretrained(folder)
    decoder, again = (Recording(*load_decoder_model(folder, precision=precision, backend="auto")) for _ in range(2))
    texts = await compare_texts(generator, num, rng)
    vokens = [
        event async for event in generator.generate(some_stories(1, generator, rng)[0]) if isinstance(event, Vokens)
    ]
    pictures = await compare_pictures(decoder, again, vokens, num, rng)
    cancels = await cancel_at_random(generator, again, vokens[0], num, rng)
    figures: dict[str, Any] = {"text": texts, "pictures": pictures, "cancels": cancels}
    ratios = {
        "same_text": int(str(texts["same_text"])) / num,
        "bit_equal_pictures": int(str(pictures["bit_equal"])) / num,
    }
    return ratios, figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.company", description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--num", type=int, default=200, help="requests, pictures and cancels, each")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="of the UNet")
    parser.add_argument("--threads", type=int, help="torch threads; as torch chooses where it is not given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results" / "company.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    ratios, figures = asyncio.run(measure(options.model, options.num, options.precision))
    with running_server(options.model, REFUSES_NOTHING) as (url, _):
        figures["fairness"] = measure_fairness(url, Load())
    ratios["page_beside_16_stories_vs_alone"] = figures["fairness"]["ratio"]
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.company", *given])
    report = {"ratios": ratios, "figures": figures, "machine": machine(), "command": command}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({"ratios": ratios, **figures}, indent=2))


if __name__ == "__main__":
    main()
