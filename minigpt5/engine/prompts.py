"""What every engine does with a request before it writes: checks, the prompt's token ids, and its script's writer.

No torch here: an engine may run in an environment with another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

from minigpt5.config import ModelConfig
from minigpt5.engine.script import Writer
from minigpt5.errors import InvalidRequest
from minigpt5.model.prompt import VokenIds, encode, pictures_read, reads_back, request_segments, text_ids
from minigpt5.model.story_windows import StoryWindows
from minigpt5.model.template import make_template
from minigpt5.model.window import Window, windows
from minigpt5.types import (
    MAX_PAGES,
    MAX_PENALTY,
    MAX_REPLY_PICTURES,
    MIN_PENALTY,
    GeneratorEvent,
    InputImage,
    Role,
    StoryRequest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ_BACK_TOKENS = 16
"""Around a picture that is read back, and of what is asked after it."""
SAMPLING_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "repetition_penalty": (MIN_PENALTY, MAX_PENALTY),
}
"""Numbers by which a token can be drawn from any logits."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request as it is written."""

    request: StoryRequest
    ids: list[int]
    """What the model reads first."""
    pictures: list[bytes]
    """Pictures among it, in reading order."""
    num_new: int
    """Tokens that may come after it, read or written."""
    num_positions: int
    """The longest that what it reads at once may become."""
    windows: StoryWindows | None = None
    """Of a story that is told page by page from its texts."""


class Prompter:
    """Makes the prompts of one model."""

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, engine: str) -> None:
        """`engine`: name and version of what will write. Raises ModelFolderError where the tokenizer's template does
        not serve."""
        self.config, self.tokenizer, self.engine = config, tokenizer, engine
        self.template = make_template(config, tokenizer)
        self.end_ids = self.template.end_ids(tokenizer)
        """Tokens that end a text."""
        self.voken_ids = VokenIds(config.vocabulary, config.num_vokens)

    def encode(self, request: StoryRequest) -> Prompt:
        """Check and tokenize a request. A reply may ask for more text than the context holds: it gets what is left. Of
        a story the context holds a window (model/window.py).

        Raises InvalidRequest where it cannot be written.
        """
        check_request(request)
        wants_pictures = request.mode == "story" and request.feedback == "pictures"
        if self.config.vision.family == "none" and (wants_pictures or pictures_read(request)):
            raise InvalidRequest("prompt", "this model reads no pictures: leave them out of the prompt")
        if request.mode == "story":
            return self._encode_story(request)
        ids = self._ids(request)
        if request.mode == "reply":
            room = max(1, self.config.context_tokens - len(ids) - request.pages * self.config.num_vokens)
            sampling = request.sampling
            sampling = dataclasses.replace(sampling, max_page_tokens=min(sampling.max_page_tokens, room))
            request = dataclasses.replace(request, sampling=sampling)
        num_texts = {"scene": request.pages - len(request.given), "reply": 1, "caption": 0}[request.mode]
        num_new = num_texts * request.sampling.max_page_tokens + request.pages * self.config.num_vokens
        if len(ids) + num_new > self.config.context_tokens:
            raise InvalidRequest(
                "prompt",
                f"prompt takes {len(ids)} tokens and {request.pages} pages up to {num_new}, but the context window is "
                f"{self.config.context_tokens} tokens: shorten the prompt or ask for fewer pages",
            )
        pictures = pictures_read(request)
        return Prompt(request=request, ids=ids, pictures=pictures, num_new=num_new, num_positions=len(ids) + num_new)

    def _ids(self, request: StoryRequest, window: Window | None = None) -> list[int]:
        segments = request_segments(request, self.template, window)
        return encode(segments, self.tokenizer, self.voken_ids, picture_tokens=self.config.vision.picture_tokens).ids

    def _encode_story(self, request: StoryRequest) -> Prompt:
        """Where pictures are read back, a page is a request by itself, whose prompt is a window."""
        context, limit = self.config.context_tokens, request.sampling.max_page_tokens
        num_before = len(request.previous)
        story = StoryWindows(
            request.prompt,
            num_before + request.pages + request.num_later,
            config=self.config,
            template=self.template,
            tokenizer=self.tokenizer,
            max_page_tokens=limit,
        )
        given = [story.size(text) for text in request.given]
        new = [*given, *[story.reserve] * (request.pages - len(given))]
        num_at_once = sum(new)
        num_needed = max([story.reserve, *given])
        if request.feedback == "pictures" and story.num_pages > 1:  # room for one earlier page at least
            num_needed += limit + self._num_read_back
        if story.prompt_tokens + num_needed > context:
            raise InvalidRequest(
                "prompt",
                f"prompt takes {story.prompt_tokens} tokens and a page up to {num_needed}, but the context window is "
                f"{context} tokens: shorten the prompt or ask for shorter pages",
            )
        if reads_back(request):
            num_at_once = max(story.reserve, *new)  # one page, read alike whether its text is given or to be written
            window, num_again = self._window_read_back(request, num_at_once), 0
        else:
            sizes = [*(story.size(page.text) for page in request.previous), *new]
            window, num_again = story.of(sizes)[num_before], story.num_read_again(sizes, first=num_before + 1)
            num_at_once = max(num_at_once, story.longest_reading(sizes, first=num_before + 1))
        ids = self._ids(request, window)
        if reads_back(request) and len(ids) + num_at_once > context:  # its turns take more than those of a story
            raise InvalidRequest(
                "prompt",
                f"prompt takes {len(ids)} tokens with the page that is read back, and a new page up to {num_at_once}, "
                f"but the context window is {context} tokens: shorten the prompt or ask for shorter pages",
            )
        return Prompt(
            request=request,
            ids=ids,
            pictures=pictures_read(request, window),
            num_new=sum(new) + num_again,
            num_positions=min(context, len(ids) + num_at_once),
            windows=None if reads_back(request) else story,
        )

    def _window_read_back(self, request: StoryRequest, num_new: int) -> Window:
        """Of a page that follows others with their pictures, and may take so many tokens."""
        texts = [len(text_ids(page.text, self.tokenizer)) for page in request.previous]
        reserve = request.sampling.max_page_tokens + self.config.num_vokens
        prompt_tokens = len(self._ids(request, Window(page=1, pages=(), num_pages=0)))
        return windows(
            [
                num_tokens + (self._num_read_back if page.picture else READ_BACK_TOKENS)
                for num_tokens, page in zip(texts, request.previous, strict=True)
            ],
            [*(max(reserve, num_tokens + self.config.num_vokens) for num_tokens in texts), num_new],
            num_pages=len(texts) + request.pages + request.num_later,
            window_pages=self.config.window_pages,
            room=self.config.context_tokens - prompt_tokens,
        )[-1]

    @property
    def _num_read_back(self) -> int:
        """Tokens of a picture that is read back."""
        return self.config.vision.num_picture_tokens + READ_BACK_TOKENS

    def writer(self, prompt: Prompt, put: Callable[[GeneratorEvent], None]) -> Writer:
        """What writes the request; `put` gets its events."""
        return Writer(
            prompt.request,
            prompt.ids,
            tokenizer=self.tokenizer,
            template=self.template,
            config=self.config,
            engine=self.engine,
            put=put,
            windows=prompt.windows,
        )


