"""What all systems check of a question."""

from __future__ import annotations

from collections.abc import Sequence

from minigpt5.errors import InvalidRequest
from minigpt5.evaluation.systems.face import Question, System


def check_kinds(system: System, questions: Sequence[Question]) -> None:
    """Raise InvalidRequest where a question is of a kind that the system does not answer."""
    for question in questions:
        if question.wants not in system.kinds:
            raise InvalidRequest(
                "wants", f"{system.name} answers {', '.join(sorted(system.kinds))} but was asked for {question.wants}"
            )


def last_text(question: Question) -> str:
    """The text that a picture is asked for. Raises InvalidRequest where the context ends with none."""
    last = question.context[-1] if question.context else None
    if not isinstance(last, str) or not last.strip():
        raise InvalidRequest("context", "a picture is asked for but the context does not end with a text: add one")
    return last
