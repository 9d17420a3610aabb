"""What the stages "vision", "align", "learn" and "refine" share: a model folder's weights behind the Objective.

The model is that of the folder that the stage starts from, else the storybook's. A learning rate of 0 freezes the part
that it belongs to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    load_noise_schedule,
    load_unet,
    load_vae,
    new_storybook_noise_schedule,
)
from minigpt5.model.language import LanguageModel, load_tokenizer, pad
from minigpt5.model.mapper import Mapper
from minigpt5.model.pixels import to_tensor
from minigpt5.model.prompt import text_segment
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.objective.losses import Objective
from minigpt5.storybook.captions import Facts, canonical_caption, write_caption
from minigpt5.storybook.scenes import draw_scene, scene_at
from training.presets import VisionPreset, VokenPreset
from training.storybook.sheets import save_sheet
from training.weight_sources import WeightSources, prepare_unet


def halve_frozen(module: nn.Module) -> None:
    """Keep a part's frozen matrices in bfloat16, which is what autocast makes of them at every use: half the memory,
    and the same numbers. For parts that are read and never saved; an adapter, which is, stays as it is."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and parameter.dim() > 1 and "lora_" not in name:
            parameter.data = parameter.data.bfloat16()


class ModelStage:
    """A stage that trains parts of a model folder; subclasses say which."""

    objective: nn.Module

    def __init__(
        self,
        preset: VisionPreset | VokenPreset,
        sources: WeightSources,
        *,
        trains_adapter: bool = False,
        first_timestep: int = 0,
        samples_latents: bool = False,
    ) -> None:
        torch.manual_seed(preset.seed)
        self.bf16 = preset.bf16
        previous = sources.model(preset.stage)
        self.config = model_folder.load_config(previous) if previous else storybook()
        base = resolve(self.config.language_model)
        self.language = LanguageModel.from_base(base, self.config)
        self.vision = model_folder.load_vision(None, self.config)
        self.mapper = Mapper(self.config)
        if previous:
            model_folder.load_voken_embeddings(previous, self.language)
            model_folder.load_qformer(previous, self.vision)
            self.mapper = model_folder.load_mapper(previous, self.config)
        if previous and (previous / "adapter").is_dir():
            self.language.load_adapter(previous / "adapter", is_trained=trains_adapter)
        elif trains_adapter:
            self.language.add_adapter(self.config.lora)
        self.freeze()
        if preset.bf16:
            halve_frozen(self.language.body)
            halve_frozen(self.vision.encoder)
        if preset.checkpoint_activations:
            self.language.checkpoint_activations()
        text_encoder = load_text_encoder(resolve(self.config.text_encoder), self.config)
        vae_of, unet_of = (sources.find(part) or resolve(self.config.diffusion) for part in ("vae", "unet"))
        vae, unet = load_vae(vae_of), load_unet(unet_of)
        has_schedule = (unet_of / "scheduler").is_dir()
        noise_schedule = load_noise_schedule(unet_of) if has_schedule else new_storybook_noise_schedule()
        self.diffusion = Diffusion(vae, unet, noise_schedule, load_distilled(unet_of))
        self.config = model_folder.draws_with(self.config, self.diffusion)
        prepare_unet(unet, preset)
        self.model = Objective(
            self.config,
            load_tokenizer(base, self.config),
            self.language,
            self.vision,
            self.mapper,
            self.diffusion,
            text_encoder,
            first_timestep=first_timestep,
            samples_latents=samples_latents,
        )
        self.model.calls_alike = preset.optimizer.zero_stage == 3

    def freeze(self) -> None:
        """Set requires_grad of what the stage trains, and of nothing else."""
        raise NotImplementedError

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.mapper.queries.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def draw_sheet(self, path: Path) -> None:
        """Held-out captions: the asked scenes, what the base draws from them, what the vokens draw from them."""
        scenes = [scene_at(i, seed=0, split="validation", held_out_pairs=True) for i in range(8)]
        rng = np.random.default_rng(0)
        facts = [Facts.of(scene) for scene in scenes]
        captions = [write_caption(fact, rng) for fact in facts]
        model = self.model
        mapper = model.settle()
        encoded = [model.encode([text_segment(caption)])[0] for caption in captions]
        ids_BS, mask_BS = (one.to(model.device) for one in pad(encoded, model.tokenizer.eos_token_id))
        with self.autocast():
            states_BVH = self.language.voken_states(ids_BS, mask_BS)
        conditions = {
            "base": model.text_encoder([canonical_caption(fact) for fact in facts]),
            "vokens": mapper(states_BVH.float()),
        }
        rows: list[Tensor] = [to_tensor(np.stack([draw_scene(scene) for scene in scenes]))]
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
            mapper=self.model.settle(),
            vision=self.vision,
            diffusion=self.diffusion,
        )


def trained(module: nn.Module) -> list[Any]:
    """The parameters of a part that have a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
