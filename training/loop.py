"""The training loop, the same for every stage.

A step is a pure function of the weights, the preset and the step's number, so that a resumed run continues as the
uninterrupted one would have, but for the replay buffer. Validation depends on the weights alone: it uses the same
examples, timesteps and noise each time, and no guidance dropout, so that the best checkpoint is the best one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt5.errors import NotFinite
from training.checkpoint import load_checkpoint
from training.data.batches import Batch
from training.devices import autocast
from training.presets import Preset
from training.run_folder import RunFolder
from training.run_recorder import Report, RunRecorder
from training.schedule import learning_rate_factor, progress_of
from training.stage import Stage
from training.strategy import CPU, new_strategy
from training.workers import agreed_checkpoint, seed_of

SECONDS = ("data_s", "forward_s", "backward_s", "optimizer_s", "communication_s")
"""Phases of a step. Communication is part of the optimizer's phase, under ZeRO of the three phases before it."""


def fit(
    stage: Stage,
    preset: Preset,
    folder: RunFolder,
    batches: Callable[[int], Iterator[Batch[Any]]],
    *,
    validation: Sequence[Batch[Any]] = (),
    owner: str = "",
    report: Report = lambda metrics: None,
    device: torch.device = CPU,
) -> None:
    """Train `stage` to the end of `preset`, resuming from the newest checkpoint in `folder`, which belongs to the
    run with the token `owner` (see checkpoint.claim).

    `batches(step)` yields the batches from that step on, `preset.optimizer.gradient_accumulation_steps` for each step.
    `validation` is measured at every checkpoint. Raises NotFinite where a loss, a gradient or a weight is not,
    TrainingError where the folder cannot be written.
    """
    strategy = new_strategy(stage.objective, stage.parameter_groups(), preset.optimizer, device)
    trained = strategy.trained
    state, position = load_checkpoint(folder, trained, name=agreed_checkpoint(folder))
    saved_average: dict[str, Tensor] = {}
    if state:
        saved_average = state.pop("average")
        strategy.load(state)
        del state  # the optimizer has its own copy
    average = {name: p.detach().clone() for name, p in trained.items()} if preset.optimizer.ema_decay else {}
    with torch.no_grad():
        for name, value in average.items():  # of a run without an average: it begins at the weights as they are
            value.copy_(saved_average.get(name, value))
    saved_average = {}
    stream = batches(position.step)
    with RunRecorder(stage, preset, folder, strategy, average, position, validation, owner, report) as run:
        while (progress := progress_of(preset, position)) < 1:
            torch.manual_seed(seed_of(preset, position.step))
            rate = learning_rate_factor(position.step, progress, preset)
            timer = PhaseTimer(waits=preset.profiles and device.type == "cuda")
            communicated_s = strategy.communication_s
            learnt: list[Batch[Any]] = []
            parts: list[dict[str, Tensor]] = []
            for _ in range(preset.optimizer.gradient_accumulation_steps):
                with timer.phase("data_s"):
                    batch = dataclasses.replace(next(stream), step=position.step)
                with timer.phase("forward_s"), autocast(preset, device):
                    losses: dict[str, Tensor] = strategy.losses(batch, progress)
                with timer.phase("backward_s"):
                    strategy.backward(losses["loss"] / preset.optimizer.gradient_accumulation_steps)
                learnt.append(batch)
                parts.append({name: loss.detach() for name, loss in losses.items()})
            run.agree(learnt, parts)
            with timer.phase("optimizer_s"), naming_examples(learnt):
                strategy.step(rate)
            timer.seconds["communication_s"] = strategy.communication_s - communicated_s
            position = run.advance(timer.seconds, rate)
            for name, value in average.items():
                decay = min(preset.optimizer.ema_decay, (1 + position.step) / (10 + position.step))
                value.lerp_(trained[name].detach(), 1 - decay)
            run.keep_up(position)
        run.finish(position)


@contextlib.contextmanager
def naming_examples(learnt: Sequence[Batch[Any]]) -> Iterator[None]:
    """Within it NotFinite names the step, and the examples of this worker."""
    try:
        yield
    except NotFinite as error:
        ids = [batch.ids for batch in learnt]
        raise NotFinite(
            f"{error} at step {learnt[0].step}, examples {', '.join(map(str, ids))}: "
            "lower the learning rate or look at these examples; the last checkpoint is kept"
        ) from None


class PhaseTimer:
    """Seconds of a step's phases. A GPU is given its work and does it later: `waits` for it at the end of a phase;
    else the phase in which the step first needs a result counts for the others."""

    def __init__(self, *, waits: bool) -> None:
        self.seconds, self.waits = dict.fromkeys(SECONDS, 0.0), waits

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.waits:
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - began
