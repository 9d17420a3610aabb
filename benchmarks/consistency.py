"""Whether a story's character stays itself: `python -m benchmarks.consistency [--work FOLDER]`.

The shipped model writes stories from held-out prompts once. It draws their pages with `consistency` off and on, from
the same vokens and seeds. For pairs of pages, by their distance: whether the scorer sees one character on both, and the
cosine of EfficientNet-Lite0's features of the whole pictures. For pages: whether the picture shows what the story says.
Pictures that repeat the first page are alike, too, and lose the places that later pages go to.

Seconds are the process's CPU time, with one thread, each way in turns. FOLDER keeps what is written and drawn: a second
run resumes there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.pixels import pixels_of
from benchmarks.quality import machine
from benchmarks.shares import mean, share_of_groups
from benchmarks.stories import FACTS, SEED
from minigpt5.config import default_model_folder
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.evaluation.consistency import efficientnet_consistency
from minigpt5.evaluation.frechet import EfficientNetFeatures
from minigpt5.story.stream import page_seed
from minigpt5.story.voken_file import pack, unpack
from minigpt5.storybook.captions import Facts
from minigpt5.storybook.scorer import load_scorer
from minigpt5.storybook.stories import page_facts, story_at
from minigpt5.types import Consistency, DrawRequest, Reference, StoryRequest, TextDelta, Vokens

WAYS: tuple[Consistency, ...] = ("off", "story")
RESULTS = Path(__file__).parent / "results" / "consistency.json"
WORK = Path("build") / "consistency"


@dataclass(frozen=True, kw_only=True)
class Told:
    """A story that was written, in a folder of its own."""

    folder: Path
    index: int
    prompt: str
    texts: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path, index: int) -> Told:
        values = json.loads((folder / "story.json").read_text())
        return cls(folder=folder, index=index, prompt=values["prompt"], texts=tuple(values["texts"]))

    def requests(self, decoder: DiffusionDecoder, way: Consistency) -> list[DrawRequest]:
        """Its pages, as `stream_story` asks for them."""
        vokens = [
            unpack((self.folder / f"{page}.safetensors").read_bytes(), page=page)
            for page in range(1, len(self.texts) + 1)
        ]
        first = Reference(vokens=vokens[0], seed=page_seed(self.index, 1))
        return [
            DrawRequest(
                vokens=one,
                seed=page_seed(self.index, one.page),
                settings=decoder.config.default_draw,
                reference=first if way == "story" and one.page > 1 else None,
            )
            for one in vokens
        ]

    def pixels(self, way: Consistency) -> np.ndarray:
        """(pages, Y, X, 3) uint8."""
        pages = range(1, len(self.texts) + 1)
        return np.stack([pixels_of((self.folder / f"{way}-{page}.png").read_bytes()) for page in pages])


async def write(generator: VokenGenerator, folder: Path, index: int, *, pages: int) -> None:
    prompt = story_at(index, seed=SEED, split="heldout", num_pages=pages, held_out_pairs=True).prompt
    request = StoryRequest(prompt=(prompt,), pages=pages, seed=index, sampling=generator.config.sampling)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [""]
    async for event in generator.generate(request):
        if isinstance(event, TextDelta):
            texts[-1] += event.text
        elif isinstance(event, Vokens):
            (folder / f"{event.page}.safetensors").write_bytes(pack(event))
            texts.append("")
    (folder / "story.json").write_text(json.dumps({"prompt": prompt, "texts": [text.strip() for text in texts[:-1]]}))


def draw(decoder: DiffusionDecoder, told: Told) -> None:
    """What is not drawn yet of a story, both ways."""
    for way in WAYS:
        for request in told.requests(decoder, way):
            path = told.folder / f"{way}-{request.vokens.page}.png"
            if not path.exists():
                path.write_bytes(decoder.draw([request])[0].png)


def compare(stories: Sequence[Told]) -> dict[str, Any]:
    """Agreement of pages by distance, and of pages with their texts."""
    scorer, network = load_scorer(), EfficientNetFeatures()
    known = [page_facts(list(told.texts), told.prompt) for told in stories]
    figures: dict[str, Any] = {}
    for way in WAYS:
        pictures = [told.pixels(way) for told in stories]
        shown = [scorer.score(pixels) for pixels in pictures]
        figures[way] = {
            "pages": {fact: _right(known, shown, fact) for fact in FACTS},
            "distances": {
                str(distance): {
                    "same_who": _same(shown, distance),
                    "likeness": _likeness(pictures, distance, network),
                }
                for distance in range(1, max(map(len, shown)))
            },
        }
    return figures


def _right(known: Sequence[Sequence[Facts]], shown: Sequence[Sequence[Facts]], fact: str) -> dict[str, float]:
    """Pages, after the first of each story, whose picture shows what the story says."""
    answers = [
        [getattr(a, fact) == getattr(b, fact) for a, b in zip(said[1:], seen[1:], strict=True) if getattr(a, fact)]
        for said, seen in zip(known, shown, strict=True)
    ]
    return share_of_groups(np.array(list(map(sum, answers))), np.array(list(map(len, answers))))


def _same(shown: Sequence[Sequence[Facts]], distance: int) -> dict[str, float]:
    pairs = [[a.who == b.who is not None for a, b in _pairs(seen, distance)] for seen in shown]
    return share_of_groups(np.array(list(map(sum, pairs))), np.array(list(map(len, pairs))))


def _likeness(pictures: Sequence[np.ndarray], distance: int, network: torch.nn.Module) -> dict[str, float]:
    pairs = [pair for pixels in pictures for pair in _pairs(list(pixels), distance)]
    ones, others = zip(*pairs, strict=True)
    return mean(efficientnet_consistency(ones, others, network))


def _pairs(pages: Sequence[Any], distance: int) -> list[tuple[Any, Any]]:
    return list(zip(pages, pages[distance:], strict=False))


def measure_seconds(decoders: dict[str, DiffusionDecoder], told: Told, *, turns: int) -> dict[str, Any]:
    """CPU seconds of a second page: plain by each backend, and with its reference, which torch computes."""
    ways = {
        **{f"off, {name}": (decoder, "off") for name, decoder in decoders.items()},
        "story": (next(iter(decoders.values())), "story"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):  # the first one warms up
        for name, (decoder, way) in ways.items():
            request = told.requests(decoder, way)[1]  # type: ignore[arg-type]
            began = time.process_time()
            decoder.draw([request])
            if turn:
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {f"story over {name}": medians["story"] / medians[name] for name in ways if name != "story"}
    return {"turns": turns, "cpu_seconds": medians, "ratios": ratios}


def sheet(stories: Sequence[Told]) -> Image.Image:
    """A story is two rows: off, then story."""
    rows = [np.concatenate(list(told.pixels(way)), axis=1) for told in stories for way in WAYS]
    return Image.fromarray(np.concatenate(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.consistency", description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder that keeps stories and pictures (default %(default)s)"
    )
    parser.add_argument("--stories", type=int, default=20)
    parser.add_argument("--pages", type=int, default=6)
    parser.add_argument("--at-once", type=int, default=5, help="stories that are written together")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folders = {index: options.work / f"{index:03d}" for index in range(options.stories)}
    missing = [index for index, folder in folders.items() if not (folder / "story.json").exists()]
    if missing:
        generator = VokenGenerator.from_pretrained(options.model, num_threads=1)

        async def write_all() -> None:
            for start in range(0, len(missing), options.at_once):
                group = missing[start : start + options.at_once]
                await asyncio.gather(*(write(generator, folders[one], one, pages=options.pages) for one in group))

        asyncio.run(write_all())
    stories = [Told.load(folder, index) for index, folder in folders.items()]
    backends = ("openvino", "eager")
    decoders = {
        name: DiffusionDecoder.from_pretrained(options.model, backend=name, num_threads=1)  # type: ignore[arg-type]
        for name in backends
    }
    for told in stories:
        draw(decoders["openvino"], told)
    sheet(stories).save(options.work / "sheet.png")
    figures = {
        "stories": len(stories),
        "pages": options.pages,
        **compare(stories),
        "seconds": measure_seconds(decoders, stories[0], turns=options.turns),
    }
    command = shlex.join(
        ["python", "-m", "benchmarks.consistency", *(sys.argv[1:] if arguments is None else arguments)]
    )
    report = {"figures": figures, "machine": machine(), "command": command}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(figures["seconds"], indent=1))


if __name__ == "__main__":
    main()
