"""Request or training row -> token ids, picture slots and labels: the one template of training and serving.

A sequence is BOS and segments. A segment is text, a picture that is read (its slot is widened to one placeholder
for each embedding), or a picture that is drawn (the vokens). The published strings are kept (arXiv 2310.02239's code).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from minigpt5.types import InputImage, Page, PromptPart, StoryRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from minigpt5.model.vokens import VokenEmbeddings

IGNORED = -100
Task = Literal["text", "picture", "both"]
"""A page's text from its picture, its picture from its text, or both."""
END = " ###"
READ_AND_TELL = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I provide "
    "it to you. Please understanding images and generate story."
)
"""Published instruction, mistakes included: the published weights were trained on it."""
ASKS_FOR_PICTURE = (" Generate an image with the scene description: ", " the scene description: ")
"""Published wordings before a page's text."""
ASKS_FOR_BOTH = (
    " Tell me the next scene with image.",
    " Generate the next scene with image.",
    " What should happen then?",
)
ASKS_FOR_TEXT = (
    " Tell me the next scene description by this image: ",
    " What happen in the next scene image: ",
)
"""Published wordings before a page's picture."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a sequence; `is_target`: the model learns to produce it."""

    kind: Literal["text", "read", "draw"]
    text: str = ""
    is_target: bool = False


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A sequence ready for the language model."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """Token id where the loss counts, else IGNORED.

    A drawn picture's only label is [IMG0]: the engine appends the other vokens.
    """


def text_segment(text: str, *, is_target: bool = False) -> Segment:
    return Segment(kind="text", text=text, is_target=is_target)


READ = Segment(kind="read")
DRAW = Segment(kind="draw")
DRAW_TARGET = Segment(kind="draw", is_target=True)


def encode(
    segments: Sequence[Segment],
    tokenizer: PreTrainedTokenizerBase,
    voken_embeddings: VokenEmbeddings,
    *,
    picture_tokens: Sequence[int],
    published_quirks: bool = False,
) -> Tokens:
    """Segments -> ids and labels, BOS first where the tokenizer has one.

    `picture_tokens`: what a picture that is read becomes, as in VisionConfig: ids, and -n for n embeddings.
    `published_quirks`: repeat the published label bug. In the first picture [IMG7] is learnt too, in later pictures
    every voken.
    """
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    labels = [IGNORED] * len(ids)
    num_drawn = 0
    for segment in segments:
        if segment.kind == "text":
            new = text_ids(segment.text, tokenizer)
            learnt = new if segment.is_target else [IGNORED] * len(new)
        elif segment.kind == "read":
            runs = ([token] if token >= 0 else [voken_embeddings.placeholder] * -token for token in picture_tokens)
            new = list(itertools.chain.from_iterable(runs))
            learnt = [IGNORED] * len(new)
        else:
            if not ids:
                raise ValueError(
                    "a picture is drawn before any text, and the tokenizer has no BOS token to draw it from"
                )
            new = voken_embeddings.ids
            learnt = [IGNORED] * len(new)
            if segment.is_target:
                learnt[0] = new[0]
                if published_quirks:
                    learnt = new if num_drawn else [new[0], *learnt[1:-1], new[-1]]
                num_drawn += 1
        ids += new
        labels += learnt
    return Tokens(ids=ids, labels=labels)


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize text. A string such as "[IMG0]" in it stays plain text; only segments insert vokens and image slots."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def page_text(page: str) -> str:
    """A page's text as every prompt has it: one space before it, none after it."""
    return f" {page.strip()}"


