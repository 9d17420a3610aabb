"""Checkpoints of a run: complete or not there, read back with weights_only. The two newest are kept."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minigpt5.errors import TrainingError


@dataclass
class Position:
    """How far a run is."""

    step: int = 0
    elapsed_s: float = 0.0


def save_checkpoint(
    folder: Path,
    position: Position,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> Path:
    """Write `checkpoint-<step>`, complete or not at all; the two newest are kept."""
    final = folder / f"checkpoint-{position.step:08d}"
    partial = folder / f".partial-{position.step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    state = {
        "trained": {name: p.detach() for name, p in trained.items()},
        "optimizer": optimizer.state_dict(),
        "average": average,
    }
    torch.save(state, partial / "state.pt")
    (partial / "position.json").write_text(json.dumps(vars(position)))
    if not final.exists():
        os.replace(partial, final)
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)
    return final


def resume(
    folder: Path,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> Position:
    """Load the newest checkpoint of `folder`, if there is one."""
    found = checkpoints(folder)
    if not found:
        return Position()
    state = torch.load(found[-1] / "state.pt", weights_only=True)
    if set(state["trained"]) != set(trained):
        different = sorted(set(state["trained"]) ^ set(trained))[:5]
        raise TrainingError(f"{found[-1]} was written by another model: {different} differ; use another --run")
    with torch.no_grad():
        for name, value in state["trained"].items():
            trained[name].copy_(value)
        for name, value in state["average"].items():
            average[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return Position(**json.loads((found[-1] / "position.json").read_text()))


def newest_step(folder: Path) -> int:
    """The step that a run under `folder` would go on from."""
    found = checkpoints(folder)
    return int(found[-1].name.removeprefix("checkpoint-")) if found else 0


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*"))
