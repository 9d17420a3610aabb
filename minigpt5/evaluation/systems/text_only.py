"""A language model that writes and never draws: fine-tuned on texts alone, or reading pictures too, as MiniGPT-4 does
(arXiv 2304.10592). Which of both, its model folder says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minigpt5.evaluation.systems.asked import check_kinds
from minigpt5.evaluation.systems.face import AnswerPart, Question
from minigpt5.evaluation.systems.folder import MODEL
from minigpt5.evaluation.systems.marks import read_marked
from minigpt5.evaluation.systems.writing import TextWriter


class TextOnlySystem:
    """A `System`."""

    kinds = frozenset({"text", "reply"})

    def __init__(self, writer: TextWriter) -> None:
        self.writer, self.name = writer, writer.generator.config.name

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, num_threads: int | None = None, device: str | None = None
    ) -> TextOnlySystem:
        return cls(TextWriter.from_pretrained(Path(folder) / MODEL, num_threads=num_threads, device=device))

    def answer(self, questions: Sequence[Question]) -> list[tuple[AnswerPart, ...]]:
        """Raises InvalidRequest."""
        check_kinds(self, questions)
        return [(" ".join(said for said, _ in read_marked(text)),) for text in self.writer.write(questions)]
