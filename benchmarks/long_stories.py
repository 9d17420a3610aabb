"""How stories of 64 pages hold out: `python -m benchmarks.long_stories [--num 8] [--pages 64] [--model FOLDER]`.

The model writes and draws stories from held-out prompts, several at once, one seed each, no selection. Each page gets
its figures (PAGE_FIGURES), which are summed by bins of page numbers. A story that is told is kept at once beside the
results: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.pixels import pixels_of
from benchmarks.quality import machine
from benchmarks.shares import share_of_groups
from minigpt5.blocking import run_blocking
from minigpt5.config import default_model_folder
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.captions import name_of
from minigpt5.storybook.scorer import Scorer, load_scorer
from minigpt5.storybook.stories import page_facts, story_at
from minigpt5.types import Story

SEED = 2310
AT_ONCE = 4
BIN_PAGES = 8
OUT = Path("benchmarks") / "results" / "long_stories.json"

Counts = list[tuple[int, int]]
"""For each page, how many of how many are right; of none, where the page has nothing to ask."""
PageFigure = Callable[[str, Story, Scorer], Counts]
"""A prompt, its story and the scorer -> the figure of each page."""


def new_4_grams(prompt: str, story: Story, scorer: Scorer) -> Counts:
    """Words of a page, four at a time, that no earlier page has."""
    seen: set[tuple[str, ...]] = set()
    counts = []
    for page in story.pages:
        words = re.findall(r"[\w']+", page.text.lower())
        fours = [tuple(words[at : at + 4]) for at in range(len(words) - 3)]
        counts.append((sum(four not in seen for four in fours), len(fours)))
        seen.update(fours)
    return counts


def cast_kept(prompt: str, story: Story, scorer: Scorer) -> Counts:
    """Whether a page is about the character that the prompt names: it names it, or no other one since."""
    facts = page_facts([prompt, *(page.text for page in story.pages)])
    return [(one.who == facts[0].who, int(facts[0].who is not None)) for one in facts[1:]]


def cast_named(prompt: str, story: Story, scorer: Scorer) -> Counts:
    """Whether a page says the kind or the own name of the character that the prompt names."""
    who = page_facts([prompt])[0].who
    if who is None:
        return [(0, 0)] * len(story.pages)
    names = [name_of(who)]
    counts = []
    for page in story.pages:
        if len(names) == 1 and (given := re.search(r"\b(?:named|called) ([A-Z]\w+)", page.text)):
            names.append(given.group(1).lower())
        says = any(re.search(rf"\b{re.escape(name)}s?\b", page.text.lower()) for name in names)
        counts.append((int(says), 1))
    return counts


def shown(fact: str) -> PageFigure:
    """Whether a page's picture shows a fact as the texts have it by then."""

    def figure(prompt: str, story: Story, scorer: Scorer) -> Counts:
        known = page_facts([page.text for page in story.pages], prompt)
        pictures = [pixels_of(page.picture.png) for page in story.pages if page.picture]
        seen = iter(scorer.score(np.stack(pictures)) if pictures else ())
        counts = []
        for page, facts in zip(story.pages, known, strict=True):
            is_right = page.picture is not None and getattr(next(seen), fact) == getattr(facts, fact)
            counts.append((int(is_right), int(getattr(facts, fact) is not None)))
        return counts

    return figure


PAGE_FIGURES: dict[str, PageFigure] = {
    "new_4_grams": new_4_grams,
    "cast_kept": cast_kept,
    "cast_named": cast_named,
    "who_shown": shown("who"),
    "what_shown": shown("what"),
}
"""What is counted of each page."""


def tell(model: MiniGPT5, scorer: Scorer, indices: Sequence[int], num_pages: int, keep: Path) -> None:
    """Tell stories at once, and append a line to `keep` for each one that is told."""

    async def one(index: int) -> None:
        prompt = story_at(index, seed=SEED, split="heldout", num_pages=4, held_out_pairs=True).prompt
        story = await model.awrite(prompt, pages=num_pages, seed=index, progress=False)
        row = {
            "index": index,
            "model": model.config.fingerprint,
            "prompt": prompt,
            "texts": [page.text for page in story.pages],
            "counts": {name: figure(prompt, story, scorer) for name, figure in PAGE_FIGURES.items()},
        }
        with keep.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"story {index} is told", file=sys.stderr, flush=True)

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, indices))

    run_blocking(lambda report: all_of_them())


def load_rows(keep: Path, fingerprint: str, num_pages: int) -> dict[int, dict[str, object]]:
    """The stories of this model that are told, by number."""
    lines = keep.read_text().splitlines() if keep.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a line may be cut off
    return {row["index"]: row for row in rows if row["model"] == fingerprint and len(row["texts"]) == num_pages}


def by_bins(rows: Sequence[dict[str, object]], num_pages: int) -> list[dict[str, object]]:
    """The share of each figure with its interval, for each bin of pages; a story's pages are a group."""
    bins = []
    for start in range(0, num_pages, BIN_PAGES):
        end = min(start + BIN_PAGES, num_pages)
        figures: dict[str, object] = {"pages": f"{start + 1} to {end}"}
        for name in PAGE_FIGURES:
            counts_GP2 = np.array([row["counts"][name][start:end] for row in rows])  # type: ignore[index]
            right_G, num_G = counts_GP2.sum(axis=1).T
            if num_G.any():
                figures[name] = share_of_groups(right_G, num_G)
        bins.append(figures)
    return bins


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_stories", description=__doc__)
    parser.add_argument("--num", type=int, default=8, help="stories (default %(default)s)")
    parser.add_argument("--pages", type=int, default=64, help="of a story (default %(default)s)")
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, help="torch threads; as torch chooses where it is not given")
    options = parser.parse_args(arguments)
    if options.num < 1:
        parser.error(f"--num is {options.num} but must be at least 1")
    model, scorer = MiniGPT5.from_pretrained(options.model, num_cores=options.threads), load_scorer()
    keep = options.out.with_suffix(".partial")
    fingerprint = model.config.fingerprint
    told = load_rows(keep, fingerprint, options.pages)
    left = [index for index in range(options.num) if index not in told]
    for start in range(0, len(left), AT_ONCE):
        tell(model, scorer, left[start : start + AT_ONCE], options.pages, keep)
    told = load_rows(keep, fingerprint, options.pages)
    rows = [told[index] for index in range(options.num)]
    given = sys.argv[1:] if arguments is None else arguments
    report = {
        "model": model.config.name,
        "fingerprint": fingerprint,
        "stories": len(rows),
        "bins": by_bins(rows, options.pages),
        "texts": [{"prompt": row["prompt"], "pages": row["texts"]} for row in rows],
        "machine": machine(),
        "command": " ".join(["python -m benchmarks.long_stories", *given]),
    }
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    keep.unlink()
    print(f"all figures: {options.out}")


if __name__ == "__main__":
    main()
