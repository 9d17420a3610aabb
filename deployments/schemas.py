"""The JSON of the HTTP contract: request bodies -> StoryRequest, StoryState -> replies."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from minigpt5 import data_url
from minigpt5.config import ModelConfig
from minigpt5.errors import InvalidRequest
from minigpt5.model.window import FIRST_PAGES
from minigpt5.pictures import ACCEPTED, open_picture
from minigpt5.story.state import PageState, StoryState
from minigpt5.story.voken_file import unpack
from minigpt5.types import (
    MAX_CHARACTERS,
    MAX_GUIDANCE,
    MAX_PAGES,
    MAX_SIDE,
    MAX_STEPS,
    WHOLE_PAGES,
    Character,
    Consistency,
    DrawRequest,
    DrawSettings,
    InputImage,
    PromptPart,
    Sampling,
    StoryRequest,
)

MAX_PROMPT_CHARACTERS = 16_000
MAX_PROMPT_PARTS = 32
MAX_NAME_CHARACTERS = 80
MAX_VOKENS_CHARACTERS = 2**20
"""Eight vokens of a width of 4096 take 171 KiB."""
MAX_SEED = 2**53 - 1  # exact in every JSON reader
_HALF = re.compile("[\ud800-\udfff]")
UNION_TAGS = {"as-string", "as-strings", "as-parts", "as-text", "as-image", "as-object", "as-refusal", "as-unread"}
"""What pydantic puts into an error's path for the members of our unions."""


def shown(value: object, *, max_length: int = 60) -> str:
    """A value as JSON, cut to what fits a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    text = text.encode(errors="replace").decode()
    return text if len(text) <= max_length else f"{text[:max_length]}..."


class Readable(BaseModel):
    """JSON whose texts are texts."""

    @model_validator(mode="before")
    @classmethod
    def has_no_halves(cls, values: Any) -> Any:
        """JSON may hold half of a surrogate pair, as of an emoji that was cut: no file and no tokenizer takes it."""
        left = [values]
        while left:
            match left.pop():
                case dict() as inner:
                    left += [*inner, *inner.values()]
                case list() as inner:
                    left += inner
                case str() as text if not text.isascii() and _HALF.search(text):
                    raise ValueError(f"{shown(text)} has half of a surrogate pair, which is no character")
        return values


class Body(Readable):
    """A request body: an unknown field is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImagePart(Body):
    type: Literal["image"]
    image: str
    """A data URL of a PNG, JPEG, WebP, TIFF or BMP picture."""


Part = Annotated[
    Annotated[TextPart, Tag("as-text")] | Annotated[ImagePart, Tag("as-image")],
    Discriminator(
        lambda part: {"text": "as-text", "image": "as-image"}.get(
            str(part.get("type") if isinstance(part, dict) else getattr(part, "type", ""))
        ),
        custom_error_type="prompt_part",
        custom_error_message='must be {"type": "text", "text": ...} or {"type": "image", "image": data URL}',
    ),
]
Prompt = Annotated[
    Annotated[str, Tag("as-string")]
    | Annotated[list[Part], Field(min_length=1, max_length=MAX_PROMPT_PARTS), Tag("as-parts")],
    Discriminator(lambda prompt: "as-string" if isinstance(prompt, str) else "as-parts"),
]


Scheduler = Literal["ddim", "pndm", "dpm-solver++", "sde-dpm-solver++", "euler", "euler-ancestral", "lcm", "distilled"]
"""Every family's; a request for one that the model does not draw with is refused (ModelConfig.check_draw)."""
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
"""Pixels; the lower bound depends on the model (ModelConfig.side_bounds)."""

Style = Annotated[str, Field(max_length=64)]
"""One of the model's style adapters (ModelConfig.check_style); "": none."""


class CharacterPart(Body):
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
    """As the story's texts say it."""
    image: str
    """A data URL of a PNG, JPEG, WebP, TIFF or BMP picture."""


class CreateStory(Body):
    """POST /v1/stories. What is left out takes the model folder's defaults."""

    prompt: Prompt
    pages: Annotated[
        int,
        Field(
            ge=1,
            le=MAX_PAGES,
            description=f"Of more than {WHOLE_PAGES} pages, the first {FIRST_PAGES} and the last ones are read before "
            "each page.",
        ),
    ] = 4
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stream: bool = False
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=1, le=MAX_GUIDANCE)] | None = None
    scheduler: Scheduler | None = None
    width: Side | None = None
    height: Side | None = None
    style: Style | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_page_tokens: Annotated[int, Field(ge=0, le=512)] | None = None
    max_page_tokens: Annotated[int, Field(ge=1, le=512)] | None = None
    wait: bool = True
    feedback: Annotated[
        Literal["text", "pictures"],
        Field(
            description='"pictures": before each page the model reads the pictures of the pages that it reads, at most '
            f"{WHOLE_PAGES - 1}, and fewer where the context has no room."
        ),
    ] = "text"
    previews: bool = False
    consistency: Consistency | None = None
    characters: Annotated[list[CharacterPart], Field(max_length=MAX_CHARACTERS)] = []

    @field_validator("prompt")
    @classmethod
    def has_content(cls, prompt: Prompt) -> Prompt:
        parts = [prompt] if isinstance(prompt, str) else prompt
        texts = [part if isinstance(part, str) else part.text for part in parts if not isinstance(part, ImagePart)]
        check_prompt_text(texts, has_image=len(texts) < len(parts))
        return prompt


