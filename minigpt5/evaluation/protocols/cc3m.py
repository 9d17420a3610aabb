"""Caption -> picture, as MiniGPT-5 is evaluated on CC3M (metric.py: CLIP-I, CLIP-T, FID and Inception Score)."""

from __future__ import annotations

from minigpt5.evaluation.protocols.protocol import (
    Answers,
    Protocol,
    Row,
    Sample,
    Settings,
    check_kind,
    facts_of,
    picture_in,
    seed_of,
    steps_of,
    true_pixels,
)
from minigpt5.evaluation.systems.face import Question

KEY = "picture"


def ask(row: Row, settings: Settings) -> dict[str, Question]:
    """One picture of a caption. Raises InvalidRequest."""
    check_kind(row, "caption", protocol="cc3m")
    (step,) = steps_of(row)
    seed = seed_of(settings, row, KEY)
    return {
        KEY: Question(context=(step.text,), wants="picture", seed=seed, sampling=settings.sampling, draw=settings.draw)
    }


def collect(row: Row, answers: Answers) -> list[Sample]:
    (step,) = steps_of(row)
    assert step.picture is not None
    return [
        Sample(
            row=row["id"],
            key=KEY,
            groups=("all",),
            asked=step.text,
            drawn=picture_in(answers[KEY]),
            true=true_pixels(step.picture),
            caption=step.text,
            facts=facts_of(row, step),
        )
    ]


CC3M = Protocol(
    name="cc3m",
    about="one picture for each caption",
    kinds=frozenset({"picture"}),
    ask=ask,
    collect=collect,
    metrics=(
        *("clip_i", "clip_t", "lpips", "fact_accuracy"),
        *("fid", "fid_published", "inception_score", "efficientnet_distance"),
    ),
    sheets=("fact_accuracy", "clip_i", "lpips"),
)
