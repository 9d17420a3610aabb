"""Stages "vision", "align", "learn" and "refine": the package's Objective, with a stage's rows and trainable sources.

vision  picture -> description; the Q-Former is trained, the language model frozen
align   caption -> picture; voken rows and mapper are trained, the language model frozen (unimodal alignment)
learn   interleaved stories; LoRA, rows and mapper are trained (multimodal learning)
refine  captions and stories; the mapper alone learns to follow what the language model has become

A learning rate of 0 freezes what it belongs to. The model is that of the folder that is gone on from, else the
storybook's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minigpt5.config import storybook
from minigpt5.engine.denoising import denoise
from minigpt5.model import folder as model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.diffusion import (
    Diffusion,
    load_distilled,
    load_scheduler,
    load_unet,
    load_vae,
    new_storybook_scheduler,
)
from minigpt5.model.language import LanguageModel, load_tokenizer, pad
from minigpt5.model.mapper import Mapper
from minigpt5.model.pixels import to_tensor
from minigpt5.model.prompt import caption_segments
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.objective.example import Row
from minigpt5.objective.losses import LossWeights, Objective
from minigpt5.storybook.captions import Facts, canonical_caption, write_caption
from minigpt5.storybook.scenes import draw_scene, scene_at
from training.data.batches import Batch, Rows, StorybookRows
from training.data.replay_buffer import is_replay
from training.presets import Preset
from training.storybook.sheets import save_sheet
from training.weight_sources import WeightSources, prepare_unet

NUM_WHITENED = 1_024
"""Captions whose voken states say how they spread."""


class StageObjective(nn.Module):
    """The Objective as the loop calls it."""

    def __init__(self, objective: Objective, preset: Preset) -> None:
        super().__init__()
        self.model, self.preset = objective, preset
        objective.calls_alike = preset.zero_stage == 3

    def outer_parameters(self) -> list[nn.Parameter]:
        return self.model.outer_parameters()

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        preset = self.preset
        rows: list[Row] = batch["row"]  # type: ignore[assignment]
        if progress < preset.words_until:
            return self.model.words(rows)
        weights = LossWeights(
            text=preset.text_weight,
            picture=preset.picture_weight if progress >= preset.picture_from else 0.0,
            caption=preset.caption_weight,
            contrast=preset.contrast_weight,
        )
        if self.training and is_replay(batch, preset, self.model.num_replayable):
            return self.model.replay(preset.replay_batch_size, weights)
        return self.model(rows, weights)


def halve_frozen(module: nn.Module) -> None:
    """Keep a part's frozen matrices in bfloat16, which is what autocast makes of them at every use: half the memory,
    and the same numbers. For parts that are read and never saved; an adapter, which is, stays as it is."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and parameter.dim() > 1 and "lora_" not in name:
            parameter.data = parameter.data.bfloat16()


