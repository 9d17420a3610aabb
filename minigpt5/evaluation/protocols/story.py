"""A system's own stories by prompts: their pattern, whether pictures fit the texts, and whether pages fit together.

Groups: `pages`, and `distance D` for pairs of pages of one story that are D pages apart, after ViStoryBench's question
whether a character stays itself.
"""

from __future__ import annotations

import dataclasses

from PIL import Image

from minigpt5.errors import InvalidRequest
from minigpt5.evaluation.protocols.protocol import (
    Answers,
    Protocol,
    Row,
    Sample,
    Settings,
    check_kind,
    pattern_of,
    pixels_of,
    seed_of,
    steps_of,
    true_pixels,
)
from minigpt5.evaluation.replies import structure
from minigpt5.evaluation.systems.face import Question
from minigpt5.storybook.captions import Facts, facts_in
from minigpt5.types import MAX_PAGES

KEY = "story"


def ask(row: Row, settings: Settings) -> dict[str, Question]:
    """As many pages as the true story has pictures. Raises InvalidRequest."""
    check_kind(row, "story", protocol="story")
    steps = steps_of(row)
    if not 1 <= len(steps) <= MAX_PAGES:
        raise InvalidRequest(
            "segments", f"a story of {len(steps)} pictures, but 1 to {MAX_PAGES} are asked: leave it out"
        )
    return {
        KEY: Question(
            context=(row["prompt"] or steps[0].text,),
            wants="pages",
            pages=len(steps),
            seed=seed_of(settings, row, KEY),
            sampling=settings.sampling,
            draw=settings.draw,
        )
    }


def collect(row: Row, answers: Answers) -> list[Sample]:
    steps, answer = steps_of(row), answers[KEY]
    prompt = row["prompt"] or steps[0].text
    is_world = str(row["source"]).startswith("storybook")
    common = Sample(row=row["id"], key=KEY, groups=("pages",), asked=prompt)
    is_right = structure(pattern_of(answer), ("text", "picture") * len(steps))
    samples = [dataclasses.replace(common, values={"structure": is_right})]
    text, pictures = "", []
    for part in answer:
        if not isinstance(part, Image.Image):
            text = part
            continue
        pictures.append(pixels_of(part))
        number = len(pictures)
        facts = facts_in(text) if is_world else Facts()
        samples.append(
            dataclasses.replace(
                common,
                key=f"page {number}",
                asked=text,
                drawn=pictures[-1],
                caption=text,
                facts=facts if facts != Facts() else None,
            )
        )
        text = ""
    # The true pictures are another story's: sets are compared, and no pairs.
    samples += [
        dataclasses.replace(common, key=f"true {number}", true=true_pixels(step.picture))
        for number, step in enumerate(steps, start=1)
        if step.picture
    ]
    for first, one in enumerate(pictures):
        for second in range(first + 1, len(pictures)):
            samples.append(
                dataclasses.replace(
                    common,
                    key=f"pages {first + 1} and {second + 1}",
                    groups=(f"distance {second - first}",),
                    pair=(one, pictures[second]),
                )
            )
    return samples


STORY = Protocol(
    name="story",
    about="own stories by prompts, with the likeness of their pages by distance",
    kinds=frozenset({"pages"}),
    ask=ask,
    collect=collect,
    metrics=(
        *("structure", "clip_t", "fact_accuracy", "fid", "fid_published", "inception_score", "efficientnet_distance"),
        *("clip_consistency", "efficientnet_consistency"),
    ),
    sheets=("fact_accuracy", "clip_t"),
    main=("pages",),
)
