"""Dialogues turn by turn, as MiniGPT-5 is evaluated on MMDialog: whether to draw, what was drawn, what was said.

Each turn after the first is asked for after the true turns before it, the last exchange and what came since, as the
published code cuts it (`first_turn`). The side that is asked is always the assistant's.
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
    parts_in,
    picture_in,
    seed_of,
    text_before_picture,
    text_in,
    true_pixels,
    turns_of,
)
from minigpt5.evaluation.replies import drawing
from minigpt5.evaluation.systems.face import Question
from minigpt5.published.data import first_turn
from minigpt5.types import InputImage, PromptPart, Role


def ask(row: Row, settings: Settings) -> dict[str, Question]:
    """Keys: numbers of turns, from 2. Raises InvalidRequest."""
    turns = _turns(row)
    return {
        str(index + 1): Question(
            context=_history(turns, index, settings),
            wants="reply",
            seed=seed_of(settings, row, str(index + 1)),
            sampling=settings.sampling,
            draw=settings.draw,
        )
        for index in range(1, len(turns))
    }


def _turns(row: Row) -> list[Step]:
    check_kind(row, "dialogue", protocol="mmdialog")
    turns = turns_of(row)
    if len(turns) < 2:
        raise InvalidRequest("segments", f"a dialogue of {len(turns)} turns, but it needs two: leave it out")
    return turns


def _history(turns: list[Step], index: int, settings: Settings) -> tuple[PromptPart, ...]:
    parts: list[PromptPart] = []
    for number in range(first_turn(index), index):
        turn = turns[number]
        parts += [Role(name="user" if (index - number) % 2 else "assistant"), turn.text]
        parts += [InputImage(data=turn.picture)] if turn.picture and settings.reads_pictures else []
    return tuple(parts)


def collect(row: Row, answers: Answers) -> list[Sample]:
    turns = _turns(row)
    samples = []
    for number, turn in enumerate(turns[1:], start=2):
        answer = answers[str(number)]
        drawn = picture_in(answer)
        samples.append(
            Sample(
                row=row["id"],
                key=str(number),
                groups=("all",),
                asked=turns[number - 2].text,
                drawn=drawn,
                true=true_pixels(turn.picture) if turn.picture else None,
                caption=turn.caption,
                facts=facts_of(row, turn),
                parts=parts_in(answer),
                said=text_in(answer),
                said_first=text_before_picture(answer),
                reference=turn.text,
                values=drawing(drawn is not None, turn.picture is not None),
            )
        )
    return samples


MMDIALOG = Protocol(
    name="mmdialog",
    about="each turn of a dialogue: whether to draw, what was drawn, what was said",
    kinds=frozenset({"reply"}),
    ask=ask,
    collect=collect,
    metrics=(
        *("draw_precision", "draw_recall", "clip_i", "lpips", "fact_accuracy", "inception_score"),
        *("bleu_1", "bleu_2", "bleu_1_published", "bleu_2_published"),
        *("rouge_l", "rouge_l_published", "meteor", "sbert"),
    ),
    of_rows=("mm_relevance", "clip_f1_published"),
    sheets=("fact_accuracy", "clip_i", "sbert", "rouge_l"),
)
