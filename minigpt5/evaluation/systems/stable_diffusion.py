"""The diffusion model alone: a caption in, a picture out. Of what comes before a text it knows nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minigpt5.evaluation.systems.asked import check_kinds, last_text
from minigpt5.evaluation.systems.face import AnswerPart, Question
from minigpt5.evaluation.systems.folder import MODEL
from minigpt5.evaluation.systems.text_to_picture import Caption, TextToPicture


class StableDiffusionSystem:
    """A `System`."""

    kinds = frozenset({"picture"})
    reads_pictures = False

    def __init__(self, drawer: TextToPicture) -> None:
        self.drawer, self.name = drawer, drawer.config.name

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, num_threads: int | None = None, device: str | None = None
    ) -> StableDiffusionSystem:
        return cls(TextToPicture.from_pretrained(Path(folder) / MODEL, num_threads=num_threads, device=device))

    def answer(self, questions: Sequence[Question]) -> list[tuple[AnswerPart, ...]]:
        """Raises InvalidRequest."""
        check_kinds(self, questions)
        return [(picture,) for picture in self.drawer.draw([own_caption(question) for question in questions])]


def own_caption(question: Question) -> Caption:
    """The last text of a question as the caption of its picture. Raises InvalidRequest."""
    return Caption.of_page(last_text(question), seed=question.seed, page=1, draw=question.draw)
