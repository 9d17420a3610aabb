"""What a dataclass says of its JSON is what is read, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from minigpt5.codec import from_json, to_json
from minigpt5.config import ModelConfig, minigpt5_7b, storybook
from minigpt5.types import InputImage, Role, StoryRequest


@dataclass(frozen=True, kw_only=True)
class Inner:
    number: int = 3
    ratio: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    data: bytes = field(default=b"", metadata={"json": "base64"})
    is_on: bool = False


FULL = Outer(name="x", kind="b", inner=Inner(ratio=2), many=(Inner(), Inner(number=4)), data=b"\x00\xff", is_on=True)


@pytest.mark.parametrize("value", [Outer(name="x"), FULL, storybook(), minigpt5_7b()])
def test_a_value_survives_json(value: object) -> None:
    assert from_json(type(value), json.loads(json.dumps(to_json(value)))) == value


def test_a_request_survives_json_with_its_pictures_as_they_were_always_stored() -> None:
    prompt = (Role(name="system"), "Rhyme.", Role(name="user"), "A fox", InputImage(data=b"png"))
    request = StoryRequest(prompt=prompt, stop=("END",), given=("One.",))
    values = json.loads(json.dumps(to_json(request)))
    assert values["prompt"] == [{"role": "system"}, "Rhyme.", {"role": "user"}, "A fox", {"image": "cG5n"}]
    assert from_json(StoryRequest, values) == request


def test_what_may_be_left_out_takes_its_default() -> None:
    assert from_json(Outer, {"name": "x"}) == Outer(name="x")
    assert from_json(Outer, {"name": "x", "inner": {}}).inner == Inner()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "key 'name' is missing"),
        ({"name": "x", "nam": 1}, "unknown key 'nam': it must be one of base64, inner, is_on, kind, many, name"),
        ({"name": 3}, "name is '3' but must be str"),
        ({"name": "x", "kind": "c"}, "kind is 'c' but must be 'a' or 'b'"),
        ({"name": "x", "inner": {"number": "3"}}, "inner.number is '3' but must be int"),
        ({"name": "x", "inner": {"number": True}}, "inner.number is 'True' but must be int"),
        ({"name": "x", "inner": {"numbr": 1}}, "unknown key 'numbr' of inner"),
        ({"name": "x", "many": [{}, {"ratio": "1"}]}, "many[1].ratio is '1' but must be float"),
        ({"name": "x", "many": {}}, "many is '{}' but must be"),
        ({"name": "x", "is_on": 1}, "is_on is '1' but must be bool"),
        ({"name": "x", "base64": "?"}, "base64 is no base64"),
        ([], "the value is '[]' but must be Outer"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(values: object, complaint: str) -> None:
    with pytest.raises(ValueError) as refusal:
        from_json(Outer, values)
    assert complaint in str(refusal.value)


def test_what_no_field_can_be_is_not_stored() -> None:
    with pytest.raises(TypeError, match="a set cannot be stored"):
        to_json(dataclasses.replace(Outer(name="x"), name={1}))  # type: ignore[arg-type]


def test_a_config_says_which_key_is_wrong() -> None:
    values = to_json(storybook())
    values["vision"]["image_px"] = "224"
    with pytest.raises(ValueError, match="vision.image_px is '224' but must be int"):
        from_json(ModelConfig, values)
