"""Two models in a row: a fine-tuned language model writes, and its text goes into the diffusion model's text encoder.

It is the baseline of MiniGPT-5's paper (arXiv 2310.02239, 4.3). A mark in the text says where a picture stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minigpt5.evaluation.systems.asked import check_kinds
from minigpt5.evaluation.systems.face import AnswerPart, Question
from minigpt5.evaluation.systems.folder import MODEL
from minigpt5.evaluation.systems.marks import read_marked
from minigpt5.evaluation.systems.stable_diffusion import own_caption
from minigpt5.evaluation.systems.text_to_picture import Caption, TextToPicture
from minigpt5.evaluation.systems.writing import TextWriter

Described = list[tuple[str, str | None]]
"""Texts, each with the caption of the picture after it, or None."""


class TwoStageSystem:
    """A `System`."""

    kinds = frozenset({"picture", "text", "pages", "reply"})

    def __init__(self, writer: TextWriter, drawer: TextToPicture) -> None:
        self.writer, self.drawer, self.name = writer, drawer, drawer.config.name

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, num_threads: int | None = None, device: str | None = None
    ) -> TwoStageSystem:
        model = Path(folder) / MODEL
        return cls(
            TextWriter.from_pretrained(model, num_threads=num_threads, device=device),
            TextToPicture.from_pretrained(model, num_threads=num_threads, device=device),
        )

    def answer(self, questions: Sequence[Question]) -> list[tuple[AnswerPart, ...]]:
        """All texts first, then all pictures. Raises InvalidRequest."""
        check_kinds(self, questions)
        parts: dict[int, list[str | Caption]] = {}
        pictures = [place for place, question in enumerate(questions) if question.wants == "picture"]
        captions = self.captions([questions[place] for place in pictures])
        parts |= {place: [caption] for place, caption in zip(pictures, captions, strict=True)}
        others = [place for place, question in enumerate(questions) if question.wants != "picture"]
        texts = self.writer.write([questions[place] for place in others])
        parts |= {place: _parts(questions[place], self.read(text)) for place, text in zip(others, texts, strict=True)}
        asked = [part for place in range(len(questions)) for part in parts[place] if isinstance(part, Caption)]
        drawn = iter(self.drawer.draw(asked))
        return [
            tuple(next(drawn) if isinstance(part, Caption) else part for part in parts[place])
            for place in range(len(questions))
        ]

    def captions(self, questions: Sequence[Question]) -> list[Caption]:
        """What is drawn for texts that are given: the texts."""
        return [own_caption(question) for question in questions]

    def read(self, text: str) -> Described:
        """What was written -> texts and the captions of their pictures: here the texts themselves."""
        return [(said, said if is_drawn and said else None) for said, is_drawn in read_marked(text)]


def _parts(question: Question, described: Described) -> list[str | Caption]:
    """Texts and pictures as the question asks for them: a text has none, an answer at most `pages`."""
    if question.wants == "text":
        return [described[0][0]]
    parts: list[str | Caption] = []
    number = 0
    for said, caption in described:
        parts += [said] if said else []
        if caption and number < question.pages:
            number += 1
            parts.append(Caption.of_page(caption, seed=question.seed, page=number, draw=question.draw))
        if question.wants == "pages" and number == question.pages:
            break
    return parts
