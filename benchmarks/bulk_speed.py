"""How fast and in how much memory bulk jobs run: what `benchmarks/bulk.py` prints beside the kills."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray

from batch_jobs import illustrate
from batch_jobs.inputs import StoryJob
from batch_jobs.job import Output, decoder_pool, generator_pool
from batch_jobs.monitor import summary
from batch_jobs.outputs import STORY_SCHEMA
from batch_jobs.pipeline import Pool
from batch_jobs.report import Report
from benchmarks.bulk_engines import SimulatedDecoder, SimulatedGenerator
from benchmarks.load import WHAT, WHO
from minigpt5.config import ModelConfig, default_model_folder, storybook
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.model.folder_config import check_folder
from minigpt5.story.stream import page_seed
from minigpt5.types import DrawRequest, DrawSettings, StoryRequest, Vokens

FIXED_TEXTS = (8, 16)
FIXED_PICTURES = (4, 8, 16)
WARM_PICTURES = 200
"""Pictures after which the memory curve should be flat."""


def new_jobs(num: int, *, pages: int, steps: int, config: ModelConfig, first_seed: int) -> list[StoryJob]:
    return [
        StoryJob(
            row=index + 1,
            id=f"{first_seed}-{index}",
            prompt=f"A {WHO[index % len(WHO)]} who finds a {WHAT[index // len(WHO) % len(WHAT)]}",
            pages=pages,
            seed=first_seed + index,
            **dataclasses.asdict(dataclasses.replace(config.draw, steps=steps)),
        )
        for index in range(num)
    ]


def run(
    jobs: list[StoryJob], *, config: ModelConfig, engines: illustrate.Engines, folder: Path, flush_s: float = 5.0
) -> Report:
    """One job with its output in `folder`, which is emptied first."""
    for path in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(path)
    output = Output.at(str(folder), STORY_SCHEMA, {"job": "bench"}, flush_s=flush_s)
    make_pages = partial(illustrate.make_pages_on_ray, config=config, engines=engines, output=output)
    return illustrate.illustrate(list(jobs), output, make_pages=make_pages, say=partial(print, flush=True))


def working_s(report: Report) -> float:
    """From the first row in an engine to the last one out: without the start of Ray and of the engines."""
    pools = report.figures.pools.values()
    return max(pool.last_s for pool in pools) - min(pool.first_s for pool in pools)


def default_engines(model: str) -> illustrate.Engines:
    """One of each, as `batch_jobs.illustrate` has them without options."""
    options = illustrate.make_parser().parse_args(["rows.jsonl", "--output", "out"])
    return illustrate.Engines(generator=generator_pool(options, model), decoder=decoder_pool(options, model))


def speed(folder: Path, *, num: int = 32, pages: int = 4, steps: int = 8) -> tuple[dict[str, Any], dict[str, float]]:
    """A job against the same engines in one process with all its cores, at the best of a sweep of fixed batches."""
    model = str(default_model_folder())
    config = check_folder(model)
    engines = default_engines(model)
    jobs = new_jobs(num, pages=pages, steps=steps, config=config, first_seed=1000)
    report = run(jobs, config=config, engines=engines, folder=folder)
    ray.shutdown()
    pools = summary(report.figures, num_pictures=report.pictures)
    rows_per_s = num / working_s(report)
    fixed = fixed_batches(model, config, jobs)
    best = num / (min(fixed["text_s"].values()) + min(fixed["picture_s"].values()))
    busiest = max(pool["utilisation"] for pool in pools.values())
    figures = {
        "rows": num,
        "pages": pages,
        "steps": steps,
        "job_rows_per_s": round(rows_per_s, 3),
        "job_with_start_rows_per_s": round(num / report.seconds, 3),
        "one_process_rows_per_s": round(best, 3),
        "one_process": fixed,
        "pools": pools,
    }
    return figures, {"bulk_rows_per_s_vs_one_process": round(rows_per_s / best, 3), "bulk_limiting_pool_busy": busiest}


def fixed_batches(model: str, config: ModelConfig, jobs: list[StoryJob]) -> dict[str, dict[str, float]]:
    """Seconds for all texts, and for all pictures, at each batch size, each with all cores."""
    pictures: list[DrawRequest] = []
    text_s = fixed_texts(model, config, jobs, pictures)
    gc.collect()  # with the generator its thread ends, whose team would slow down this one's (engine/threads.py)
    decoder = DiffusionDecoder.from_pretrained(model)

    def draw_all(size: int) -> None:
        for start in range(0, len(pictures), size):
            decoder.draw(pictures[start : start + size])

    picture_s = {str(size): _seconds(lambda size=size: draw_all(size)) for size in FIXED_PICTURES}
    return {"text_s": text_s, "picture_s": picture_s}


def fixed_texts(model: str, config: ModelConfig, jobs: list[StoryJob], pictures: list[DrawRequest]) -> dict[str, float]:
    """Measure seconds at each batch size, and add the pictures to draw to `pictures`."""
    generator = VokenGenerator.from_pretrained(model, num_threads=psutil.cpu_count() or 1)

    async def write(job: StoryJob) -> None:
        request = StoryRequest(prompt=(job.prompt,), pages=job.pages, seed=job.seed, sampling=config.sampling)
        async for event in generator.generate(request):
            if isinstance(event, Vokens):
                settings = DrawSettings(steps=job.steps, guidance_scale=job.guidance_scale, scheduler=job.scheduler)
                seed = page_seed(job.seed, event.page)
                pictures.append(DrawRequest(vokens=event, seed=seed, settings=settings))

    async def write_all(size: int) -> None:
        pictures.clear()
        for start in range(0, len(jobs), size):
            await asyncio.gather(*map(write, jobs[start : start + size]))

    asyncio.run(write_all(len(jobs)))  # warm
    return {str(size): _seconds(lambda size=size: asyncio.run(write_all(size))) for size in FIXED_TEXTS}


def _seconds(do: Callable[[], None]) -> float:
    started = time.monotonic()
    do()
    return round(time.monotonic() - started, 2)


def memory(folder: Path, *, pictures: int = 2000, pages: int = 16) -> tuple[dict[str, Any], dict[str, float]]:
    """RSS of all processes of a job and what lies in the object store, over `pictures` at 4 steps of the shipped model.

    The stories' texts are given, so that most of the time goes into pictures.
    """
    model = str(default_model_folder())
    config = check_folder(model)
    engines = default_engines(model)
    jobs = [
        StoryJob(**{**vars(job), "texts": tuple(f"Page {n} of {job.prompt}." for n in range(pages))})
        for job in new_jobs(-(-pictures // pages), pages=pages, steps=4, config=config, first_seed=5000)
    ]
    samples: list[tuple[int, int, int, int]] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(2.0):
            num = len(list(folder.with_name(folder.name + ".pictures").glob("*.png")))
            samples.append((num, *_memory()))

    for path in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(path)
    output = Output.at(str(folder), STORY_SCHEMA, {"job": "bench"}, keeps_pictures=True, flush_s=5.0)
    make_pages = partial(illustrate.make_pages_on_ray, config=config, engines=engines, output=output)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        report = illustrate.illustrate(list(jobs), output, make_pages=make_pages, say=partial(print, flush=True))
    finally:
        is_over.set()
        watcher.join()
        ray.shutdown()
    # The generator is done, and its process ends, long before the decoder: like is compared with like.
    warm = [sample for sample in samples if sample[0] >= WARM_PICTURES]
    [(num_engines, _)] = Counter(engines for _, engines, _, _ in warm).most_common(1)
    flat = [rss + store for _, engines, rss, store in warm if engines == num_engines]
    quarter = max(1, len(flat) // 4)
    early, late = (sorted(part)[quarter // 2] for part in (flat[:quarter], flat[-quarter:]))
    growth = late / early - 1
    curve = [
        {"pictures": n, "engines": engines, "rss_mib": rss >> 20, "store_mib": store >> 20}
        for n, engines, rss, store in samples
    ]
    figures = {
        "pictures": report.pictures,
        "growth_after_200": round(growth, 4),
        "of": "samples after 200 pictures while the same engines live: median of the last quarter over the first",
        "pools": summary(report.figures, num_pictures=report.pictures),
        "curve": curve[:: max(1, len(curve) // 40)],
    }
    return figures, {"bulk_memory_growth": round(growth, 4)}


def _memory() -> tuple[int, int, int]:
    """How many engines live, summed RSS of this process and all under it, and bytes in the object store."""
    rss = num_engines = 0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            rss += process.memory_info().rss
            num_engines += " ".join(process.cmdline()).startswith("ray::MapWorker")
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    if not ray.is_initialized():
        return num_engines, rss, 0
    total = ray.cluster_resources().get("object_store_memory", 0)
    return num_engines, rss, int(total - ray.available_resources().get("object_store_memory", total))


def scaling(folder: Path, *, num: int = 200, pages: int = 4) -> tuple[dict[str, Any], dict[str, float]]:
    """Pictures/s with 1, 2 and 4 decoders, simulated at 25 pictures/s each: what the pipeline itself allows."""
    config = storybook()
    rates: dict[int, float] = {}
    pools = {}
    for decoders in (1, 2, 4):
        engines = illustrate.Engines(
            generator=Pool(load=SimulatedGenerator),
            decoder=Pool(load=SimulatedDecoder, min_engines=decoders, max_engines=decoders),
        )
        jobs = new_jobs(num * decoders, pages=pages, steps=1, config=config, first_seed=100 * decoders)
        report = run(jobs, config=config, engines=engines, folder=folder)
        ray.shutdown()
        rates[decoders] = report.pictures / working_s(report)
        pools[decoders] = summary(report.figures, num_pictures=report.pictures)
    figures = {
        "engines": "simulated: 25 pictures/s a decoder, PNGs of the shipped model's size, a page's text in 0.05 s",
        "pictures_per_s": {decoders: round(rate, 1) for decoders, rate in rates.items()},
        "pools": pools,
    }
    return figures, {f"bulk_scaling_{count}": round(rates[count] / (count * rates[1]), 3) for count in (2, 4)}
