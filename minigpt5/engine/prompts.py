"""What every engine does with a request before it writes: checks, the prompt's token ids, and its script's writer.

No torch here: an engine may run in an environment with another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minigpt5.config import ModelConfig
from minigpt5.engine.script import Writer
from minigpt5.errors import InvalidRequest
from minigpt5.model.prompt import VokenIds, encode, given_ids, pictures_read, request_segments
from minigpt5.model.template import make_template
from minigpt5.types import MAX_PAGES, GeneratorEvent, InputImage, Role, StoryRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ_BACK_TOKENS = 16
"""Around a picture that is read back, and of what is asked after it."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request as it is written."""

    request: StoryRequest
    ids: list[int]
    """What the model reads first."""
    num_new: int
    """Tokens that may come after it."""


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
        """Check and tokenize a request. A reply may ask for more text than the window holds: it gets what is left.

        Raises InvalidRequest where it cannot be written.
        """
        check_request(request)
        reads_back = request.mode == "story" and request.feedback == "pictures"
        if self.config.vision.family == "none" and (reads_back or pictures_read(request)):
            raise InvalidRequest("prompt", "this model reads no pictures: leave them out of the prompt")
        ids = encode(
            request_segments(request, self.template),
            self.tokenizer,
            self.voken_ids,
            picture_tokens=self.config.vision.picture_tokens,
        ).ids
        if request.mode == "reply":
            room = max(1, self.config.context_tokens - len(ids) - request.pages * self.config.num_vokens)
            sampling = request.sampling
            sampling = dataclasses.replace(sampling, max_page_tokens=min(sampling.max_page_tokens, room))
            request = dataclasses.replace(request, sampling=sampling)
        limit = request.sampling.max_page_tokens
        num_given = sum(map(len, given_ids(request, self.template, self.tokenizer)))
        num_ungiven = request.pages - len(request.given)
        num_written = {"story": num_ungiven, "scene": num_ungiven, "reply": 1, "caption": 0}[request.mode]
        num_text = num_given + num_written * limit
        num_new = num_text + request.pages * self.config.num_vokens
        if request.feedback == "pictures":  # the last page reads all the others' pictures
            num_new += (request.pages + request.num_later - 1) * (
                self.config.vision.num_picture_tokens + READ_BACK_TOKENS
            )
            num_new += request.num_later * limit
        if len(ids) + num_new > self.config.context_tokens:
            raise InvalidRequest(
                "prompt",
                f"prompt takes {len(ids)} tokens and {request.pages} pages up to {num_new}, but the context window is "
                f"{self.config.context_tokens} tokens: shorten the prompt or ask for fewer pages",
            )
        return Prompt(request=request, ids=ids, num_new=num_new)

    def writer(self, prompt: Prompt, put: Callable[[GeneratorEvent], None]) -> Writer:
        """What writes the request; `put` gets its events."""
        return Writer(
            prompt.request,
            prompt.ids,
            tokenizer=self.tokenizer,
            template=self.template,
            num_vokens=self.config.num_vokens,
            fingerprint=self.config.fingerprint,
            engine=self.engine,
            put=put,
            published_quirks=self.config.published_quirks,
        )


def check_request(request: StoryRequest) -> None:
    """Raise InvalidRequest where a request makes no sense to any model."""
    said = [part for part in request.prompt if not isinstance(part, Role)]
    asks_by_text = request.mode == "scene" and bool(request.given)
    if not asks_by_text and not any(isinstance(part, InputImage) or part.strip() for part in said):
        raise InvalidRequest("prompt", "prompt is empty: say what the story or the picture is about")
    if not 1 <= request.pages <= MAX_PAGES:
        raise InvalidRequest("pages", f"pages is {request.pages} but must be from 1 to {MAX_PAGES}")
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
    if not all(request.stop):
        raise InvalidRequest("stop", f"stop is {request.stop} but no stop string may be empty")
