"""The training loop, the same for every stage: batches in, checkpoints, a log and sample sheets out.

A step is a pure function of the weights, the preset and the step's number, so that a resumed run goes on as the
uninterrupted one would have. Validation is one of the weights alone: the same rows, timesteps and noise each time, and
no guidance dropout, so that the best checkpoint is the best one.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils.tensorboard import SummaryWriter

from minigpt5.errors import NotFinite
from training.checkpoint import Position, check_owner, checkpoints, load_checkpoint, save_checkpoint
from training.presets import Preset
from training.report import write_report
from training.run_folder import RunFolder
from training.samples import write_sample

Batch = dict[str, object]
TELLING = ("learn", "refine")
"""Stages whose model writes stories."""
SECONDS = ("data_s", "forward_s", "backward_s", "optimizer_s", "communication_s")
"""What a step's time goes to. Communication is a part of the three before it: of all of them under ZeRO."""
CPU = torch.device("cpu")
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


class Plain:
    """Torch's own optimizer; every worker holds everything."""

    def __init__(self, objective: nn.Module, groups: list[dict[str, Any]], preset: Preset) -> None:
        self.objective, self.clip_norm, self.communication_s = objective, preset.clip_norm, 0.0
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
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.trained.values(), self.clip_norm)
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


def new_updater(objective: nn.Module, groups: list[dict[str, Any]], preset: Preset) -> Updater:
    if preset.zero_stage < 0:
        return Plain(objective, groups, preset)
    from training.zero import Zero

    return Zero(objective, groups, preset)


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

    `batches(step)` yields the batches from that step on, `preset.accumulate` for each step. `validation` is measured at
    every checkpoint. Raises NotFinite where the loss is not, TrainingError where the folder cannot be written.
    """
    stage.objective.to(device)
    updater = new_updater(stage.objective, stage.parameter_groups(), preset)
    trained = updater.trained
    average = {name: p.detach().clone() for name, p in trained.items()} if preset.ema else {}
    state, position = load_checkpoint(folder, trained, average, name=agreed_checkpoint(folder))
    if state:
        updater.load(state)
    run = _Run(stage, preset, folder, updater, average, position, validation, owner, report)
    stream = batches(position.step)
    while (progress := progress_of(preset, position)) < 1:
        torch.manual_seed(seed_of(preset, position.step))
        rate = learning_rate_factor(position.step, progress, preset)
        seconds = dict.fromkeys(SECONDS, 0.0)
        communicated_s = updater.communication_s
        parts: list[dict[str, float]] = []
        for _ in range(preset.accumulate):
            with _timed(seconds, "data_s"):
                batch = {**next(stream), "step": position.step}
            with _timed(seconds, "forward_s"), _autocast(preset, device):
                losses: dict[str, Tensor] = updater.losses(batch, progress)
            stop_if_not_finite(losses["loss"], position.step, batch)
            with _timed(seconds, "backward_s"):
                updater.backward(losses["loss"] / preset.accumulate)
            parts.append({name: loss.item() for name, loss in losses.items()})
            run.note_rows(batch, parts[-1]["loss"])
        with _timed(seconds, "optimizer_s"):
            updater.step(rate)
        seconds["communication_s"] = updater.communication_s - communicated_s
        position = run.advance(parts, seconds, rate)
        for name, value in average.items():
            decay = min(preset.ema, (1 + position.step) / (10 + position.step))
            value.lerp_(trained[name].detach(), 1 - decay)
        run.keep_up(position)
    run.finish(position)


class _Run:
    """What a run writes and tells while it goes on."""

    def __init__(
        self,
        stage: Stage,
        preset: Preset,
        folder: RunFolder,
        updater: Updater,
        average: dict[str, Tensor],
        position: Position,
        validation: Sequence[Batch],
        owner: str,
        report: Report,
    ) -> None:
        self.stage, self.preset, self.folder, self.updater = stage, preset, folder, updater
        self.average, self.validation, self.report = average, validation, report
        self.position, self.owner = position, owner
        self._scratch = tempfile.TemporaryDirectory()
        local = folder.local / "tensorboard" if folder.local else Path(self._scratch.name)
        self._curves = SummaryWriter(str(local)) if is_first_worker() else None
        self._sums: dict[str, list[float]] = {}
        self._rate = 0.0
        self._started_s, self._clock = position.elapsed_s, time.monotonic()
        self._next_sheet_s = position.elapsed_s + preset.sheet_every_s
        self._next_save_s = position.elapsed_s + preset.checkpoint_every_s

    def advance(self, parts: list[dict[str, float]], seconds: dict[str, float], rate: float) -> Position:
        """A step is done: count it and its losses."""
        for one in parts:
            for name, loss in one.items():
                self._sums.setdefault(name, []).append(loss)
        for name, spent in seconds.items():
            self._sums.setdefault(name, []).append(spent)
        self._rate = rate
        elapsed_s = agree(self._started_s + time.monotonic() - self._clock)
        self.position = Position(self.position.step + 1, elapsed_s)
        return self.position

    def note_rows(self, batch: Batch, loss: float) -> None:
        if self.preset.log_rows:
            rank = distributed.get_rank() if distributed.is_initialized() else 0
            line = {"step": batch["step"], "row_ids": batch["row_ids"], "loss": loss}
            self.folder.append(f"rows-{rank}.jsonl", json.dumps(line) + "\n")

    def keep_up(self, position: Position) -> None:
        """Save, log and draw where it is time to."""
        is_saved = position.elapsed_s >= self._next_save_s
        if is_saved:
            self._save(position)
            self._next_save_s = position.elapsed_s + self.preset.checkpoint_every_s
        if position.step % self.preset.log_every == 0 or is_saved:
            metrics = {name: sum(values) / len(values) for name, values in self._sums.items()}
            metrics |= {"step": position.step, "elapsed_s": round(position.elapsed_s, 3), "lr_factor": self._rate}
            self._log(metrics)
            self.report(metrics)
            self._sums = {}
        if position.elapsed_s >= self._next_sheet_s:
            self._draw(f"sheet-{position.step:06d}.png")
            if self.preset.stage in TELLING:
                self._save_model(f"story-{position.step:06d}.html")
            if is_first_worker():
                write_report(self.folder)
            self._next_sheet_s = position.elapsed_s + self.preset.sheet_every_s

    def finish(self, position: Position) -> None:
        self._save(position)
        self._draw("sheet.png")
        self._save_model("story.html")
        if is_first_worker():
            write_report(self.folder)
        self.report({"step": position.step, "elapsed_s": position.elapsed_s})

    def _save(self, position: Position) -> None:
        state = self.updater.state()  # of all workers, called by all of them
        if is_first_worker():
            check_owner(self.folder, self.owner)
            save_checkpoint(self.folder, position, state, self.average)
        if self.validation:
            self._validate(position)

    def _validate(self, position: Position) -> None:
        objective, sums = self.stage.objective, dict[str, list[float]]()
        is_training = [module for module in objective.modules() if module.training]
        objective.eval()
        progress = progress_of(self.preset, position)
        random_state = torch.get_rng_state()
        with torch.no_grad(), Averaged(self.updater.trained, self.average):
            for number, batch in enumerate(self.validation):
                torch.manual_seed(number)
                with _autocast(self.preset, next(objective.parameters()).device):
                    for name, loss in self.updater.losses({**batch, "step": 0}, min(progress, 1.0)).items():
                        sums.setdefault(f"validation_{name}", []).append(loss.item())
        torch.set_rng_state(random_state)
        for module in is_training:
            module.training = True
        metrics = {name: sum(values) / len(values) for name, values in sums.items()}
        metrics["validation_loss"] = agree(metrics["validation_loss"])
        self._log({"step": position.step, **metrics})
        if is_first_worker():
            best = json.loads(self.folder.read("best.json") or b"{}")
            if metrics["validation_loss"] < best.get("validation_loss", math.inf):
                self.folder.write("best.json", json.dumps({"step": position.step, **metrics}).encode())

    def _save_model(self, sample: str) -> None:
        """The model folder, and a sample page of a model that can write one."""
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            with self.updater.gathered():
                if is_first_worker():
                    with Averaged(self.updater.trained, self.average):
                        self.stage.save(model)
                    self.folder.write_tree("model", model)
            if is_first_worker() and self.preset.stage in TELLING and (model / "config.json").is_file():
                self.folder.write(sample, write_sample(model))

    def _log(self, metrics: dict[str, float]) -> None:
        if self._curves:
            self.folder.append("log.jsonl", json.dumps(metrics) + "\n")
            with self.folder.writing("tensorboard"):
                for name, value in metrics.items():
                    self._curves.add_scalar(name, value, int(metrics["step"]))
                self._curves.flush()
            if self.folder.local is None:
                self.folder.write_tree("tensorboard", Path(self._curves.log_dir))

    def _draw(self, name: str) -> None:
        """Not where weights are shared out: one worker alone cannot call the modules then."""
        if self.preset.zero_stage == 3:
            return
        with tempfile.TemporaryDirectory() as scratch:
            if is_first_worker():
                path = Path(scratch) / "sheet.png"
                with Averaged(self.updater.trained, self.average):
                    self.stage.draw_sheet(path)
                if path.exists():
                    self.folder.write(name, path.read_bytes())


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a GPU is given its work, and does it later
    seconds[name] += time.perf_counter() - began


def _autocast(preset: Preset, device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if preset.bf16 else contextlib.nullcontext()


def seed_of(preset: Preset, step: int) -> int:
    """Of a step's noise, timesteps and dropout on this worker."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    return int(np.random.SeedSequence([preset.seed, rank, step]).generate_state(1, np.uint64)[0])


