"""Stage "vision": picture -> description. Trains the Q-Former; the language model is frozen."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from minigpt5.objective.example import Example
from minigpt5.objective.losses import LossWeights
from minigpt5.objective.objective import Objective
from minigpt5.objective.words import word_losses
from training.data.batches import Batch, StageData
from training.presets import VisionPreset
from training.stages.model import ModelStage, trained
from training.weight_sources import WeightSources


class VisionObjective(nn.Module):
    """First the words of a picture alone, then its description."""

    def __init__(self, objective: Objective, preset: VisionPreset) -> None:
        super().__init__()
        self.model, self.preset = objective, preset

    def outer_parameters(self) -> list[nn.Parameter]:
        return self.model.outer_parameters()

    def forward(self, batch: Batch[Example], progress: float) -> dict[str, Tensor]:
        if progress < self.preset.words_until:
            model = self.model
            return word_losses(model.language, model.vision, model.tokenizer, batch.examples)
        return self.model(batch.examples, LossWeights(text=self.preset.text_weight, picture=0.0, caption=0.0))


class VisionStage(ModelStage):
    """See this file's first line."""

    def __init__(self, preset: VisionPreset, sources: WeightSources, data: StageData) -> None:
        super().__init__(preset, sources, data)
        self.learning_rate = preset.optimizer.learning_rate
        self.objective = VisionObjective(self.model, preset)

    def freeze(self) -> None:
        self.vision.qformer.requires_grad_(True)
        self.language.voken_embeddings.requires_grad_(False)
        self.mapper.requires_grad_(False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": trained(self.vision.qformer), "lr": self.learning_rate}]