class Redraw(Body):
    """POST /v1/stories/{id}/pages/{n}/redraw. What is left out is as in the picture that is shown, but for the seed,
    which is a new one, and for what does not go together: see ModelConfig.draw_settings."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=1, le=MAX_GUIDANCE)] | None = None
    scheduler: Scheduler | None = None
    width: Side | None = None
    height: Side | None = None
    style: Style | None = None


class CreatePicture(Redraw):
    """POST /v1/pictures: vokens that were fetched, drawn again."""

    vokens: Annotated[str, Field(min_length=1, max_length=MAX_VOKENS_CHARACTERS)]
    """A safetensors file in base64."""


class AddPages(Body):
    """POST /v1/stories/{id}/pages: adds pages to the story."""

    count: Annotated[int, Field(ge=1, le=MAX_PAGES)] = 1
    stream: bool = False
    wait: bool = True


class ChangePage(Body):
    """PATCH /v1/stories/{id}/pages/{n}: either another text, which gets a new picture, or another one of the pictures
    that were drawn."""

    text: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)] | None = None
    variant: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def asks_for_one_thing(self) -> ChangePage:
        if (self.text is None) == (self.variant is None):
            raise ValueError("send either text or variant")
        if self.text is not None and not self.text.strip():
            raise ValueError(f"text is empty ({shown(self.text)}): say what the page says")
        return self


def check_prompt_text(texts: Sequence[str], *, has_image: bool = False) -> None:
    """Raises ValueError."""
    length = sum(map(len, texts))
    if length > MAX_PROMPT_CHARACTERS:
        raise ValueError(
            f"prompt has {length} characters ({shown(texts[0])}) but must have at most {MAX_PROMPT_CHARACTERS}"
        )
    if not has_image and not any(text.strip() for text in texts):
        raise ValueError(
            f"prompt is empty ({shown(texts[0])}) but must have from 1 to {MAX_PROMPT_CHARACTERS} characters"
        )


def to_story_request(body: CreateStory, config: ModelConfig, *, client: str = "") -> StoryRequest:
    """Fill in the defaults and decode the pictures, which may take a moment. Raises InvalidRequest."""
    return StoryRequest(
        prompt=_read_prompt(body.prompt),
        pages=body.pages,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        sampling=dataclasses.replace(config.sampling, **_sent(body, Sampling)),
        draw=config.draw_settings(_sent(body, DrawSettings)),
        feedback=body.feedback,
        previews=body.previews,
        consistency=config.consistency_of(body.consistency),
        characters=_read_characters(body.characters, config),
        key=client,
    )


def to_draw_request(body: CreatePicture, config: ModelConfig, *, client: str) -> DrawRequest:
    """Raises InvalidRequest."""
    try:
        data = data_url.decode_base64(body.vokens.encode())
    except ValueError as error:
        raise InvalidRequest("vokens", f"vokens is {shown(body.vokens)}, which cannot be read: {error}") from error
    return DrawRequest(
        vokens=unpack(data, page=1),
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        settings=config.draw_settings(_sent(body, DrawSettings)),
        key=client,
    )


def redrawn(body: Redraw, like: DrawSettings, config: ModelConfig) -> tuple[int, DrawSettings]:
    """The seed and the settings of another picture, `like` those of before. Raises InvalidRequest."""
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    return seed, config.draw_settings(_sent(body, DrawSettings), like=like)


def _sent(body: CreateStory | Redraw, settings: type[Sampling] | type[DrawSettings]) -> dict[str, Any]:
    """The fields of `settings` that the body sets."""
    values = {field.name: getattr(body, field.name, None) for field in dataclasses.fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def _read_prompt(prompt: Prompt) -> tuple[PromptPart, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    return tuple(
        part.text if isinstance(part, TextPart) else decode_data_url(part.image, field=f"prompt[{index}].image")
        for index, part in enumerate(prompt)
    )


def _read_characters(parts: Sequence[CharacterPart], config: ModelConfig) -> tuple[Character, ...]:
    if parts:
        config.check_characters()
    return tuple(
        Character(name=part.name, image=decode_data_url(part.image, field=f"characters[{index}].image"))
        for index, part in enumerate(parts)
    )


def decode_data_url(url: str, *, field: str) -> InputImage:
    """A data URL -> a picture that is known to decode. Nothing is ever fetched. Raises InvalidRequest, BadPicture."""
    if not data_url.is_data_url(url):
        raise InvalidRequest(
            field, f"{field} is {shown(url)} but must be a data URL (data:image/png;base64,...) of a {ACCEPTED} picture"
        )
    try:
        data = data_url.decode(url)
    except ValueError as error:
        raise InvalidRequest(field, f"{field} is {shown(url)}, which cannot be read: {error}") from error
    open_picture(data, name=field)
    return InputImage(data=data)


class ImageReply(BaseModel):
    url: str
    width: int
    height: int
    seed: int
    resampled: bool | None = None
    """True where the model drew the picture in its own size, which was then resampled; else left out."""
    fingerprint: str | None = None
    """Of the model folder that drew it; left out where it is not known."""


class VariantReply(BaseModel):
    url: str
    seed: int
    steps: int
    guidance_scale: float
    scheduler: str
    width: int
    height: int
    style: str | None = None
    """Left out where the picture has none."""
    fingerprint: str | None = None


class PageReply(BaseModel):
    index: int
    text: str
    image: ImageReply | None = None
    error: str | None = None
    variants: list[VariantReply] | None = None
    """All pictures of the page; `variant` is the one that `image` is."""
    variant: int | None = None
    fingerprint: str | None = None
    """Of the model folder that wrote the text; left out where it is not known, or the text was edited."""
    engine: str | None = None
    """Name and version of the engine that wrote the text; left out as `fingerprint` is."""


class UsageReply(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    images: int
    denoise_steps: int


class StoryReply(BaseModel):
    """A story as far as it is."""

    id: str
    object: Literal["story"] = "story"
    created: int
    model: str
    prompt: str
    seed: int
    status: Literal["drawing", "done", "failed", "cancelled"]
    error: str | None = None
    pages: list[PageReply]
    usage: UsageReply


def picture_url(story_id: str, page: int) -> str:
    return f"/v1/stories/{story_id}/pages/{page}.png"


def page_reply(story_id: str, page: PageState) -> PageReply:
    reply = PageReply(
        index=page.index,
        text=page.text,
        error=page.error,
        fingerprint=page.fingerprint or None,
        engine=page.engine or None,
    )
    if page.image:
        url = picture_url(story_id, page.index)
        image = ImageReply(
            url=url,
            width=page.image.width,
            height=page.image.height,
            seed=page.image.seed,
            resampled=page.image.is_resampled or None,
            fingerprint=page.image.fingerprint or None,
        )
        variants = [
            VariantReply(
                url=f"{url}?variant={k}",
                seed=variant.seed,
                steps=variant.draw.steps,
                guidance_scale=variant.draw.guidance_scale,
                scheduler=variant.draw.scheduler,
                width=variant.width,
                height=variant.height,
                style=variant.draw.style or None,
                fingerprint=variant.fingerprint or None,
            )
            for k, variant in enumerate(page.variants or (page.image,))
        ]
        reply.image, reply.variants, reply.variant = image, variants, page.variant
    return reply


def story_reply(state: StoryState) -> StoryReply:
    return StoryReply(
        id=state.id,
        created=state.created,
        model=state.model,
        prompt=state.prompt,
        seed=state.seed,
        status=state.status,
        error=state.error,
        pages=[page_reply(state.id, page) for page in state.pages],
        usage=UsageReply(
            prompt_tokens=state.usage.prompt_tokens,
            completion_tokens=state.usage.completion_tokens,
            images=state.num_images,
            denoise_steps=state.num_denoise_steps,
        ),
    )


class StoryList(BaseModel):
    """Newest first; `after` the last id there are more where `has_more` says so."""

    object: Literal["list"] = "list"
    data: list[StoryReply]
    has_more: bool


class ShareStory(Body):
    """POST /v1/stories/{id}/share."""

    expires_s: Annotated[int, Field(ge=1, le=30 * 24 * 3600)] = 24 * 3600


class ShareReply(BaseModel):
    html: str
    epub: str
    pdf: str
    expires: int
    """Seconds since 1970."""


class Login(Body):
    """POST /login."""

    key: Annotated[str, Field(min_length=1, max_length=200)]


class Defaults(BaseModel):
    """Defaults of a story's optional fields."""

    pages: int
    steps: int
    guidance_scale: float
    scheduler: str
    style: str
    consistency: Consistency
    """"off" where the model's denoiser has no self-attention that pictures could share."""
    temperature: float
    top_p: float
    min_page_tokens: int
    max_page_tokens: int


class ExampleReply(BaseModel):
    """A prompt to try."""

    prompt: str
    picture: str | None
    """Path of a small WebP picture, where the model's folder has one."""


class ModelReply(BaseModel):
    """A model in OpenAI's format, with fields of our own."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "minigpt5"
    about: str
    """What it is for, as its folder says: a line of summary, then the details. Empty where the folder says nothing."""
    examples: list[ExampleReply]
    fingerprint: str
    image_size: str
    context_tokens: int
    max_pages: int = MAX_PAGES
    max_pixels: int
    """Largest picture that is drawn at the width and height of a request; 0: none is, and it is resampled."""
    size_multiple: int
    """Such a width or height is a multiple of this many pixels."""
    schedulers: list[str]
    """What pictures can be drawn with."""
    styles: list[str]
    """Style adapters that a picture may be drawn in."""
    max_characters: int
    """Characters that a story may be given pictures of; 0: the model's folder has no IP-Adapter."""
    defaults: Defaults


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelReply]


class StatusReply(BaseModel):
    status: str
