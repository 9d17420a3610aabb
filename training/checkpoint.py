"""Checkpoints of a run: complete or not there, read back with weights_only. The two newest are kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt5.errors import TrainingError


@dataclass
class Position:
    """How far a run is."""

    step: int = 0
    elapsed_s: float = 0.0


def save_checkpoint(folder: Path, position: Position, state: dict[str, Any], average: dict[str, Tensor]) -> Path:
    """Write `checkpoint-<step>`, complete or not at all; the two newest are kept.

    `state` holds what is trained and its optimizer. Raises TrainingError where it cannot be written, a full disk
    included: the earlier checkpoints stay as they are.
    """
    final = folder / f"checkpoint-{position.step:08d}"
    partial = folder / f".partial-{position.step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, content in (("state.pt", {**state, "average": average}), ("position.json", vars(position))):
            with (partial / name).open("wb") as file:
                if name == "state.pt":
                    torch.save(content, file)
                else:
                    file.write(json.dumps(content).encode())
                file.flush()
                os.fsync(file.fileno())  # a rename may reach the disk before what is renamed
        if not final.exists():
            os.replace(partial, final)
    except (OSError, RuntimeError) as failure:  # torch's writer turns a full disk into a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        kept = checkpoints(folder)
        last = f"{kept[-1]} is kept" if kept else "there is no earlier one"
        raise TrainingError(
            f"the checkpoint {final} cannot be written: {failure}; {last}: make room, then resume"
        ) from failure
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    folder: Path, trained: Iterable[str], average: dict[str, Tensor]
) -> tuple[dict[str, Any] | None, Position]:
    """The state and the position of the newest checkpoint of `folder`; None where there is none."""
    found = checkpoints(folder)
    if not found:
        return None, Position()
    state = torch.load(found[-1] / "state.pt", weights_only=True)
    if set(state["trained"]) != set(trained):
        different = sorted(set(state["trained"]) ^ set(trained))[:5]
        raise TrainingError(f"{found[-1]} was written by another model: {different} differ; use another --runs")
    with torch.no_grad():
        for name, value in state["average"].items():
            average[name].copy_(value)
    return state, Position(**json.loads((found[-1] / "position.json").read_text()))


def newest_step(folder: Path) -> int:
    """The step that a run under `folder` would go on from."""
    found = checkpoints(folder)
    return int(found[-1].name.removeprefix("checkpoint-")) if found else 0


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*"))
