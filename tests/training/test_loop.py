"""A run that is stopped and resumed ends where the uninterrupted one does."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt5.errors import NotFinite, TrainingError
from minigpt5.objective.example import Example
from minigpt5.storybook.captions import facts_in
from minigpt5.storybook.scenes import is_held_out
from tests.helpers.toy_stage import TOY, WIDTH, ToyStage
from tests.helpers.toy_stage import batches as toy_batches
from training import checkpoint, loop, presets
from training.data import batches as data
from training.data.batches import StageData
from training.run_folder import RunFolder
from training.schedule import learning_rate_factor
from training.storybook import presets as storybook_presets
from training.storybook.examples import StorybookExamples, example_at
from training.storybook.rivals import RIVALS
from training.storybook.vae import VaeStage
from training.strategy import TorchStrategy, new_strategy
from training.train import check_replay
from training.weight_sources import WeightSources

TINY = dataclasses.replace(
    storybook_presets.STORYBOOK["vae"],
    steps=4,
    batch_size=2,
    optimizer=dataclasses.replace(storybook_presets.STORYBOOK["vae"].optimizer, warmup_steps=2),
    log_every=1,
    sheet_every_s=1e9,
    checkpoint_every_s=1e9,
)


PARTS, NAMES = ("words", "picture"), ("weight", "bias")


class Stopped(Exception):
    pass


def new_stage(preset: presets.Preset, folder: Path) -> VaeStage:
    assert isinstance(preset, storybook_presets.VaePreset)
    return VaeStage(preset, WeightSources(runs=folder), StageData(training=StorybookExamples(preset), validation=None))


def train(folder: Path, *, stop_after: int | None = None, preset: presets.Preset = TINY) -> VaeStage:
    stage = new_stage(preset, folder)
    stage.draw_sheet = lambda path: None  # type: ignore[method-assign]
    stage.save = lambda folder: None  # type: ignore[method-assign]

    def report(metrics: dict[str, float]) -> None:
        if metrics["step"] == stop_after:
            raise Stopped

    loop.fit(stage, preset, RunFolder(folder), data.local_batches(StorybookExamples(preset), preset), report=report)
    return stage


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    every_step = dataclasses.replace(TINY, checkpoint_every_s=0.0)
    with pytest.raises(Stopped):
        train(tmp_path / "parts", stop_after=2, preset=every_step)
    assert checkpoint.newest_step(RunFolder(tmp_path / "parts")) == 2
    resumed = train(tmp_path / "parts")
    for one, other in zip(whole.vae.parameters(), resumed.vae.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_half_written_checkpoint_is_never_resumed_from(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoint-00000009"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    assert checkpoint.newest_step(RunFolder(tmp_path)) == 0


def test_a_checkpoint_that_does_not_fit_keeps_the_one_before(tmp_path: Path) -> None:
    state = {"trained": {"weight": torch.zeros(100_000)}, "optimizer": {}}
    folder = RunFolder(tmp_path)
    good = checkpoint.save_checkpoint(folder, checkpoint.Position(1), state, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel refuses to write on, as on a full disk
    try:
        with pytest.raises(TrainingError, match="cannot be written.*checkpoint-00000001 is kept"):
            checkpoint.save_checkpoint(folder, checkpoint.Position(2), state, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [good]
    assert checkpoint.load_checkpoint(folder, ["weight"])[1] == checkpoint.Position(1)


class SlowFolder(RunFolder):
    """A disk on which the checkpoint of step 1 is written when the test allows it, and those of `broken` never."""

    def __init__(self, path: Path, *, broken: str = "") -> None:
        super().__init__(path)
        self.broken, self.may_write = broken, threading.Event()

    def write(self, name: str, data: bytes | memoryview) -> None:
        if name == "checkpoint-00000001/state.pt":
            assert self.may_write.wait(60)
        if self.broken and name.startswith(self.broken):
            raise TrainingError(f"{name} cannot be written: no room")
        super().write(name, data)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    preset, folder = presets.override(TOY, ["steps=4"]), SlowFolder(tmp_path)
    seen: list[tuple[float, int]] = []

    def report(metrics: dict[str, float]) -> None:
        seen.append((metrics["step"], checkpoint.newest_step(folder)))
        folder.may_write.set()

    loop.fit(ToyStage(), preset, folder, loop_batches(), report=report)
    assert seen[0] == (1, 0), "the step was done before its checkpoint was there"
    assert all(newest >= step - 1 for step, newest in seen), "at most one is behind"
    assert checkpoint.newest_step(folder) == preset.steps


def test_a_checkpoint_that_fails_in_the_background_is_said_at_the_next_step_and_loses_nothing(tmp_path: Path) -> None:
    preset, steps = presets.override(TOY, ["steps=4"]), list[float]()
    folder = SlowFolder(tmp_path / "run", broken="checkpoint-00000002")
    folder.may_write.set()

    def train_toy(folder: RunFolder) -> ToyStage:
        stage = ToyStage()
        loop.fit(stage, preset, folder, loop_batches(), report=lambda metrics: steps.append(metrics["step"]))
        return stage

    with pytest.raises(TrainingError, match="checkpoint-00000002.*no room; checkpoint-00000001 is kept"):
        train_toy(folder)
    assert steps == [1, 2] and checkpoint.newest_step(folder) == 1
    whole, resumed = train_toy(RunFolder(tmp_path / "whole")), train_toy(RunFolder(tmp_path / "run"))
    for one, other in zip(whole.objective.parameters(), resumed.objective.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_of_two_runs_in_a_folder_the_later_one_goes_on(tmp_path: Path) -> None:
    """This happens when a driver died and its workers live on for a moment."""
    folder = RunFolder(tmp_path)
    first = checkpoint.claim(folder)

    def report(metrics: dict[str, float]) -> None:
        if metrics["step"] == 1:
            checkpoint.claim(folder)

    with pytest.raises(TrainingError, match="another run works in"):
        loop.fit(ToyStage(), presets.override(TOY, ["steps=3"]), folder, loop_batches(), owner=first, report=report)
    assert checkpoint.newest_step(folder) == 1


def test_a_batch_is_the_same_examples_for_any_number_of_workers_and_wherever_a_run_resumes() -> None:
    preset = presets.override(TINY, ["batch_size=8", "gradient_accumulation_steps=2", "steps=6"])
    for workers in (1, 2, 4):
        share = 8 // workers
        for first_step in (0, 3):
            ids = np.arange((6 - first_step) * 2 * share)
            found = [
                data.worker_positions(ids, preset, first_step=first_step, rank=rank, num_workers=workers)
                for rank in range(workers)
            ]
            for step in range(first_step, 6):
                for part in range(2):
                    at = ((step - first_step) * 2 + part) * share
                    together = np.concatenate([positions[at : at + share] for positions in found])
                    start = (step * 2 + part) * 8
                    assert together.tolist() == list(range(start, start + 8))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_workers_share_out_the_same_validation_batches(num_workers: int) -> None:
    preset = presets.override(TINY, ["validation_batches=5", "batch_size=12"])
    source = StorybookExamples(preset)
    alone = [batch.ids for batch in data.validation_batches(source, preset)]
    shares = [
        [batch.ids for batch in data.validation_batches(source, preset, rank=rank, num_workers=num_workers)]
        for rank in range(num_workers)
    ]
    assert len({len(share) for share in shares}) == 1, "all workers make as many calls"
    dealt = [share[turn] for turn in range(len(shares[0])) for share in shares]
    assert dealt[:5] == alone and len(dealt) - 5 < num_workers


def test_a_batch_has_as_many_examples_for_each_worker() -> None:
    preset = presets.override(TINY, ["per_gpu_batch_size=3"])
    assert [presets.for_workers(preset, workers).batch_size for workers in (0, 1, 4)] == [3, 3, 12]
    assert presets.for_workers(TINY, 4) == TINY
    with pytest.raises(ValueError, match="batch_size and per_gpu_batch_size are both set"):
        presets.override(TINY, ["per_gpu_batch_size=3", "batch_size=6"])


def test_a_loss_that_is_not_finite_stops_with_the_examples(tmp_path: Path) -> None:
    stage = new_stage(TINY, tmp_path)
    with torch.no_grad():
        next(stage.vae.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match=r"step 0 is not finite: nan, examples \[0, 1\]"):
        loop.fit(stage, TINY, RunFolder(tmp_path), data.local_batches(StorybookExamples(TINY), TINY))


class SteepStage(ToyStage):
    """A finite loss with a gradient that is not, at one step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        whole = self.objective.forward

        def forward(batch: data.Batch[torch.Tensor], progress: float) -> dict[str, torch.Tensor]:
            losses = whole(batch, progress)
            if batch.step == at:
                losses["loss"] = losses["loss"] + (self.objective.words.weight * 0).abs().sum().sqrt()
            return losses

        self.objective.forward = forward  # type: ignore[method-assign]

    def save(self, folder: Path) -> None:
        raise AssertionError("a broken model is not saved")


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("at", [1, 2])
def test_a_gradient_that_is_not_finite_reaches_no_weight_and_no_checkpoint(
    tmp_path: Path, at: int, max_grad_norm: float
) -> None:
    """Its loss is finite. The last step of a run has no other step after it that would see the weights."""
    stage, folder = SteepStage(at), RunFolder(tmp_path)
    preset = presets.override(TOY, ["steps=3", f"max_grad_norm={max_grad_norm}"])
    first = at * TOY.batch_size
    with pytest.raises(NotFinite, match=rf"norm nan at step {at}, examples \[{first}, .*the last checkpoint is kept"):
        loop.fit(stage, preset, folder, loop_batches())
    state, position = checkpoint.load_checkpoint(folder, [f"{one}.{name}" for one in PARTS for name in NAMES])
    assert state and position.step == at
    assert all(value.isfinite().all() for value in state["trained"].values())
    assert all(parameter.isfinite().all() for parameter in stage.objective.parameters())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """A step of a finite gradient can make them so."""
    preset = presets.override(TOY, ["steps=2"])

    class Huge(ToyStage):
        def parameter_groups(self) -> list[dict[str, object]]:
            return [{**group, "lr": 3e38, "weight_decay": 1e38} for group in super().parameter_groups()]

    with pytest.raises(NotFinite, match="trained weights are not finite after step 1: .*words.weight"):
        loop.fit(Huge(), preset, RunFolder(tmp_path), loop_batches())
    assert not checkpoint.checkpoints(RunFolder(tmp_path)) and not (tmp_path / "model").exists()


