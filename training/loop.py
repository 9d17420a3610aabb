"""The training loop, the same for every stage: batches in, checkpoints, a log and sample sheets out.

A step is a pure function of the weights, the preset and the step's number, so that a resumed run goes on as the
uninterrupted one would have. A checkpoint is a folder that is renamed into place when it is complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from minigpt5.errors import TrainingError
from training.presets import Preset

Batch = dict[str, object]
Report = Callable[[dict[str, float], Path | None], None]


class Stage(Protocol):
    """One stage of training: what is trained, on which loss, and what comes out."""

    objective: nn.Module
    """batch, progress (0 to 1) -> losses by name; "loss" is the one that is minimised."""

    def parameter_groups(self) -> list[dict[str, object]]: ...
    def draw_sheet(self, path: Path) -> None: ...
    def save(self, folder: Path) -> None: ...


@dataclass
class Position:
    """How far a run is."""

    step: int = 0
    elapsed_s: float = 0.0


def fit(
    stage: Stage,
    preset: Preset,
    folder: Path,
    batches: Callable[[int], Iterator[Batch]],
    *,
    report: Report = lambda metrics, checkpoint: None,
) -> None:
    """Train `stage` to the end of `preset`, resuming from the newest checkpoint under `folder`.

    `batches(step)` yields the batches from that step on. Raises TrainingError where the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p for name, p in stage.objective.named_parameters() if p.requires_grad}
    groups = [{**group, "initial_lr": group["lr"]} for group in stage.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=preset.weight_decay)
    average = {name: p.detach().clone() for name, p in trained.items()} if preset.ema else {}
    position = resume(folder, trained, optimizer, average)
    next_sheet_s = position.elapsed_s + preset.sheet_every_s
    next_save_s = position.elapsed_s + preset.checkpoint_every_s
    sums: dict[str, float] = {}
    count, started, clock = 0, position.elapsed_s, time.monotonic()

    stream = batches(position.step)
    while (progress := progress_of(preset, position)) < 1:
        batch = next(stream)
        torch.manual_seed((preset.seed << 32) + position.step)
        rate = learning_rate_factor(position.step, progress, preset)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        losses: dict[str, Tensor] = stage.objective(batch, progress)
        if not math.isfinite(losses["loss"].item()):
            raise TrainingError(
                f"the loss is {losses['loss'].item()} at step {position.step}, rows {batch.get('row_ids')}: "
                "lower the learning rate or look at these rows; the last checkpoint is kept"
            )
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(trained.values(), preset.clip_norm)
        optimizer.step()
        position = Position(position.step + 1, started + time.monotonic() - clock)
        for name, value in average.items():
            decay = min(preset.ema, (1 + position.step) / (10 + position.step))
            value.lerp_(trained[name].detach(), 1 - decay)

        count += 1
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.item()
        saved = None
        if position.elapsed_s >= next_save_s:
            saved = save_checkpoint(folder, position, trained, optimizer, average)
            next_save_s = position.elapsed_s + preset.checkpoint_every_s
        if position.step % preset.log_every == 0 or saved:
            metrics = {name: total / count for name, total in sums.items()}
            metrics |= {"step": position.step, "elapsed_s": round(position.elapsed_s, 1), "lr_factor": rate}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(metrics) + "\n")
            report(metrics, saved)
            sums, count = {}, 0
        if position.elapsed_s >= next_sheet_s:
            with averaged(trained, average):
                stage.draw_sheet(folder / f"sheet-{position.step:06d}.png")
            next_sheet_s = position.elapsed_s + preset.sheet_every_s

    saved = save_checkpoint(folder, position, trained, optimizer, average)
    with averaged(trained, average):
        stage.draw_sheet(folder / "sheet.png")
        stage.save(folder / "model")
    report({"step": position.step, "elapsed_s": position.elapsed_s}, saved)


def progress_of(preset: Preset, position: Position) -> float:
    """0 at the start, 1 at the end: by steps, or by minutes where the preset bounds them."""
    by_time = position.elapsed_s / (60 * preset.minutes) if preset.minutes else 0.0
    return max(position.step / preset.steps, by_time)


def learning_rate_factor(step: int, progress: float, preset: Preset) -> float:
    """Linear warm-up, then a half cosine down to a hundredth."""
    warm = min(1.0, (step + 1) / preset.warmup_steps)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class averaged:
    """Within this context the trained parameters hold their running average, where there is one."""

    def __init__(self, trained: dict[str, nn.Parameter], average: dict[str, Tensor]) -> None:
        self.trained, self.average = trained, average

    def _swap(self) -> None:
        with torch.no_grad():
            for name, value in self.average.items():
                current = self.trained[name].detach().clone()
                self.trained[name].copy_(value)
                value.copy_(current)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()


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


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*"))
