"""Stages that train vokens: the two stages of the paper (arXiv 2310.02239), for any model, and "refine".

align   caption -> picture; voken embeddings and mapper are trained, the language model frozen (unimodal alignment)
learn   interleaved stories; LoRA, voken embeddings and mapper are trained (multimodal learning)
refine  captions and stories; the mapper alone learns to follow what the language model has become
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minigpt5.model.language import pad
from minigpt5.model.prompt import text_segment
from minigpt5.objective.example import Example
from minigpt5.objective.losses import LossWeights, Objective
from minigpt5.storybook.captions import Facts, canonical_caption, write_caption
from minigpt5.storybook.scenes import scene_at
from training.data.batches import Batch, ExampleSource
from training.data.replay_buffer import is_replay
from training.presets import VokenPreset
from training.stages.model import ModelStage, trained
from training.weight_sources import WeightSources

NUM_STANDARDISED = 512
"""Captions whose spread scales the caption loss."""
NUM_WHITENED = 1_024
"""Captions whose voken states say how they spread."""


class VokenObjective(nn.Module):
    """The Objective as the loop calls it, on new examples or on the replay buffer."""

    def __init__(self, objective: Objective, preset: VokenPreset) -> None:
        super().__init__()
        self.model, self.preset = objective, preset

    def outer_parameters(self) -> list[nn.Parameter]:
        return self.model.outer_parameters()

    def forward(self, batch: Batch[Example], progress: float) -> dict[str, Tensor]:
        preset = self.preset
        weights = LossWeights(
            text=preset.text_weight,
            picture=preset.picture_weight if progress >= preset.picture_from else 0.0,
            caption=preset.caption_weight,
            contrast=preset.contrast_weight,
        )
        if self.training and is_replay(batch, preset.replay, self.model.num_replayable):
            return self.model.replay(preset.replay.batch_size, weights)
        return self.model(batch.examples, weights)


class VokenStage(ModelStage):
    """One of the stages of this file, by its preset."""

    def __init__(self, preset: VokenPreset, sources: WeightSources, examples: ExampleSource) -> None:
        self.preset = preset
        super().__init__(
            preset,
            sources,
            trains_adapter=preset.stage == "learn" and preset.optimizer.learning_rate > 0,
            first_timestep=preset.first_timestep,
            samples_latents=preset.samples_latents,
        )
        if preset.standardises:
            captions = [canonical_caption(Facts.of(scene_at(i, seed=0))) for i in range(NUM_STANDARDISED)]
            self.model.standardise_captions(captions, start_there=preset.stage == "align" and not sources.start)
        if preset.whitens:
            self.model.whiten_vokens(*self._some_vokens(), noise=preset.voken_noise)
        self.objective = VokenObjective(self.model, preset)

    @torch.no_grad()
    def _some_vokens(self) -> tuple[Tensor, Tensor]:
        """Voken states of some captions, and the text encoder's states of what they say."""
        rng = np.random.default_rng(0)
        facts = [Facts.of(scene_at(i, seed=0)) for i in range(NUM_WHITENED)]
        encoded = [self.model.encode([text_segment(write_caption(fact, rng))])[0] for fact in facts]
        states, targets = [], []
        for start in range(0, len(facts), 32):
            batch = slice(start, start + 32)
            with self.autocast():
                found = self.language.voken_states(*pad(encoded[batch], self.model.tokenizer.eos_token_id))
            states.append(found.float())
            targets.append(self.model.text_encoder([canonical_caption(fact) for fact in facts[batch]]))
        return torch.cat(states), torch.cat(targets)

    def freeze(self) -> None:
        self.vision.qformer.requires_grad_(False)
        self.language.voken_embeddings.requires_grad_(self.preset.voken_learning_rate > 0)
        self.mapper.requires_grad_(self.preset.mapper_learning_rate > 0)
        if not self.preset.trains_queries:
            self.mapper.fc.requires_grad_(False)
            self.mapper.queries.requires_grad_(False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        preset = self.preset
        groups: list[dict[str, Any]] = [
            {"params": trained(self.language.voken_embeddings), "lr": preset.voken_learning_rate, "weight_decay": 0.0},
            {"params": trained(self.mapper), "lr": preset.mapper_learning_rate},
            {"params": trained(self.language.body), "lr": preset.optimizer.learning_rate},
        ]
        return [group for group in groups if group["params"]]
