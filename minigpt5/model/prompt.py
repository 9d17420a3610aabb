"""Request or training row -> token ids, picture slots and labels: one way for training and serving.

A sequence is BOS and segments. A segment is text, a picture that is read (its slot is widened to one placeholder
for each embedding), or a picture that is drawn (the vokens). A `Template` makes the segments of each task: see
published_template.py and chat_template.py. The wordings here are the published ones (arXiv 2310.02239's code).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from minigpt5.types import InputImage, Page, PromptPart, StoryRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from minigpt5.model.vokens import VokenEmbeddings
    from minigpt5.model.window import Window

IGNORED = -100
Task = Literal["text", "picture", "both"]
"""A page's text from its picture, its picture from its text, or both."""
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
    frames: tuple[tuple[int, int], ...] = ()
    """Start and end, in characters, of what a chat template wrote. Control tokens are tokens there alone."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A sequence ready for the language model."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """Token id where the loss counts, else IGNORED.

    A drawn picture's only label is [IMG0]: the engine appends the other vokens.
    """


@dataclass(frozen=True)
class VokenIds:
    """The numbers of the new tokens, without their embeddings, which VokenEmbeddings has."""

    first: int
    """[IMG0]: the vokens are numbered after the base vocabulary."""
    num_vokens: int

    @property
    def placeholder(self) -> int:
        """Marks the positions of an input picture's embeddings."""
        return self.first + self.num_vokens

    @property
    def ids(self) -> list[int]:
        return list(range(self.first, self.placeholder))


def text_segment(text: str, *, is_target: bool = False) -> Segment:
    return Segment(kind="text", text=text, is_target=is_target)


READ = Segment(kind="read")
DRAW = Segment(kind="draw")
DRAW_TARGET = Segment(kind="draw", is_target=True)


class Template(Protocol):
    """What stands around the texts and pictures of each task."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a text, beside the end tokens."""

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Tokens that end a text."""

    def page(self, text: str, *, begins_answer: bool) -> str:
        """A page's text with the white space that it is written with."""

    def caption(self, caption: str) -> list[Segment]:
        """Stage 1: the bare caption, then its picture. Caption mode reads the same."""

    def describe(self, description: str) -> list[Segment]:
        """Vision: a picture, then what is on it."""

    def story(self, prompt: Sequence[PromptPart], num_pages: int, pages: Sequence[str]) -> list[Segment]:
        """A prompt and a page count, then the pages so far, each text followed by its picture."""

    def reply(self, prompt: Sequence[PromptPart], pages: Sequence[Page]) -> list[Segment]:
        """A prompt as `describe` asks, then what was already answered."""

    def answer(self, text: str, *, draws: bool = False) -> list[Segment]:
        """What is learnt after `reply`: a text, or none, and perhaps a picture after it."""

    def next_page(self, history: Sequence[str], page: str, task: Task, *, variant: int) -> list[Segment]:
        """The published stage-2 tasks on a page that follows others: its text from its picture, its picture from its
        text, or both.

        `variant` chooses the published wording: any integer; it is taken modulo the number of wordings (2 or 3).
        """

    def scene(self, context: Sequence[PromptPart], text: str) -> list[Segment]:
        """As `next_page` asks, in its first wording, after any texts and pictures: for the picture of `text`, or where
        that is empty for both."""

    def read_back(self, prompt: Sequence[PromptPart], pages: Sequence[Page]) -> list[Segment]:
        """A prompt and the pages so far with their pictures, as `next_page` asks for the next one with both."""


