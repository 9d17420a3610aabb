"""The published template, word for word (arXiv 2310.02239): the shipped weights were trained on it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minigpt5.model.prompt import (
    ASKS_FOR_BOTH,
    DRAW,
    DRAW_TARGET,
    READ,
    READ_AND_TELL,
    Segment,
    Task,
    ask_for,
    join_texts,
    merge_text_parts,
    text_segment,
)
from minigpt5.types import InputImage, Page, PromptPart, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = " ###"
HUMAN, ASSISTANT = "###Human:", "###Assistant:"


@dataclass(frozen=True)
class PublishedTemplate:
    """A `Template`. Its strings end a text too, for a tokenizer has no token of its own for them."""

    stop: tuple[str, ...] = (END.strip(),)
    caption_opens: str = ""

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """The tokenizer's own end, and the tokens that hold the template's."""
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends = [token for name, token in tokenizer.get_vocab().items() if END.strip() in name]
        return frozenset([*own, *ends])

    def page(self, text: str, *, begins_answer: bool) -> str:
        """One space before it, none after it."""
        return f" {text.strip()}"

    def caption(self, caption: str) -> list[Segment]:
        return [text_segment(f"{self.caption_opens}{caption}"), DRAW_TARGET, text_segment(END, is_target=True)]

    def describe(self, description: str) -> list[Segment]:
        return [
            text_segment(f"{HUMAN} <Img>"),
            READ,
            text_segment(f"</Img> Describe this image. {ASSISTANT}"),
            text_segment(f" {description}{END}", is_target=True),
        ]

    def story(self, prompt: Sequence[PromptPart], num_pages: int, pages: Sequence[str]) -> list[Segment]:
        # Not joined: the shipped model was trained on separately tokenized parts.
        segments = [text_segment(f"{HUMAN} ")]
        for part in _as_texts(prompt):
            if isinstance(part, InputImage):
                segments += [text_segment("<Img>"), READ, text_segment("</Img> ")]
            else:
                segments.append(text_segment(part.strip()))
        segments.append(text_segment(f" Tell it in {num_pages} pages with pictures. {ASSISTANT}"))
        for page in pages:
            segments += [text_segment(f" {page.strip()}", is_target=True), DRAW_TARGET]
        if len(pages) == num_pages:
            segments.append(text_segment(END, is_target=True))
        return segments

    def reply(self, prompt: Sequence[PromptPart], pages: Sequence[Page]) -> list[Segment]:
        segments = [text_segment(HUMAN)]
        for part in _as_texts(prompt):
            if isinstance(part, InputImage):
                segments += [text_segment(" <Img>"), READ, text_segment("</Img>")]
            else:
                segments.append(text_segment(f" {part.strip()}"))
        segments.append(text_segment(f" {ASSISTANT}"))
        for page in pages:
            segments.append(text_segment(f" {page.text.strip()}"))
            segments += [DRAW] if page.picture else []
        return join_texts(segments)

    def answer(self, text: str, *, draws: bool = False) -> list[Segment]:
        said = [text_segment(self.page(text, begins_answer=True), is_target=True)] if text.strip() else []
        return join_texts([*said, *([DRAW_TARGET] if draws else []), text_segment(END, is_target=True)])

    def next_page(self, history: Sequence[str], page: str, task: Task, *, variant: int) -> list[Segment]:
        segments = [text_segment(f"{READ_AND_TELL}{HUMAN}")]
        for past in history:
            segments += [text_segment(f"{past}<Img>"), READ, text_segment("</Img>")]
        if history:
            segments.append(text_segment("\n"))
        ask = ask_for(task, variant)
        text = text_segment(f" {page.strip()}", is_target=True)
        if task == "picture":
            segments += [text_segment(f"{ask}{page} {ASSISTANT}"), DRAW_TARGET]
        elif task == "both":
            segments += [text_segment(f"{ask} {ASSISTANT}"), text, DRAW_TARGET]
        else:
            segments += [text_segment(f"{ask}<Img>"), READ, text_segment(f"</Img> {ASSISTANT}"), text]
        return [*segments, text_segment(END, is_target=True)]

    def scene(self, context: Sequence[PromptPart], text: str) -> list[Segment]:
        segments, past = [text_segment(f"{READ_AND_TELL}{HUMAN}")], ""
        for part in context:
            if isinstance(part, InputImage):
                segments += [text_segment(f"{past}<Img>"), READ, text_segment("</Img>")]
                past = ""
            elif isinstance(part, str):
                past = f"{past} {part}".strip()
        if context:
            segments.append(text_segment(f"{past}\n"))
        ask = f"{ask_for('picture', 0)}{text}" if text else ask_for("both", 0)
        return [*segments, text_segment(f"{ask} {ASSISTANT}")]

    def read_back(self, prompt: Sequence[PromptPart], pages: Sequence[Page]) -> list[Segment]:
        segments = [text_segment(f"{READ_AND_TELL}{HUMAN}")]
        for part in _as_texts(prompt):
            if isinstance(part, InputImage):
                segments += [text_segment("<Img>"), READ, text_segment("</Img> ")]
            else:
                segments.append(text_segment(part.strip()))
        for page in pages:
            segments.append(text_segment(f" {page.text.strip()}"))
            segments += [text_segment("<Img>"), READ, text_segment("</Img>")] if page.picture else []
        return join_texts([*segments, text_segment(f"\n{ASKS_FOR_BOTH[0]} {ASSISTANT}")])


PUBLISHED = PublishedTemplate()


def _as_texts(prompt: Sequence[PromptPart]) -> list[str | InputImage]:
    """The prompt with its roles spelt out where the side changes: the template has one question, so earlier turns stand
    in it as it writes them. It has no system's side."""
    parts: list[str | InputImage] = []
    is_answer = False
    for part in prompt:
        if not isinstance(part, Role):
            parts.append(part)
        elif is_answer != (part.name == "assistant"):
            is_answer = not is_answer
            parts.append(ASSISTANT if is_answer else HUMAN)
    return merge_text_parts(parts)
