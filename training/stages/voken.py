"""Stages that train vokens: the two stages of the paper (arXiv 2310.02239), for any model, and "refine".

align   caption -> picture; voken embeddings and mapper are trained, the language model frozen (unimodal alignment)
learn   interleaved stories; LoRA, voken embeddings and mapper are trained (multimodal learning)
refine  captions and stories; the mapper alone learns to follow what the language model has become
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt5.errors import TrainingError
from minigpt5.model import folder as model_folder
from minigpt5.model.cache import hash_file
from minigpt5.model.folder import PREFIX, VOKENS
from minigpt5.model.language import pad, padding_id
from minigpt5.model.locate import find_part
from minigpt5.model.prompt import text_segment
from minigpt5.model.weights import load_tensors, save_tensors
from minigpt5.objective.example import Example
from minigpt5.objective.losses import LossWeights
from minigpt5.objective.objective import Objective
from training.data.batches import Batch, StageData
from training.data.replay import WorkersReplay
from training.presets import VokenPreset
from training.samples import write_story
from training.stages.model import ModelStage, trained
from training.weight_sources import WeightSources

NUM_STANDARDISED = 512
"""Captions whose spread scales the caption loss."""
NUM_WHITENED = 1_024
"""Captions whose voken states say how they spread; more where a picture has few vokens."""
MIN_STATES = 2
"""Voken states for each direction that they are whitened in, at least."""
LOOKED_THROUGH = 8
"""Examples that are looked through for each caption."""
WRITES_STORIES = ("learn", "refine")


class VokenObjective(nn.Module):
    """The Objective as the loop calls it, on new examples or on the replay buffer."""

    def __init__(self, objective: Objective, preset: VokenPreset) -> None:
        super().__init__()
        self.model, self.preset = objective, preset
        self._workers = WorkersReplay(preset.replay)

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
        if self.training and (preset.replay.fill or self._workers.is_replay(batch, len(self.model.replay_buffer))):
            return self.model.replay(preset.replay.batch_size, weights)
        return self.model(batch.examples, weights)


class VokenStage(ModelStage):
    """One of the stages of this file, by its preset."""

    def __init__(self, preset: VokenPreset, sources: WeightSources, data: StageData) -> None:
        self.preset = preset
        trains_language = preset.stage == "learn" and preset.optimizer.learning_rate > 0
        self.trains_body = trains_language and preset.tunes == "body"
        trains_prefix = trains_language and preset.tunes == "prefix"
        super().__init__(
            preset,
            sources,
            data,
            trains_adapter=trains_language and preset.tunes == "adapter",
            trains_body=self.trains_body,
            prefix_tokens=preset.prefix_tokens if trains_prefix else 0,
            first_timestep=preset.first_timestep,
            samples_latents=preset.samples_latents,
            keeps_replay=preset.replay.steps > 0,
            guidance_dropout=preset.guidance_dropout,
        )
        # A fresh prefix changes states, and stands in no file of the start.
        self._states_folder = sources.runs / "states" if preset.keeps_states and not trains_prefix else None
        num_whitened = max(NUM_WHITENED, math.ceil(MIN_STATES * self.config.hidden / self.config.num_vokens))
        num_captions = num_whitened if preset.whitens else NUM_STANDARDISED * preset.standardises
        captions = self._fill() if preset.replay.fill else self._some_captions(num_captions)
        if preset.standardises:
            targets = [target for _, target in captions[:NUM_STANDARDISED]]
            with self.autocast():
                self.model.standardise_captions(targets, start_there=preset.stage == "align" and self.mapper.is_fresh)
        if preset.whitens:
            if len(captions) * self.config.num_vokens < MIN_STATES * self.config.hidden:
                print(f"whitens is true, but {len(captions)} captions are too few for it: it is off", flush=True)
            else:
                self.model.whiten_vokens(*self._voken_states(captions), noise=preset.voken_noise)
        if preset.contrast_weight and not any(example.contrasts for example in self.sample_examples()):
            print("contrast_weight is not 0, but the examples have no contrasts: it has no effect", flush=True)
        self.objective = VokenObjective(self.model, preset)

    @torch.no_grad()
    def _fill(self) -> list[tuple[str, str]]:
        """Read the captions that are replayed, and return them as `_some_captions` does. Raises TrainingError."""
        preset = self.preset
        if preset.stage != "align" or preset.voken_learning_rate:
            raise TrainingError(
                f"replay.fill is {preset.replay.fill}, but states that are read once stay true in stage align with "
                "voken_learning_rate=0 alone: set replay.fill=0"
            )
        examples: list[Example] = [self.data.training.example_at(at)[1] for at in range(preset.replay.fill)]
        captions = [(example.segments[0].text, example.captions[0]) for example in examples]
        states_PVH, targets_PQD = self._voken_states(captions)
        latents_PCYX = None
        if preset.picture_weight:
            batches = (examples[start : start + 32] for start in range(0, len(examples), 32))
            latents_PCYX = torch.cat([self.model.to_latents(batch) for batch in batches])
        self.model.store_for_replay(states_PVH, targets_PQD, None, latents_PCYX)
        return captions

    def _some_captions(self, num: int) -> list[tuple[str, str]]:
        """Captions of the run's first examples: as the language model reads each, and as the text encoder does."""
        found: list[tuple[str, str]] = []
        position, last = 0, LOOKED_THROUGH * num
        while len(found) < num and position < last:
            example: Example = self.data.training.example_at(position)[1]
            position += 1
            read = [example.segments[0].text] if example.is_caption else example.captions
            found += zip(read, example.captions, strict=True)
        return list(dict.fromkeys(found))[:num]

    @torch.no_grad()
    def _voken_states(self, captions: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Voken states of captions, and the text encoder's states of them."""
        kept = self._states_folder and self._states_folder / f"{self._states_key(captions)}.safetensors"
        if kept and kept.is_file():
            tensors = load_tensors(kept)
            return tensors["states"].float(), tensors["targets"].float()
        encoded = [self.model.encode([text_segment(read)])[0] for read, _ in captions]
        states: list[Tensor] = []
        targets: list[Tensor] = []
        for start in range(0, len(captions), 32):
            batch = slice(start, start + 32)
            with self.autocast():
                read = self.language.voken_states(*pad(encoded[batch], padding_id(self.model.tokenizer)))
                states.append(read.float())
                targets.append(self.model.text_encoder([target for _, target in captions[batch]]).float())
        found = torch.cat(states), torch.cat(targets)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")
            save_tensors({"states": found[0].half(), "targets": found[1].half()}, partial)
            partial.replace(kept)
        return found

    def _states_key(self, captions: list[tuple[str, str]]) -> str:
        """Of all that voken states depend on."""
        config = self.config
        parts = [config.language_model, config.text_encoder, *(text for both in captions for text in both)]
        parts += [hash_file(self.start / name) for name in (VOKENS, PREFIX) if (self.start / name).is_file()]
        parts += [hash_file(path) for path in sorted(self.start.glob("adapter/*.safetensors"))]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def write_sample(self) -> bytes | None:
        if self.preset.stage not in WRITES_STORIES:
            return None
        with self.autocast():
            return write_story(self.model, self.sample_prompt(), seed=self.preset.seed)

    def sample_prompt(self) -> str:
        """The prompt of a held-out story, or the first caption of a row that has no prompt."""
        examples = self.sample_examples()
        prompts = [example.prompt for example in examples if example.prompt]
        return [*prompts, *(example.captions[0] for example in examples if example.captions)][0]

    def freeze(self) -> None:
        self.vision.qformer.requires_grad_(False)
        if self.trains_body:
            self.language.body.requires_grad_(True)
        self.language.voken_embeddings.requires_grad_(self.preset.voken_learning_rate > 0)
        self.mapper.requires_grad_(self.preset.mapper_learning_rate > 0)
        if not self.preset.trains_queries:
            self.mapper.fc.requires_grad_(False)
            self.mapper.queries.requires_grad_(False)

    def saved_parameters(self) -> list[nn.Parameter]:
        body = self.language.body.parameters() if self.trains_body else []
        return list(dict.fromkeys([*super().saved_parameters(), *body]))

    def save(self, folder: Path) -> None:
        config = self.config
        if self.trains_body:
            base = find_part(self.start, config, config.language_model)
            self.config = model_folder.save_language(folder, config, self.language, base)
        super().save(folder)
        self.config = config

    def parameter_groups(self) -> list[dict[str, Any]]:
        preset = self.preset
        groups: list[dict[str, Any]] = [
            {"params": trained(self.language.voken_embeddings), "lr": preset.voken_learning_rate, "weight_decay": 0.0},
            {"params": trained(self.mapper), "lr": preset.mapper_learning_rate},
            {"params": self._tuned(), "lr": preset.optimizer.learning_rate},
        ]
        return [group for group in groups if group["params"]]

    def _tuned(self) -> list[nn.Parameter]:
        """What is trained of the language model."""
        prefix = self.language.prefix
        return [*trained(self.language.body), *(trained(prefix) if prefix else [])]
