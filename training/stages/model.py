"""What the stages of a model folder share: its weights behind the Objective, and its decoder.

A learning rate of 0 freezes the part that it belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt5.config import ModelConfig
from minigpt5.engine.denoising import denoise
from minigpt5.errors import TrainingError
from minigpt5.model import folder as model_folder
from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.decoders.load import INDEX, find_family
from minigpt5.model.decoders.stable_diffusion import StableDiffusion
from minigpt5.model.decoders.upscaling import encode_alike
from minigpt5.model.folder_config import DECODER, load_config
from minigpt5.model.language import load_tokenizer
from minigpt5.model.locate import contains, find_part
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.model.vision import NoEncoder
from minigpt5.objective.dummy_examples import DummyExamples
from minigpt5.objective.encoders import fields_read
from minigpt5.objective.example import Example
from minigpt5.objective.objective import Objective
from minigpt5.types import DISTILLED_FOLDER, UPSCALING_FOLDER
from training.data.batches import StageData
from training.presets import VisionPreset, VokenPreset
from training.samples import save_sheet
from training.weight_sources import WeightSources, prepare_unet

NUM_SHEET_PICTURES = 8
NUM_SHEET_EXAMPLES = 64
"""Examples that are looked through for pictures to draw."""


def halve_frozen(module: nn.Module) -> None:
    """Keep a part's frozen matrices in bfloat16, which is what autocast makes of them at every use: half the memory,
    and the same numbers. Matrices that are stored so stay in their mapped files. All else is float32. For parts that
    are read and never saved; an adapter, which is, stays as it is."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16 if parameter.dim() > 1 else torch.float32)


class ModelStage(ABC):
    """A stage that trains parts of a model folder; subclasses say which."""

    objective: nn.Module

    def __init__(
        self,
        preset: VisionPreset | VokenPreset,
        sources: WeightSources,
        data: StageData,
        *,
        trains_adapter: bool = False,
        trains_body: bool = False,
        prefix_tokens: int = 0,
        first_timestep: int = 0,
        samples_latents: bool = False,
        keeps_replay: bool = False,
        guidance_dropout: float = 0.1,
    ) -> None:
        """Load the model folder that the stage starts from. `trains_body`: all weights of the language model, into
        which an adapter of the folder goes. `prefix_tokens`: of a prefix that is trained, where the folder has none.
        Raises TrainingError where there is no folder, or its body cannot be trained."""
        torch.manual_seed(preset.seed)
        self.bf16, self.data = preset.bf16, data
        self.start = start = sources.need_model(preset.stage)
        self.config = load_config(start)
        if trains_body and self.config.vision.family == "own":
            raise TrainingError(
                f"tunes is body, but the language model of {start} also reads pictures, and would be saved without its "
                "vision tower: set tunes=adapter or tunes=prefix"
            )
        self.language, self.vision = model_folder.load_language_and_vision(
            start,
            self.config,
            adapter="trained" if trains_adapter else "merged" if trains_body else "frozen",
            has_encoder="features" in fields_read(preset.stage, reads_pictures=self.config.vision.family != "none"),
            keeps_dtype=preset.halves_frozen and not trains_body,  # steps are smaller than bfloat16 tells apart
        )
        if trains_adapter and not (start / "adapter").is_dir():
            self.language.add_adapter(self.config.lora)
        if prefix_tokens:
            self._train_prefix(prefix_tokens)
        if preset.checkpoint_activations and self.language.prefix:
            raise TrainingError(
                "transformers keeps no prefix while activations are recomputed: set checkpoint_activations=false"
            )
        self.mapper = model_folder.load_mapper(start, self.config)
        self._decoder = find_decoder(start, self.config, sources)
        self.diffusion = self._decoder.load(keeps_dtype=preset.halves_frozen)
        self.config = model_folder.draws_with(self.config, self.diffusion)
        text_encoder = load_text_encoder(find_part(start, self.config, self.config.text_encoder), self.config)
        self.freeze()
        if preset.checkpoint_activations:
            self.language.checkpoint_activations()
        prepare_unet(self.diffusion.denoiser, preset)
        self.model = Objective(
            self.config,
            load_tokenizer(find_part(start, self.config, self.config.language_model), self.config),
            self.language,
            self.vision,
            self.mapper,
            self.diffusion,
            text_encoder,
            first_timestep=first_timestep,
            samples_latents=samples_latents,
            keeps_replay=keeps_replay,
            guidance_dropout=guidance_dropout,
        )
        if preset.halves_frozen:
            for part in (self.language.body, self.language.head, self.vision.encoder, self.diffusion, text_encoder):
                halve_frozen(part)
        if preset.optimizer.zero_stage == 3:
            seen = [data.training.example_at(position)[1] for position in range(NUM_SHEET_EXAMPLES)]
            read = (picture for example in seen for picture in example.read)
            drawn = (picture for example in seen for picture in example.drawn)
            self.model.dummies = DummyExamples(
                self.config,
                reads_pictures=not isinstance(self.vision.encoder, NoEncoder),
                read=next(read, None),
                drawn=next(drawn, None),
            )

    def _train_prefix(self, num_tokens: int) -> None:
        """Train the folder's prefix, or a fresh one. Raises TrainingError where the folder's has another length."""
        prefix = self.language.prefix
        if not prefix:
            self.language.add_prefix(num_tokens, context_tokens=self.config.context_tokens)
        elif (found := prefix.num_tokens) != num_tokens:
            raise TrainingError(
                f"{self.start} has a prefix of {found} tokens, not of {num_tokens}: set prefix_tokens={found}"
            )
        else:
            prefix.requires_grad_(True)

    @abstractmethod
    def freeze(self) -> None:
        """Set requires_grad of what the stage trains, and of nothing else."""

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def draw_sheet(self, path: Path) -> None:
        """Held-out examples: their pictures, what the text encoder's condition draws, what the vokens draw."""
        examples = [example for example in self.sample_examples() if example.drawn][:NUM_SHEET_PICTURES]
        if not examples:
            return
        model, mapper = self.model, self.model.settle()
        with self.autocast():
            drawn = [model.to_latents([example])[:1].float() for example in examples]
            true_BCYX = self.diffusion.to_pixels(torch.cat(drawn)).float()
            vokens = [model.read([example])[0][:1].float() for example in examples]
            conditions = {
                "text": model.text_encoder([example.captions[0] for example in examples]),
                "vokens": mapper(torch.cat(vokens)),
            }
            nulls = {"text": model.text_encoder([""]), "vokens": mapper.null_condition()}
            rows = [true_BCYX]
            for name, condition_BQD in conditions.items():
                rows.append(
                    denoise(
                        self.diffusion,
                        condition_BQD.float(),
                        nulls[name].float(),
                        seeds=list(range(len(examples))),
                        draw=self.config.default_draw,
                        guidance_rescale=self.config.guidance_rescale,
                    )
                )
        save_sheet(path, rows)

    def write_sample(self) -> bytes | None:
        return None

    def saved_parameters(self) -> list[nn.Parameter]:
        adapter = [one for name, one in self.language.body.named_parameters() if "lora_" in name]
        parts = [self.language.voken_embeddings, self.mapper, self.vision.qformer]
        parts += [self.language.prefix] if self.language.prefix else []
        return [*adapter, *(one for part in parts for one in part.parameters())]

    def sample_examples(self) -> list[Example]:
        """The first held-out examples, or the first ones of the run where none are held out."""
        return [self.data.samples.example_at(position)[1] for position in range(NUM_SHEET_EXAMPLES)]

    def save(self, folder: Path) -> None:
        """Write the model folder: after "learn" it is the finished model."""
        model_folder.save(
            folder,
            self.config,
            language=self.language,
            mapper=self.model.settle(),
            vision=self.vision,
            start=self.start,
            decoder=self._decoder.parts if self._decoder.is_own else None,
        )