def check_request(request: StoryRequest) -> None:
    """Raise InvalidRequest where a request makes no sense to any model."""
    said = [part for part in request.prompt if not isinstance(part, Role)]
    asks_by_text = request.mode == "scene" and bool(request.given)
    if not asks_by_text and not any(isinstance(part, InputImage) or part.strip() for part in said):
        raise InvalidRequest("prompt", "prompt is empty: say what the story or the picture is about")
    for part in said:
        if isinstance(part, str):
            check_text("prompt", part)
    most = MAX_REPLY_PICTURES if request.mode == "reply" else MAX_PAGES
    if not 1 <= request.pages <= most:
        raise InvalidRequest("pages", f"pages is {request.pages} but must be from 1 to {most}")
    if (num_pages := len(request.previous) + request.pages + request.num_later) > MAX_PAGES and request.mode == "story":
        raise InvalidRequest("pages", f"the story would have {num_pages} pages but may have {MAX_PAGES}: ask for fewer")
    if request.pictures != "auto" and request.mode != "reply":
        raise InvalidRequest("pictures", f"pictures is {request.pictures!r} but a {request.mode} has its own: use auto")
    if request.mode == "scene" and (request.pages != 1 or request.previous):
        raise InvalidRequest(
            "pages", f"pages is {request.pages} but a scene is one page: put earlier ones in the prompt"
        )
    if request.given and request.mode not in ("story", "scene"):
        raise InvalidRequest("given", f"given has texts but a {request.mode} has no pages to give: leave it out")
    if len(request.given) > request.pages:
        raise InvalidRequest(
            "given", f"given has {len(request.given)} texts but pages is {request.pages}: ask for as many or more"
        )
    for number, words in enumerate(request.given, start=1):
        if not words.strip():
            raise InvalidRequest("given", f"given text {number} is empty: say what the page says")
        check_text("given", words)
    if not all(request.stop):
        raise InvalidRequest("stop", f"stop is {request.stop} but no stop string may be empty")
    seed: object = request.seed
    if not isinstance(seed, Integral) or int(seed) < 0:
        raise InvalidRequest("seed", f"seed is {seed!r} but must be a whole number from 0")
    for name, (low, high) in SAMPLING_BOUNDS.items():
        value = getattr(request.sampling, name)
        if not isinstance(value, Real) or not low <= float(value) <= high:
            raise InvalidRequest(name, f"{name} is {value!r} but must be a number from {low:g} to {high:g}")


def check_text(field: str, text: str) -> None:
    """Raise InvalidRequest where a text holds what no tokenizer and no file takes. Python reads a byte of a command
    line that is not UTF-8 as half of a surrogate pair, too."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            field, f"{field} {text!r:.80} holds half of a surrogate pair or a byte that is not UTF-8: write it as UTF-8"
        ) from None
