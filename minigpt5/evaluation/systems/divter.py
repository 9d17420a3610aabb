"""Divter (arXiv 2110.08515): the language model writes, between marks, what a picture shows, and a text-to-image model
draws it. It differs from two stages in that the language model says what its text only refers to."""

from __future__ import annotations

from collections.abc import Sequence

from minigpt5.evaluation.systems.asked import last_text
from minigpt5.evaluation.systems.face import Question
from minigpt5.evaluation.systems.marks import END_MARK, MARK, read_described
from minigpt5.evaluation.systems.text_to_picture import Caption
from minigpt5.evaluation.systems.two_stage import Described, TwoStageSystem


class DivterSystem(TwoStageSystem):
    """A `System`."""

    def captions(self, questions: Sequence[Question]) -> list[Caption]:
        """Descriptions that the language model writes after the texts; the text itself where it writes none."""
        described = self.writer.write(questions, begun=MARK, stop=(END_MARK,))
        return [
            Caption.of_page(text.strip() or last_text(question), seed=question.seed, page=1, draw=question.draw)
            for question, text in zip(questions, described, strict=True)
        ]

    def read(self, text: str) -> Described:
        return [(said, description or None) for said, description in read_described(text)]
