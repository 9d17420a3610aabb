"""Does an answer have the asked pattern of texts and pictures? The structural level of ISG-Bench, on any rows."""

from __future__ import annotations

from minigpt5.evaluation.protocols import cc3m, dialogue, interleave, story
from minigpt5.evaluation.protocols.protocol import (
    Answers,
    Protocol,
    Row,
    Sample,
    Settings,
    pattern_of,
    steps_of,
    turns_of,
)
from minigpt5.evaluation.replies import structure
from minigpt5.evaluation.systems.face import Question

ASK = {"caption": cc3m.ask, "story": story.ask, "dialogue": dialogue.ask, "question": interleave.ask}


def ask(row: Row, settings: Settings) -> dict[str, Question]:
    """The question that each kind's own protocol asks. Raises InvalidRequest."""
    return ASK[row["kind"]](row, settings)


def expected_of(row: Row) -> dict[str, tuple[str, ...]]:
    """The asked pattern of each question; none where a benchmark's item has no annotators' answer."""
    if row["kind"] == "caption":
        return {cc3m.KEY: ("picture",)}
    if row["kind"] == "story":
        return {story.KEY: ("text", "picture") * len(steps_of(row))}
    if row["kind"] == "question":
        golden = interleave.golden_pattern(row)
        return {interleave.KEY: golden} if golden else {}
    turns = enumerate(turns_of(row), start=1)
    return {str(number): ("text", "picture") if turn.picture else ("text",) for number, turn in turns if number > 1}


def collect(row: Row, answers: Answers) -> list[Sample]:
    return [
        Sample(
            row=row["id"],
            key=key,
            groups=("all", row["kind"]),
            asked=f"asked: {', '.join(expected)}; answered: {', '.join(pattern_of(answers[key])) or 'nothing'}",
            values={"structure": structure(pattern_of(answers[key]), expected)},
        )
        for key, expected in expected_of(row).items()
    ]


STRUCTURE = Protocol(
    name="structure",
    about="whether answers have the asked pattern of texts and pictures",
    kinds=frozenset({"picture", "pages", "reply"}),
    ask=ask,
    collect=collect,
    metrics=("structure",),
    sheets=("structure",),
)