def page_ids(page: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a page's text as `story_segments` has it."""
    return text_ids(page_text(page), tokenizer)


def merge_text_parts(prompt: Sequence[PromptPart]) -> list[PromptPart]:
    """Join neighbouring texts with one space."""
    merged: list[PromptPart] = []
    for part in prompt:
        if merged and isinstance(part, str) and isinstance(last := merged[-1], str):
            merged[-1] = f"{last.strip()} {part.strip()}".strip()
        else:
            merged.append(part)
    return merged


def caption_segments(caption: str) -> list[Segment]:
    """Stage 1 and caption mode: the bare caption, then its picture."""
    return [text_segment(caption), DRAW_TARGET, text_segment(END, is_target=True)]


def describe_segments(description: str) -> list[Segment]:
    """Vision: a picture, then what is on it."""
    return [
        text_segment("###Human: <Img>"),
        READ,
        text_segment("</Img> Describe this image. ###Assistant:"),
        text_segment(f" {description}{END}", is_target=True),
    ]


def story_segments(prompt: Sequence[PromptPart], num_pages: int, pages: Sequence[str]) -> list[Segment]:
    """A prompt and a page count, then the pages so far, each text followed by its picture."""
    # Not joined: the shipped model was trained on separately tokenized parts.
    segments = [text_segment("###Human: ")]
    for part in merge_text_parts(prompt):
        if isinstance(part, InputImage):
            segments += [text_segment("<Img>"), READ, text_segment("</Img> ")]
        else:
            segments.append(text_segment(part.strip()))
    segments.append(text_segment(f" Tell it in {num_pages} pages with pictures. ###Assistant:"))
    for page in pages:
        segments += [text_segment(page_text(page), is_target=True), DRAW_TARGET]
    if len(pages) == num_pages:
        segments.append(text_segment(END, is_target=True))
    return segments


def reply_segments(prompt: Sequence[PromptPart], pages: Sequence[Page]) -> list[Segment]:
    """A prompt as `describe_segments` asks, then what was already answered."""
    segments = [text_segment("###Human:")]
    for part in merge_text_parts(prompt):
        if isinstance(part, InputImage):
            segments += [text_segment(" <Img>"), READ, text_segment("</Img>")]
        else:
            segments.append(text_segment(f" {part.strip()}"))
    segments.append(text_segment(" ###Assistant:"))
    for page in pages:
        segments.append(text_segment(page_text(page.text)))
        segments += [DRAW] if page.picture else []
    return join_texts(segments)


def join_texts(segments: Sequence[Segment]) -> list[Segment]:
    """Merge adjacent text segments: tokenizing them separately can give other ids."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and last.kind == segment.kind == "text" and last.is_target == segment.is_target:
            joined[-1] = text_segment(last.text + segment.text, is_target=segment.is_target)
        else:
            joined.append(segment)
    return joined


def next_page_segments(history: Sequence[str], page: str, task: Task, *, variant: int) -> list[Segment]:
    """The published stage-2 tasks on a page that follows others: its text from its picture, its picture from its
    text, or both.

    `variant` chooses the published wording: any integer; it is taken modulo the number of wordings (2 or 3).
    """
    segments = [text_segment(f"{READ_AND_TELL}###Human:")]
    for past in history:
        segments += [text_segment(f"{past}<Img>"), READ, text_segment("</Img>")]
    if history:
        segments.append(text_segment("\n"))
    tasks = {"text": _text_task, "picture": _picture_task, "both": _both_task}
    return [*segments, *tasks[task](page, variant), text_segment(END, is_target=True)]


def _picture_task(page: str, variant: int) -> list[Segment]:
    ask = ASKS_FOR_PICTURE[variant % len(ASKS_FOR_PICTURE)]
    return [text_segment(f"{ask}{page} ###Assistant:"), DRAW_TARGET]


def _both_task(page: str, variant: int) -> list[Segment]:
    ask = ASKS_FOR_BOTH[variant % len(ASKS_FOR_BOTH)]
    return [text_segment(f"{ask} ###Assistant:"), text_segment(page_text(page), is_target=True), DRAW_TARGET]


def _text_task(page: str, variant: int) -> list[Segment]:
    ask = ASKS_FOR_TEXT[variant % len(ASKS_FOR_TEXT)]
    return [
        text_segment(f"{ask}<Img>"),
        READ,
        text_segment("</Img> ###Assistant:"),
        text_segment(page_text(page), is_target=True),
    ]


def read_back_segments(prompt: Sequence[PromptPart], pages: Sequence[Page]) -> list[Segment]:
    """A prompt and the pages so far with their pictures, as the published stage 2 asks for the next one with both."""
    segments = [text_segment(f"{READ_AND_TELL}###Human:")]
    for part in merge_text_parts(prompt):
        if isinstance(part, InputImage):
            segments += [text_segment("<Img>"), READ, text_segment("</Img> ")]
        else:
            segments.append(text_segment(part.strip()))
    for page in pages:
        segments.append(text_segment(page_text(page.text)))
        segments += [text_segment("<Img>"), READ, text_segment("</Img>")] if page.picture else []
    return join_texts([*segments, text_segment(f"\n{ASKS_FOR_BOTH[0]} ###Assistant:")])


def pictures_read(request: StoryRequest) -> list[bytes]:
    """The pictures of `request_segments`, in reading order. It must stay in step with `request_segments`: one entry for
    each READ segment."""
    if request.mode == "caption":
        return []
    pictures = [part.data for part in request.prompt if isinstance(part, InputImage)]
    if _reads_back(request):
        pictures += [page.picture.png for page in request.previous if page.picture]
    return pictures


def _reads_back(request: StoryRequest) -> bool:
    return request.mode == "story" and request.feedback == "pictures" and bool(request.previous)


def request_segments(request: StoryRequest) -> list[Segment]:
    """What the generator reads before it writes."""
    if request.mode == "caption":
        texts = merge_text_parts([part for part in request.prompt if isinstance(part, str)])
        return [text_segment(caption) for caption in texts if isinstance(caption, str)]
    if request.mode == "reply":
        return reply_segments(request.prompt, request.previous)
    if _reads_back(request):
        return read_back_segments(request.prompt, request.previous)
    written = [page.text for page in request.previous]
    return story_segments(request.prompt, len(written) + request.pages + request.num_later, written)
