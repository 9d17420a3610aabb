"""The training loop, the same for every stage.

A step is a pure function of the weights, the preset and the step's number, so that a resumed run goes on as the
uninterrupted one would have, but for what replay.py remembers. Validation is one of the weights alone: the same rows,
timesteps and noise each time, and no guidance dropout, so that the best checkpoint is the best one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.checkpoint import load_checkpoint
from training.data.batches import Batch
from training.devices import autocast
from training.presets import Preset
from training.run_folder import RunFolder
from training.run_recorder import Report, RunRecorder
from training.schedule import learning_rate_factor, progress_of
from training.workers import agreed_checkpoint, average_over_workers, seed_of, stop_if_not_finite

SECONDS = ("data_s", "forward_s", "backward_s", "optimizer_s", "communication_s")
"""What a step's time goes to. Communication is a part of the three before it: of all of them under ZeRO."""
CPU = torch.device("cpu")


class Stage(Protocol):
    """One stage of training: what is trained, on which loss, and what comes out."""

    @property
    def objective(self) -> nn.Module:
        """batch, progress (0 to 1) -> losses by name; "loss" is the one that is minimised."""

    def parameter_groups(self) -> list[dict[str, object]]: ...
    def draw_sheet(self, path: Path) -> None: ...
    def save(self, folder: Path) -> None: ...


class Strategy(Protocol):
    """What turns losses into steps: TorchStrategy here, or training.zero.ZeroStrategy."""

    trained: dict[str, nn.Parameter]
    communication_s: float
    """Seconds that workers have spent on each other's gradients and weights so far."""

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]: ...
    def backward(self, loss: Tensor) -> None:
        """Gradients of one of the parts of a step, added to those of the parts before."""

    def step(self, factor: float) -> None:
        """Use the gradients, the learning rates multiplied by `factor`."""

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Within it every worker holds all that is trained, to read it or, on the first worker, to change it."""

    def state(self) -> dict[str, Any]:
        """ "trained" values by name and torch's "optimizer" state. Called by every worker."""

    def load(self, state: dict[str, Any]) -> None: ...


class TorchStrategy:
    """Torch's own optimizer; every worker holds everything."""

    def __init__(self, objective: nn.Module, groups: list[dict[str, Any]], preset: Preset) -> None:
        self.objective, self.max_grad_norm, self.communication_s = objective, preset.max_grad_norm, 0.0
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        groups = [{**group, "initial_lr": group["lr"]} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, preset.beta2), weight_decay=preset.weight_decay)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return self.objective(batch, progress)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        began = time.perf_counter()
        average_over_workers(self.trained)
        self.communication_s += time.perf_counter() - began
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

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


def new_strategy(objective: nn.Module, groups: list[dict[str, Any]], preset: Preset) -> Strategy:
    if preset.zero_stage < 0:
        return TorchStrategy(objective, groups, preset)
    from training.zero import ZeroStrategy

    return ZeroStrategy(objective, groups, preset)


def fit(
    stage: Stage,
    preset: Preset,
    folder: RunFolder,
    batches: Callable[[int], Iterator[Batch]],
    *,
    validation: Sequence[Batch] = (),
    owner: str = "",
    report: Report = lambda metrics: None,
    device: torch.device = CPU,
) -> None:
    """Train `stage` to the end of `preset`, resuming from the newest checkpoint in `folder`, which is the run's with
    the token `owner` (see checkpoint.claim).

    `batches(step)` yields the batches from that step on, `preset.gradient_accumulation_steps` for each step.
    `validation` is measured at every checkpoint. Raises NotFinite where the loss is not, TrainingError where the folder
    cannot be written.
    """
    stage.objective.to(device)
    strategy = new_strategy(stage.objective, stage.parameter_groups(), preset)
    trained = strategy.trained
    average = {name: p.detach().clone() for name, p in trained.items()} if preset.ema_decay else {}
    state, position = load_checkpoint(folder, trained, average, name=agreed_checkpoint(folder))
    if state:
        strategy.load(state)
    run = RunRecorder(stage, preset, folder, strategy, average, position, validation, owner, report)
    stream = batches(position.step)
    while (progress := progress_of(preset, position)) < 1:
        torch.manual_seed(seed_of(preset, position.step))
        rate = learning_rate_factor(position.step, progress, preset)
        seconds = dict.fromkeys(SECONDS, 0.0)
        communicated_s = strategy.communication_s
        parts: list[dict[str, float]] = []
        for _ in range(preset.gradient_accumulation_steps):
            with _timed(seconds, "data_s"):
                batch = {**next(stream), "step": position.step}
            with _timed(seconds, "forward_s"), autocast(preset, device):
                losses: dict[str, Tensor] = strategy.losses(batch, progress)
            stop_if_not_finite(losses["loss"], position.step, batch)
            with _timed(seconds, "backward_s"):
                strategy.backward(losses["loss"] / preset.gradient_accumulation_steps)
            parts.append({name: loss.item() for name, loss in losses.items()})
            run.note_rows(batch, parts[-1]["loss"])
        with _timed(seconds, "optimizer_s"):
            strategy.step(rate)
        seconds["communication_s"] = strategy.communication_s - communicated_s
        position = run.advance(parts, seconds, rate)
        for name, value in average.items():
            decay = min(preset.ema_decay, (1 + position.step) / (10 + position.step))
            value.lerp_(trained[name].detach(), 1 - decay)
        run.keep_up(position)
    run.finish(position)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a GPU is given its work, and does it later
    seconds[name] += time.perf_counter() - began
