"""What a run writes: checkpoints, a log and its curves, sample sheets, the model folder."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.tensorboard import SummaryWriter

from minigpt5.errors import NotFinite, TrainingError
from minigpt5.model.language import evaluating
from training.checkpoint import CheckpointWriter, Position, copy_to_host
from training.data.batches import Batch
from training.devices import autocast
from training.presets import Preset
from training.report import write_report
from training.run_folder import RunFolder
from training.schedule import progress_of
from training.stage import Stage
from training.strategy import Strategy
from training.workers import agree, is_first_worker, mean_over_workers, num_workers, own_rank

Report = Callable[[dict[str, float]], None]


class RunRecorder:
    """Records one run. Every worker has a recorder; the first worker's writes."""

    def __init__(
        self,
        stage: Stage,
        preset: Preset,
        folder: RunFolder,
        strategy: Strategy,
        average: dict[str, Tensor],
        position: Position,
        validation: Sequence[Batch[Any]],
        owner: str,
        report: Report,
    ) -> None:
        self.stage, self.preset, self.folder, self.strategy = stage, preset, folder, strategy
        self.average, self.validation, self.report = average, validation, report
        self.position, self._elapsed_s = position, position.elapsed_s
        self._writer = CheckpointWriter(folder, owner)
        self._scratch = tempfile.TemporaryDirectory()
        local = folder.local / "tensorboard" if folder.local else Path(self._scratch.name)
        self._curves = SummaryWriter(str(local)) if is_first_worker() else None
        self._sums: dict[str, list[float]] = {}
        self._rate = 0.0
        self._started_s, self._clock = position.elapsed_s, time.monotonic()
        self._next_sheet_s = position.elapsed_s + preset.sheet_every_s
        self._next_save_s = position.elapsed_s + preset.checkpoint_every_s

    def __enter__(self) -> RunRecorder:
        """Measure the losses of a fresh run on what it never trains on, before its first step."""
        if self.validation and not self.position.step:
            self._validate(self.position)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last checkpoint, whatever ends the run."""
        with contextlib.suppress(TrainingError) if kind else contextlib.nullcontext():
            self._writer.finish()

    def agree(self, batches: list[Batch[Any]], parts: list[dict[str, Tensor]]) -> None:
        """Note the losses of a step's batches before they change the weights, and the time, which all workers have from
        the first. Raises NotFinite on all workers where a loss of any is not finite."""
        found = [dict(zip(part, torch.stack(list(part.values())).tolist(), strict=True)) for part in parts]
        losses = [part["loss"] for part in found]
        self._elapsed_s = agree(self._started_s + time.monotonic() - self._clock, losses, batches)
        for batch, loss in zip(batches, losses, strict=True):
            self._note_examples(batch, loss)
        for part in found:
            for name, loss in part.items():
                self._sums.setdefault(name, []).append(loss)

    def advance(self, seconds: dict[str, float], rate: float) -> Position:
        """Count a finished step."""
        for name, spent in seconds.items():
            self._sums.setdefault(name, []).append(spent)
        self._rate = rate
        self.position = Position(self.position.step + 1, self._elapsed_s)
        return self.position

    def _note_examples(self, batch: Batch[Any], loss: float) -> None:
        if self.preset.log_examples:
            line = {"step": batch.step, "ids": batch.ids, "loss": loss}
            self.folder.append(f"examples-{own_rank()}.jsonl", json.dumps(line) + "\n")

    def keep_up(self, position: Position) -> None:
        """Save, log and draw when they are due. Raises TrainingError where the last checkpoint could not be written."""
        self._writer.raise_failure()
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
        if is_saved:
            self._keep_curves()
        if position.elapsed_s >= self._next_sheet_s:
            self._draw(f"{position.step:06d}")
            if is_first_worker():
                write_report(self.folder)
            self._next_sheet_s = position.elapsed_s + self.preset.sheet_every_s

    def finish(self, position: Position) -> None:
        self._save(position)
        self._writer.finish()
        self._keep_curves()
        self._save_model()
        self._draw()
        if is_first_worker():
            write_report(self.folder)
        self.report({"step": position.step, "elapsed_s": position.elapsed_s})

    def _save(self, position: Position) -> None:
        state = self.strategy.state()  # of all workers, called by all of them
        _check_finite(state["trained"] if is_first_worker() else {}, position)
        if is_first_worker():
            self._writer.write(position, state, copy_to_host(self.average))
        if self.validation:
            self._validate(position)

    def _validate(self, position: Position) -> None:
        objective, sums = self.stage.objective, dict[str, list[float]]()
        progress = progress_of(self.preset, position)
        random_state = torch.get_rng_state()
        with torch.no_grad(), Averaged(self.strategy.trained, self.average), evaluating(objective):
            for turn, batch in enumerate(self.validation):
                number = own_rank() + turn * num_workers()
                torch.manual_seed(number)
                with autocast(self.preset, next(objective.parameters()).device):
                    losses = self.strategy.losses(batch, min(progress, 1.0))
                if number < self.preset.validation_batches:
                    for name, loss in losses.items():
                        sums.setdefault(f"validation_{name}", []).append(loss.item())
        torch.set_rng_state(random_state)
        metrics = mean_over_workers(sums)
        self._log({"step": position.step, **metrics})
        if is_first_worker():
            best = json.loads(self.folder.read("best.json") or b"{}")
            if metrics["validation_loss"] < best.get("validation_loss", math.inf):
                self.folder.write("best.json", json.dumps({"step": position.step, **metrics}).encode())

    def _save_model(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            with self.strategy.gathered(self.stage.saved_parameters()):
                if is_first_worker():
                    with Averaged(self.strategy.trained, self.average):
                        self.stage.save(model)
                    self.folder.write_tree("model", model)

    def _log(self, metrics: dict[str, float]) -> None:
        if self._curves:
            self.folder.append("log.jsonl", json.dumps(metrics) + "\n")
            with self.folder.writing("tensorboard"):
                for name, value in metrics.items():
                    self._curves.add_scalar(name, value, int(metrics["step"]))
                self._curves.flush()

    def _keep_curves(self) -> None:
        """Copy TensorBoard's files to an object store, whole: with each checkpoint, and not with each line."""
        if self._curves and self.folder.local is None:
            self.folder.write_tree("tensorboard", Path(self._curves.log_dir))

    def _draw(self, suffix: str = "") -> None:
        """Write a sample sheet and a sample story with the weights as they are; not under ZeRO 3, where one worker
        alone cannot call the modules. A sample that cannot be made is a line in the log, and the run goes on."""
        is_whole = self.preset.optimizer.zero_stage != 3
        if not (self.preset.draws_samples and is_whole and is_first_worker()):
            return
        name = f"-{suffix}" if suffix else ""
        random_state = torch.get_rng_state()
        with (
            tempfile.TemporaryDirectory() as scratch,
            Averaged(self.strategy.trained, self.average),
            evaluating(self.stage.objective),
        ):
            try:
                path = Path(scratch) / "sheet.png"
                self.stage.draw_sheet(path)
                if path.exists():
                    self.folder.write(f"sheet{name}.png", path.read_bytes())
                if story := self.stage.write_sample():
                    self.folder.write(f"story{name}.html", story)
            except TrainingError:
                raise
            except Exception as failure:  # a sample is for a person to look at: it costs no training
                print(f"a sample could not be drawn: {type(failure).__name__}: {failure}", flush=True)
        torch.set_rng_state(random_state)


def _check_finite(trained: Mapping[str, Tensor | None], position: Position) -> None:
    """Raise NotFinite on every worker where what the first one is about to save is not finite."""
    broken = [name for name, value in trained.items() if value is not None and not value.isfinite().all()]
    num_broken = torch.tensor(float(len(broken)))
    if distributed.is_initialized():  # the others hold no copy, and would wait for the first one
        distributed.all_reduce(num_broken)
    if num_broken:
        names = f": {', '.join(broken[:5])}" if broken else ""
        raise NotFinite(
            f"{num_broken.item():.0f} trained weights are not finite after step {position.step}{names}; lower the "
            "learning rate, or set max_grad_norm=1; the last checkpoint is kept"
        )


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