class ModelStage:
    def __init__(self, preset: Preset, sources: WeightSources, rows: Rows | None = None) -> None:
        torch.manual_seed(preset.seed)
        self.preset = preset
        previous = sources.model(preset.stage)
        self.config = model_folder.load_config(previous) if previous else storybook()
        self.rows = rows or StorybookRows(preset)
        base = resolve(self.config.language_model)
        self.language = LanguageModel.from_base(base, self.config)
        self.vision = model_folder.load_vision(None, self.config)
        self.mapper = Mapper(self.config)
        if previous:
            self._load(previous)
        self._adapt(previous)
        self._freeze()
        if preset.bf16:
            halve_frozen(self.language.body)
            halve_frozen(self.vision.encoder)
        if preset.checkpoint_activations:
            self.language.checkpoint_activations()
        text_encoder = load_text_encoder(resolve(self.config.text_encoder), self.config)
        vae_of, unet_of = (sources.find(part) or resolve(self.config.diffusion) for part in ("vae", "unet"))
        vae, unet = load_vae(vae_of), load_unet(unet_of)
        has_schedule = (unet_of / "scheduler").is_dir()
        schedule = load_scheduler(unet_of) if has_schedule else new_storybook_scheduler()
        self.diffusion = Diffusion(vae, unet, schedule, load_distilled(unet_of))
        self.config = model_folder.draws_with(self.config, self.diffusion)
        prepare_unet(unet, preset)
        objective = Objective(
            self.config,
            load_tokenizer(base, self.config),
            self.language,
            self.vision,
            self.mapper,
            self.diffusion,
            text_encoder,
            first_timestep=preset.first_timestep,
            samples_latents=bool(preset.samples_latents),
        )
        if preset.standardises:
            objective.standardise_captions(
                [canonical_caption(Facts.of(scene_at(i, seed=0))) for i in range(512)],
                start_there=preset.stage == "align" and not sources.start,
            )
        if preset.stage != "vision" and preset.whitens:
            objective.whiten_vokens(*self._some_vokens(objective), noise=preset.voken_noise)
        self.objective = StageObjective(objective, preset)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.mapper.queries.device.type, dtype=torch.bfloat16, enabled=bool(self.preset.bf16))

    @torch.no_grad()
    def _some_vokens(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """Voken states of some captions, and the text encoder's states of what they say."""
        rng = np.random.default_rng(0)
        facts = [Facts.of(scene_at(i, seed=0)) for i in range(NUM_WHITENED)]
        encoded = [objective.encode(caption_segments(write_caption(fact, rng))[:1])[0] for fact in facts]
        states, targets = [], []
        for start in range(0, len(facts), 32):
            batch = slice(start, start + 32)
            with self._autocast():
                found = self.language.voken_states(*pad(encoded[batch], objective.tokenizer.eos_token_id))
            states.append(found.float())
            targets.append(objective.text_encoder([canonical_caption(fact) for fact in facts[batch]]))
        return torch.cat(states), torch.cat(targets)

    def _load(self, folder: Path) -> None:
        model_folder.load_voken_embeddings(folder, self.language)
        model_folder.load_qformer(folder, self.vision)
        self.mapper = model_folder.load_mapper(folder, self.config)

    def _adapt(self, previous: Path | None) -> None:
        """The adapter of the folder that is gone on from, trained in "learn" only, where a missing one is made."""
        is_trained = self.preset.stage == "learn" and self.preset.learning_rate > 0
        if previous and (previous / "adapter").is_dir():
            self.language.load_adapter(previous / "adapter", is_trained=is_trained)
        elif is_trained:
            self.language.add_adapter(self.config.lora)

    def _freeze(self) -> None:
        stage = self.preset.stage
        self.vision.qformer.requires_grad_(stage == "vision")
        self.language.voken_embeddings.requires_grad_(stage != "vision" and self.preset.voken_learning_rate > 0)
        self.mapper.requires_grad_(stage != "vision" and self.preset.mapper_learning_rate > 0)
        if not self.preset.trains_queries:
            self.mapper.fc.requires_grad_(False)
            self.mapper.queries.requires_grad_(False)

    def parameter_groups(self) -> list[dict[str, object]]:
        preset = self.preset
        if preset.stage == "vision":
            return [{"params": list(self.vision.qformer.parameters()), "lr": preset.learning_rate}]
        rows, mapper, adapter = (
            [parameter for parameter in module.parameters() if parameter.requires_grad]
            for module in (self.language.voken_embeddings, self.mapper, self.language.body)
        )
        groups: list[dict[str, object]] = [
            {"params": rows, "lr": preset.voken_learning_rate, "weight_decay": 0.0},
            {"params": mapper, "lr": preset.mapper_learning_rate},
            {"params": adapter, "lr": preset.learning_rate},
        ]
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def draw_sheet(self, path: Path) -> None:
        """Held-out captions: the asked scenes, what the base draws from them, what the vokens draw from them."""
        scenes = [scene_at(i, seed=0, split="validation", held_out_pairs=True) for i in range(8)]
        rng = np.random.default_rng(0)
        facts = [Facts.of(scene) for scene in scenes]
        captions = [write_caption(fact, rng) for fact in facts]
        model = self.objective.model
        mapper = model.settle()
        encoded = [model.encode(caption_segments(caption)[:1])[0] for caption in captions]
        ids_BS, mask_BS = (one.to(model.device) for one in pad(encoded, model.tokenizer.eos_token_id))
        with self._autocast():
            states_BVH = self.language.voken_states(ids_BS, mask_BS)
        conditions = {
            "base": model.text_encoder([canonical_caption(fact) for fact in facts]),
            "vokens": mapper(states_BVH.float()),
        }
        rows = [to_tensor(np.stack([draw_scene(scene) for scene in scenes]))]
        for condition_BQD in conditions.values():
            rows.append(
                denoise(
                    self.diffusion,
                    condition_BQD,
                    mapper.null_condition(),
                    seeds=list(range(8)),
                    draw=self.config.default_draw,
                    guidance_rescale=self.config.guidance_rescale,
                )
            )
        save_sheet(path, rows)

    def save(self, folder: Path) -> None:
        """Write the model folder: after "learn" it is the finished model."""
        model_folder.save(
            folder,
            self.config,
            language=self.language,
            mapper=self.objective.model.settle(),
            vision=self.vision,
            diffusion=self.diffusion,
        )
