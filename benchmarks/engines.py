"""How fast the engines are: `python -m benchmarks.engines [--model FOLDER] [--serve]`.

Stories of 4 pages with 48 tokens of text each and guided pictures, written and drawn by

  ours        both engines in one process, 1 to 16 stories at once
  baseline    a loop as published: one story at a time, token by token, diffusers' own pipeline for each picture
  upper_bound the same tokens and steps in lockstep with no engine around them, at the best of a sweep of batch sizes

with the same weights, precision, cores and scheduler, in one run, each in a process of its own. With `--serve`, a
server of the same model folder is then started, stories are streamed from it by a process of its own, and the ratios
are of those.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import DynamicCache

from benchmarks.http_load import measure_http, running_server
from benchmarks.load import TINY, Load, Timing, describe_load, spread
from benchmarks.quality import machine
from minigpt5.config import default_model_folder
from minigpt5.engine.decoder import DiffusionDecoder, encode
from minigpt5.engine.generator import VokenGenerator
from minigpt5.engine.sampling import sample_token
from minigpt5.engine.threads import share, single_thread
from minigpt5.model.folder import load_decoder_model, load_generator_model
from minigpt5.model.prompt import encode as encode_prompt
from minigpt5.model.prompt import request_segments
from minigpt5.story.stream import page_seed, stream_story
from minigpt5.types import DrawRequest, PageDone, Picture, StoryRequest, TextDelta, Vokens

LONG_CONTEXT = 8192
LONG_COMPANY = 4
"""Stories under way when a long prompt joins."""


class Engines:
    """Both engines, and their parts for the ways without an engine."""

    def __init__(self, generator: VokenGenerator, decoder: DiffusionDecoder) -> None:
        self.generator, self.decoder, self.config = generator, decoder, generator.config
        self._num_asked = 0

    def new_stories(self, num: int, load: Load, *, steps: int) -> list[StoryRequest]:
        first, self._num_asked = self._num_asked, self._num_asked + num
        return [load.story(index, self.config, steps=steps) for index in range(first, first + num)]

    def prompt_ids(self, request: StoryRequest) -> list[int]:
        picture_tokens = self.config.vision.picture_tokens
        rows = self.generator.language.voken_embeddings
        return encode_prompt(
            request_segments(request, self.generator.template),
            self.generator.tokenizer,
            rows,
            picture_tokens=picture_tokens,
        ).ids


# Ours


async def write_at_once(engines: Engines, requests: Sequence[StoryRequest]) -> tuple[float, list[Timing]]:
    """Seconds until all are done, and each one's own times."""
    began = time.perf_counter()

    async def one(request: StoryRequest) -> Timing:
        timing = Timing(start=time.perf_counter() - began)
        async for event in stream_story(request, engines.generator.generate, engines.decoder.decode):
            now = time.perf_counter() - began
            if isinstance(event, TextDelta):
                timing.texts.append(now)
            elif isinstance(event, Picture):
                timing.pictures.append(now)
            elif isinstance(event, PageDone):
                assert event.page.error is None, event.page.error
                timing.pages.append(now)
        return timing

    timings = await asyncio.gather(*map(one, requests))
    return time.perf_counter() - began, list(timings)


async def measure_bound(engines: Engines, request: StoryRequest) -> float:
    """The shortest time of a story whose pictures are drawn while its text goes on: stages measured alone."""
    began = last = time.perf_counter()
    text_s, vokens = [], []
    async for event in engines.generator.generate(request):
        if isinstance(event, Vokens):
            vokens.append(event)
            text_s.append(time.perf_counter() - last)
            last = time.perf_counter()
    assert last > began
    draw_s = []
    for one in vokens:
        began = time.perf_counter()
        seed = page_seed(request.seed, one.page) + 1  # not the picture that is drawn again when the whole is measured
        async for _ in engines.decoder.decode(DrawRequest(vokens=one, seed=seed, settings=request.draw)):
            pass
        draw_s.append(time.perf_counter() - began)
    return max(sum(text_s[: k + 1]) + sum(draw_s[k:]) for k in range(len(text_s)))


