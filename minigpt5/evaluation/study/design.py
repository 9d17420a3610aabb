"""What raters see: items, pairs of candidates under opaque names, and the key that tells which run made which.

Names and orders in a page carry nothing about the runs. The browser mixes order and sides once more for each rater.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from minigpt5.evaluation.study.runs import Common, Run, StoryPage
from minigpt5.pictures import open_picture

PICTURE_PX = 512
"""Longest side of a picture in a page, by default."""
QUESTIONS = {
    "language": ("Language continuity", "Which story reads better, each text going on from the one before?"),
    "image": ("Image quality", "Which pictures look better, whatever the texts say?"),
    "coherence": ("Multimodal coherence", "In which story do the pictures and the texts fit together better?"),
}
"""The published study's three questions: the name of each, and what a rater reads."""
TIE = "tie"
"""A choice of neither candidate."""
KEY_FORMAT = "minigpt5-study-key-1"
ANSWERS_FORMAT = "minigpt5-study-answers-1"

Pair = tuple[str, str]
Pairing = Callable[[list[str], list[str]], list[tuple[str, Pair]]]
"""Items and runs -> the comparisons: an item and two runs each."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The key's word on one story of the page: the run that made it, and the row's id."""

    run: str
    item: str


@dataclass(frozen=True, kw_only=True)
class Key:
    """What makes answers readable; raters never see it."""

    study: str
    seed: int
    runs: list[str]
    candidates: dict[str, Candidate]
    comparisons: dict[str, Pair]
    """The two candidates of each comparison."""
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    """Rows that are not in the study, by run: `missing` and `failed`."""

    def to_json(self) -> str:
        return json.dumps({"format": KEY_FORMAT, **asdict(self)}, indent=1)


@dataclass(frozen=True, kw_only=True)
class Design:
    """A page's content but for its pictures' form: `content` becomes JSON, `pictures` are WebP files by name."""

    content: dict[str, object]
    pictures: dict[str, bytes]
    key: Key


def every_pair(items: list[str], runs: list[str]) -> list[tuple[str, Pair]]:
    """Compare all pairs of runs on each item."""
    return [(item, pair) for item in items for pair in itertools.combinations(runs, 2)]


def balanced(items: list[str], runs: list[str]) -> list[tuple[str, Pair]]:
    """Compare one pair on each item. Each pair has as many items as any other, or one more."""
    return list(zip(items, itertools.cycle(itertools.combinations(runs, 2)), strict=False))


def with_first(items: list[str], runs: list[str]) -> list[tuple[str, Pair]]:
    """Compare the first run with each other one, on each item."""
    return [(item, (runs[0], other)) for item in items for other in runs[1:]]


PAIRINGS: dict[str, Pairing] = {"balanced": balanced, "all": every_pair, "first": with_first}


def make_design(
    runs: Sequence[Run],
    common: Common,
    *,
    num_items: int | None = None,
    pairing: Pairing = balanced,
    seed: int | None = None,
    picture_px: int = PICTURE_PX,
) -> Design:
    """Draw the items and name the candidates. Without a seed a new one is drawn, which nobody can guess."""
    seed = secrets.randbits(63) if seed is None else seed
    draw = random.Random(seed)
    ids = draw.sample(sorted(common.prompts), min(num_items or len(common.prompts), len(common.prompts)))
    planned = pairing(ids, [run.name for run in runs])
    needed = {run.name: {item for item, pair in planned if run.name in pair} for run in runs}
    pages = {run.name: run.read(needed[run.name]) for run in runs}
    made = sorted((name, item) for name, items in needed.items() for item in items)
    names = {one: f"s{number:08x}" for one, number in zip(made, draw.sample(range(2**32), len(made)), strict=True)}
    pictures: dict[str, bytes] = {}
    stories = {
        name: [_encode(page, f"{name}-{index}", pictures, picture_px) for index, page in enumerate(pages[run][item], 1)]
        for (run, item), name in sorted(names.items(), key=lambda pair: pair[1])
    }
    # Sorted by opaque names: neither an item's place nor a candidate's side comes from the runs' order.
    pairs = sorted((tuple(sorted((names[a, item], names[b, item]))), item) for item, (a, b) in planned)
    comparisons = {f"c{number}": pair for number, (pair, _) in enumerate(pairs, 1)}
    content: dict[str, object] = {
        "format": ANSWERS_FORMAT,
        "questions": [{"id": id, "name": name, "text": text} for id, (name, text) in QUESTIONS.items()],
        "comparisons": [
            {"id": f"c{number}", "prompt": common.prompts[item], "stories": pair}
            for number, (pair, item) in enumerate(pairs, 1)
        ],
        "stories": stories,
    }
    study = _hash(content, pictures)
    return Design(
        content={"study": study, **content},
        pictures=pictures,
        key=Key(
            study=study,
            seed=seed,
            runs=[run.name for run in runs],
            candidates={name: Candidate(run=run, item=item) for (run, item), name in names.items()},
            comparisons={id: (pair[0], pair[1]) for id, pair in comparisons.items()},
            left_out={"missing": common.missing, "failed": common.failed},
        ),
    )


def _encode(page: StoryPage, name: str, pictures: dict[str, bytes], picture_px: int) -> dict[str, str | None]:
    """Put the page's picture among `pictures`, in one form for all runs: no file tells its maker by its metadata."""
    if page.picture is None:
        return {"text": page.text, "picture": None}
    picture = open_picture(page.picture, name=f"picture {name}")
    picture.thumbnail((picture_px, picture_px))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=90)
    pictures[f"{name}.webp"] = file.getvalue()
    return {"text": page.text, "picture": f"{name}.webp"}


def _hash(content: dict[str, object], pictures: dict[str, bytes]) -> str:
    """Name a study by what is in it."""
    digest = hashlib.sha256(json.dumps(content).encode())
    for name in sorted(pictures):
        digest.update(pictures[name])
    return digest.hexdigest()[:12]
