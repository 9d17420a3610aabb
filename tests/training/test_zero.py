"""ZeRO 0 to 3 on two local processes: the plain loop's losses, and checkpoints that any of them goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.toy_stage import TOY, ToyStage, batches
from training import loop
from training.presets import override
from training.run_folder import RunFolder

WORKER = """
import dataclasses, datetime, json, sys
from pathlib import Path
import torch
from torch import distributed
from tests.helpers.toy_stage import ToyStage, batches, TOY
from training import loop
from training.presets import override
from training.run_folder import RunFolder

folder, zero_stage, steps, losses = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), []
torch.set_num_threads(1)
distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
preset = override(TOY, [f"zero_stage={zero_stage}"])

class Enough(Exception): pass

def report(metrics):
    if "loss" in metrics:
        losses.append(metrics["loss"])
    if metrics["step"] == steps < preset.steps:
        raise Enough

try:
    share = batches(distributed.get_rank(), distributed.get_world_size())
    loop.fit(ToyStage(), preset, RunFolder(folder), share, report=report)
except Enough:
    pass
total = torch.tensor(losses, dtype=torch.float64)
distributed.all_reduce(total)
if distributed.get_rank() == 0:
    print("LOSSES", json.dumps((total / distributed.get_world_size()).tolist()))
"""


MODEL_WORKER = """
import datetime, json, sys
from pathlib import Path
import numpy as np
import torch
from torch import distributed
from minigpt5.model.published_template import PUBLISHED
from minigpt5.objective.example import Example
from tests.helpers.tiny import tiny_config
from tests.minigpt5.objective.test_losses import caption, new_objective, story
from training import loop
from training.data.batches import Batch
from training.presets import OptimizerConfig, VokenPreset, override
from training.run_folder import RunFolder
from minigpt5.objective.dummy_examples import DummyExamples
from training.stages.voken import VokenObjective
from training.strategy import new_strategy

torch.set_num_threads(1)
distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
px = tiny_config().vision.image_px
only_text = Example(
    segments=PUBLISHED.next_page(["One."], "Two.", "text", variant=0),
    read=[np.zeros((px, px, 3), np.uint8)] * 2, drawn=[], captions=[],
)

def batches(step):
    while True:  # at every step one of the workers has no picture to draw, and another kind of example
        with_picture = story() if step % 3 else caption("a fox")
        yield Batch(examples=[only_text if (step + distributed.get_rank()) % 2 else with_picture], ids=[step])
        step += 1

class Stage:
    def __init__(self, model, preset):
        self.model, self.objective = model, VokenObjective(model, preset)
        self.trained = (model.language.voken_embeddings, model.mapper, model.language.prefix)
    def parameter_groups(self):
        return [{"params": list(part.parameters()), "lr": 1e-3} for part in self.trained]
    def draw_sheet(self, path): ...
    def write_sample(self): ...
    def saved_parameters(self): return list(self.model.parameters())
    def save(self, folder): ...

def new_model():
    torch.manual_seed(0)
    model = new_objective()
    model.language.add_prefix(3, context_tokens=model.config.context_tokens)
    for part in (model.vision, model.language.body, model.text_encoder):
        part.requires_grad_(False)
    model.dummies = DummyExamples(model.config, reads_pictures=True)  # always: all curves draw the same random numbers
    return model

def curve(folder, zero_stage, steps):
    losses = []
    preset = VokenPreset(
        stage="learn", steps=steps, batch_size=2, mapper_learning_rate=1e-3, voken_learning_rate=1e-3,
        optimizer=OptimizerConfig(warmup_steps=1), log_every=1, text_weight=1.0, picture_weight=1.0,
        caption_weight=1.0, checkpoint_every_s=1e9, sheet_every_s=1e9,
    )
    preset = override(preset, [f"zero_stage={zero_stage}"])
    model = new_model()

    def report(metrics):
        if "loss" in metrics:
            losses.append(metrics["loss"])

    loop.fit(Stage(model, preset), preset, RunFolder(folder / zero_stage), batches, report=report)
    total = torch.tensor(losses, dtype=torch.float64)
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).tolist()

if len(sys.argv) > 3:
    curves = {zero_stage: curve(Path(sys.argv[1]), zero_stage, int(sys.argv[2])) for zero_stage in sys.argv[3:]}
    if distributed.get_rank() == 0:
        print("CURVES", json.dumps(curves))
"""

SAVED_WORKER = (
    MODEL_WORKER
    + """
