"""A folder -> the system that it holds: a MiniGPT-5 model, or a rival whose config.json says `"system": NAME`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minigpt5.codec import from_json
from minigpt5.errors import ModelFolderError
from minigpt5.evaluation.systems.face import System
from minigpt5.model.folder_config import check_folder, load_config
from minigpt5.model.locate import check_bases, locate, shared_name
from minigpt5.types import DrawSettings, Sampling

OURS = "minigpt5.evaluation.systems.ours:MiniGPT5System"
RIVALS: dict[str, str] = {
    "stable-diffusion": "minigpt5.evaluation.systems.stable_diffusion:StableDiffusionSystem",
    "text-only": "minigpt5.evaluation.systems.text_only:TextOnlySystem",
    "minigpt4": "minigpt5.evaluation.systems.text_only:TextOnlySystem",
    "two-stage": "minigpt5.evaluation.systems.two_stage:TwoStageSystem",
    "divter": "minigpt5.evaluation.systems.divter:DivterSystem",
    "gill": "minigpt5.evaluation.systems.gill:GillSystem",
}
"""The `system` of a rival's config.json -> "module:Class". The class has the attribute `kinds` of a System, and
`from_pretrained(folder, *, num_threads, device)`, and `reads_pictures` where it reads none whatever its model does."""


@dataclass(frozen=True, kw_only=True)
class SystemInfo:
    """What is known of a system before its weights are loaded."""

    folder: str
    """By which every machine of a cluster finds it."""
    kind: str | None
    """Which rival it is; None: a model of ours."""
    name: str
    version: str
    """Changes when the weights do: the fingerprint, or a rival's own `version`."""
    kinds: frozenset[str]
    reads_pictures: bool
    sampling: Sampling
    draw: DrawSettings


def read_system(folder: str, draw: Mapping[str, Any] | None = None) -> SystemInfo:
    """Read a system's config and check it. `draw`: fields of DrawSettings that differ from its default.

    A rival's config.json may have `name`, `version`, `reads_pictures` (default true), and `sampling` and `draw` in the
    form that ours has. Raises ModelFolderError, BaseModelNotFound, and InvalidRequest where the model does not draw so.
    """
    local, kind = locate(folder), read_kind(folder)
    changes = dict(draw or {})
    if kind is None:
        config = check_folder(local)
        check_bases(local, config)
        return SystemInfo(
            folder=shared_name(folder),
            kind=kind,
            name=config.name,
            version=config.fingerprint,
            kinds=load_class(kind).kinds,
            reads_pictures=config.vision.family != "none",
            sampling=config.sampling,
            draw=config.draw_settings(changes),
        )
    values = json.loads((local / "config.json").read_bytes())
    try:
        sampling = from_json(Sampling, values.get("sampling", {}))
        chosen = from_json(DrawSettings, {**values.get("draw", {}), **changes})
    except ValueError as error:
        raise ModelFolderError(f"{local}/config.json is damaged ({error}): correct it") from error
    return SystemInfo(
        folder=shared_name(folder),
        kind=kind,
        name=str(values.get("name", kind)),
        version=str(values.get("version", "")),
        kinds=load_class(kind).kinds,
        reads_pictures=values.get("reads_pictures", True) is True and getattr(load_class(kind), "reads_pictures", True),
        sampling=sampling,
        draw=chosen,
    )


def read_kind(folder: str) -> str | None:
    """The name of a rival, or None for a model of ours. Raises ModelFolderError, also for an unknown rival."""
    path = locate(folder) / "config.json"
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        load_config(path.parent)  # says what is wrong
        raise
    kind = values.get("system") if isinstance(values, dict) else None
    if kind is not None and kind not in RIVALS:
        known = ", ".join(sorted(RIVALS)) or "none"
        raise ModelFolderError(f"{path} names the system {kind!r} but the known ones are: {known}")
    return kind


def load_class(kind: str | None) -> Any:
    module, _, name = (RIVALS[kind] if kind else OURS).partition(":")
    return getattr(importlib.import_module(module), name)


def load_system(folder: str, *, num_threads: int | None = None, device: str | None = None) -> System:
    """Load a folder by its path, URI or hub id; `device`: by default a GPU where there is one. Raises as `read_system`
    does."""
    system: System = load_class(read_kind(folder)).from_pretrained(
        locate(folder), num_threads=num_threads, device=device
    )
    return system
