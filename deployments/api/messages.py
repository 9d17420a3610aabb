"""A history of messages in OpenAI's shape -> the prompt of one reply.

What has text is read as text: tool calls as `name(arguments)`, a tool's result as something that the user says. Fields
and parts without a text or a picture are passed over.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Discriminator, Tag

from deployments.schemas import MAX_PROMPT_PARTS, Readable, check_prompt_text, decode_data_url
from minigpt5.errors import InvalidRequest
from minigpt5.types import InputImage, PromptPart, Role

MAX_MESSAGES = 2048
Side = Literal["system", "user", "assistant"]
MAX_NAMED = 32
"""Parts that were passed over and that a reply names; it counts the others."""
TextType = Literal["text", "input_text", "output_text"]
PictureType = Literal["image_url", "input_image"]
UnreadType = Literal["audio", "file", "input_audio", "input_file", "reasoning", "redacted_thinking", "thinking"]
"""Parts without a text for the model and without a picture."""


class Lenient(Readable):
    """An object of a history: it may have come from any model, so that unknown fields are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True)


class ImageUrl(Lenient):
    url: str


class TextPart(Lenient):
    type: TextType
    text: str


class RefusalPart(Lenient):
    type: Literal["refusal"]
    refusal: str


class PicturePart(Lenient):
    type: PictureType
    image_url: Annotated[
        Annotated[str, Tag("as-string")] | Annotated[ImageUrl, Tag("as-object")],
        Discriminator(lambda url: "as-string" if isinstance(url, str) else "as-object"),
    ]
    """A data URL, or an object that has it."""


class UnreadPart(Lenient):
    type: UnreadType


_TAGS = {
    "refusal": "as-refusal",
    **dict.fromkeys(get_args(TextType), "as-text"),
    **dict.fromkeys(get_args(PictureType), "as-image"),
    **dict.fromkeys(get_args(UnreadType), "as-unread"),
}
Part = Annotated[
    Annotated[TextPart, Tag("as-text")]
    | Annotated[RefusalPart, Tag("as-refusal")]
    | Annotated[PicturePart, Tag("as-image")]
    | Annotated[UnreadPart, Tag("as-unread")],
    Discriminator(
        lambda part: _TAGS.get(str(part.get("type") if isinstance(part, dict) else getattr(part, "type", ""))),
        custom_error_type="message_part",
        custom_error_message='must be {"type": "text", "text": ...} or {"type": "image_url", "image_url": data URL}',
    ),
]


class Called(Lenient):
    name: str | None = None
    arguments: Any = None
    input: Any = None


class ToolCall(Lenient):
    function: Called | None = None
    custom: Called | None = None


class Message(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: (
        Annotated[
            Annotated[str, Tag("as-string")] | Annotated[list[Part], Tag("as-parts")],
            Discriminator(lambda content: "as-string" if isinstance(content, str) else "as-parts"),
        ]
        | None
    ) = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Called | None = None
    images: list[PicturePart] | None = None
    """Pictures of an answer, as this server gave them."""


def read_messages(messages: list[Message]) -> tuple[tuple[PromptPart, ...], list[str]]:
    """The prompt of all turns, and the places of parts that were passed over.

    A role stands where the side changes: neighbours on one side make one turn. Only the first messages can be the
    system's; what a system or developer says later, the user says. Raises InvalidRequest.
    """
    _check_num_pictures(messages)
    parts: list[PromptPart] = []
    unread: list[str] = []
    texts: list[str] = []
    side: Side = "user"
    for index, message in enumerate(messages):
        read = _read_message(message, f"messages[{index}]", unread)
        own = _side(message, is_start=not parts or side == "system")
        if read and own != side:
            side = own
            parts.append(Role(name=side))
        parts += read
        texts += [part for part in read if isinstance(part, str)]
    try:
        check_prompt_text(texts or [""], has_image=any(isinstance(part, InputImage) for part in parts))
    except ValueError as error:
        raise InvalidRequest("messages", str(error)) from error
    if num_more := max(0, len(unread) - MAX_NAMED):
        unread = [*unread[:MAX_NAMED], f"messages: {num_more} more parts"]
    return tuple(parts), unread


def _side(message: Message, *, is_start: bool) -> Side:
    if message.role == "assistant":
        return "assistant"
    return "system" if is_start and message.role in ("system", "developer") else "user"


def _check_num_pictures(messages: list[Message]) -> None:
    """Raises InvalidRequest, before any picture is decoded."""
    num_pictures = sum(
        len(message.images or []) + sum(isinstance(part, PicturePart) for part in _parts(message))
        for message in messages
    )
    if num_pictures > MAX_PROMPT_PARTS:
        message = f"messages hold {num_pictures} pictures but must hold at most {MAX_PROMPT_PARTS}: leave some out"
        raise InvalidRequest("messages", message)


def _parts(message: Message) -> list[TextPart | RefusalPart | PicturePart | UnreadPart]:
    return message.content if isinstance(message.content, list) else []


def _read_message(message: Message, field: str, unread: list[str]) -> list[PromptPart]:
    """What the model reads of a message: pictures, and texts that are not blank. Raises InvalidRequest."""
    read: list[PromptPart] = [message.content] if isinstance(message.content, str) else []
    for number, part in enumerate(_parts(message)):
        where = f"{field}.content[{number}]"
        match part:
            case TextPart():
                read.append(part.text)
            case RefusalPart():
                read.append(part.refusal)
            case PicturePart():
                read.append(_read_picture(part, where))
            case UnreadPart():
                unread.append(where)
    read.append(message.refusal or "")
    called = [call.function or call.custom for call in message.tool_calls or []]
    read += [_write_call(one) for one in [*called, message.function_call] if one]
    read += [_read_picture(part, f"{field}.images[{number}]") for number, part in enumerate(message.images or [])]
    return [part for part in read if not isinstance(part, str) or part.strip()]


def _read_picture(part: PicturePart, where: str) -> PromptPart:
    if isinstance(part.image_url, str):
        return decode_data_url(part.image_url, field=f"{where}.image_url")
    return decode_data_url(part.image_url.url, field=f"{where}.image_url.url")


def _write_call(called: Called) -> str:
    arguments = called.input if called.arguments is None else called.arguments
    if not isinstance(arguments, str):
        arguments = "" if arguments is None else json.dumps(arguments, ensure_ascii=False)
    return f"{called.name or ''}({arguments})"
