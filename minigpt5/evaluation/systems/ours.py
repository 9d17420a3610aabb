"""A MiniGPT-5 model folder as a system: questions become requests to the two engines, and share their batches.

Each kind of question is asked in the words that the model was trained with:

    picture  a lone caption: caption mode. A page, or a text after others: the published stage-2 task (mode "scene")
    text     a page: the same, without its picture. Else a reply without pictures
    pages    a story
    reply    a chat. A dialogue, which has roles, begins with the published instruction of MMDialog
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minigpt5.blocking import run_blocking
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.errors import InvalidRequest, MiniGPT5Error
from minigpt5.evaluation.systems.face import AnswerPart, Question
from minigpt5.pictures import open_picture
from minigpt5.pipeline import MiniGPT5
from minigpt5.published.data import READ_AND_TALK
from minigpt5.story.stream import write_story
from minigpt5.types import PromptPart, Role, StoryRequest, TextDelta

KINDS = frozenset({"picture", "text", "pages", "reply"})


class MiniGPT5System:
    """A `System`. Example: MiniGPT5System.from_pretrained("models/storybook").answer([question])"""

    kinds = KINDS

    def __init__(self, model: MiniGPT5) -> None:
        self.model, self.name = model, model.config.name

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, num_threads: int | None = None, device: str | None = None
    ) -> MiniGPT5System:
        """Load a model folder by its path, URI or hub id. Raises ModelFolderError, BaseModelNotFound."""
        # The decoder comes first: on a GPU the generator's KV store takes most of the memory that is left.
        decoder = DiffusionDecoder.from_pretrained(folder, num_threads=num_threads, device=device)
        generator = VokenGenerator.from_pretrained(folder, num_threads=num_threads, device=device)
        return cls(MiniGPT5(generator, decoder))

    def answer(self, questions: Sequence[Question]) -> list[tuple[AnswerPart, ...]]:
        """All questions at once: each answer is what it is alone. Threads that ask together share batches too.

        Raises InvalidRequest, and MiniGPT5Error where a picture could not be drawn.
        """
        requests = [to_request(question) for question in questions]
        for question, request in zip(questions, requests, strict=True):
            self.model.generator.validate_request(request)
            self.model.config.check_draw(question.draw)

        async def answer_all() -> list[tuple[AnswerPart, ...]]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answer(*one)) for one in zip(questions, requests, strict=True)]
            return [task.result() for task in tasks]

        try:
            return run_blocking(lambda report: answer_all())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _answer(self, question: Question, request: StoryRequest) -> tuple[AnswerPart, ...]:
        generate, decode = self.model.generator.generate, self.model.decoder.decode
        if question.wants == "text":
            events = [event async for event in generate(request)]
            return ("".join(event.text for event in events if isinstance(event, TextDelta)).strip(),)
        story = await write_story(request, generate, decode, model=self.name)
        parts: list[AnswerPart] = []
        for page in story.pages:
            if page.error:
                raise MiniGPT5Error(f"page {page.index} has no picture: {page.error}")
            parts += [page.text] if page.text and question.wants != "picture" else []
            parts += [open_picture(page.picture.png)] if page.picture else []
        return tuple(parts)


def to_request(question: Question) -> StoryRequest:
    """Raises InvalidRequest where a picture is asked for and no text says of what."""
    common = StoryRequest(
        prompt=question.context, pages=1, seed=question.seed, sampling=question.sampling, draw=question.draw
    )
    if question.wants == "picture":
        if not question.context or not isinstance(words := question.context[-1], str):
            raise InvalidRequest("context", "a picture is asked for but the context does not end with a text: add one")
        if question.is_page or len(question.context) > 1:
            return replace(common, mode="scene", prompt=question.context[:-1], given=(words,))
        return replace(common, mode="caption")
    if question.wants == "text":
        return replace(common, mode="scene") if question.is_page else replace(common, mode="reply", pictures="none")
    if question.wants == "pages":
        return replace(common, pages=question.pages)
    is_dialogue = any(isinstance(part, Role) for part in question.context)
    prompt = _with_instruction(question.context) if is_dialogue else question.context
    return replace(common, mode="reply", pages=question.pages, prompt=prompt)


def _with_instruction(context: tuple[PromptPart, ...]) -> tuple[PromptPart, ...]:
    """The published instruction at the begin of what the user says first."""
    if isinstance(context[0], Role) and context[0].name == "user":
        return (context[0], READ_AND_TALK, *context[1:])
    return (Role(name="user"), READ_AND_TALK, *context)
