"""What the language model's voken states know: `python -m benchmarks.probe [--num 1500] [--model FOLDER]`.

A linear classifier for each fact, fitted by ridge regression on the states of all vokens of one picture: of captions
(seen pairs to learn from, seen and held-out pairs to test on), and of the pages of stories after the first, whose
facts are often only referred to. What is linear in the states the mapper can use; what is not there no mapper finds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality import save_report
from benchmarks.referring import NUM_PAGES
from benchmarks.shares import share
from minigpt5.config import default_model_folder
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.captions import FACTS, Facts, write_caption
from minigpt5.storybook.scenes import Split, scene_at
from minigpt5.storybook.stories import story_at
from minigpt5.types import StoryRequest, Vokens

SEED = 77
AT_ONCE = 8
RIDGE = 0.1
"""Ridge of the classifiers, in units of the mean square length of the states."""

Known = tuple[np.ndarray, list[Facts]]
"""States (N, V H) and what they are to know."""


def of_captions(model: MiniGPT5, num: int, *, split: Split, held_out_pairs: bool) -> Known:
    scenes = [scene_at(index, seed=SEED, split=split, held_out_pairs=held_out_pairs) for index in range(num)]
    facts = [Facts.of(scene) for scene in scenes]
    captions = [write_caption(one, np.random.default_rng([SEED, index])) for index, one in enumerate(facts)]
    requests = [StoryRequest(prompt=(caption,), pages=1, mode="caption") for caption in captions]
    return np.concatenate(_states(model, requests)), facts


def of_pages(model: MiniGPT5, num: int, *, split: Split, held_out_pairs: bool) -> Known:
    """Collect states and facts of the pages after the first, of enough stories for about `num` pages."""
    stories = [
        story_at(index, seed=SEED, split=split, num_pages=NUM_PAGES, held_out_pairs=held_out_pairs)
        for index in range(-(-num // (NUM_PAGES - 1)))
    ]
    requests = [
        StoryRequest(prompt=(story.prompt,), pages=NUM_PAGES, given=tuple(page.text for page in story.pages))
        for story in stories
    ]
    states = [pages_PD[1:] for pages_PD in _states(model, requests)]
    return np.concatenate(states), [page.facts for story in stories for page in story.pages[1:]]


def _states(model: MiniGPT5, requests: Sequence[StoryRequest]) -> list[np.ndarray]:
    """For each request the states of its pages: (P, V H)."""

    async def one(request: StoryRequest, turn: asyncio.Semaphore) -> np.ndarray:
        async with turn:
            events = [event async for event in model.generator.generate(request)]
        return np.stack([event.hidden_VH.ravel() for event in events if isinstance(event, Vokens)])

    async def all_of_them() -> list[np.ndarray]:
        turn = asyncio.Semaphore(AT_ONCE)
        return await asyncio.gather(*(one(request, turn) for request in requests))

    return asyncio.run(all_of_them())


def probe(learnt: Known, tests: dict[str, Known]) -> dict[str, dict[str, dict[str, float]]]:
    """For each test the share of each fact that the classifiers name rightly, where it is known."""
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in tests}
    for fact in FACTS:
        states_ND, values = _with_fact(learnt, fact)
        if not values:
            continue
        mean_D, spread_D = states_ND.mean(0), states_ND.std(0) + 1e-6
        names = sorted(set(values))
        inputs = torch.from_numpy((states_ND - mean_D) / spread_D).double()
        targets = torch.tensor([[float(value == name) for name in names] for value in values]).double()
        kernel = inputs @ inputs.T  # fewer rows than dimensions: the dual form
        weights = torch.linalg.solve(
            kernel + RIDGE * inputs.shape[1] * torch.eye(len(inputs)).double(), targets - targets.mean(0)
        )
        for test, known in tests.items():
            states_MD, asked = _with_fact(known, fact)
            others = torch.from_numpy((states_MD - mean_D) / spread_D).double()
            best = (others @ (inputs.T @ weights) + targets.mean(0)).argmax(1).tolist()
            found[test][fact] = share(
                sum(names[guess] == value for guess, value in zip(best, asked, strict=True)), len(asked)
            )
    return found


def _with_fact(known: Known, fact: str) -> tuple[np.ndarray, list[str]]:
    states_ND, facts = known
    rows = [row for row, one in enumerate(facts) if getattr(one, fact) is not None]
    return states_ND[rows], [getattr(facts[row], fact) for row in rows]


def measure(model: MiniGPT5, num: int) -> dict[str, object]:
    """`num` captions and as many pages to learn from, a quarter as many of each kind to test on."""
    quarter = max(num // 4, 1)
    return {
        name: probe(
            states(model, num, split="train", held_out_pairs=False),
            {
                "seen_pairs": states(model, quarter, split="heldout", held_out_pairs=False),
                "held_out_pairs": states(model, quarter, split="heldout", held_out_pairs=True),
            },
        )
        for name, states in (("captions", of_captions), ("pages", of_pages))
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__)
    parser.add_argument("--num", type=int, default=1500, help="captions, and pages, to learn from")
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results" / "probe.json")
    parser.add_argument("--threads", type=int, help="torch threads; as torch chooses where it is not given")
    options = parser.parse_args(arguments)
    if options.num < 1:
        parser.error("--num must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = MiniGPT5.from_pretrained(options.model, num_cores=options.threads)
    figures = measure(model, options.num)
    given = sys.argv[1:] if arguments is None else arguments
    save_report(options.out, figures, command=" ".join(["python -m benchmarks.probe", *given]))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
