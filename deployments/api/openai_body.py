"""What the bodies of OpenAI's routes share: a field is honoured, ignored by name, or refused.

Clients and gateways send fields of OpenAI's schema and of other servers. The reply's `x_ignored` names what was
ignored. A field is refused where ignoring it would mislead; so is one that no list here has, since it may be a
misspelling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.api.errors import ApiError
from deployments.schemas import MAX_SEED, Body, shown
from minigpt5.config import ModelConfig
from minigpt5.errors import InvalidRequest
from minigpt5.types import MAX_STEPS, DrawSettings

IGNORED = "ignored"
"""Mark of a field that is accepted and does nothing."""
Ignored = Annotated[Any, IGNORED, Field(description="Ignored, and named in the reply's `x_ignored`.")]


class OpenAIBody(Body):
    """Fields of both routes. An unknown field that is null asks for nothing, and is left out."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"additionalProperties": {"type": "null"}})

    model: str | None = None
    extra_body: dict[str, Any] | None = None
    """Its fields are taken for the body's own, as OpenAI's Python client sends them."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Another name of `steps`."""
    guidance_scale: Annotated[float, Field(ge=0, le=20)] | None = None
    """Up to 1: no guidance."""
    metadata: Ignored = None
    moderation: Ignored = None
    negative_prompt: Ignored = None
    safety_identifier: Ignored = None
    user: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def open_extra_body(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if isinstance(extra := data.get("extra_body"), dict):
            if "extra_body" in extra:
                raise ValueError("extra_body holds another extra_body: send its fields beside the others")
            data = {name: value for name, value in data.items() if name != "extra_body"} | extra
        return {name: value for name, value in data.items() if value is not None or name in cls.model_fields}

    def draw_settings(self, config: ModelConfig, **others: int | str) -> DrawSettings:
        """How pictures are drawn: as asked, else as the model folder says. `others`: further fields of DrawSettings.
        Raises InvalidRequest."""
        if None not in (self.steps, self.num_inference_steps) and self.steps != self.num_inference_steps:
            message = f"num_inference_steps is {self.num_inference_steps} but steps is {self.steps}: send one of them"
            raise InvalidRequest("num_inference_steps", message)
        sent: dict[str, Any] = {**others}
        if steps := self.steps or self.num_inference_steps:
            sent["steps"] = steps
        if self.guidance_scale is not None:
            sent["guidance_scale"] = max(1.0, self.guidance_scale)
        return config.draw_settings(sent)


def ignored_fields(body: BaseModel) -> list[str]:
    """The names of fields that the body has and that nothing reads, those of an object in it with a dot."""
    found = []
    for name, field in type(body).model_fields.items():
        value = getattr(body, name)
        if IGNORED in field.metadata and value is not None:
            found.append(name)
        elif isinstance(value, BaseModel):
            found += [f"{name}.{inner}" for inner in ignored_fields(value)]
    return sorted(found)


def note(ignored: list[str]) -> dict[str, list[str]]:
    """The reply's field of what was ignored, where there is any."""
    return {"x_ignored": ignored} if ignored else {}


def refuse_unserved(body: BaseModel, served: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse a field whose value is none of the `served` ones. Raises ApiError."""
    for name, values in served.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            choice = " or ".join(["leave it out", *([f"send {' or '.join(map(shown, values))}"] if values else [])])
            message = f"{name} is {shown(value)}, which is not served here: {choice}"
            raise ApiError(400, message, param=name, code="unsupported_value")


def check_model(asked: str | None, model: str) -> None:
    """Raises ApiError where another model than the one that is served is asked for."""
    if asked not in (None, model):
        message = f"model {shown(asked)} does not exist here; the model is {model}"
        raise ApiError(404, message, param="model", code="model_not_found")