@dataclass(frozen=True, kw_only=True)
class FoundDecoder:
    """Where the latent diffusion model of a stage comes from."""

    family: type[Diffusion]
    parts: dict[str, Path]
    """The folder of each part and file."""
    is_own: bool
    """Whether any comes from elsewhere than the folder that the config names."""

    def load(self, *, keeps_dtype: bool = False) -> Diffusion:
        """Read it, with its distilled denoiser where there is one. `keeps_dtype`: see `stored_dtype`."""
        return self.family.from_folders(
            vae=self.parts["vae"],
            denoiser=self.parts[self.family.DENOISER],
            distilled=self.parts.get(DISTILLED_FOLDER),
            keeps_dtype=keeps_dtype,
        )


def find_decoder(start: Path, config: ModelConfig, sources: WeightSources) -> FoundDecoder:
    """The decoder that `config` names, with parts from `sources.decoder`, or from stages of the shipped model's own.

    Raises TrainingError where a denoiser comes without its noise schedule, is of another family than the start's, or
    is nowhere, and BaseModelNotFound.
    """
    is_trained_here = config.diffusion == DECODER and not sources.start
    has_none = is_trained_here and not contains(start, config.diffusion)  # the first stages wrote it elsewhere
    base = None if has_none else find_part(start, config, config.diffusion)
    family = find_family(base) if base else StableDiffusion
    if sources.decoder and (sources.decoder / INDEX).is_file() and find_family(sources.decoder) is not family:
        raise TrainingError(
            f"{sources.decoder} is a {find_family(sources.decoder).__name__} but {start} was made for a "
            f"{family.__name__}: make a folder for it with python -m minigpt5.new --diffusion {sources.decoder}"
        )
    found: dict[str, Path] = {}
    is_own = False
    for part in ("vae", family.DENOISER):
        folder = sources.find(part) if is_trained_here else None
        if sources.decoder and (sources.decoder / part).is_dir():
            folder = sources.decoder
        is_own = is_own or folder is not None
        found[part] = folder or base or sources.need(part, stage="")
    place = found["scheduler"] = found[family.DENOISER]
    if not (place / "scheduler").is_dir():
        raise TrainingError(
            f"{place} has a {family.DENOISER} and no scheduler/: add it, the noise schedule is not known"
        )
    is_upscaled_alike = base is not None and _encode_alike(found["vae"], base)
    is_starts = {DISTILLED_FOLDER: place == base, UPSCALING_FOLDER: is_upscaled_alike}
    for name, part in ((DISTILLED_FOLDER, family.DENOISER), (UPSCALING_FOLDER, "vae")):
        if addition := model_folder.find_addition(name, found[part], start if is_starts[name] else None):
            found[name] = addition
    if base and (base / INDEX).is_file():  # it names the family
        found[INDEX] = base
    return FoundDecoder(family=family, parts=found, is_own=is_own)


def _encode_alike(folder: Path, base: Path) -> bool:
    """Whether the VAE of a folder reads pictures as the start's does: a stage may have trained its decoder alone."""
    return folder == base or encode_alike(folder / "vae", base / "vae")


def trained(module: nn.Module) -> list[Any]:
    """The parameters of a part that have a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