stream, model = batches(0), new_model()
preset = VokenPreset(
    stage="learn", steps=6, batch_size=2, mapper_learning_rate=1e-3, voken_learning_rate=1e-3, text_weight=1.0,
    picture_weight=1.0, caption_weight=1.0, optimizer=OptimizerConfig(warmup_steps=1, zero_stage=3),
)
stage = Stage(model, preset)
strategy = new_strategy(stage.objective, stage.parameter_groups(), preset.optimizer)
for step in range(6):
    if step == 4:  # DeepSpeed knows by now in which order modules are called
        with strategy.gathered(list(model.language.prefix.parameters())):
            if distributed.get_rank() == 0:
                print("SAVED", model.language.prefix.settle().states.shape)
    strategy.backward(strategy.losses(next(stream), 0.5)["loss"])
    strategy.step(1.0)
"""
)

REPLAYING_WORKER = (
    MODEL_WORKER
    + """
from training.presets import ReplayConfig

zero_stage, counts = int(sys.argv[2]), []
model = new_model()
model.keeps_replay = True
if zero_stage != 3:
    model.dummies = None
preset = VokenPreset(
    stage="learn", steps=8, batch_size=2, mapper_learning_rate=1e-3, voken_learning_rate=1e-3, text_weight=1.0,
    picture_weight=1.0, picture_from=0.5, caption_weight=0.0,
    optimizer=OptimizerConfig(warmup_steps=1, zero_stage=zero_stage),
    replay=ReplayConfig(steps=1, batch_size=2, min_size=2),
)
stage = Stage(model, preset)
strategy = new_strategy(stage.objective, stage.parameter_groups(), preset.optimizer)
for step in range(8):  # in the first step one worker has text alone, and one of them at each new one
    examples = [only_text if (step // 2 + distributed.get_rank()) % 2 else story()]
    losses = strategy.losses(Batch(examples=examples, ids=[step], step=step), step / 8)
    strategy.backward(losses["loss"])
    strategy.step(1.0)
    counts.append(int(any("replayed" in name for name in losses)))
print("REPLAYED", json.dumps(counts))
"""
)

BUFFERS_WORKER = """
import datetime, json
from torch import distributed
from training.data.batches import Batch
from training.data.replay import WorkersReplay
from training.presets import ReplayConfig

distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
workers, size, found, num_messages = WorkersReplay(ReplayConfig(steps=1, min_size=2)), 0, [], 0
all_reduce = distributed.all_reduce

def count(*arguments, **options):
    global num_messages
    num_messages += 1
    return all_reduce(*arguments, **options)

distributed.all_reduce = count
for step in range(10):
    found.append(workers.is_replay(Batch(examples=[], ids=[], step=step), size))
    size += 0 if found[-1] or (step < 4 and distributed.get_rank()) else 2
print("REPLAYED", json.dumps([found, num_messages]))
"""

FROZEN_WORKER = """
import dataclasses, json, sys
import torch
from torch import distributed
from tests.helpers.toy_stage import ToyStage, batches, TOY
from training.devices import autocast
from training.presets import override
from training.strategy import new_strategy
from training.stages.model import halve_frozen

zero_stage, steps = sys.argv[2], int(sys.argv[3])
if zero_stage == "3":  # share out matrices as small as these, too
    from training import zero
    of_config = zero._configuration
    def configuration(config):
        found = of_config(config)
        return found | {"zero_optimization": found["zero_optimization"] | {"stage3_param_persistence_threshold": 0}}
    zero._configuration = configuration
torch.set_num_threads(1)
distributed.init_process_group("gloo")
stage, preset = ToyStage(), override(TOY, [f"zero_stage={zero_stage}", "bf16=true"])
halve_frozen(stage.objective)
strategy = new_strategy(stage.objective, stage.parameter_groups(), preset.optimizer)
stream = batches(distributed.get_rank(), distributed.get_world_size())(0)
losses = []
for step in range(steps):
    with autocast(preset, torch.device("cpu")):
        loss = strategy.losses(next(stream), 0.0)["loss"]
    strategy.backward(loss)
    strategy.step(1.0)
    distributed.all_reduce(mean := loss.detach().double())
    losses.append(mean.item() / distributed.get_world_size())

frozen = stage.objective.frozen.weight
state = strategy.engine.optimizer if zero_stage != "none" else strategy.optimizer
trained = sum(getattr(p, "ds_numel", p.numel()) for p in stage.objective.parameters() if p.requires_grad)
moments = getattr(state, "optimizer", state).state.values()
held = sum(one["exp_avg"].numel() for one in moments)
assert frozen.grad is None and frozen.dtype == torch.bfloat16
assert held == (trained // distributed.get_world_size() if zero_stage in ("1", "2", "3") else trained), (held, trained)
if zero_stage == "3":  # neither has the whole
    assert frozen.ds_tensor.numel() * distributed.get_world_size() == frozen.ds_numel and frozen.data.numel() == 0
if distributed.get_rank() == 0:
    print("LOSSES", json.dumps(losses))
"""

UNEQUAL_WORKER = """
import sys
import torch
from torch import distributed
from tests.helpers.toy_stage import ToyStage, TOY
from training.presets import override
from training.strategy import new_strategy

torch.set_num_threads(1)
distributed.init_process_group("gloo")
for zero_stage in sys.argv[1:]:
    stage = ToyStage()
    with torch.no_grad():
        for parameter in stage.objective.parameters():
            parameter += distributed.get_rank()
    before = stage.objective.frozen.weight.clone()
    preset = override(TOY, [f"zero_stage={zero_stage}"])
    new_strategy(stage.objective, stage.parameter_groups(), preset.optimizer)
    assert torch.equal(stage.objective.frozen.weight, before), zero_stage
    for parameter in stage.objective.parameters():
        if parameter.requires_grad:
            distributed.broadcast(first := parameter.detach().clone(), 0)
            assert torch.equal(parameter, first), zero_stage
"""

STEEP_WORKER = """
import sys
import torch
from torch import distributed
from minigpt5.errors import NotFinite
from tests.helpers.toy_stage import ToyStage, batches, TOY
from training.checkpoint import Position
from training.presets import override
from training.run_recorder import _check_finite
from training.strategy import new_strategy

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank = distributed.get_rank()
for zero_stage in sys.argv[1:]:
    def new(*settings):
        stage = ToyStage()
        preset = override(TOY, [f"zero_stage={zero_stage}", *settings])
        return stage.objective, new_strategy(stage.objective, stage.parameter_groups(), preset.optimizer)

    toy, strategy = new()
    stream = batches(rank, distributed.get_world_size())(0)
    strategy.backward(strategy.losses(next(stream), 0.0)["loss"])
    strategy.step(1.0)
    saved = [strategy.state()]
    distributed.broadcast_object_list(saved, src=0)
    loss = strategy.losses(next(stream), 0.0)["loss"]
    if rank == 1:  # finite, with a gradient that is not
        loss = loss + (toy.words.weight * 0).abs().sum().sqrt()
    strategy.backward(loss)
    try:
        strategy.step(1.0)
        print("LEFT OUT", zero_stage)
    except NotFinite as error:
        print("REFUSED", zero_stage, error)
    state = strategy.state()
    _check_finite(state["trained"] if rank == 0 else {}, Position(2))
    if rank == 0:
        assert all(value.equal(saved[0]["trained"][name]) for name, value in state["trained"].items()), zero_stage
    _, resumed = new("weight_decay=0.5", "beta2=0.9")
    resumed.load(saved[0])
    optimizer = resumed.engine.optimizer if zero_stage != "none" else resumed.optimizer
    assert all((one["weight_decay"], one["betas"]) == (0.5, (0.9, 0.9)) for one in optimizer.param_groups), zero_stage
try:
    _check_finite({"words": torch.tensor(float("nan"))} if rank == 0 else {}, Position(2))
except NotFinite as error:
    print("BROKEN", error)
"""

VALIDATED_WORKER = WORKER.replace(
    "report=report)",
    """report=report, validation=validation)""",
).replace(
    "try:",
    """held_out = [next(batches(0, 1)(1000 + number)) for number in range(3)]
rank, world = distributed.get_rank(), distributed.get_world_size()
validation = [held_out[(rank + turn * world) % 3] for turn in range(-(-3 // world))]
preset = dataclasses.replace(preset, validation_batches=3)
try:""",
)


def train(
    folder: Path, zero_stage: int | None, *, workers: int = 2, steps: int = 50, worker: str = WORKER
) -> list[float]:
    """The losses, means over the workers, of the steps that this run makes."""
    arguments = [str(folder), str(zero_stage).lower(), str(steps)]
    outputs = run_ranks(worker, arguments, num=workers)
    return json.loads(next(line for line in outputs[0].splitlines() if line.startswith("LOSSES"))[7:])


def train_model(folder: Path, *zero_stages: str, steps: int) -> dict[str, list[float]]:
    """By stage, the losses of the model itself, all in the same two processes."""
    outputs = run_ranks(MODEL_WORKER, [str(folder), str(steps), *zero_stages], num=2)
    return json.loads(next(line for line in outputs[0].splitlines() if line.startswith("CURVES"))[7:])


def largest_difference(curve: list[float], other: list[float]) -> float:
    """Relative."""
    return max(abs(one - two) / abs(two) for one, two in zip(curve, other, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_stage_has_the_plain_curve(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", None)
    assert len(plain) == 50 and plain[-1] < 0.7 * plain[0]
    for zero_stage in (0, 1, 2, 3):
        assert largest_difference(train(tmp_path / str(zero_stage), zero_stage), plain) < 1e-3, zero_stage


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_workers_checkpoint_goes_on_with_one_and_with_four(tmp_path: Path, zero_stage: int) -> None:
    whole = train(tmp_path / "whole", None)
    for workers in (1, 4):
        folder = tmp_path / str(workers)
        first = train(folder, zero_stage, steps=20)
        rest = train(folder, zero_stage, workers=workers)
        assert largest_difference(first + rest, whole) < 1e-3


@pytest.mark.timeout(600)
def test_workers_validate_together_as_one_does_alone(tmp_path: Path) -> None:
    preset = override(TOY, ["validation_batches=3"])
    validation = [next(batches(0, 1)(1000 + number)) for number in range(3)]
    loop.fit(ToyStage(), preset, RunFolder(tmp_path / "alone"), batches(0, 1), validation=validation)
    train(tmp_path / "together", None, worker=VALIDATED_WORKER)
    best = [json.loads((tmp_path / name / "best.json").read_text()) for name in ("alone", "together")]
    assert best[0]["step"] == best[1]["step"]
    assert best[0]["validation_loss"] == pytest.approx(best[1]["validation_loss"], rel=1e-5)


@pytest.mark.timeout(600)
def test_workers_with_and_without_pictures_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """The model itself, with a prefix, under ZeRO 3, where every worker has to call every part: a batch of text alone
    would leave the others waiting for ever. Its losses are the plain loop's."""
    curves = train_model(tmp_path, "none", "3", steps=4)
    assert len(curves["none"]) == 4 and largest_difference(curves["3"], curves["none"]) < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_saves_a_prefix_keeps_no_other_waiting() -> None:
    outputs = run_ranks(SAVED_WORKER, [], num=2)
    assert "SAVED torch.Size([2, 2, 2, 3, 12])" in outputs[0]


def test_workers_begin_with_the_first_ones_trained_weights_and_frozen_ones_are_not_written() -> None:
    """A page of a mapped file that is written to is shared no more."""
    run_ranks(UNEQUAL_WORKER, ["0", "2"], num=2)


def replayed(outputs: list[str]) -> list[Any]:
    """What each worker says that it has replayed."""
    said = (next(line for line in output.splitlines() if line.startswith("REPLAYED")) for output in outputs)
    return [json.loads(line[8:]) for line in said]


def test_workers_replay_at_the_same_steps_however_full_their_buffers_are() -> None:
    one, other = replayed(run_ranks(BUFFERS_WORKER, [], num=2))
    assert one == other
    steps, num_messages = one
    assert [step for step, is_replay in enumerate(steps) if is_replay] == [6, 8]
    assert num_messages == 4  # none once all buffers are full enough


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_workers_that_lack_pictures_replay_together(tmp_path: Path, zero_stage: int) -> None:
    """As published, "learn" has no caption loss, and its picture loss may begin later."""
    one, other = replayed(run_ranks(REPLAYING_WORKER, [str(tmp_path), str(zero_stage)], num=2))
    assert one == other == [0, 0, 0, 0, 1, 0, 1, 0]


@pytest.mark.timeout(600)
def test_a_gradient_that_is_not_finite_on_one_worker_changes_no_weight_of_any() -> None:
    """Neither do settings of the optimizer that a resumed run was given come from its checkpoint."""
    for output in run_ranks(STEEP_WORKER, ["none", "0", "2"], num=2):
        assert "REFUSED none the gradient has the norm nan" in output and "REFUSED 0 the gradient" in output, output
        assert "REFUSED 2 the gradient's norm is not finite" in output and "LEFT OUT" not in output
        assert "BROKEN 1 trained weights are not finite after step 2" in output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_frozen_parts_are_halved_and_have_no_gradient_no_optimizer_state_and_no_replica(tmp_path: Path) -> None:
    plain, shared_out = (train(tmp_path, stage, steps=5, worker=FROZEN_WORKER) for stage in (None, 3))
    assert plain[-1] < plain[0] and largest_difference(shared_out, plain) < 0.01  # bfloat16


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_trains_the_model_alike(tmp_path: Path) -> None:
    curves = train_model(tmp_path, "none", "0", "1", "2", "3", steps=50)
    for zero_stage, curve in curves.items():
        assert largest_difference(curve, curves["none"]) < 1e-3, zero_stage