def encode(
    segments: Sequence[Segment],
    tokenizer: PreTrainedTokenizerBase,
    voken_embeddings: VokenEmbeddings | VokenIds,
    *,
    picture_tokens: Sequence[int],
    published_quirks: bool = False,
) -> Tokens:
    """Segments -> ids and labels, BOS first where the tokenizer has one and no chat template has written its own.

    `picture_tokens`: what a picture that is read becomes, as in VisionConfig: ids, and -n for n embeddings.
    `published_quirks`: repeat the published label bug. In the first picture [IMG7] is learnt too, in later pictures
    every voken.
    """
    is_chat = bool(segments) and bool(segments[0].frames)
    ids = [] if is_chat or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    labels = [IGNORED] * len(ids)
    num_drawn = 0
    for at, segment in enumerate(segments):
        if segment.kind == "text":
            follows_picture = at > 0 and segments[at - 1].kind == "read"
            if segment.frames or (is_chat and follows_picture):
                placeholder = voken_embeddings.placeholder if follows_picture else None
                new = framed_ids(segment, tokenizer, after=placeholder)
            else:
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
                    learnt[-1] = new[-1]
                    learnt = new if num_drawn else learnt
                num_drawn += 1
        ids += new
        labels += learnt
    return Tokens(ids=ids, labels=labels)


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize text. A string such as "[IMG0]" in it stays plain text; only segments insert vokens and image slots."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def framed_ids(segment: Segment, tokenizer: PreTrainedTokenizerBase, *, after: int | None = None) -> list[int]:
    """Tokenize text of a chat, as the tokenizer's library tokenizes a rendered chat template. `after`: the token before
    it, where there is one; some tokenizers treat the very first word otherwise.

    Where a string such as "<|im_end|>" stands outside the frames, the texts between control tokens are tokenized alone.
    """
    text = segment.text
    found = list(re.finditer(control_tokens(tokenizer), text))
    own = [match for match in found if any(a <= match.start() and match.end() <= b for a, b in segment.frames)]
    if len(own) == len(found):
        if after is None:
            return tokenizer.encode(text, add_special_tokens=False)
        return tokenizer.encode(f"{tokenizer.convert_ids_to_tokens(after)}{text}", add_special_tokens=False)[1:]
    ids, start = [], 0
    for match in own:
        ids += text_ids(text[start : match.start()], tokenizer)
        ids.append(tokenizer.convert_tokens_to_ids(match.group()))
        start = match.end()
    return ids + text_ids(text[start:], tokenizer)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """A regular expression of the special tokens, the longest first; without any it fits nothing."""
    names = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return "|".join(sorted(names, key=len, reverse=True)) or "(?!)"


def merge_text_parts(prompt: Sequence[str | InputImage]) -> list[str | InputImage]:
    """Join neighbouring texts with one space."""
    merged: list[str | InputImage] = []
    for part in prompt:
        if merged and isinstance(part, str) and isinstance(last := merged[-1], str):
            merged[-1] = f"{last.strip()} {part.strip()}".strip()
        else:
            merged.append(part)
    return merged


def ask_for(task: Task, variant: int) -> str:
    """The published wording of a task."""
    wordings = {"text": ASKS_FOR_TEXT, "picture": ASKS_FOR_PICTURE, "both": ASKS_FOR_BOTH}[task]
    return wordings[variant % len(wordings)]


def join_texts(segments: Sequence[Segment]) -> list[Segment]:
    """Merge adjacent text segments: tokenizing them separately can give other ids."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and last.kind == segment.kind == "text" and last.is_target == segment.is_target:
            shift = len(last.text)
            frames = (*last.frames, *((start + shift, end + shift) for start, end in segment.frames))
            joined[-1] = dataclasses.replace(last, text=last.text + segment.text, frames=frames)
        else:
            joined.append(segment)
    return joined


def pictures_read(request: StoryRequest, window: Window | None = None) -> list[bytes]:
    """The pictures of `request_segments`, in reading order. It must stay in step with `request_segments`: one entry for
    each READ segment."""
    if request.mode == "caption":
        return []
    pictures = [part.data for part in request.prompt if isinstance(part, InputImage)]
    if reads_back(request):
        pictures += [page.picture.png for page in _pages_read(request, window) if page.picture]
    return pictures


def reads_back(request: StoryRequest) -> bool:
    """Whether the prompt has the pictures of earlier pages."""
    return request.mode == "story" and request.feedback == "pictures" and bool(request.previous)


def _pages_read(request: StoryRequest, window: Window | None) -> tuple[Page, ...]:
    """Those of the earlier pages that are read."""
    return tuple(request.previous[page - 1] for page in window.pages) if window else request.previous


def request_segments(request: StoryRequest, template: Template, window: Window | None = None) -> list[Segment]:
    """What the generator reads before it writes. `window`: of a story's first new page; None: its earlier pages are
    read whole."""
    if request.mode == "caption":
        texts = merge_text_parts([part for part in request.prompt if isinstance(part, str)])
        return [template.caption(caption)[0] for caption in texts if isinstance(caption, str)]
    if request.mode == "reply":
        return template.reply(request.prompt, request.previous)
    if request.mode == "scene":
        return template.scene(request.prompt, "".join(request.given))
    pages = _pages_read(request, window)
    if reads_back(request):
        return template.read_back(request.prompt, pages)
    num_pages = window.num_pages if window else len(pages) + request.pages + request.num_later
    return template.story(request.prompt, num_pages, [page.text for page in pages])


def given_ids(request: StoryRequest, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize each given page as training has it. A scene has its text in the prompt."""
    if request.mode == "scene":
        return []
    is_start = not request.previous or reads_back(request)
    texts = [template.page(text, begins_answer=is_start and not at) for at, text in enumerate(request.given)]
    return [text_ids(text, tokenizer) for text in texts]
