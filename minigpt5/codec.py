"""Dataclasses <-> JSON values: how model configs and stories are stored.

The dataclass says everything: its types are checked when a value is read, unknown and missing keys are errors, a field
with a default may be missing. Tuples are lists in JSON, bytes are base64. `field(metadata={"json": NAME})` stores a
field under another key.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A dataclass, or what its fields may hold, as JSON values. Raises TypeError for any other type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_key(field): to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be stored as JSON")


def from_json(kind: type[T], value: Any) -> T:
    """The inverse of `to_json`. Raises ValueError, which names the key and what it must be."""
    return _read(kind, value, "")


def _read(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _read_dataclass(kind, value, path)
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and value in options:
        return value
    if origin in (typing.Union, types.UnionType):
        fitting = [option for option in options if _fits(option, value)]
        for option in sorted(fitting, key=lambda option: not _has_keys(option, value)):
            return _read(option, value, path)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(options[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if kind is bytes and isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error:
            raise ValueError(f"{path} is no base64") from None
    if isinstance(kind, type) and type(value) is kind:
        return value
    name = " or ".join(map(repr, options)) if origin is Literal else getattr(kind, "__name__", kind)
    raise ValueError(f"{path or 'the value'} is {str(value)[:80]!r} but must be {name}")


def _read_dataclass(kind: Any, values: Mapping[str, Any], path: str) -> Any:
    fields = {_key(field): (field, hint) for field, hint in _fields(kind)}
    where = f" of {path}" if path else ""
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"unknown key {unknown[0]!r}{where}: it must be one of {', '.join(sorted(fields))}")
    found = {
        field.name: _read(hint, values[key], f"{path}.{key}".lstrip("."))
        for key, (field, hint) in fields.items()
        if key in values
    }
    try:
        return kind(**found)
    except TypeError:
        missing = [key for key, (field, _) in fields.items() if _is_required(field) and key not in values]
        raise ValueError(f"key {missing[0]!r}{where} is missing") from None


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value may be of one option of a union."""
    if kind is type(None):
        return value is None
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping)
    return value is not None and not isinstance(value, Mapping)


def _has_keys(kind: Any, value: Any) -> bool:
    """Whether all keys of a value are those of one option of a union: there may be two dataclasses."""
    return not (isinstance(kind, type) and dataclasses.is_dataclass(kind)) or value.keys() <= {
        _key(field) for field, _ in _fields(kind)
    }


@cache
def _fields(kind: Any) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    hints = typing.get_type_hints(kind)
    return tuple((field, hints[field.name]) for field in dataclasses.fields(kind))


def _key(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("json", field.name)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