def test_a_resumed_run_takes_its_new_settings_of_the_optimizer() -> None:
    def new(**settings: float) -> TorchStrategy:
        stage = ToyStage()
        config = presets.OptimizerConfig(**settings)  # type: ignore[arg-type]
        strategy = new_strategy(stage.objective, stage.parameter_groups(), config)
        assert isinstance(strategy, TorchStrategy)
        return strategy

    first, then = new(), new(weight_decay=0.5, beta2=0.9)
    first.backward(first.losses(next(loop_batches()(0)), 0.0)["loss"])
    first.step(1.0)
    then.load(first.state())
    for group in then.optimizer.param_groups:
        assert (group["weight_decay"], group["betas"]) == (0.5, (0.9, 0.9))
    for one, other in zip(first.optimizer.state.values(), then.optimizer.state.values(), strict=True):
        assert one["step"] == other["step"] == 1 and one["exp_avg"].equal(other["exp_avg"])


def test_a_run_without_warm_up_begins_at_the_full_rate(tmp_path: Path) -> None:
    preset = presets.override(TOY, ["steps=2", "warmup_steps=0"])
    assert learning_rate_factor(0, 0.0, preset) == 1.0
    loop.fit(ToyStage(), preset, RunFolder(tmp_path), loop_batches())


def test_the_rate_warms_up_and_decays() -> None:
    preset = presets.override(TINY, ["steps=100", "warmup_steps=10"])
    rates = [learning_rate_factor(step, step / 100, preset) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == max(rates[9:12]) and rates[-1] < 0.02


def test_settings_are_checked() -> None:
    changed = presets.override(TINY, ["steps=7", "learning_rate=1e-3", "optimizer.schedule=linear", "bf16=false"])
    assert (changed.steps, changed.optimizer.learning_rate, changed.optimizer.schedule) == (7, 1e-3, "linear")
    assert changed.bf16 is False and changed.optimizer.ema_decay == TINY.optimizer.ema_decay
    distill = storybook_presets.STORYBOOK["distill"]
    assert isinstance(distill, presets.DistillPreset)
    assert presets.override(distill, ["replay.steps=5"]).replay == dataclasses.replace(distill.replay, steps=5)
    assert presets.override(TINY, ["zero_stage=2"]).optimizer.zero_stage == 2
    assert presets.override(presets.override(TINY, ["zero_stage=2"]), ["zero_stage=none"]).optimizer.zero_stage is None
    with pytest.raises(ValueError, match="unknown setting 'lr=1'"):
        presets.override(TINY, ["lr=1"])
    with pytest.raises(ValueError, match="zero_stage is 4"):
        presets.override(TINY, ["zero_stage=4"])
    with pytest.raises(ValueError, match="steps is 'many'"):
        presets.override(TINY, ["steps=many"])
    with pytest.raises(ValueError, match="bf16 is '1' but must be true or false"):
        presets.override(TINY, ["bf16=1"])
    with pytest.raises(ValueError, match="schedule is 'steep' but must be cosine or linear"):
        presets.override(TINY, ["schedule=steep"])
    with pytest.raises(ValueError, match="unknown setting 'mapper_learning_rate=1'"):  # another stage's
        presets.override(TINY, ["mapper_learning_rate=1"])


@pytest.mark.parametrize(
    ("stage", "settings", "said"),
    [
        ("align", "steps=-3", "steps is -3 but must be 0 or more"),
        ("align", "steps=5 epochs=3", "steps is 5 and epochs is 3: leave one out"),
        ("align", "steps=0 epochs=0 minutes=5", "minutes is 5 but steps is 0"),
        ("align", "epochs=-1", "epochs is -1.0"),
        ("align", "minutes=nan", "minutes is nan"),
        ("align", "batch_size=0", "batch_size is 0 but must be 1 or more: set batch_size="),
        ("align", "log_every=0", "log_every is 0"),
        ("align", "num_threads=0", "num_threads is 0"),
        ("align", "seed=-1", "seed is -1"),
        ("align", "warmup_steps=-1", "warmup_steps is -1"),
        ("align", "learning_rate=-1", "learning_rate is -1.0"),
        ("align", "beta2=1", "beta2 is 1 but must be less"),
        ("align", "ema_decay=1.5", "ema_decay is 1.5 but must be from 0 to 1"),
        ("align", "guidance_dropout=7", "guidance_dropout is 7.0 but must be from 0 to 1"),
        ("align", "zero_offload=true", "zero_offload is true but zero_stage is none: set zero_stage to 1, 2 or 3"),
        ("align", "zero_offload=true zero_stage=0", "zero_offload is true but zero_stage is 0"),
        ("align", "zero_live_parameters=5 zero_stage=2", "zero_live_parameters is 5 but zero_stage is 2"),
        ("align", "replay.min_size=0", "replay.min_size is 0 but must be 1 or more"),
        ("vision", "words_until=2", "words_until is 2.0"),
        ("distill", "teacher_steps=0", "teacher_steps is 0"),
    ],
)
def test_values_out_of_range_and_settings_that_exclude_each_other_are_refused(
    stage: str, settings: str, said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        presets.override(presets.PUBLISHED[stage], settings.split())


def test_epochs_replace_the_steps_of_a_preset_and_steps_its_epochs() -> None:
    by_steps = storybook_presets.STORYBOOK["align"]
    assert (by_epochs := presets.override(by_steps, ["epochs=3"])).steps == 0 and by_epochs.epochs == 3
    assert (again := presets.override(by_epochs, ["steps=7"])).steps == 7 and again.epochs == 0
    presets.override(by_steps, ["zero_stage=3", "zero_offload=true", "zero_live_parameters=5", "ema_decay=0"])


def test_a_replay_buffer_that_is_never_full_enough_is_refused() -> None:
    align = storybook_presets.STORYBOOK["align"]
    for name in ("min_size", "fill"):
        with pytest.raises(TrainingError, match=f"replay.{name} is 30000 but the replay buffer of align holds 24576"):
            check_replay(presets.override(align, [f"replay.{name}=30000"]))
    check_replay(presets.override(align, ["replay.min_size=30000", "replay.steps=0"]))


@pytest.mark.parametrize("stage", presets.STAGES)
def test_examples_are_a_function_of_their_position(stage: str) -> None:
    preset = {**RIVALS["gill"].stages, **storybook_presets.STORYBOOK}[stage]
    assert str(example_at(preset, 5)) == str(example_at(preset, 5))
    assert str(example_at(preset, 5)) != str(example_at(preset, 6))


def test_no_example_says_a_pair_that_is_held_out_not_even_as_what_is_not_there() -> None:
    preset = storybook_presets.STORYBOOK["learn"]
    examples = [example for index in range(60) if isinstance(example := example_at(preset, index), Example)]
    said = [facts_in(text) for one in examples for texts in (one.captions, *one.contrasts) for text in texts]
    pairs = [(facts.who, facts.what) for facts in said if facts.who and facts.what]
    assert len(pairs) > 300 and not any(is_held_out(*pair) for pair in pairs)


@pytest.mark.cluster
@pytest.mark.slow
def test_two_workers_of_a_local_ray_train_a_stage(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "training.train",
        "vae",
        "--preset",
        "storybook",
        "--workers",
        "2",
        "--runs",
        str(tmp_path),
    ]
    settings = ["steps=4", "batch_size=4", "num_threads=1", "log_every=2", "warmup_steps=1"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "vae" / "model" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "vae" / "sheet.png").is_file()
    assert checkpoint.newest_step(RunFolder(tmp_path / "vae")) == 4


def test_validation_is_a_function_of_the_weights_alone(tmp_path: Path) -> None:
    preset = presets.override(TOY, ["steps=3", "validation_batches=2"])
    held_out = toy_batches(0, 1)(1000)
    validation = [next(held_out) for _ in range(2)]
    stage = ToyStage()
    loop.fit(stage, preset, RunFolder(tmp_path), loop_batches(), validation=validation)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 1, 2, 3, 3]  # once more at the end
    assert losses[-1] == losses[-2] and len(set(losses)) == 4
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["validation_loss"] == min(losses)
    report = (tmp_path / "report.html").read_text()
    assert "best validation loss" in report and "<svg" in report and "forward" in report
    assert any((tmp_path / "tensorboard").iterdir())
    plain = ToyStage()
    loop.fit(plain, presets.override(TOY, ["steps=3"]), RunFolder(tmp_path / "plain"), loop_batches())
    for one, other in zip(stage.objective.parameters(), plain.objective.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)  # and it changes nothing


@pytest.mark.parametrize(("first", "then"), [(0.0, 0.9), (0.9, 0.0), (0.9, 0.5)])
def test_a_run_goes_on_with_another_ema_decay(tmp_path: Path, first: float, then: float) -> None:
    """An average that begins late begins at the weights as they are, not at the initial ones."""
    at = loop_batches()
    for steps, decay in ((3, first), (4, then)):
        preset = presets.override(TOY, [f"steps={steps}", f"ema_decay={decay}"])
        stage = ToyStage()
        loop.fit(stage, preset, RunFolder(tmp_path), at)
    state, position = checkpoint.load_checkpoint(
        RunFolder(tmp_path), [name for name, p in stage.objective.named_parameters() if p.requires_grad]
    )
    assert state and position.step == 4
    assert bool(state["average"]) == bool(then)
    for name, value in state["average"].items():
        initial = dict(ToyStage().objective.named_parameters())[name]
        distance = (value - state["trained"][name]).abs().max()
        assert distance < (initial - state["trained"][name]).abs().max()


def test_a_sample_that_cannot_be_drawn_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = ToyStage()

    def draw_sheet(path: Path) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    stage.draw_sheet = draw_sheet  # type: ignore[method-assign]
    loop.fit(stage, presets.override(TOY, ["steps=2", "sheet_every_s=0"]), RunFolder(tmp_path), loop_batches())
    assert "a sample could not be drawn: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out
    assert checkpoint.newest_step(RunFolder(tmp_path)) == 2


def loop_batches() -> Callable[[int], Iterator[data.Batch[torch.Tensor]]]:
    return toy_batches(0, 1)


def test_batches_that_make_a_step_are_one_large_batch(tmp_path: Path) -> None:
    toys = []
    for size, parts in ((8, 1), (2, 4)):
        preset = dataclasses.replace(
            presets.override(TOY, [f"batch_size={size}", f"gradient_accumulation_steps={parts}"]),
            steps=5,
            checkpoint_every_s=1e9,
        )

        def batches(step: int, size: int = size, parts: int = parts) -> Iterator[data.Batch[torch.Tensor]]:
            for start in range(step * size * parts, 10_000, size):
                ids = list(range(start, start + size))
                rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(row_id)) for row_id in ids]
                yield data.Batch(ids=ids, examples=rows)

        stage = ToyStage()
        loop.fit(stage, preset, RunFolder(tmp_path / str(parts)), batches)
        toys.append(stage.objective)
    for one, other in zip(toys[0].parameters(), toys[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_run_on_an_object_store_is_gone_on_with(tmp_path: Path) -> None:
    """Through pyarrow's own file system for tests, which is used as object stores are."""
    folder = RunFolder("mock:///run")
    assert folder.local is None
    again = RunFolder("mock:///run")
    again._files = folder._files  # it lives in memory
    preset = dataclasses.replace(TOY, steps=4, checkpoint_every_s=0.0)

    def batches(step: int) -> Iterator[data.Batch[torch.Tensor]]:
        while True:
            rows = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
            yield data.Batch(ids=[4 * step + k for k in range(4)], examples=list(rows))
            step += 1

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        loop.fit(ToyStage(), preset, folder, batches, report=stop)
    assert checkpoint.newest_step(again) == 2
    stage, whole = ToyStage(), ToyStage()
    loop.fit(stage, preset, again, batches)
    loop.fit(whole, preset, RunFolder(tmp_path), batches)
    for one, other in zip(stage.objective.parameters(), whole.objective.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len((again.read("log.jsonl") or b"").splitlines()) == 4
    assert len(checkpoint.checkpoints(again)) == 2 and again.names("tensorboard")


def test_the_published_settings_are_those_of_the_paper() -> None:
    align, learn = presets.PUBLISHED["align"], presets.PUBLISHED["learn"]
    assert isinstance(align, presets.VokenPreset) and isinstance(learn, presets.VokenPreset)
    assert (align.voken_learning_rate, align.mapper_learning_rate, align.optimizer.learning_rate) == (2e-5, 2e-4, 0)
    assert (learn.voken_learning_rate, learn.mapper_learning_rate, learn.optimizer.learning_rate) == (2e-5, 2e-5, 2e-5)
    assert data.examples_per_step(align) == data.examples_per_step(learn) == 48
    assert (align.text_weight, align.picture_weight, align.caption_weight) == (0.01, 1.0, 0.1)
    assert (learn.text_weight, learn.picture_weight, learn.caption_weight) == (0.01, 1.0, 0.0)
    optimizer = align.optimizer
    assert (optimizer.warmup_steps, optimizer.schedule, optimizer.max_grad_norm, align.epochs) == (1000, "linear", 0, 2)
    rates = [learning_rate_factor(step, step / 4000, align) for step in (0, 999, 2000, 3999)]
    assert rates == pytest.approx([0.001, 0.75, 0.5, 0.00025], rel=1e-2)
