"""A language model that writes text alone: questions in the words of ours, answers without vokens."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from minigpt5.blocking import run_blocking
from minigpt5.engine.generator import VokenGenerator
from minigpt5.evaluation.systems.face import Question
from minigpt5.evaluation.systems.ours import to_request
from minigpt5.model.prompt import Segment, Template, join_texts, pictures_read, request_segments, text_segment
from minigpt5.types import InputImage, Page, PromptPart, StoryRequest, TextDelta

READ = Segment(kind="read")


@dataclass(frozen=True)
class _AsItIs:
    """A template of prompts that are segments already. What ends a text is what ends it in `own`."""

    own: Template

    @property
    def stop(self) -> tuple[str, ...]:
        return self.own.stop

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        return self.own.end_ids(tokenizer)

    def page(self, text: str, *, begins_answer: bool) -> str:
        return self.own.page(text, begins_answer=begins_answer)

    def reply(self, prompt: Sequence[PromptPart], pages: Sequence[Page]) -> list[Segment]:
        return [text_segment(part) if isinstance(part, str) else READ for part in prompt]


class TextWriter:
    """Writes what follows a question. Its prompts are those of our own model, so that it was trained on them too."""

    def __init__(self, generator: VokenGenerator) -> None:
        self.generator, self.template = generator, generator.template
        self.reads_pictures = generator.config.vision.family != "none"
        # Replies are all that is asked of it, so that the other tasks' words are not needed.
        generator.prompter.template = _AsItIs(self.template)  # type: ignore[assignment]

    @classmethod
    def from_pretrained(cls, folder: Path, *, num_threads: int | None = None, device: str | None = None) -> TextWriter:
        """Load a model folder. Raises ModelFolderError, BaseModelNotFound."""
        return cls(VokenGenerator.from_pretrained(folder, num_threads=num_threads, device=device))

    def write(self, questions: Sequence[Question], *, begun: str = "", stop: tuple[str, ...] = ()) -> list[str]:
        """The answers' texts, all at once. `begun`: how each answer begins, which is not repeated; a text ends before
        any of `stop`. Raises InvalidRequest."""
        requests = [self._request(question, begun, stop) for question in questions]
        for request in requests:
            self.generator.validate_request(request)

        async def write_all() -> list[str]:
            return list(await asyncio.gather(*map(self._write, requests)))

        return run_blocking(lambda report: write_all())

    async def _write(self, request: StoryRequest) -> str:
        events = [event async for event in self.generator.generate(request)]
        return "".join(event.text for event in events if isinstance(event, TextDelta))

    def _request(self, question: Question, begun: str, stop: tuple[str, ...]) -> StoryRequest:
        asked = to_request(question)
        pages = question.pages if question.wants == "pages" else 1
        sampling = dataclasses.replace(question.sampling, max_page_tokens=question.sampling.max_page_tokens * pages)
        return StoryRequest(
            prompt=self._prompt(asked, begun),
            pages=1,
            seed=question.seed,
            sampling=sampling,
            mode="reply",
            pictures="none",
            stop=stop,
        )

    def _prompt(self, asked: StoryRequest, begun: str) -> tuple[PromptPart, ...]:
        """What our model reads, texts joined as in training; without its pictures where this one reads none."""
        pictures = iter(pictures_read(asked))
        segments = request_segments(asked, self.template)
        if not self.reads_pictures:
            segments = [segment for segment in segments if segment.kind == "text"]
        segments = join_texts([*segments, *([text_segment(begun)] if begun else [])])
        return tuple(
            segment.text if segment.kind == "text" else InputImage(data=next(pictures)) for segment in segments
        )
