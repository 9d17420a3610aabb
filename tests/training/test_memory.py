"""The memory that `minigpt5.new` prints for a stage is what the stage holds: weights, gradients, optimizer states."""

from __future__ import annotations

import dataclasses
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batch_jobs.prepare import Part, write_part
from examples.own_model.tiny_bases import make_bases
from minigpt5 import new
from minigpt5.combine import Parts
from minigpt5.footprint import count_trained, memory_gb
from training.data.batches import Batch
from training.presets import PUBLISHED
from training.stage import build_stage
from training.strategy import TorchStrategy, new_strategy
from training.train import find_examples
from training.weight_sources import WeightSources


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parts, str]:
    """A model folder of tiny bases, its parts, and rows to train on."""
    folder = tmp_path_factory.mktemp("made")
    bases = {name: str(base) for name, base in make_bases(folder / "bases").items()}
    parts = new.make_folder(folder / "model", **bases, context_tokens=512)
    write_part(
        Part(number=0, file="", start=0, count=6), layout="storybook:story", uri="", output=str(folder / "rows"), seed=3
    )
    return folder / "model", parts, str(folder / "rows")


def count_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held_bytes(stage: str, folder: Path, rows: str, *, bf16: bool) -> tuple[int, int, int]:
    """Bytes of a stage's weights, those of its gradients and AdamW's moments in a step, and its trained parameters."""
    preset = dataclasses.replace(PUBLISHED[stage], steps=1, epochs=0.0, validation_batches=0, bf16=bf16)
    sources = WeightSources(runs=folder, start=folder)
    preset, data = find_examples(preset, sources, rows)
    built = build_stage(preset, sources, data)
    weights = count_bytes(list(built.objective.parameters()))
    strategy = new_strategy(built.objective, built.parameter_groups(), preset.optimizer)
    assert isinstance(strategy, TorchStrategy)
    batch = Batch(examples=[data.training.example_at(position)[1] for position in range(4)], ids=list(range(4)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        losses = strategy.losses(batch, 0.5)
    strategy.backward(losses["loss"])
    gradients = count_bytes([one.grad for one in built.objective.parameters() if one.grad is not None])
    strategy.step(1.0)
    states = chain.from_iterable(state.values() for state in strategy.optimizer.state.values())
    moments = count_bytes([value for value in states if value.dim()])
    return weights, gradients + moments, sum(one.numel() for one in strategy.trained.values())


@pytest.mark.parametrize("stage", ["vision", "align", "learn"])
def test_a_stage_holds_what_the_report_says(stage: str, made: tuple[Path, Parts, str]) -> None:
    folder, parts, rows = made
    weights, others, num_trained = held_bytes(stage, folder, rows, bf16=True)
    assert num_trained == count_trained(parts)[stage]
    assert weights + others == pytest.approx(1e9 * memory_gb(parts)[f"{stage} on a GPU, one worker"], rel=1e-6)


def test_in_float32_it_holds_what_the_report_says_of_a_cpu(made: tuple[Path, Parts, str]) -> None:
    folder, parts, rows = made
    weights, others, _ = held_bytes("align", folder, rows, bf16=False)
    assert weights + others == pytest.approx(1e9 * memory_gb(parts)["align on a CPU, one worker"], rel=1e-6)
