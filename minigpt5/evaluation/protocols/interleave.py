"""Questions of the benchmarks in items.py: an answer of texts and pictures, which a judge may read.

Without a judge it measures what needs none: the pattern, answers without texts or pictures, the text beside the
annotators' one, and each picture beside the text before it.
"""

from __future__ import annotations

from minigpt5.evaluation.protocols.items import steps_in
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
    text_in,
)
from minigpt5.evaluation.replies import missing, structure
from minigpt5.evaluation.systems.face import Question
from minigpt5.types import MAX_REPLY_PICTURES, InputImage, PromptPart

KEY = "answer"
PICTURES_WITHOUT_GOLDEN = 4


def ask(row: Row, settings: Settings) -> dict[str, Question]:
    """A reply with at most as many pictures as the annotators' one. Raises InvalidRequest."""
    check_kind(row, "question", protocol="interleave")
    return {KEY: question_of(row, settings)}


def question_of(row: Row, settings: Settings) -> Question:
    parts: list[PromptPart] = []
    for segment in row["segments"]:
        if segment["text"] is not None:
            parts.append(segment["text"])
        elif settings.reads_pictures:
            parts.append(InputImage(data=segment["picture"]))
    golden = golden_pattern(row)
    pages = golden.count("picture") if golden else PICTURES_WITHOUT_GOLDEN
    return Question(
        context=tuple(parts),
        wants="reply",
        pages=min(max(1, pages), MAX_REPLY_PICTURES),
        seed=seed_of(settings, row, KEY),
        sampling=settings.sampling,
        draw=settings.draw,
    )


def golden_pattern(row: Row) -> tuple[str, ...]:
    """The pattern of the annotators' answer; empty where there is none."""
    return tuple("picture" if part["text"] is None else "text" for part in row["golden"] or ())


def collect(row: Row, answers: Answers) -> list[Sample]:
    answer, golden = answers[KEY], golden_pattern(row)
    asked = " ".join(segment["text"] for segment in row["segments"] if segment["text"] is not None)
    values = missing(pattern_of(answer))
    values |= {"structure": structure(pattern_of(answer), golden)} if golden else {}
    reference = " ".join(part["text"] for part in row["golden"] or () if part["text"] is not None)
    samples = [
        Sample(
            row=row["id"],
            key=KEY,
            groups=("all",),
            asked=asked,
            said=text_in(answer),
            reference=reference or None,
            values=values,
        )
    ]
    for number, (text, picture) in enumerate(steps_in(answer), start=1):
        if picture:
            key = f"picture {number}"
            samples.append(
                Sample(row=row["id"], key=key, groups=("all",), asked=asked, drawn=pixels_of(picture), caption=text)
            )
    return samples


INTERLEAVE = Protocol(
    name="interleave",
    about="answers of texts and pictures to the questions of a benchmark's file",
    kinds=frozenset({"reply"}),
    ask=ask,
    collect=collect,
    metrics=("structure", "no_picture", "no_text", "clip_t", "bleu_1", "rouge_l", "sbert", "judge"),
    sheets=("judge/helpfulness", "clip_t", "rouge_l"),
)