async def measure_token_gaps(engines: Engines, load: Load) -> dict[str, float]:
    """Gaps between the texts of running stories, without and with a long prompt that joins them."""
    figures = {}
    for name in ("without", "with"):
        stories = engines.new_stories(LONG_COMPANY, load, steps=1)
        arrivals: list[list[float]] = []
        is_reading = asyncio.Event()

        async def write(
            request: StoryRequest, arrivals: list[list[float]] = arrivals, started: asyncio.Event = is_reading
        ) -> None:
            times: list[float] = []
            arrivals.append(times)
            async for event in engines.generator.generate(request):
                if isinstance(event, TextDelta):
                    times.append(time.perf_counter())
                    started.set()

        running = [asyncio.create_task(write(story)) for story in stories]
        await is_reading.wait()
        joining = None
        if name == "with":
            words = " and a fox" * (load.long_prompt_tokens // 3)
            request = dataclasses.replace(engines.new_stories(1, load, steps=1)[0], prompt=(words,), pages=1)
            joining = asyncio.create_task(write(request, [], is_reading))
        await asyncio.gather(*running)
        if joining:
            joining.cancel()
            await asyncio.gather(joining, return_exceptions=True)
            while engines.generator.num_running:  # it leaves at the next step
                await asyncio.sleep(0.01)
        gaps = [b - a for times in arrivals for a, b in zip(times, times[1:], strict=False)]
        figures[f"p95_{name}_s"] = float(np.quantile(gaps, 0.95))
    return {**figures, "ratio": figures["p95_with_s"] / figures["p95_without_s"]}


def measure_ours(engines: Engines, load: Load) -> dict[str, Any]:
    """Both engines in this process, with the bound of a lone story."""
    asyncio.run(write_at_once(engines, engines.new_stories(1, load, steps=1)))  # the first call is always the slowest
    by_steps: dict[str, Any] = {}
    for steps, nums in load.sizes():
        bound_s = asyncio.run(measure_bound(engines, engines.new_stories(1, load, steps=steps)[0]))
        ours = {}
        for num in nums:
            seconds, timings = asyncio.run(write_at_once(engines, engines.new_stories(num, load, steps=steps)))
            ours[str(num)] = describe_load(seconds, timings, load)
        by_steps[str(steps)] = {"ours": ours, "bound_s": bound_s}
    generator = engines.generator
    return {
        "by_steps": by_steps,
        "close_choices": generator.num_close_choices,
        "prompt_tokens": generator.num_prompt_tokens,
        "reused_prompt_tokens": generator.num_reused_tokens,
    }


def measure_long_prompt(engines: Engines, load: Load) -> dict[str, Any]:
    asyncio.run(write_at_once(engines, engines.new_stories(1, load, steps=1)))  # the first call is always the slowest
    return {"long_prompt": asyncio.run(measure_token_gaps(engines, load))}


# The baseline


@torch.no_grad()
def write_as_baseline(engines: Engines, request: StoryRequest) -> float:
    """Seconds of one story."""
    began = time.perf_counter()
    language, decoder = engines.generator.language, engines.decoder
    pipeline = baseline_pipeline(decoder, request)
    cache = DynamicCache()
    ids_1S = torch.tensor([engines.prompt_ids(request)])
    state_H = language.states(language.embed(ids_1S), cache=cache)[0, -1]
    for page in range(1, request.pages + 1):
        written: list[int] = []
        while len(written) < request.sampling.max_page_tokens:
            logits_T = language.logits(state_H).numpy()
            logits_T[language.voken_embeddings.first :] = -np.inf
            logits_T[list(engines.generator.end_ids)] = -np.inf
            choice = sample_token(
                logits_T, request.sampling, seed=request.seed, page=page, position=len(written), seen=written
            )
            written.append(choice.token)
            engines.generator.tokenizer.decode(written)
            state_H = language.states(language.embed(torch.tensor([[choice.token]])), cache=cache)[0, -1]
        states_VH = language.states(language.embed(torch.tensor([language.voken_embeddings.ids])), cache=cache)[0]
        hidden_VH, state_H = torch.cat([state_H[None], states_VH[:-1]]), states_VH[-1]
        latents_1CYX = pipeline(
            prompt_embeds=decoder.mapper(hidden_VH[None]),
            negative_prompt_embeds=decoder.mapper.null_condition(),
            num_inference_steps=request.draw.steps,
            guidance_scale=request.draw.guidance_scale,
            guidance_rescale=engines.config.guidance_rescale,
            generator=torch.Generator().manual_seed(page_seed(request.seed, page)),
            output_type="latent",
        ).images
        encode(decoder.diffusion.to_pixels(latents_1CYX), "PNG")
    return time.perf_counter() - began


def baseline_pipeline(decoder: DiffusionDecoder, request: StoryRequest) -> StableDiffusionPipeline:
    # An offset, which the pipeline insists on, plays no part with timesteps that are spaced from the end.
    pipeline = StableDiffusionPipeline(
        vae=decoder.diffusion.vae,
        unet=decoder.diffusion.denoiser,
        scheduler=decoder.diffusion.noise.new_sampler(request.draw.scheduler, steps_offset=1),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure_baseline(engines: Engines, load: Load) -> dict[str, Any]:
    write_as_baseline(engines, engines.new_stories(1, load, steps=1)[0])  # the first call is always the slowest
    by_steps = {}
    for steps in load.steps:
        stories = engines.new_stories(load.num_baseline, load, steps=steps)
        seconds = [write_as_baseline(engines, story) for story in stories]
        by_steps[str(steps)] = {"stories_per_s": len(seconds) / sum(seconds), "story_s": spread(seconds)}
    return {"by_steps": by_steps}


# The upper bound


@torch.no_grad()
def text_in_lockstep(engines: Engines, request: StoryRequest, batch_size: int) -> float:
    """Seconds of text a story: as many tokens, the same in every row, logits computed and not looked at."""
    language = engines.generator.language
    began = time.perf_counter()
    cache = DynamicCache()

    def read(ids: list[int]) -> Tensor:
        ids_BS = torch.tensor([ids]).expand(batch_size, -1)
        return language.states(language.embed(ids_BS), cache=cache)[:, -1]

    states_BH = read(engines.prompt_ids(request))
    for _ in range(request.pages):
        for token in range(request.sampling.max_page_tokens):
            language.logits(states_BH)
            states_BH = read([100 + token])
        states_BH = read(language.voken_embeddings.ids)
    return (time.perf_counter() - began) / batch_size


@torch.no_grad()
def picture_in_lockstep(engines: Engines, request: StoryRequest, batch_size: int) -> float:
    """Seconds a picture."""
    decoder, draw = engines.decoder, request.draw
    unet = decoder.diffusion.denoiser
    began = time.perf_counter()
    states_BVH = torch.randn(batch_size, engines.config.num_vokens, engines.config.hidden)
    sampler = decoder.diffusion.noise.new_sampler(draw.scheduler)
    sampler.set_timesteps(draw.steps)
    null_BQD = decoder.mapper.null_condition().expand(batch_size, -1, -1)
    condition_BQD = torch.cat([null_BQD, decoder.mapper(states_BVH)])
    latents_BCYX = torch.randn(batch_size, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    for timestep in sampler.timesteps:
        predicted = unet(torch.cat([latents_BCYX] * 2), timestep, encoder_hidden_states=condition_BQD).sample
        unconditional, conditional = predicted.chunk(2)
        predicted = unconditional + draw.guidance_scale * (conditional - unconditional)
        spread_B = conditional.std(dim=(1, 2, 3), keepdim=True) / predicted.std(dim=(1, 2, 3), keepdim=True)
        rescale = engines.config.guidance_rescale
        predicted = predicted * (rescale * spread_B + 1 - rescale)
        latents_BCYX = sampler.step(predicted, timestep, latents_BCYX).prev_sample
    encode(decoder.diffusion.to_pixels(latents_BCYX), "PNG")
    return (time.perf_counter() - began) / batch_size


def measure_upper_bound(engines: Engines, load: Load) -> dict[str, Any]:
    """Stories/s of the best batch sizes: text, then pictures, each with all threads."""
    first = load.story(0, engines.config, steps=load.steps[0])
    text_in_lockstep(engines, first, 1)  # the first call is always the slowest
    text_s = {size: text_in_lockstep(engines, first, size) for size in load.batch_sizes}
    by_steps = {}
    for steps in load.steps:
        story = load.story(0, engines.config, steps=steps)
        picture_s = {size: picture_in_lockstep(engines, story, size) for size in load.batch_sizes}
        by_steps[str(steps)] = {
            "stories_per_s": 1 / (min(text_s.values()) + story.pages * min(picture_s.values())),
            "text_s_by_batch_size": text_s,
            "picture_s_by_batch_size": picture_s,
        }
    return {"by_steps": by_steps}


# The whole


WAYS: dict[str, Callable[[Engines, Load], dict[str, Any]]] = {
    "baseline": measure_baseline,
    "upper_bound": measure_upper_bound,
    "ours": measure_ours,
    "long_prompt": measure_long_prompt,
}


def load_engines(model: Path, *, num_cores: int | None, context_tokens: int | None = None) -> Engines:
    """Both engines with their share of the cores; the other ways have all of them."""
    generator_threads, decoder_threads = share(num_cores)
    with single_thread():
        config, *parts = load_generator_model(model)
        drawing = load_decoder_model(model)
    config = dataclasses.replace(config, context_tokens=context_tokens or config.context_tokens)
    return Engines(
        VokenGenerator(config, *parts, num_threads=generator_threads),
        DiffusionDecoder(*drawing, num_threads=decoder_threads),
    )


def measure_in_own_process(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one way: threads that another one has used would slow it down (`minigpt5/engine/threads.py`)."""
    command = [sys.executable, "-m", "benchmarks.engines", "--way", way, "--model", str(options.model)]
    command += ["--tiny"] * options.tiny + (["--cores", str(options.cores)] if options.cores else [])
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(finished.stdout)


def compare(ways: dict[str, Any], name: str) -> dict[str, float]:
    """Ratios of `name`, "ours" or "http", to the baseline and to the upper bound."""
    most = max(map(int, ways[name]))
    one, many = ways[name]["1"], ways[name][str(most)]
    baseline, upper_bound = (ways[name]["stories_per_s"] for name in ("baseline", "upper_bound"))
    return {
        f"stories_{most}_vs_baseline": many["stories_per_s"] / baseline,
        f"stories_{most}_vs_upper_bound": many["stories_per_s"] / upper_bound,
        "latency_1_vs_baseline": baseline / one["stories_per_s"],
        "overlap": 1 / one["stories_per_s"] / ways["bound_s"],
    }


def show(figures: dict[str, Any], ratios: dict[str, float]) -> None:
    """One table on the terminal."""
    print(f"{'steps':>5}  {'way':<12} {'stories/s':>9}  {'story p50 s':>11}  {'first text s':>12}  {'picture s':>9}")
    for steps, ways in figures["by_steps"].items():
        rows = {name: ways[name] for name in ("baseline", "upper_bound")}
        for name in ("ours", "http"):
            rows |= {f"{name}, {num}": row for num, row in ways.get(name, {}).items()}
        for name, row in rows.items():
            story, text, picture = (
                row.get(f"{what}_s", {}).get("p50", math.nan) for what in ("story", "first_text", "first_picture")
            )
            rate = row["stories_per_s"]
            print(f"{steps:>5}  {name:<12} {rate:9.4f}  {story:11.2f}  {text:12.2f}  {picture:9.2f}")
        for num, row in ways.get("http", {}).items():
            print(f"       http, {num}: busy cores: " + ", ".join(f"{n} {v}" for n, v in row["busy_cores"].items()))
        for what in ("text", "picture"):
            sweep = ways["upper_bound"][f"{what}_s_by_batch_size"]
            print(
                f"       upper bound, {what} s by batch size: " + ", ".join(f"{n}: {s:.3f}" for n, s in sweep.items())
            )
    print("ratios: " + ", ".join(f"{name} {value:.3f}" for name, value in ratios.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--cores", type=int, help="that every way has (default: all)")
    parser.add_argument("--tiny", action="store_true", help="a check that the bench runs")
    parser.add_argument("--serve", action="store_true", help="also over HTTP, from a server that is started for it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results" / "engines.json")
    parser.add_argument("--way", choices=WAYS, help="measure this one alone and print its figures")
    options = parser.parse_args(arguments)
    load = TINY if options.tiny else Load()
    if options.way:
        if options.cores:
            torch.set_num_threads(options.cores)
        context_tokens = LONG_CONTEXT if options.way == "long_prompt" else None
        engines = load_engines(options.model, num_cores=options.cores, context_tokens=context_tokens)
        print(json.dumps(WAYS[options.way](engines, load)))
        return
    by_steps: dict[str, dict[str, Any]] = {str(steps): {} for steps in load.steps}
    figures: dict[str, Any] = {"load": dataclasses.asdict(load), "by_steps": by_steps}
    for way in WAYS:
        measured = measure_in_own_process(way, options)
        for steps, row in measured.pop("by_steps", {}).items():
            by_steps[steps] |= row if way == "ours" else {way: row}
        figures |= measured
    if options.serve:
        with running_server(options.model) as (url, server):
            for steps, row in measure_http(url, server, load, tiny=options.tiny).items():
                by_steps[steps]["http"] = row
            processes = server.children(recursive=True)
            figures["server_memory_gib"] = sum(process.memory_full_info().pss for process in processes) / 2**30
        figures["serve_overhead_s_a_story"] = {  # of a lone one: processes, HTTP, storage
            steps: ways["http"]["1"]["story_s"]["p50"] - ways["ours"]["1"]["story_s"]["p50"]
            for steps, ways in by_steps.items()
        }
    way = "http" if options.serve else "ours"
    figures["ratios_by_steps"] = {
        steps: {name: compare(ways, name) for name in ("ours", "http") if name in ways}
        for steps, ways in by_steps.items()
    }
    ratios = compare(by_steps[str(load.steps[0])], way)
    show(figures, ratios)
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.engines", *given])
    report = {"ratios": ratios, "figures": figures, "machine": machine(), "command": command}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
