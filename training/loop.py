"""The training loop, the same for every stage: batches in, checkpoints, a log and sample sheets out.

A step is a pure function of the weights, the preset and the step's number, so that a resumed run goes on as the
uninterrupted one would have. A checkpoint is a folder that is renamed into place when it is complete.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from minigpt5.errors import TrainingError
from training.checkpoint import Position, load_checkpoint, save_checkpoint
from training.presets import Preset

Batch = dict[str, object]
Report = Callable[[dict[str, float]], None]


class Stage(Protocol):
    """One stage of training: what is trained, on which loss, and what comes out."""

    @property
    def objective(self) -> nn.Module:
        """batch, progress (0 to 1) -> losses by name; "loss" is the one that is minimised."""

    def parameter_groups(self) -> list[dict[str, object]]: ...
    def draw_sheet(self, path: Path) -> None: ...
    def save(self, folder: Path) -> None: ...


class Updater(Protocol):
    """What turns losses into steps: Plain here, or training.zero.Zero."""

    trained: dict[str, nn.Parameter]

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]: ...
    def update(self, loss: Tensor, factor: float) -> None:
        """One step, the learning rates multiplied by `factor`."""

    def state(self) -> dict[str, Any]:
        """ "trained" values by name and torch's "optimizer" state. Called by every worker."""

    def load(self, state: dict[str, Any]) -> None: ...


class Plain:
    """Torch's own optimizer; every worker holds everything."""

    def __init__(self, objective: nn.Module, groups: list[dict[str, Any]], preset: Preset) -> None:
        self.objective, self.clip_norm = objective, preset.clip_norm
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        groups = [{**group, "initial_lr": group["lr"]} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=preset.weight_decay)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return self.objective(batch, progress)

    def update(self, loss: Tensor, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_over_workers(self.trained)
        nn.utils.clip_grad_norm_(self.trained.values(), self.clip_norm)
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        trained = {name: p.detach() for name, p in self.trained.items()}
        return {"trained": trained, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        for name, value in state["trained"].items():
            self.trained[name].copy_(value)
        initial = [group["initial_lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, initial, strict=True):
            group["initial_lr"] = rate


def new_updater(objective: nn.Module, groups: list[dict[str, Any]], preset: Preset) -> Updater:
    if preset.zero_stage < 0:
        return Plain(objective, groups, preset)
    from training.zero import Zero

    return Zero(objective, groups, preset)


def fit(
    stage: Stage,
    preset: Preset,
    folder: Path,
    batches: Callable[[int], Iterator[Batch]],
    *,
    report: Report = lambda metrics: None,
) -> None:
    """Train `stage` to the end of `preset`, resuming from the newest checkpoint under `folder`.

    `batches(step)` yields the batches from that step on. Raises TrainingError where the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    updater = new_updater(stage.objective, stage.parameter_groups(), preset)
    trained = updater.trained
    average = {name: p.detach().clone() for name, p in trained.items()} if preset.ema else {}
    state, position = load_checkpoint(folder, trained, average)
    if state:
        updater.load(state)
    next_sheet_s = position.elapsed_s + preset.sheet_every_s
    next_save_s = position.elapsed_s + preset.checkpoint_every_s
    sums: dict[str, list[float]] = {}
    started, clock = position.elapsed_s, time.monotonic()

    stream = batches(position.step)
    while (progress := progress_of(preset, position)) < 1:
        batch = next(stream)
        torch.manual_seed((preset.seed << 32) + position.step)
        rate = learning_rate_factor(position.step, progress, preset)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(preset.bf16)):
            losses: dict[str, Tensor] = updater.losses(batch, progress)
        stop_if_not_finite(losses["loss"], position.step, batch)
        updater.update(losses["loss"], rate)
        position = Position(position.step + 1, agree(started + time.monotonic() - clock))
        for name, value in average.items():
            decay = min(preset.ema, (1 + position.step) / (10 + position.step))
            value.lerp_(trained[name].detach(), 1 - decay)

        for name, loss in losses.items():
            sums.setdefault(name, []).append(loss.item())
        saved = False
        if position.elapsed_s >= next_save_s:
            state = updater.state()
            if is_first_worker():
                save_checkpoint(folder, position, state, average)
            saved = True
            next_save_s = position.elapsed_s + preset.checkpoint_every_s
        if position.step % preset.log_every == 0 or saved:
            metrics = {name: sum(values) / len(values) for name, values in sums.items()}
            metrics |= {"step": position.step, "elapsed_s": round(position.elapsed_s, 1), "lr_factor": rate}
            if is_first_worker():
                with (folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(metrics) + "\n")
            report(metrics)
            sums = {}
        if position.elapsed_s >= next_sheet_s:
            if is_first_worker():
                with Averaged(trained, average):
                    stage.draw_sheet(folder / f"sheet-{position.step:06d}.png")
            next_sheet_s = position.elapsed_s + preset.sheet_every_s

    state = updater.state()
    if is_first_worker():
        save_checkpoint(folder, position, state, average)
        with Averaged(trained, average):
            stage.draw_sheet(folder / "sheet.png")
            stage.save(folder / "model")
    report({"step": position.step, "elapsed_s": position.elapsed_s})


def is_first_worker() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def stop_if_not_finite(loss: Tensor, step: int, batch: Batch) -> None:
    """Raise TrainingError on every worker where the loss of any is not finite: one alone would leave the others
    waiting for its gradients."""
    found = [f"{loss.item()}, rows {batch.get('row_ids')}"] if not math.isfinite(loss.item()) else []
    if distributed.is_initialized():
        is_broken = torch.tensor([float(len(found))])
        distributed.all_reduce(is_broken)
        if is_broken:
            everyone: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(everyone, found)
            found = [entry for entries in everyone for entry in entries]
    if found:
        raise TrainingError(
            f"the loss at step {step} is not finite: {'; '.join(found)}: "
            "lower the learning rate or look at these rows; the last checkpoint is kept"
        )


def average_over_workers(trained: dict[str, nn.Parameter]) -> None:
    """Mean gradients; a worker whose batch did not touch a parameter counts as zero, so that none waits for ever."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    for parameter in trained.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
        parameter.grad /= distributed.get_world_size()


def agree(elapsed_s: float) -> float:
    """The first worker's clock: what ends a run or makes a checkpoint must be the same for all."""
    if not distributed.is_initialized():
        return elapsed_s
    clock = torch.tensor([elapsed_s], dtype=torch.float64)
    distributed.broadcast(clock, src=0)
    return clock.item()


def progress_of(preset: Preset, position: Position) -> float:
    """0 at the start, 1 at the end: by steps, or by minutes where the preset bounds them.

    A run of no steps ends at once: it puts the parts that it would have gone on from into one folder.
    """
    by_steps = position.step / preset.steps if preset.steps else 1.0
    by_time = position.elapsed_s / (60 * preset.minutes) if preset.minutes else 0.0
    return max(by_steps, by_time)


def learning_rate_factor(step: int, progress: float, preset: Preset) -> float:
    """Linear warm-up, then a half cosine down to a hundredth."""
    warm = min(1.0, (step + 1) / preset.warmup_steps)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Averaged:
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
