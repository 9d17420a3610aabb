"""Request or training row -> token ids, picture slots and labels: the one template of training and serving.

A sequence is BOS and segments. A segment is text, a picture that is read (its slot is widened to one placeholder
for each embedding), or a picture that is drawn (the vokens). The published strings are kept (arXiv 2310.02239's code).
"""

from __future__ import annotations

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
    """The id where it is learnt, else -100. Of a picture only [IMG0] is: the others are given after it."""


def text(words: str, *, is_target: bool = False) -> Segment:
    return Segment(kind="text", text=words, is_target=is_target)


READ = Segment(kind="read")
DRAW = Segment(kind="draw")
DRAW_TARGET = Segment(kind="draw", is_target=True)


def encode(
    segments: Sequence[Segment],
    tokenizer: PreTrainedTokenizerBase,
    voken_embeddings: VokenEmbeddings,
    *,
    num_image_embeddings: int,
    published_quirks: bool = False,
) -> Tokens:
    """Segments -> ids and labels, BOS first where the tokenizer has one.

    `published_quirks`: of the first picture [IMG7] is learnt too, of any other all vokens (an index that ends one too
    early, and looks at the first picture only).
    """
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    labels = [IGNORED] * len(ids)
    num_drawn = 0
    for segment in segments:
        if segment.kind == "text":
            new = words_ids(segment.text, tokenizer)
            learnt = new if segment.is_target else [IGNORED] * len(new)
        elif segment.kind == "read":
            new = [voken_embeddings.placeholder] * num_image_embeddings
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


def words_ids(words: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Words that spell a voken or a slot are words: what is drawn and read is said by segments alone."""
    return tokenizer.encode(words, add_special_tokens=False, split_special_tokens=True)


def page_ids(page: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A page's text as it stands in a story."""
    return words_ids(f" {page.strip()}", tokenizer)


def caption_segments(caption: str) -> list[Segment]:
    """Stage 1 and caption mode: the bare caption, then its picture."""
    return [text(caption), DRAW_TARGET, text(END, is_target=True)]


def describe_segments(description: str) -> list[Segment]:
    """Vision: a picture, then what is on it."""
    return [
        text("###Human: <Img>"),
        READ,
        text("</Img> Describe this image. ###Assistant:"),
        text(f" {description}{END}", is_target=True),
    ]


def story_segments(prompt: Sequence[PromptPart], num_pages: int, pages: Sequence[str]) -> list[Segment]:
    """A prompt and a page count, then the pages so far, each text followed by its picture."""
    segments = [text("###Human: ")]
    for part in prompt:
        if isinstance(part, InputImage):
            segments += [text("<Img>"), READ, text("</Img> ")]
        else:
            segments.append(text(part.strip()))
    segments.append(text(f" Tell it in {num_pages} pages with pictures. ###Assistant:"))
    for page in pages:
        segments += [text(f" {page}", is_target=True), DRAW_TARGET]
    if len(pages) == num_pages:
        segments.append(text(END, is_target=True))
    return segments


def reply_segments(prompt: Sequence[PromptPart], pages: Sequence[Page]) -> list[Segment]:
    """A prompt as `describe_segments` asks, then what was already answered."""
    segments = [text("###Human:")]
    for part in prompt:
        if isinstance(part, InputImage):
            segments += [text(" <Img>"), READ, text("</Img>")]
        else:
            segments.append(text(f" {part.strip()}"))
    segments.append(text(" ###Assistant:"))
    for page in pages:
        segments.append(text(f" {page.text}"))
        segments += [DRAW] if page.picture else []
    return join_texts(segments)


def join_texts(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbouring texts of one kind as one: a tokenizer may part them otherwise when it sees them apart."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and last.kind == segment.kind == "text" and last.is_target == segment.is_target:
            joined[-1] = text(last.text + segment.text, is_target=segment.is_target)
        else:
            joined.append(segment)
    return joined


def next_page_segments(history: Sequence[str], page: str, task: Task, *, variant: int) -> list[Segment]:
    """The published stage-2 tasks on a page that follows others: its text from its picture, its picture from its
    text, or both. `variant` chooses among the published instructions."""
    segments = [text(f"{READ_AND_TELL}###Human:")]
    asks: tuple[str, ...]
    for past in history:
        segments += [text(f"{past}<Img>"), READ, text("</Img>")]
    if history:
        segments.append(text("\n"))
    if task == "picture":
        asks = (" Generate an image with the scene description: ", " the scene description: ")
        segments += [text(f"{asks[variant % 2]}{page} ###Assistant:"), DRAW_TARGET]
    elif task == "both":
        asks = (
            " Tell me the next scene with image.",
            " Generate the next scene with image.",
            " What should happen then?",
        )
        segments += [
            text(f"{asks[variant % 3]} ###Assistant:"),
            text(f" {page}", is_target=True),
            DRAW_TARGET,
        ]
    else:
        asks = (
            " Tell me the next scene description by this image: ",
            " What happen in the next scene image: ",
        )
        segments += [text(f"{asks[variant % 2]}<Img>"), READ, text("</Img> ###Assistant:")]
        segments.append(text(f" {page}", is_target=True))
    return [*segments, text(END, is_target=True)]


def read_back_segments(prompt: Sequence[PromptPart], pages: Sequence[Page]) -> list[Segment]:
    """A prompt and the pages so far with their pictures, as the published stage 2 asks for the next one with both."""
    segments = [text(f"{READ_AND_TELL}###Human:")]
    for part in prompt:
        segments += [text("<Img>"), READ, text("</Img> ")] if isinstance(part, InputImage) else [text(part.strip())]
    for page in pages:
        segments.append(text(f" {page.text}"))
        segments += [text("<Img>"), READ, text("</Img>")] if page.picture else []
    return join_texts([*segments, text("\n Tell me the next scene with image. ###Assistant:")])


def pictures_read(request: StoryRequest) -> list[bytes]:
    """The pictures of `request_segments`, in reading order."""
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
        return caption_segments(" ".join(part for part in request.prompt if isinstance(part, str)))[:1]
    if request.mode == "reply":
        return reply_segments(request.prompt, request.previous)
    if _reads_back(request):
        return read_back_segments(request.prompt, request.previous)
    written = [page.text for page in request.previous]
    return story_segments(request.prompt, len(written) + request.pages + request.num_later, written)