def agreed_checkpoint(folder: RunFolder) -> str | None:
    """The newest one that the first worker sees: a run that is dying may write another one meanwhile."""
    newest = next(reversed(checkpoints(folder)), None)
    if not distributed.is_initialized():
        return newest
    everyone: list[str | None] = [newest]
    distributed.broadcast_object_list(everyone, src=0)
    return everyone[0]


def is_first_worker() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def stop_if_not_finite(loss: Tensor, step: int, batch: Batch) -> None:
    """Raise NotFinite on every worker where the loss of any is not finite: one alone would leave the others
    waiting for its gradients."""
    found = [f"{loss.item()}, rows {batch.get('row_ids')}"] if not math.isfinite(loss.item()) else []
    if distributed.is_initialized():
        is_broken = torch.tensor(float(len(found)))
        distributed.all_reduce(is_broken)
        if is_broken:
            everyone: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(everyone, found)
            found = [entry for entries in everyone for entry in entries]
    if found:
        raise NotFinite(
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
    gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])  # hundreds of small ones would wait in a row
    distributed.all_reduce(together)
    together /= distributed.get_world_size()
    for gradient, mean in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


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
    """Linear warm-up, then a half cosine down to a hundredth, or a line down to nothing."""
    warm = min(1.0, (step + 1) / preset.warmup_steps)
    if preset.decays_linearly:
        return warm * max(0.0, 1 - progress)
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
