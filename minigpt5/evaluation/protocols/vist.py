"""Stories in steps, as MiniGPT-5 is evaluated on VIST: the picture of each step's text after contexts of four kinds,
and the text of each step after those before it.

Groups: `steps/CONTEXT` has every step, `last/CONTEXT` the last one of each story. `gill` is GILL's protocol: five
captions and four pictures in, the last picture scored; its question is that of `last/both`. The first step has no
context, so its one picture counts in all four.
"""

from __future__ import annotations

from minigpt5.errors import InvalidRequest
from minigpt5.evaluation.protocols.protocol import (
    Answers,
    Protocol,
    Row,
    Sample,
    Settings,
    Step,
    check_kind,
    facts_of,
    picture_in,
    seed_of,
    steps_of,
    text_in,
    true_pixels,
)
from minigpt5.evaluation.systems.face import Question, Wants
from minigpt5.types import InputImage, PromptPart

CONTEXTS = ("none", "text", "picture", "both")
GILL_STEPS = 5


def ask(row: Row, settings: Settings) -> dict[str, Question]:
    """Keys: `CONTEXT/STEP` for pictures and `narration/STEP` for texts, steps from 1. Raises InvalidRequest."""
    steps = _steps(row)
    questions: dict[str, Question] = {}

    def add(key: str, context: tuple[PromptPart, ...], wants: Wants) -> None:
        questions[key] = Question(
            context=context,
            wants=wants,
            is_page=True,
            seed=seed_of(settings, row, key.rpartition("/")[2]),  # contexts are compared with the same noise
            sampling=settings.sampling,
            draw=settings.draw,
        )

    for number, step in enumerate(steps, start=1):
        before = steps[: number - 1]
        for context in CONTEXTS if settings.reads_pictures else ("none", "text"):
            if number > 1 or context == "none":
                add(f"{context}/{number}", (*_context(before, context), step.text), "picture")
        if before:
            add(f"narration/{number}", _context(before, "both" if settings.reads_pictures else "text"), "text")
    return questions


def _steps(row: Row) -> list[Step]:
    check_kind(row, "story", protocol="vist")
    steps = steps_of(row)
    if len(steps) < 2:
        raise InvalidRequest("segments", f"a story of {len(steps)} pictures, but vist needs two: leave it out")
    return steps


def _context(before: list[Step], context: str) -> tuple[PromptPart, ...]:
    parts: list[PromptPart] = []
    for step in before:
        parts += [step.text] if context in ("text", "both") else []
        parts += [InputImage(data=step.picture)] if step.picture and context in ("picture", "both") else []
    return tuple(parts)


def collect(row: Row, answers: Answers) -> list[Sample]:
    steps = _steps(row)
    samples = []
    for number, step in enumerate(steps, start=1):
        assert step.picture is not None
        true, is_last = true_pixels(step.picture), number == len(steps)
        for context in CONTEXTS:
            key = f"{context}/{number}"
            if key not in answers:
                continue
            shared = CONTEXTS if number == 1 else (context,)
            # Contexts that were not asked have no later steps: the first alone would not be theirs.
            groups = [f"steps/{one}" for one in shared if f"{one}/2" in answers]
            groups += [f"last/{context}"] if is_last else []
            groups += ["gill"] if is_last and context == "both" and number == GILL_STEPS else []
            samples.append(
                Sample(
                    row=row["id"],
                    key=key,
                    groups=tuple(groups),
                    asked=step.text,
                    drawn=picture_in(answers[key]),
                    true=true,
                    caption=step.text,
                    facts=facts_of(row, step),
                )
            )
        if (said := answers.get(f"narration/{number}")) is not None:
            samples.append(
                Sample(
                    row=row["id"],
                    key=f"narration/{number}",
                    groups=("narration",),
                    asked=steps[number - 2].text,
                    said=text_in(said),
                    reference=step.text,
                )
            )
    return samples


VIST = Protocol(
    name="vist",
    about="each step's picture after no context, texts, pictures or both; each step's text after those before it",
    kinds=frozenset({"picture", "text"}),
    ask=ask,
    collect=collect,
    metrics=(
        *("clip_i", "clip_t", "lpips", "fact_accuracy"),
        *("fid", "fid_published", "inception_score", "efficientnet_distance"),
        *("bleu_1", "bleu_2", "rouge_l", "meteor", "sbert"),
    ),
    of_rows=("story_fid_published",),
    sheets=("fact_accuracy", "clip_i", "lpips"),
    main=("last/both", "last/text"),
)
