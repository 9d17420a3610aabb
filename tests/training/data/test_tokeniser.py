"""Examples that are tokenised where they are made: the objective learns the same from them."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

from batch_jobs.prepare import Part, write_part
from examples.own_model.tiny_bases import make_bases
from minigpt5 import new
from minigpt5.config import TemplateName
from minigpt5.objective.losses import LossWeights
from training.presets import PUBLISHED
from training.stage import build_stage
from training.stages.voken import VokenStage
from training.train import find_examples
from training.weight_sources import WeightSources

WEIGHTS = LossWeights(text=1.0, picture=0.0, caption=1.0)


@pytest.mark.parametrize("template", ["chat", "published"])
@pytest.mark.parametrize("kind", ["caption", "story"])
def test_the_objective_reads_the_tokens_that_a_data_worker_made(
    kind: str, template: TemplateName, tmp_path: Path
) -> None:
    bases = {name: str(base) for name, base in make_bases(tmp_path / "bases").items()}
    new.make_folder(tmp_path / "model", **bases, context_tokens=512, template=template)
    part = Part(number=0, file="", start=0, count=8)
    write_part(part, layout=f"storybook:{kind}", uri="", output=str(tmp_path / "rows"), seed=3)
    sources = WeightSources(runs=tmp_path, start=tmp_path / "model")
    preset = dataclasses.replace(PUBLISHED["align" if kind == "caption" else "learn"], validation_batches=0, bf16=False)
    preset, data = find_examples(preset, sources, str(tmp_path / "rows"))
    stage = build_stage(preset, sources, data)
    assert isinstance(stage, VokenStage)
    source = pickle.loads(pickle.dumps(data.training))
    examples = [source.example_at(position)[1] for position in range(6)]
    losses = []
    for learnt in (examples, [dataclasses.replace(example, tokens=None) for example in examples]):
        torch.manual_seed(0)
        losses.append(stage.model(learnt, WEIGHTS))
    assert all(example.tokens for example in examples) and losses[0].keys() >= {"text", "caption"}
    for name, loss in losses[0].items():
        assert loss.item() == losses[1][name].item(), name
